"""Readers of detectors' labels in the formats of COCO, YOLO and Pascal VOC.

Nothing here checks which labels a training can use, or registers a data set.
"""
