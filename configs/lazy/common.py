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
# What tools/lazyconfig_train_net.py adds to Detectron2's ``train``, with these values where a
# config says nothing. A data set by its path (--data), its validation split's path if that is
# another (--data-val), and the share of the training images that is held back where there is none:
train.data, train.data_val, train.hold_back = "", "", 0.0
# A loss that is no number ends a training, but for so many steps in a row:
train.skip_nonfinite = 0
# With several processes, the seconds after which an iteration that waits for images hangs (none
# does if it is 0):
train.hang_timeout = 600
# What model_best.pth is best in, by its name in metrics.json; if not 0, so many evaluations that do
# not improve it end the training:
train.best_metric = "bbox/AP"
train.patience = 0
# If not 0, evaluations test an average of the weights, which keeps this part of itself (0.999, say)
# in each iteration:
train.ema = {"decay": 0.0}
# Whether an evaluation also writes the losses of the test images:
train.eval_loss = False
# Whether norms are tested with the means and variances of so many batches of training images:
train.precise_bn = {"enabled": False, "num_iter": 200}
# If not 0, one fused stage is run node by node as well every so many iterations, and compared:
train.shadow_period = 0
# What images, augmentation and the network draw is a function of it; -1 for a drawn one:
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
