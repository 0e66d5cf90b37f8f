#!/usr/bin/env python
"""Show what a detector gets right and wrong. See --help."""

from randwire_d2.cli.analyze_results import main

if __name__ == "__main__":
    main()
