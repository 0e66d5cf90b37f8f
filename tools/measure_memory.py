#!/usr/bin/env python
"""Find out whether a training or prediction needs more and more memory. See --help."""

from randwire_d2.cli.measure_memory import main

if __name__ == "__main__":
    main()
