"""Detectron2's own detectors, with nothing but the backbone's name changed, train on real data; and
what other projects do with a backbone."""

import copy
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch import nn

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


@BACKBONE_REGISTRY.register()
def build_dilated_randwire_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RandWire:
    """GUIDE.md's: res5 with a dilation in place of its stride."""
    backbone = RandWire(cfg, input_shape)
    for conv in backbone.res5.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
    return backbone


def segmentor(backbone: str) -> CfgNode:
    """DeepLab V3, whose head reads res5 alone, at stride 16; small."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    options: list[Any] = [
        *("MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.BACKBONE.NAME", backbone),
        *("MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3Head", "MODEL.SEM_SEG_HEAD.NORM", "BN"),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"], "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16),
        *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "cross_entropy", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4),
        *("MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 8, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8),
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", (64, 96)),
        *("MODEL.RANDWIRE.REGIME", "small", "MODEL.RANDWIRE.CHANNELS", 4),
        *("MODEL.RANDWIRE.NUM_NODES", 6, "MODEL.RANDWIRE.NORM", "BN"),
        *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
    ]
    cfg.merge_from_list(options)
    return cfg


def images() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(256, (3, 64, 96), generator=generator),
            "sem_seg": torch.randint(4, (64, 96), generator=generator),
        }
        for _ in range(2)
    ]


def step(cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    torch.manual_seed(0)  # dropout
    with EventStorage():
        loss = sum(model.train()(images()).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def scores(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([result["sem_seg"] for result in model.eval()(images())])


def test_deeplab_trains_on_a_dilated_res5() -> None:
    """Wrong: GUIDE.md's builder does not give DeepLab V3 the stride that its config has."""
    cfg = segmentor("build_dilated_randwire_backbone")
    model = build_model(cfg)
    assert model.backbone.output_shape()["res5"].stride == 16
    assert model.backbone.res5.nodes[-1].conv.depthwise.dilation == (2, 2)
    step(cfg, model, build_optimizer(cfg, model))
    assert all(p.grad.isfinite().all() for p in model.backbone.parameters())
    assert scores(model).shape == (2, 4, 64, 96)


def test_a_dilation_that_is_not_read_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: DeepLab V3+ and DC5 train at a stride of 32, while their config asks for 16, and
    nothing says so."""
    cfg = segmentor("build_randwire_backbone")
    with mock.patch.object(logging.getLogger("randwire_d2"), "propagate", True):
        build_model(cfg)
        assert not caplog.records
        cfg.MODEL.RESNETS.RES5_DILATION = 2
        build_model(cfg)
        (said,) = caplog.messages
        assert "RES5_DILATION is 2" in said
        cfg.MODEL.BACKBONE.NAME = "build_dilated_randwire_backbone"
        build_model(cfg)
        assert caplog.messages == [said]


def test_what_other_projects_do_with_a_backbone(tmp_path: Path) -> None:
    """Wrong: a project's trainer, which knows nothing of RandWires, can't save and resume it, copy
    it, group its parameters, exchange its norms, or load weights of the backbone alone."""
    cfg = segmentor("build_dilated_randwire_backbone")
    model = build_model(cfg)
    backbone = model.backbone
    # DETR's wrapper pairs features with strides by their order, and puts others in their place.
    features = backbone(torch.randn(1, 3, 64, 96))
    assert type(features) is dict and list(features) == list(backbone.output_shape())
    optimizer = build_optimizer(cfg, model)  # by name and by the type of the norms
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in backbone.named_parameters():
        expected = 0.0 if ".norm." in name else cfg.SOLVER.WEIGHT_DECAY
        assert decay[id(parameter)] == expected, name
    step(cfg, model, optimizer)

    DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model", iteration=0)
    resumed = build_model(cfg)
    rest = build_optimizer(cfg, resumed)
    DetectionCheckpointer(resumed, str(tmp_path), optimizer=rest).resume_or_load("", resume=True)
    assert step(cfg, resumed, rest) == step(cfg, model, optimizer)
    assert torch.equal(scores(resumed), scores(model))

    weights = {"model": backbone.state_dict(), "matching_heuristics": True}
    torch.save(weights, tmp_path / "backbone.pth")
    other = build_model(cfg)
    DetectionCheckpointer(other).load(str(tmp_path / "backbone.pth"))
    theirs = other.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in weights["model"].items())

    for change in (copy.deepcopy, nn.SyncBatchNorm.convert_sync_batchnorm):
        changed = change(copy.deepcopy(model))
        assert torch.equal(scores(changed), scores(model)), change
        step(cfg, changed, build_optimizer(cfg, changed))
