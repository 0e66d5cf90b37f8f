#!/usr/bin/env python
"""Pretrain, convert and fine-tune on data that is made here. See --help."""

from randwire_d2.cli.demo import main

if __name__ == "__main__":
    main()
