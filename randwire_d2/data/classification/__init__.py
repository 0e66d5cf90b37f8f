"""Data sets of classifiers, with one folder per class or as tar shards: registering and listing.

Nothing here depends on boxes.
"""
