"""Detectron2's own detectors, with nothing but the backbone's name changed, train on real data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from randwire_d2 import RandWire, add_randwire_config
from randwire_d2.data.builtin import register_shapes
from randwire_d2.data.shapes import CLASSES, ShapesConfig

FPN = "build_randwire_fpn_backbone"
RETINANET = "build_randwire_retinanet_fpn_backbone"


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a few images of the built-in data set."""
    folder: Path = tmp_path_factory.mktemp("datasets")
    register_shapes(str(folder), ShapesConfig(num_train=4, num_val=1), prefix="detectors_shapes")
    return "detectors_shapes_train"


def small(cfg: CfgNode, dataset: str) -> CfgNode:
    """The same detector, small enough for a CPU; whatever the backbone's name builds."""
    options: list[Any] = [
        *("MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10),
        *("MODEL.RANDWIRE.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0),
        *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), "MODEL.RETINANET.NUM_CLASSES", len(CLASSES)),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
        *("DATASETS.TRAIN", (dataset,), "DATALOADER.NUM_WORKERS", 0, "SEED", 1),
        *("INPUT.MIN_SIZE_TRAIN", (96,), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.01),
    ]
    cfg.merge_from_list(options)
    return cfg


@pytest.mark.parametrize(
    "config, backbone, losses",
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN, {"loss_rpn_cls", "loss_box_reg"}),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", FPN, {"loss_mask"}),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", RETINANET, {"loss_cls", "loss_box_reg"}),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", FPN, {"loss_mask", "loss_box_reg_stage2"}),
    ],
    ids=["faster", "mask", "retinanet", "cascade"],
)
def test_swapping_the_backbones_name_trains(
    config: str, backbone: str, losses: set[str], shapes: str
) -> None:
    """Else Detectron2's own configs need more than another MODEL.BACKBONE.NAME, or a part of the
    network gets no gradient."""
    torch.manual_seed(0)
    cfg = model_zoo.get_config(config)
    add_randwire_config(cfg)
    cfg.MODEL.BACKBONE.NAME = backbone
    model = build_model(small(cfg, shapes)).train()
    assert isinstance(model.backbone.bottom_up, RandWire)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    batch = next(iter(build_detection_train_loader(cfg)))
    assert sum(len(image["instances"]) for image in batch) > 0
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        loss_dict = model(batch)
    assert losses <= set(loss_dict)
    loss = sum(loss_dict.values())
    assert torch.isfinite(loss), loss_dict
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    for name, p in model.backbone.bottom_up.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # RetinaNet reads nothing but res3 … res5, yet res2 lies below them.
    for part in ("stem", "res2", "res3", "res4", "res5"):
        assert any(name.startswith(f"backbone.bottom_up.{part}.") for name in moved), part

    model.eval()
    with torch.no_grad():
        results = model(batch)
    assert len(results) == 2
    assert all("instances" in result for result in results)
