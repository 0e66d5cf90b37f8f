"""Classifiers' images, in one folder per class or in tar shards: registered, and listed once.

Nothing here knows of boxes.
"""
