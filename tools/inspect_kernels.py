#!/usr/bin/env python
"""Show what a compiler makes of the Triton kernels. See --help."""

from randwire_d2.cli.inspect_kernels import main

if __name__ == "__main__":
    main()
