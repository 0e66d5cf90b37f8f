"""coco/cascade_mask_rcnn_randwire_c109_fpn_1x.yaml as a LazyConfig.

Its stages are initialised in another order than from YAML, so a seed gives other weights.
"""

from detectron2 import model_zoo

from .common import dataloader, lr_multiplier, on_randwire, optimizer, train

model = on_randwire(model_zoo.get_config("common/models/cascade_rcnn.py").model)
model.proposal_generator.post_nms_topk = (2000, 1000)
train.output_dir = "./output/lazy/cascade_mask_rcnn_randwire_c109_fpn_1x"
