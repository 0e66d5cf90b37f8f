#!/usr/bin/env python
"""Write a classifier's images as tar shards in webdataset's layout. See --help."""

from randwire_d2.cli.make_shards import main

if __name__ == "__main__":
    main()
