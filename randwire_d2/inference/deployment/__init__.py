"""Trained models in other runtimes: as files, in float or in int8, that are proved before they get
their names; and the runtime that predicts fastest. The graphs and formats are those of ``export``.

Nothing here writes results.
"""
