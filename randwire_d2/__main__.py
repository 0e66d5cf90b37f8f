"""``python -m randwire_d2``: the command ``randwire-d2``."""

from .command import main

if __name__ == "__main__":
    main()
