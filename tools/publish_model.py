#!/usr/bin/env python
"""A trained model as a folder with a card: see --help."""

from randwire_d2.inference.publish import main

if __name__ == "__main__":
    main()
