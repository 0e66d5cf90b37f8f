"""What the configs here share: the backbone, COCO, the 1x schedule. Their models are Detectron2's.

LazyConfig files are Python by nature: whoever loads one runs it.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from randwire_d2 import NetworkGenerator, RandWire
from randwire_d2.data import PatientMapper

constants = model_zoo.get_config("common/data/constants.py").constants
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

dataloader.train.mapper.image_format = "RGB"
for split in ("train", "test"):
    dataloader[split].mapper["_target_"] = PatientMapper  # waits for a disk that is away
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
train.init_checkpoint = "output/imagenet/randwire_c109_100ep/backbone.pth"
# The keys that tools/lazyconfig_train_net.py adds to Detectron2's ``train``, with their defaults.
# A data set by its path (--data), the path of its validation split if that is another (--data-val),
# and the share of the training images that is held back if there is no such split:
train.data, train.data_val, train.hold_back = "", "", 0.0
# A loss that is NaN or infinite ends a training. So many such steps in a row are skipped first:
train.skip_nonfinite = 0
# With several processes, the seconds for which an iteration may wait for images or compile; 0 sets
# no limit:
train.hang_timeout = 600
# The metric of model_best.pth, by its name in metrics.json; and, if not 0, the number of
# evaluations without improvement that ends the training:
train.best_metric = "bbox/AP"
train.patience = 0
# If not 0, evaluations test an average of the weights, which keeps this part of itself (0.999, say)
# in each iteration:
train.ema = {"decay": 0.0}
# Whether an evaluation also writes the losses of the test images:
train.eval_loss = False
# Whether evaluations give norms the means and variances of num_iter batches of training images:
train.precise_bn = {"enabled": False, "num_iter": 200}
# What train.amp.enabled=True computes in, float16 or bfloat16:
train.amp.precision = "float16"
# If not 0, one fused stage is also run node by node every so many iterations, and compared:
train.shadow_period = 0
# The seed of all that images, augmentation and the network draw; -1 draws a seed:
train.seed = -1


def on_randwire(model: DictConfig) -> DictConfig:
    """A model of Detectron2's, with RandWire for its ResNet, and the images of its pretraining."""
    model.backbone.bottom_up = L(RandWire)(
        # NetworkGenerator(…)(seed=1): the generator is called, and what it returns is the spec.
        spec=L(
            L(NetworkGenerator)(
                regime="regular",
                channels=109,
                num_nodes=32,
                graph="WS",
                graph_params={"k": 4, "p": 0.75},
                node_op="sep_conv3x3",
            )
        )(seed=1),
        out_features=model.backbone.bottom_up.out_features,
        norm="FrozenBN",
        freeze_at=2,
    )
    model.pixel_mean = constants.imagenet_rgb256_mean
    model.pixel_std = constants.imagenet_rgb256_std
    model.input_format = "RGB"
    return model
