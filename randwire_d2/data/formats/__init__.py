"""The labels of detectors' images in COCO's, YOLO's and Pascal VOC's files: found and read.

Nothing here knows what a training can use of them, or how a data set is registered.
"""
