"""Detectors' images: what can be used, what is in them; registered in Detectron2, and augmented.

Nothing here reads a file of labels.
"""
