"""A prediction of many images and videos: its work, what it leaves, how another one goes on.

Nothing here loads a model, or chooses what computes it.
"""
