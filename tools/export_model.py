#!/usr/bin/env python
"""Export a trained model for ONNX Runtime, libtorch or torch.export. See --help."""

from randwire_d2.inference.export import main

if __name__ == "__main__":
    main()
