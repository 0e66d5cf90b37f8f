"""Files of weights, of ``torch.save``, safetensors and pickle, which are read without running code.

Nothing here knows what the entries beside the weights mean.
"""
