"""Detectors' data sets: inspecting, summarising, registering and augmenting labelled images.

Nothing here reads label files.
"""
