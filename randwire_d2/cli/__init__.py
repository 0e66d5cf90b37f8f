"""The command lines: each subcommand of ``randwire-d2`` calls the ``main`` of a module here.

tools/ has a script for each module. ``randwire_d2.command`` lists them.
"""
