"""LazyConfigs: RandWire in one, the same detectors as from YAML, and the tool that trains them."""

import argparse
import json
import re
import signal
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from helpers import ROOT, Tool, assert_equal, raises_one_line, refusal, run_tool, wait_until
from label_formats import write_sound
from launching import TORCHRUN
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset, IterableDataset

from randwire_d2 import NetworkGenerator, NetworkSpec, RandWire
from randwire_d2.config import detector_config, merge_file
from randwire_d2.data.shapes import CLASSES
from randwire_d2.engine.launch import add_data_arguments
from randwire_d2.engine.lazy.config import load_lazy_config
from randwire_d2.engine.lazy.loader import (
    check_loss_images,
    lazy_loss_loader,
    lazy_train_loader,
)
from randwire_d2.engine.train_loader import TrainLoader, detection_train_loader
from randwire_d2.engine.validation import detection_loss_loader, detection_losses, mean_losses
from randwire_d2.runs import RunFolder

LAZY = ROOT / "configs" / "lazy"
CONFIGS = sorted(path.stem for path in LAZY.glob("*rand*.py"))
TOOL = "lazyconfig_train_net.py"
SPEC = "model.backbone.bottom_up.spec"
NUMBER = dict.fromkeys(CONFIGS, "model.roi_heads.num_classes") | {
    "retinanet_randwire_c109_fpn_1x": "model.num_classes"
}
FASTER = "faster_rcnn_randwire_c109_fpn_1x"
DATA = [
    f"{NUMBER[FASTER]}={len(CLASSES)}",
    "dataloader.train.dataset.names=randwire_shapes_train",
    "dataloader.test.dataset.names=randwire_shapes_val",
    # Else 14 million weights, which take most of the time of a checkpoint.
    "model.roi_heads.box_head.fc_dims=[32,32]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
]
SMALL = [
    f"{SPEC}._target_.channels=8", f"{SPEC}._target_.num_nodes=10",
    "model.backbone.bottom_up.norm=BN", "model.backbone.bottom_up.freeze_at=0",
    "train.init_checkpoint=''", "train.device=cpu", "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0", "dataloader.test.num_workers=0",
]  # fmt: skip
SMALL_YAML: list[Any] = [
    *("MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 10, "MODEL.RANDWIRE.NORM", "BN"),
    *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), "MODEL.RETINANET.NUM_CLASSES", len(CLASSES)),
    *("DATASETS.TRAIN", ("randwire_shapes_train",), "DATASETS.TEST", ("randwire_shapes_val",)),
    *("SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
]


def yaml_of(name: str) -> Path:
    """The config of a LazyConfig's name."""
    beside = ROOT / "configs" / f"{name}.yaml"
    return beside if beside.is_file() else ROOT / "configs" / "coco" / f"{name}.yaml"


def parse(name: str | Path, *args: str) -> argparse.Namespace:
    path = LAZY / f"{name}.py" if isinstance(name, str) else name
    parser = default_argument_parser()
    add_data_arguments(parser, "train.data", "train.data_val")
    return parser.parse_args(["--config-file", str(path), *args])


# -------------------------------------------------------------------------------------------------
# RandWire
# -------------------------------------------------------------------------------------------------


def test_a_lazy_call_builds_the_network_of_the_call(tmp_path: Path) -> None:
    """Wrong: a generator in a LazyConfig draws another network, or one that can't be changed or
    saved and read."""
    params = {"k": 4, "p": 0.75}
    lazy = L(RandWire)(
        spec=L(L(NetworkGenerator)(channels=8, num_nodes=10, graph_params=params))(seed=1),
        out_features=["res3", "res5"],
    )
    LazyConfig.apply_overrides(lazy, ["spec._target_.channels=6", "spec.seed=2"])
    expected = NetworkGenerator(channels=6, num_nodes=10)(seed=2)
    saved = tmp_path / "saved.yaml"
    LazyConfig.save(lazy, str(saved))
    drawn = L(RandWire)(spec=L(NetworkSpec.from_json)(text=expected.to_json()))
    for config in (lazy, LazyConfig.load(str(saved)), drawn):
        assert instantiate(config).spec == expected
    assert list(instantiate(lazy).output_shape()) == ["res3", "res5"]


def test_a_generator_that_was_not_called_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"got NetworkGenerator.*generator\(seed=1\)"):
        instantiate(L(RandWire)(spec=L(NetworkGenerator)(channels=8, num_nodes=10)))


# -------------------------------------------------------------------------------------------------
# The same as from YAML
# -------------------------------------------------------------------------------------------------


def both(name: str) -> tuple[CfgNode, DictConfig]:
    """A config of each kind, small."""
    cfg = detector_config()
    merge_file(cfg, str(yaml_of(name)))
    number = f"{NUMBER[name]}={len(CLASSES)}"
    top = ["model.backbone.top_block.in_channels=64"] if name.startswith("retinanet") else []
    lazy = LazyConfig.load(str(LAZY / f"{name}.py"))
    LazyConfig.apply_overrides(lazy, [*DATA[1:3], number, *SMALL, *top])
    assert lazy.dataloader.train.mapper.augmentations[0].short_edge_length == list(
        cfg.INPUT.MIN_SIZE_TRAIN
    )
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    cfg.SEED = 2
    lazy.dataloader.train.mapper.augmentations[0].short_edge_length = [96]
    cfg.merge_from_list([*SMALL_YAML, "INPUT.MIN_SIZE_TRAIN", (96,)])
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        rpn, heads = lazy.model.proposal_generator, lazy.model.roi_heads
        assert rpn.post_nms_topk[0] == cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN
        assert heads.batch_size_per_image == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        rpn.post_nms_topk[0] = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
        heads.batch_size_per_image = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
        if not name.startswith("cascade"):  # which has a head for each of its stages
            assert heads.box_head.fc_dims == [cfg.MODEL.ROI_BOX_HEAD.FC_DIM] * 2
            heads.box_head.fc_dims, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = [32, 32], 32
            heads.box_predictor.input_shape.channels = 32
    return cfg, lazy


@torch.jit.optimized_execution(False)  # a focal loss rounds its first call unlike later ones
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("mask") else pytest.mark.slow)
        for name in CONFIGS
    ],
)
def test_yaml_and_lazy_are_one_detector(name: str) -> None:
    """Wrong: their weights have other names, other values for one seed, or their images, losses
    (those of the test images, too) or learning rates differ in a bit."""
    cfg, lazy = both(name)
    found = []
    models: list[torch.nn.Module] = []
    for build in (lambda: build_model(cfg), lambda: instantiate(lazy.model)):
        seed_all_rng(1)
        models.append(build())
    ours, theirs = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    if name.startswith("cascade"):  # as its file says
        models[1].load_state_dict(ours)
    assert all(torch.equal(ours[key], value) for key, value in models[1].state_dict().items())

    lazy.optimizer.params.model = models[1]
    optimizers = [build_optimizer(cfg, models[0]), instantiate(lazy.optimizer)]
    schedulers = [
        build_lr_scheduler(cfg, optimizers[0]),
        LRMultiplier(optimizers[1], instantiate(lazy.lr_multiplier), lazy.train.max_iter),
    ]
    for iteration in (0, 1, 499, 999, 1000, 59999, 60000, 79999, 80000, 89999):
        for scheduler in schedulers:
            scheduler.last_epoch = iteration
        ours, theirs = (sorted({*scheduler.get_lr()}) for scheduler in schedulers)
        assert ours == pytest.approx(theirs, rel=1e-12)
    loaders = (
        lambda: detection_train_loader(cfg),
        lambda: lazy_train_loader(lazy.dataloader.train, cfg.SEED),
    )
    for model, optimizer, loader in zip(models, optimizers, loaders):
        seed_all_rng(2)
        found.append(first_losses(model.train(), optimizer, loader()))
    assert found[0] == found[1]
    lazy.dataloader.test.mapper.augmentations[0].short_edge_length = cfg.INPUT.MIN_SIZE_TEST = 96
    check_loss_images(lazy)
    tests = detection_loss_loader(cfg, "randwire_shapes_val"), lazy_loss_loader(lazy)
    found = [
        mean_losses(detection_losses(model), islice(loader, 3))
        for model, loader in zip(models, tests)
    ]
    assert found[0] == found[1]
    assert ("val_loss_mask" in found[0]) == ("mask" in name)


def first_losses(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: Any
) -> list[dict[str, float]]:
    """Those of two iterations, with a learning rate that changes the second."""
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    batches: Iterator[Any] = iter(loader)
    found = []
    with EventStorage():
        for _ in range(2):
            losses = model(next(batches))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            found.append({name: loss.item() for name, loss in losses.items()})
    assert found[0] != found[1]
    return found


# -------------------------------------------------------------------------------------------------
# The images
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_yaml_and_lazy_see_the_same_images(sampler: str) -> None:
    """Wrong: a LazyConfig's images are not those of the seed, with any workers, its sampler and
    grouping are not the config's, or another seed changes nothing."""
    cfg, lazy = both(FASTER)
    cfg.merge_from_list(["DATALOADER.ASPECT_RATIO_GROUPING", False])
    cfg.merge_from_list(["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9])
    call = lazy.dataloader.train
    call.aspect_ratio_grouping, call.num_workers = False, 2
    if sampler == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
        call.sampler = L(RepeatFactorTrainingSampler)(
            repeat_factors=L(factors)(dataset_dicts=call.dataset, repeat_thresh=0.9), seed=cfg.SEED
        )
    expected, found = detection_train_loader(cfg), lazy_train_loader(call, cfg.SEED)
    assert isinstance(expected, TrainLoader) and isinstance(found, TrainLoader)
    expected.start_iter = found.start_iter = 30
    assert_equal(*(list(islice(map(images_of, loader), 4)) for loader in (found, expected)))
    if "sampler" in call:
        del call.sampler.seed  # then it draws one
    streams = [lazy_train_loader(call, seed) for seed in (1, 2)]
    assert list(islice(streams[0].batches(), 9)) != list(islice(streams[1].batches(), 9))
    streams[0].seed = 2
    assert list(islice(streams[0].batches(), 9)) == list(islice(streams[1].batches(), 9))


def images_of(batch: list[Any]) -> list[Any]:
    return [(d["file_name"], d["image"], d["instances"].gt_boxes.tensor) for d in batch]


def records() -> list[dict]:
    return DatasetCatalog.get("randwire_shapes_train")


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return cycle(records())


class Numbers(Dataset):
    def __len__(self) -> int:
        return len(records())

    def __getitem__(self, index: int) -> int:
        return index


class OwnSampler(TrainingSampler):
    pass


def own_loader(**arguments: Any) -> Any:
    return build_detection_train_loader(**arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_target_": own_loader}, "is not Detectron2's build_detection_train_loader"),
        ({"dataset": L(Stream)()}, "dataset is not one of dicts by number"),
        ({"dataset": L(Numbers)(), "mapper": lambda i: records()[i]}, "dataset is not one of dict"),
        ({"mapper": None}, "has no mapper"),
        ({"collate_fn": tuple}, "sets collate_fn"),
        ({"sampler": L(OwnSampler)(size=24)}, "a sampler that is not one of Detectron2's"),
        # Its seed may have been drawn when the file was loaded.
        ({"sampler": TrainingSampler(24)}, "a sampler that is not one of Detectron2's"),
    ],
    ids=["loader", "stream", "numbers", "mapper", "collate", "sampler", "sampler_built"],
)
def test_another_loader_is_as_it_was_and_the_log_says_what_that_costs(
    changes: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: what can't begin anywhere passes for what can, is no longer what the config builds, or
    nobody learns that a resumed training sees its first images again."""
    _, lazy = both(FASTER)
    call = lazy.dataloader.train
    for key, value in changes.items():
        call[key] = value
    loader = lazy_train_loader(call, 1)
    (line,) = (r.getMessage() for r in caplog.records if "first images again" in r.getMessage())
    assert line.startswith("dataloader.train") and says in line and "\n" not in line
    assert not isinstance(loader, TrainLoader)
    batch = next(iter(loader))
    assert len(batch) == 2 and isinstance(batch, call.get("collate_fn", list))
    assert all("file_name" in image for image in batch)


# -------------------------------------------------------------------------------------------------
# The tool
# -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_resume_and_evaluate_with_either_tool(tmp_path: Path) -> None:
    """Wrong: a training does not go on from its checkpoint, its checkpoint is not one of this
    project's, or tools/train_net.py finds other objects with it than this tool."""
    run, log = tmp_path / "run", tmp_path / "log"
    fast = ["model.roi_heads.box_predictor.test_score_thresh=0.0", "train.seed=1",
            "model.proposal_generator.post_nms_topk=[50,20]", f"train.output_dir={run}",
            "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
            "dataloader.test.mapper.augmentations.0.short_edge_length=96"]  # fmt: skip
    given = ["--config-file", LAZY / f"{FASTER}.py"]
    options = [*DATA, *SMALL, *fast]
    said = run_tool(TOOL, *given, *options, "train.max_iter=2", log=log)
    assert "a LazyConfig is Python" in said and "Shadow step" in said
    said = run_tool(TOOL, *given, "--resume", *options, "train.max_iter=3", log=log)
    assert "Starting training from iteration 2" in said
    checkpoint = torch.load(run / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 2
    assert checkpoint["class_names"] == list(CLASSES)
    assert NetworkSpec.from_json(checkpoint["randwire"]["spec"]).channels == 8

    weights = run / "model_final.pth"
    options += [f"train.init_checkpoint={weights}", f"train.output_dir={tmp_path / 'lazy'}"]
    run_tool(TOOL, *given, "--eval-only", *options, log=log)
    yaml = [*SMALL_YAML, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "yaml",
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
            "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "INPUT.MIN_SIZE_TEST", 96]  # fmt: skip
    run_tool("train_net.py", "--config-file", yaml_of(FASTER), "--eval-only", *yaml, log=log)
    lazily, plainly = (
        json.loads(next((tmp_path / kind).rglob(RunFolder(run).detections_file.name)).read_text())
        for kind in ("lazy", "yaml")
    )
    assert len(lazily) > 100 and lazily == plainly


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train.skip_nonfinite=-1"], "train.skip_nonfinite must be at least 0; got -1"),
        (["train.hang_timeout=no"], "train.hang_timeout must be of type int; got 'no'"),
        (["train.max_iter=1.5"], "train.max_iter must be of type int; got 1.5"),
        (["train.output_dir=5"], "train.output_dir must be of type str; got 5"),
        (["train.init_checkpoint=[a]"], r"train.init_checkpoint must be of type str; got \['a'\]"),
        (["train.eval_loss=maybe"], "train.eval_loss must be of type bool; got 'maybe'"),
        (["train=5"], "rcnn_randwire_c109_fpn_1x.py lacks train"),
        (["modl.x=5"], "has no 'modl' to override; did you mean 'model'"),
        (["optimizer.lrr=1"], "optimizer: .*'lrr'"),
        (["optimizer.lr=-1"], "optimizer: .* -1"),
        (["lr_multiplier.warmup_fact=1"], "lr_multiplier: .*'warmup_fact'"),
        (["dataloader.train.num_wrkers=2"], "train.num_wrkers is unknown; did .* 'num_workers'"),
        (["dataloader.evaluator.x=5"], "dataloader.evaluator: .*'x'"),
        (
            ["dataloader.test.mapper.augmentations.0.short_edge_len=9"],
            "dataloader.test.mapper.augmentations.0: .*'short_edge_len'",
        ),
        (["dataloader.train.dataset.names=null"], "dataset.names must name data sets; got None"),
        (["train.ema.decay=1"], "train.ema.decay must be within 0 … 1, and less than 1; got 1"),
        (["+train.checkpointer.file_prefix=x"], "train.checkpointer.file_prefix is unknown"),
        (["train.ema.deca=0.5"], "train.ema.deca is unknown; did you mean 'decay'"),
        (["train.ema=0.5"], "train.ema must have keys, decay; got 0.5"),
        (
            ["train.patience=2", "train.eval_period=0"],
            "train.patience 2 .* but train.eval_period is",
        ),
        (
            ["train.patience=2", "dataloader.evaluator=null"],
            "train.patience 2 needs a dataloader.eval",
        ),
        (
            ["train.eval_loss=True", "dataloader.test.mapper._target_=builtins.dict"],
            "train.eval_loss needs .* as dataloader.test.mapper: set train.eval_loss=False",
        ),
        (["train.shadow_period=-1"], "train.shadow_period must be at least 0; got -1"),
        (["train.precise_bn.num_iter=0"], "train.precise_bn.num_iter must be at least 1; got 0"),
        (["train.precise_bn.num_itr=2"], "train.precise_bn.num_itr is unk.* mean 'num_iter'"),
        (["train.best_metric=segm/AP"], "train.best_metric: no evaluation gives .* bbox/AP50"),
        (["train.log_period=null"], "train.log_period has no value"),
        (["train.checkpointer.period=0"], "train.checkpointer.period must be at least 1; got 0"),
        (["train.max_iter=[5"], "the command line's path.key=value: .*'.5'"),
        (["~train.max_iter"], "the command line's path.key=value: deletion is not"),
        (["train.max_iter.x=1"], "the command line's path.key=value: .*train.max_iter"),
        (["train.device=cuda:99"], "device is 'cuda:99', but .*(add train.device=cpu|last GPU)"),
        (["train.device=cuda", "--num-gpus=99"], "device=cpu|--num-gpus 99: this machine has"),
        (["train.device=cuda:0", "--num-gpus=2"], "device is 'cuda:0', .* with train.device=cuda"),
        (["--num-gpus=3"], "dataloader.train.total_batch_size 2 is the batch of all 3 processes"),
        (["train.amp.enabled=True"], "train.amp.enabled needs a GPU"),
        (["train.amp.precision=float32"], "train.amp.precision is float16 or bfloat16; got 'float"),
        (["train.amp.opt_level=O1"], "train.amp.opt_level is unknown"),
        (["dataloader.train.dataset.names=randwire_shape_train"], "names: .*'randwire_shapes_trai"),
        (["model.roi_heads.num_classes=80"], "model.roi_heads.num_classes is 80, but .* has 6 cl"),
        (["model.roi_heads.box_predictor.num_classes=7"], "box_predictor.num_classes is 7, but"),
        (["train.init_checkpoint=/"], "train.init_checkpoint '/' is a folder; name the file in it"),
        (
            ["train.init_checkpoint=output/randwire_c109_100ep/backbone.pth"],
            "does not exist: pretrain it .*train.init_checkpoint='' .*norm=BN .*freeze_at=0",
        ),
        (["--data-val=x"], r"train.data_val \(--data-val\) needs train.data \(--data\)"),
        (["model.backbone.bottom_up.norm=FrozenBN"], "without train.init_checkpoint, .* freeze_at"),
        (["model.backbone.bottom_up.freeze_at=1"], "without train.init_checkpoint, .* freeze_at"),
        (
            ["model.backbone.bottom_up.norm=SyncBN"],
            "SyncBN needs GPUs; on a CPU use naiveSyncBN, BN or GN",
        ),
        ([f"{SPEC}._target_.graph_params.k=3"], "model: .*K=3"),
        (["model.roi_heads.box_head.fc_dim=3"], "model: .*fc_dim"),
        ([f"{SPEC}._target_.channels=8.5"], r"model: channels \(C\) must be an integer; got 8.5"),
        (["model.backbone.bottom_up.in_channels=2.5"], "in_channels must be an integer; got 2.5"),
        (["model.backbone.bottom_up.freeze_at=all"], "freeze_at must be an integer; got 'all'"),
        (["model.backbone.out_channels=-1"], "model can't be built: RuntimeError: .* dimension -1"),
        (["model.backbone.out_channels=10000000000"], "can't be built: RuntimeError: .*100000000"),
        (["model.backbone.norm=XX"], "model can't be built: KeyError: 'XX', in .*norm.*; mend the"),
        (["model.backbone.in_features=[res9]"], "model can't be built: KeyError: 'res9', in "),
        (["model.backbone.top_block=3"], "model can't be built: AttributeError: .*num_levels"),
        (["model.proposal_generator.pre_nms_topk=x"], "model can't be built: IndexError: .*index"),
        (["model.roi_heads.box_pooler.output_size=x"], "model: assert len.output_size. == 2"),
        (["model.roi_heads=null"], "model.roi_heads must be a LazyCall .*; got None"),
        (["--eval-only"], "--eval-only needs weights"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(args: list[str], says: str) -> None:
    flags = [arg for arg in args if arg.startswith("--")]
    options = [*DATA, *SMALL, *(arg for arg in args if arg not in flags)]
    with raises_one_line(ValueError, match=says):
        load_lazy_config(parse(FASTER, *flags, *options))


# -------------------------------------------------------------------------------------------------
# Data by their path
# -------------------------------------------------------------------------------------------------

NO_MASKS = "model.roi_heads.mask_in_features=null"  # boxes are all that write_sound's images have


def load_with_data(name: str, root: Path, *args: str) -> DictConfig:
    given = write_sound(root / "data")["coco"]
    small = [*SMALL, f"train.output_dir={root / 'run'}"]
    small += ["model.backbone.top_block.in_channels=64"] if name.startswith("retina") else []
    flags = [arg for arg in args if arg.startswith("--")]
    return load_lazy_config(
        parse(name, *given, *flags, *small, *(a for a in args if a not in flags))
    )


@pytest.mark.parametrize("masks", ["of one object", "of all"])
def test_masks_are_read_for_a_detector_that_finds_some(masks: str, tmp_path: Path) -> None:
    """Detectron2's configs read COCO's masks, whatever the detector finds. Wrong: a training of
    boxes ends in its mapper, which takes no masks of only some objects, nor RLE for polygons; or a
    Mask R-CNN gets none."""
    data = write_sound(tmp_path / "data")["coco"]
    for split in ("train", "val"):
        labels = tmp_path / "data" / f"{split}.json"
        content = json.loads(labels.read_text())
        for found in content["annotations"][: 1 if masks == "of one object" else None]:
            found["segmentation"] = [[5, 7, 9, 7, 9, 9]]
        labels.write_text(json.dumps(content))
    options = [NO_MASKS] if masks == "of one object" else []
    cfg = load_lazy_config(parse("mask_rcnn_randwire_c109_fpn_1x", *data, *SMALL, *options))
    loader = cfg.dataloader.train
    mapper = instantiate(loader.mapper)
    samples = [mapper(record) for record in DatasetCatalog.get(loader.dataset.names)]
    assert {s["instances"].has("gt_masks") for s in samples} == {masks == "of all"}


@pytest.mark.parametrize("name", CONFIGS)
def test_data_by_path_settle_names_and_classes(name: str, tmp_path: Path) -> None:
    """Wrong: a loader or the evaluator reads COCO, or a head tells COCO's 80 classes apart."""
    cfg = load_with_data(name, tmp_path, *([NO_MASKS] if "mask" in name else []))
    train, test = (cfg.dataloader[split].dataset.names for split in ("train", "test"))
    assert [len(DatasetCatalog.get(name)) for name in (train, test)] == [6, 2]
    assert cfg.dataloader.evaluator.dataset_name == test
    described = str(OmegaConf.to_container(cfg.model, resolve=True))
    assert set(re.findall(r"'num_classes': (\d+)", described)) == {"2"}


def test_copies_of_the_number_of_classes_are_set_and_others_are_not(tmp_path: Path) -> None:
    """Wrong: a config that repeats its number is refused, or loses that of masks for all."""
    config = tmp_path / "config.py"
    config.write_text(
        f"from detectron2.config import LazyConfig\n"
        f"mask = LazyConfig.load({str(LAZY / 'mask_rcnn_randwire_c109_fpn_1x.py')!r})\n"
        "model, dataloader, train = mask.model, mask.dataloader, mask.train\n"
        "lr_multiplier, optimizer = mask.lr_multiplier, mask.optimizer\n"
        "model.roi_heads.box_predictor.num_classes = 80\n"
        "model.roi_heads.mask_head.num_classes = 1\n"
        "dataloader.evaluator.dataset_name = 'coco_2017_val'\n"
        "del dataloader.evaluator.output_dir\n"  # as in Detectron2's configs
    )
    data = write_sound(tmp_path / "data")["coco"]
    cfg = load_lazy_config(parse(config, *data, *SMALL, NO_MASKS))
    heads = cfg.model.roi_heads
    numbers = [part.num_classes for part in (heads, heads.box_predictor, heads.mask_head)]
    assert numbers == [2, 2, 1]
    evaluator = cfg.dataloader.evaluator
    assert evaluator.dataset_name == cfg.dataloader.test.dataset.names
    assert evaluator.output_dir == f"{cfg.train.output_dir}/inference", "or it fails once trained"


def test_an_evaluator_writes_labels_that_are_not_cocos(tmp_path: Path) -> None:
    """Wrong: one without output_dir, as in Detectron2's configs, fails in the first evaluation;
    or labels that were corrected are evaluated as they were before."""
    config = tmp_path / "config.py"
    config.write_text(
        f"from detectron2.config import LazyConfig\n"
        f"stock = LazyConfig.load({str(LAZY / f'{FASTER}.py')!r})\n"
        "model, dataloader, train = stock.model, stock.dataloader, stock.train\n"
        "lr_multiplier, optimizer = stock.lr_multiplier, stock.optimizer\n"
        "dataloader.evaluator.dataset_name = dataloader.test.dataset.names = 'by_code'\n"
        "del dataloader.evaluator.output_dir\n"
    )
    given = [*DATA[:2], *SMALL, f"train.output_dir={tmp_path / 'run'}"]
    for number in (1, 2):
        records = [{"file_name": "x.png", "image_id": i, "height": 8, "width": 8, "annotations": []}
                   for i in range(number)]  # fmt: skip
        DatasetCatalog.register("by_code", lambda records=records: records)
        MetadataCatalog.get("by_code").thing_classes = list(CLASSES)
        evaluator = instantiate(load_lazy_config(parse(config, *given)).dataloader.evaluator)
        assert len(evaluator._coco_api.imgs) == number
        DatasetCatalog.remove("by_code")
        MetadataCatalog.remove("by_code")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            [],
            "12 of 12 boxes of .* have no polygon, the first in .*g; train without masks, "
            + NO_MASKS,
        ),
        ([NO_MASKS, "model.roi_heads.num_classes=5"], "num_classes is 5, but .* has 2 classes"),
        ([NO_MASKS, *DATA[1:2]], "names=randwire_shapes_train is given beside --data"),
        (
            [NO_MASKS, "model.roi_heads.keypoint_in_features=[p2]"],
            "no keypoint_names; train without .* model.roi_heads.keypoint_in_features=null",
        ),
        ([NO_MASKS, "train.hold_back=2"], "train.hold_back is a share .* less than 1; got 2"),
        ([NO_MASKS, "--data-val=gone"], "gone' does not exist"),
    ],
)
def test_data_by_path_that_do_not_fit_are_refused(
    args: list[str], says: str, tmp_path: Path
) -> None:
    """Wrong: the training ends later, or trains on something else than was asked for."""
    with raises_one_line(ValueError, match=says):
        load_with_data("mask_rcnn_randwire_c109_fpn_1x", tmp_path, *args)


def test_the_masks_of_c4_need_polygons(tmp_path: Path) -> None:
    """Wrong: Detectron2's Mask R-CNN C4, whose masks have no features of their own, trains on data
    without polygons until its first loss."""
    config = tmp_path / "config.py"
    config.write_text(
        "from detectron2 import model_zoo\n"
        "c4 = model_zoo.get_config('COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py')\n"
        "model, dataloader, train = c4.model, c4.dataloader, c4.train\n"
        "lr_multiplier, optimizer = c4.lr_multiplier, c4.optimizer\n"
    )
    given = [*write_sound(tmp_path / "data")["coco"], *SMALL[4:], f"train.output_dir={tmp_path}"]
    with raises_one_line(
        ValueError, match="no polygon, .*; .* model.roi_heads.mask_head=null"
    ) as e:
        load_lazy_config(parse(config, *given))
    load_lazy_config(parse(config, *given, str(e.value).rpartition(" ")[2]))


def test_only_python_is_read_as_python(tmp_path: Path) -> None:
    """Wrong: a YAML file, whose tags LazyConfig would let run code, is read; or a part is missing
    without a word."""
    config = tmp_path / "config.yaml"
    config.write_text("x: !!python/object/apply:os.mkdir [ran]")
    with pytest.raises(ValueError, match=r"ends in \.py, .*; YAML is for tools/train_net.py"):
        load_lazy_config(parse(config))
    with pytest.raises(ValueError, match="gone.py' does not exist"):
        load_lazy_config(parse(tmp_path / "gone.py"))
    config = tmp_path / "config.py"
    config.write_text("model = dict(a=1)\ntrain = dict()\n")
    with pytest.raises(ValueError, match="lacks dataloader, lr_multiplier, optimizer"):
        load_lazy_config(parse(config))
    said = refusal(TOOL, "--config-file", tmp_path / "config.yaml", log=tmp_path / "log")
    assert "is no LazyConfig" in said


@pytest.mark.slow
def test_torchrun_trains_and_a_signal_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Wrong: torchrun's processes start others, or a signal costs what was trained."""
    output = tmp_path / "run"
    given = ["--config-file", LAZY / f"{FASTER}.py", *DATA, *SMALL, f"train.output_dir={output}"]
    given += ["train.max_iter=100000", "train.log_period=1", "train.eval_period=0"]
    given += ["dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
              "model.backbone.bottom_up.fused=off"]  # fmt: skip
    flags = ("--standalone", "--nproc-per-node", 2, ROOT / "tools" / TOOL)
    tool = Tool(TORCHRUN, *flags, *given, log=tmp_path / "log")
    metrics = output / "metrics.json"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
    tool.send(signal.SIGTERM, alone=True)
    assert tool.wait() != 0
    (done,) = re.findall(r"SIGTERM ends the training after (\d+) iterations", tool.said)
    name = (output / "last_checkpoint").read_text()
    checkpoint = torch.load(output / name, weights_only=True)
    assert checkpoint["iteration"] == int(done) - 1
