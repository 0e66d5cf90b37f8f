#!/usr/bin/env python
"""Run a sweep: Figures 3 and 6, Tables 2 to 5. See --help."""

from randwire_d2.cli.compare_generators import main

if __name__ == "__main__":
    main()
