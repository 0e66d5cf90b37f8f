#!/usr/bin/env python
"""Train or evaluate a detector. See --help."""

from randwire_d2.cli.train import main

if __name__ == "__main__":
    main()
