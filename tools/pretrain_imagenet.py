#!/usr/bin/env python
"""Train or evaluate a classifier. See --help."""

from randwire_d2.cli.pretrain import main

if __name__ == "__main__":
    main()
