#!/usr/bin/env python
"""Count parameters and multiply-adds; Tables 1 to 4. See --help."""

from randwire_d2.cli.analyze_model import main

if __name__ == "__main__":
    main()
