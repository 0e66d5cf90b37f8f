#!/usr/bin/env python
"""Look at the data of a detector before it is trained. See --help."""

from randwire_d2.cli.browse_data import main

if __name__ == "__main__":
    main()
