#!/usr/bin/env python
"""Draw networks and random graphs. See --help."""

from randwire_d2.cli.draw_wiring import main

if __name__ == "__main__":
    main()
