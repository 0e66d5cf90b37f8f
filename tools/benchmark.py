#!/usr/bin/env python
"""Compare what RandWire and ResNets cost: memory and time. See --help."""

from randwire_d2.cli.benchmark import main

if __name__ == "__main__":
    main()
