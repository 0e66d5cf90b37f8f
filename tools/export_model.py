#!/usr/bin/env python
"""Write a trained model for ONNX Runtime, libtorch, torch.export. See --help."""

from randwire_d2.cli.export import main

if __name__ == "__main__":
    main()
