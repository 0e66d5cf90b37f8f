#!/usr/bin/env python
"""Measure what a training step costs the host, fused or not. See --help."""

from randwire_d2.cli.measure_host import main

if __name__ == "__main__":
    main()
