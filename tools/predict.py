#!/usr/bin/env python
"""Predict with a checkpoint: images, folders, videos or a data set. See --help."""

from randwire_d2.cli.predict import main

if __name__ == "__main__":
    main()
