"""coco/retinanet_randwire_c109_fpn_1x.yaml as a LazyConfig."""

from detectron2 import model_zoo

from .common import dataloader, lr_multiplier, on_randwire, optimizer, train

model = on_randwire(model_zoo.get_config("common/models/retinanet.py").model)
model.backbone.top_block.in_channels = 872  # res5: 8 C

dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
train.output_dir = "./output/lazy/retinanet_randwire_c109_fpn_1x"
