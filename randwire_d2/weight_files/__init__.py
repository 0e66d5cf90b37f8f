"""Files of weights, of ``torch.save``, safetensors and pickle, which are read without running code.

The modules here do not interpret the entries beside the weights.
"""
