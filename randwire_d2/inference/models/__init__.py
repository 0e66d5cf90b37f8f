"""Trained models out of the files that hold them: Detector and Classifier, to be called on images.

Nothing here finds inputs, or writes results.
"""
