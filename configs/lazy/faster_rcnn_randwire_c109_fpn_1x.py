"""faster_rcnn_randwire_c109_fpn_1x.yaml, the recipe of Table 5, as a LazyConfig."""

from detectron2 import model_zoo

from .common import dataloader, lr_multiplier, on_randwire, optimizer, train

model = on_randwire(model_zoo.get_config("common/models/mask_rcnn_fpn.py").model)
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[key]
model.proposal_generator.smooth_l1_beta = 0.1111
model.proposal_generator.anchor_boundary_thresh = 0
model.roi_heads.box_pooler.pooler_type = "ROIAlign"
model.roi_heads.box_pooler.sampling_ratio = 2
model.roi_heads.box_predictor.smooth_l1_beta = 1.0

dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
optimizer.params.base_lr = "${..lr}"
optimizer.params.bias_lr_factor = 2.0
optimizer.params.weight_decay_bias = 0.0
lr_multiplier.warmup_length = 500 / train.max_iter
lr_multiplier.warmup_factor = 0.3333
train.output_dir = "./output/lazy/faster_rcnn_randwire_c109_fpn_1x"
