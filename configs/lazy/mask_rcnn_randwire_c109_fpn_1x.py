"""coco/mask_rcnn_randwire_c109_fpn_1x.yaml as a LazyConfig."""

from detectron2 import model_zoo

from .common import dataloader, lr_multiplier, on_randwire, optimizer, train

model = on_randwire(model_zoo.get_config("common/models/mask_rcnn_fpn.py").model)
train.output_dir = "./output/lazy/mask_rcnn_randwire_c109_fpn_1x"
