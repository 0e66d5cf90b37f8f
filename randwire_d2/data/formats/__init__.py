"""Readers of detectors' labels in the formats of COCO, YOLO, Pascal VOC and LabelMe.

Nothing here checks which labels a training can use, or registers a data set.
"""
