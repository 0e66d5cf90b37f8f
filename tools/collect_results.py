#!/usr/bin/env python
"""Tables of runs, beside the paper's numbers. See --help."""

from randwire_d2.cli.collect_results import main

if __name__ == "__main__":
    main()
