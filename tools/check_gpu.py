#!/usr/bin/env python
"""Find out whether the GPU runs the fused operators. See --help."""

from randwire_d2.cli.check_gpu import main

if __name__ == "__main__":
    main()
