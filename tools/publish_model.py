#!/usr/bin/env python
"""Write a trained model into a folder with a card, for the Hugging Face Hub. See --help."""

from randwire_d2.cli.publish import main

if __name__ == "__main__":
    main()
