#!/usr/bin/env python
"""Make a detector's backbone of a checkpoint, proved. See --help."""

from randwire_d2.cli.convert import main

if __name__ == "__main__":
    main()
