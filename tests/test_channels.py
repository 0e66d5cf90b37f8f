"""Images of other than three channels: the backbone follows MODEL.PIXEL_MEAN, as Detectron2's."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from helpers import (
    ROOT,
    assert_equal,
    assert_same,
    assert_same_gradients,
    draw_boxes,
    draw_spec,
    leaves,
    raises_one_line,
    randomise,
)
from PIL import Image
from test_lazy_runs import saved, small
from torch import nn

from randwire_d2 import RandWire, complexity, load_detector
from randwire_d2.checkpoint import WIRING_KEY, Classes, RandWireCheckpointer, check_wiring
from randwire_d2.cli.predict import main as predict
from randwire_d2.config import detector_config
from randwire_d2.engine import Trainer, argument_parser, load_config
from randwire_d2.export import FORMATS
from randwire_d2.inference.deployment.export import export_model, write_proved

CONFIG = ROOT / "configs/faster_rcnn_randwire_shapes.yaml"
SMALL = ["MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 6, "MODEL.FPN.OUT_CHANNELS", 16,
         "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_HEADS.NUM_CLASSES", 2,
         "INPUT.MIN_SIZE_TEST", 64, "MODEL.RANDWIRE.FUSED", "on"]  # fmt: skip


def images_of(number: int) -> list[Any]:
    """The keys of images of so many channels."""
    keys = ["MODEL.PIXEL_MEAN", [90.0] * number, "MODEL.PIXEL_STD", [60.0] * number]
    return [*keys, "INPUT.FORMAT", "L"] if number == 1 else keys


def config(number: int, *options: Any) -> CfgNode:
    cfg = detector_config()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list([*SMALL, *images_of(number), *options])
    return cfg


def stem_of(model: Any) -> nn.Parameter:
    return model.backbone.bottom_up.stem.conv.weight


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector's data set of grey files, in COCO's layout."""
    root = draw_boxes(tmp_path_factory.mktemp("data") / "grey")
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    return root


@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize("regime, channels", [("small", 1), ("regular", 4)])
def test_a_network_of_any_channels_is_the_oracle(regime: str, channels: int, path: str) -> None:
    """Wrong: it computes, or learns, something else than the paper's; or has other parameters,
    multiply-adds or activations than are counted."""
    spec = draw_spec(regime, "WS", seed=2)
    names = ("stem", "res2", "res3", "res4", "res5")
    model = RandWire(
        spec,
        out_features=names,
        in_channels=channels,
        relu_features=False,
        fused="on" if path == "fused" else "off",
    )
    randomise(model.double())
    state = leaves(model)
    x, x_oracle = (torch.randn(2, channels, 69, 77).double().requires_grad_() for _ in range(2))
    x_oracle.data.copy_(x.data)
    expected = oracle.backbone(spec, state, x_oracle, train=True).features
    found = model(x)
    for name in names:
        assert_same(found[name], expected[name], name)
    (found["res5"] ** 2).sum().backward()
    (expected["res5"] ** 2).sum().backward()
    assert_same_gradients(model, x, state, x_oracle)

    counted = complexity(spec, 69, 77, in_channels=channels).stages
    for name in names:
        own = sum(p.numel() for p in model.get_submodule(name).parameters())
        assert own == counted[name].params, name
    flops = FlopCountAnalysis(model.eval(), x[:1].detach()).unsupported_ops_warnings(False)
    assert flops.by_module()["stem.conv"] == counted["stem"].flops
    assert complexity(spec, in_channels=3) == complexity(spec)


def test_images_of_other_channels_are_refused_in_one_line() -> None:
    """Wrong: they end in PyTorch's error; or the check warns when a graph is traced, or refuses
    what a first convolution takes that a project has put in the place of ours."""
    model = RandWire(draw_spec("small", "WS"), in_channels=4).eval()
    with pytest.raises(ValueError, match=r"takes .* \(N, 4, H, W\); got \(1, 3, 32"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="in_channels must be at least 1; got 0"):
        RandWire(model.spec, in_channels=0)
    with warnings.catch_warnings(record=True) as caught:
        torch.jit.trace(model, torch.zeros(1, 4, 32, 32), strict=False, check_trace=False)
    assert not [w for w in caught if "backbone.py" in w.filename]
    for model.stem.conv in (nn.Conv2d(5, 2, 3, 2, 1), nn.Sequential(nn.Conv2d(5, 2, 3, 2, 1))):
        model(torch.zeros(1, 5, 32, 32))
    with pytest.raises(ValueError, match=r"takes .* \(N, C, H, W\); got \(5, 32"):
        model(torch.zeros(5, 32, 32))


@pytest.mark.parametrize(
    "channels, builder, architecture",
    [
        (1, "build_randwire_fpn_backbone", "GeneralizedRCNN"),
        (4, "build_randwire_fpn_backbone", "GeneralizedRCNN"),
        (7, "build_randwire_retinanet_fpn_backbone", "RetinaNet"),
    ],
)
def test_a_detector_learns_and_keeps_its_channels(
    channels: int, builder: str, architecture: str, tmp_path: Path
) -> None:
    """Wrong: a builder ignores PIXEL_MEAN, the first convolution does not learn, or a checkpoint
    gives another detector, or none."""
    options: list[Any] = ["MODEL.BACKBONE.NAME", builder, "MODEL.META_ARCHITECTURE", architecture]
    if architecture == "RetinaNet":
        options += ["MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5"],
                    "MODEL.RETINANET.NUM_CLASSES", 2]  # fmt: skip
    cfg = config(channels, *options)
    torch.manual_seed(0)
    model = build_model(cfg)
    before = stem_of(model).detach().clone()
    assert before.shape[1] == channels
    data = [
        {"image": torch.randint(0, 256, (channels, 64, 64)), "instances": _boxes(64)}
        for _ in range(2)
    ]
    with EventStorage():
        sum(model(data).values()).backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert all((stem_of(model)[:, i] != before[:, i]).any() for i in range(channels))

    RandWireCheckpointer(model, str(tmp_path), cfg=cfg, classes=Classes(["a", "b"])).save("model")
    RandWireCheckpointer(other := build_model(cfg)).load(str(tmp_path / "model.pth"))
    assert_equal(other.state_dict(), model.state_dict())
    again = load_detector(tmp_path / "model.pth", "cpu")
    with torch.no_grad():
        ours, theirs = (m([{"image": data[0]["image"]}]) for m in (model.eval(), again.model))
    fields = [found[0]["instances"].get_fields() for found in (ours, theirs)]
    assert_equal(fields[0].pop("pred_boxes").tensor, fields[1].pop("pred_boxes").tensor)
    assert_equal(*fields)


def _boxes(size: int) -> Instances:
    boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 44.0]]))
    return Instances((size, size), gt_boxes=boxes, gt_classes=torch.tensor([1]))


def trained(data: Path, folder: Path, last: int, resume: bool = False) -> dict[str, Any]:
    """The weights of a detector of grey images after some iterations."""
    given = [
        *(["--resume"] if resume else []), "--config-file", CONFIG, "--data", data, *SMALL,
        *images_of(1), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", last, "SEED", 3,
        "SOLVER.WARMUP_ITERS", 0, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR",
        "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0,
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "OUTPUT_DIR", folder,
    ]  # fmt: skip
    cfg = load_config(argument_parser().parse_args([*map(str, given)]))
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer.model.state_dict()


def test_a_training_of_grey_files_resumes(grey: Path, tmp_path: Path) -> None:
    """Wrong: images of INPUT.FORMAT L are not read, or the run goes on as another."""
    whole = trained(grey, tmp_path / "whole", 2)
    assert whole["backbone.bottom_up.stem.conv.weight"].shape[1] == 1
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    assert_equal(trained(grey, tmp_path / "run", 2, resume=True), whole)


@pytest.fixture
def saved_as(tmp_path: Path) -> Any:
    """The checkpoint of an untrained detector of so many means and such a format."""

    def save(number: int, order: str) -> Path:
        torch.manual_seed(0)
        cfg = config(number, "INPUT.FORMAT", order, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
        RandWireCheckpointer(build_model(cfg), str(tmp_path), cfg=cfg).save("model")
        return tmp_path / "model.pth"

    return save


@pytest.mark.parametrize(
    "part, number, order, channels",
    [
        ("whole", 3, "L", 1),
        pytest.param("whole", 1, "L", 1, marks=pytest.mark.slow),
        pytest.param("whole", 4, "RGB", 4, marks=pytest.mark.slow),
        ("backbone", 3, "L", 3),
        ("backbone", 1, "L", 1),
    ],
)
def test_a_graph_takes_the_images_that_its_model_takes(
    part: str, number: int, order: str, channels: int, saved_as: Any, tmp_path: Path
) -> None:
    """Wrong: a graph wants three channels whatever its detector reads, of which Detectron2 may
    normalise one by three means; or a backbone's wants other than its first convolution."""
    file = str(tmp_path / "x.ts")
    proof = export_model(saved_as(number, order), file, part=part)
    assert {shape[-3] for shape in proof.shapes} == {channels}
    told = json.loads(FORMATS["torchscript"].read(file)[1]["input"])["shape"]
    assert told[-3:] == [channels, "height", "width"]


def test_a_detector_may_normalise_its_images_as_it_likes(saved_as: Any, tmp_path: Path) -> None:
    """Wrong: another project's detector can't be exported, for want of a buffer pixel_mean."""
    detector = load_detector(saved_as(3, "RGB"), "cpu")
    model: Any = detector.model
    del model.pixel_mean

    def divided(inputs: list[dict[str, torch.Tensor]]) -> ImageList:
        return ImageList.from_tensors([x["image"] / 255 for x in inputs], 32)

    model.preprocess_image = divided
    write_proved(detector, str(tmp_path / "x.ts"), FORMATS["torchscript"])


def test_a_grey_file_is_read_as_one_channel(
    grey: Path, saved_as: Any, request: pytest.FixtureRequest
) -> None:
    """Wrong: as three; or PyTorch warns of a PIL image's pixels, which can't be written."""
    detector = load_detector(saved_as(1, "L"), "cpu")
    torch.set_warn_always(True)  # else once a process, and a training's mapper was the first
    request.addfinalizer(lambda: torch.set_warn_always(False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not writable")
        read = detector.read({"file_name": str(grey / "val" / "1.png")})
    assert read["image"].shape[0] == 1 and len(detector.predict([read])[0])


def test_what_no_format_reads_is_refused_before_it_is_read(saved_as: Any, tmp_path: Path) -> None:
    """Wrong: each image of four channels is skipped with PyTorch's error."""
    file, image = saved_as(4, "RGB"), tmp_path / "a.png"
    Image.new("RGBA", (64, 64)).save(image)
    said = r"INPUT.FORMAT RGB reads 3 channels, and MODEL.PIXEL_MEAN has 4: .* a mapper of your own"
    with pytest.raises(ValueError, match=said):
        load_detector(file, "cpu").read({"file_name": str(image)})
    with pytest.raises(SystemExit, match=said):
        predict([str(file), str(image), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_weights_of_other_channels_leave_no_frozen_convolution_untrained(tmp_path: Path) -> None:
    """Wrong: a first convolution that nobody trained is frozen, and only a warning says so; or one
    that is trained is refused, where Detectron2 begins it anew; or the rest is not loaded."""
    rgb = build_model(config(3))
    RandWireCheckpointer(rgb, str(tmp_path)).save("model")
    file = str(tmp_path / "model.pth")
    frozen = build_model(config(1, "MODEL.BACKBONE.FREEZE_AT", 1))
    with raises_one_line(ValueError, match=r"\(4, 1, 3, 3\).*FREEZE_AT 0 \(freeze_at"):
        RandWireCheckpointer(frozen).load(file)
    grey = build_model(config(1))
    before = stem_of(grey).detach().clone()
    RandWireCheckpointer(grey).load(file)
    assert torch.equal(stem_of(grey), before)
    ours, theirs = grey.state_dict(), rgb.state_dict()
    del ours["backbone.bottom_up.stem.conv.weight"], theirs["backbone.bottom_up.stem.conv.weight"]
    assert_equal(ours, theirs)
    # A backbone's own, under its own names, and one of the same channels.
    bare = {"model": RandWire(rgb.backbone.bottom_up.spec).state_dict(), **_wiring_of(file)}
    with pytest.raises(ValueError, match=r"stem.conv.weight has the shape \(4, 1, 3, 3\)"):
        check_wiring(frozen, bare)
    check_wiring(build_model(config(3, "MODEL.BACKBONE.FREEZE_AT", 1)), bare)


def test_what_else_has_a_stem_is_no_other_first_convolution(tmp_path: Path) -> None:
    """Wrong: a network of two backbones, for RGB and for depth, is refused its own checkpoint."""
    spec = draw_spec("small", "WS")
    parts = {"rgb": RandWire(spec, freeze_at=1), "depth": RandWire(spec, in_channels=1)}
    checkpointer = RandWireCheckpointer(nn.ModuleDict(parts), str(tmp_path))
    checkpointer.save("model")
    checkpointer.load(str(tmp_path / "model.pth"))


def _wiring_of(file: str) -> dict[str, Any]:
    return {WIRING_KEY: torch.load(file, weights_only=True)[WIRING_KEY]}


def test_a_saved_backbone_keeps_its_channels(tmp_path: Path) -> None:
    """Wrong: it can't be saved, or is read as one of three channels."""
    model = RandWire(draw_spec("small", "WS"), in_channels=4)
    model.save_pretrained(tmp_path / "four")
    again = RandWire.from_pretrained(tmp_path / "four")
    assert again.options() == model.options()
    assert_equal(again.state_dict(), model.state_dict())


def test_a_lazy_detector_keeps_its_channels(tmp_path: Path) -> None:
    """Wrong: its checkpoint is another detector's, or holds a key that no config has."""
    lazy = small("retinanet_randwire_c109_fpn_1x")
    lazy.model.backbone.bottom_up.in_channels = 1
    lazy.model.pixel_mean, lazy.model.pixel_std = [90.0], [60.0]
    lazy.dataloader.test.mapper.image_format = lazy.model.input_format = "L"
    model, detector = saved(lazy, tmp_path), load_detector(tmp_path / "model.pth", "cpu")
    assert repr(detector.model) == repr(model) and stem_of(detector.model).shape[1] == 1
    assert list(detector.cfg.MODEL.PIXEL_MEAN) == [90.0] and detector.cfg.INPUT.FORMAT == "L"
