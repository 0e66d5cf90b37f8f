#!/usr/bin/env python
"""Measure everything about a GPU. See --help."""

from randwire_d2.cli.measure_gpu import main

if __name__ == "__main__":
    main()
