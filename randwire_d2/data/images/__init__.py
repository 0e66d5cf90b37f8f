"""Image files: checking and reading them, also from a disk that is unavailable for a while.

Nothing here depends on the data set of an image, or on the format of its labels.
"""
