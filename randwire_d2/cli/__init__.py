"""The command lines: a module for each subcommand of ``randwire-d2``, whose ``main`` is called.

tools/ has a script for each. ``randwire_d2.command`` lists them.
"""
