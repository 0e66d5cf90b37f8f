#!/usr/bin/env python
"""Train or evaluate a detector whose config is Python, a LazyConfig. See --help."""

from randwire_d2.cli.train_lazy import main

if __name__ == "__main__":
    main()
