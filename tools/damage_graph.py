#!/usr/bin/env python
"""Remove nodes and edges of trained networks; Figure 5. See --help."""

from randwire_d2.cli.damage_graph import main

if __name__ == "__main__":
    main()
