"""Models that travel: equal to the bit at the other end, or refused in one line."""

import hashlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from helpers import (
    ROOT,
    RunsCode,
    assert_equal,
    draw_image_folders,
    draw_spec,
    last_metrics,
    raises_one_line,
    randomise,
    run_tool,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from randwire_d2 import (
    NetworkSpec,
    RandWire,
    RandWireClassifier,
    from_pretrained,
    load_classifier,
    load_detector,
)
from randwire_d2.checkpoint import Classes, RandWireCheckpointer, Wiring, load_checkpoint
from randwire_d2.cli.publish import main
from randwire_d2.config import classifier_config, detector_config, set_spec
from randwire_d2.engine import argument_parser, load_config
from randwire_d2.inference import Classifier, Detector
from randwire_d2.inference.record import _results, sections_of
from randwire_d2.weight_files.safetensors_file import read_safetensors, safetensors_bytes

SPEC = draw_spec("small", "WS")
NAMES = ["dog", "cat", "bird", "cow", "pig", "emu"]
PIXELS = np.random.default_rng(1).integers(0, 256, (60, 90, 3), dtype=np.uint8)
X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def detector_cfg(spec: NetworkSpec = SPEC) -> CfgNode:
    cfg = detector_config()
    cfg.merge_from_file(str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml"))
    set_spec(cfg, spec)
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 6, "TEST.DETECTIONS_PER_IMAGE", 5])
    return cfg


def build_backbone() -> RandWire:
    """With a frozen stage, whose norms have other weights than they were built with."""
    torch.manual_seed(0)
    model = RandWire(SPEC, out_features=("res3", "res5"), relu_features=True, freeze_at=2)
    randomise(model)
    return model.eval()


def build_classifier_network() -> RandWireClassifier:
    torch.manual_seed(0)
    model = RandWireClassifier(SPEC, 7, head_relu=True, dropout=0.3)
    randomise(model)
    return model.eval().double()


def build_classifier() -> Classifier:
    torch.manual_seed(0)
    cfg = classifier_config()
    cfg.merge_from_file(str(ROOT / "configs/shapes/randwire_pretrain.yaml"))
    set_spec(cfg, SPEC)
    return Classifier("", cfg, randomise(build_model(cfg)).eval(), Classes(NAMES))


def build_detector() -> Detector:
    torch.manual_seed(0)
    cfg = detector_cfg()
    return Detector("", cfg, build_model(cfg).eval(), Classes(NAMES, [18, 17, 16, 21, 1, 90]))


BUILD: dict[str, Callable[[], Any]] = {
    "RandWire": build_backbone,
    "RandWireClassifier": build_classifier_network,
    "Classifier": build_classifier,
    "Detector": build_detector,
}


def state_and_outputs(model: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    if isinstance(model, nn.Module):
        with torch.no_grad():
            found = model(X.to(next(model.parameters()).dtype))
        return model.state_dict(), [*found.values()] if isinstance(found, dict) else [found]
    found = model(PIXELS)
    if isinstance(model, Detector):
        fields = found["instances"].get_fields()
        assert len(found["instances"]) == 5  # else nothing is compared
        found = [fields["pred_boxes"].tensor, fields["scores"], fields["pred_classes"]]
        return model.model.state_dict(), found
    return model.model.state_dict(), [found]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {kind: build().save_pretrained(root / kind) for kind, build in BUILD.items()}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A backbone's, to be damaged."""
    return build_backbone().save_pretrained(tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def refusal_of(call: Callable[[], object]) -> str:
    with raises_one_line(ValueError) as caught:
        call()
    return str(caught.value)


# -------------------------------------------------------------------------------------------------
# Round trips
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILD)
def test_a_model_is_the_same_to_the_bit_at_the_other_end(kind: str, saved: dict[str, Path]) -> None:
    """Wrong: weights, a dtype, an option, the names or the ids of classes are lost on the way; or
    it comes back in training mode, in which it computes something else, and no call repeats it."""
    model = BUILD[kind]()
    state, outputs = state_and_outputs(model)
    found = from_pretrained(saved[kind], device="cpu")
    for again in (type(model).from_pretrained(saved[kind]), found):
        assert type(again) is type(model)
        its_state, its_outputs = state_and_outputs(again)
        assert list(its_state) == list(state)
        assert all(torch.equal(its_state[name], value) for name, value in state.items())
        assert all(its_state[name].dtype == value.dtype for name, value in state.items())
        assert len(its_outputs) == len(outputs)
        assert all(torch.equal(a, b) for a, b in zip(its_outputs, outputs))
        if isinstance(model, nn.Module):
            trained = [p.requires_grad for p in model.parameters()]
            assert [p.requires_grad for p in again.parameters()] == trained
            assert again.options() == model.options()
        else:
            assert again.class_names == NAMES and again.category_ids == model.category_ids


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_classifier_computes_in_the_type_that_it_was_saved_in(
    kind: torch.dtype, tmp_path: Path
) -> None:
    """Wrong: it comes back in float32, which gives other outputs; or bfloat16 can't be saved."""
    model = build_classifier()
    model.model.to(kind)
    state, outputs = state_and_outputs(model)
    again = from_pretrained(model.save_pretrained(tmp_path / "model"), device="cpu")
    its_state, its_outputs = state_and_outputs(again)
    assert its_outputs[0].dtype == kind and torch.equal(its_outputs[0], outputs[0])
    assert all(torch.equal(its_state[name], value) for name, value in state.items())


def test_options_take_the_place_of_those_it_was_saved_with(saved: dict[str, Path]) -> None:
    """Wrong: a backbone that was trained can't be loaded for fine-tuning, which freezes it, or for
    a head that reads fewer features."""
    frozen = RandWire.from_pretrained(saved["RandWire"], norm="FrozenBN", out_features=["res5"])
    assert list(frozen.output_shape()) == ["res5"]
    weights = build_backbone().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in frozen.state_dict().items())
    few = RandWire.from_pretrained(saved["RandWire"], out_features=["res3"])
    assert torch.equal(few(X)["res3"], build_backbone()(X)["res3"])
    load = RandWireClassifier.from_pretrained
    assert "size mismatch" in refusal_of(lambda: load(saved["RandWireClassifier"], num_classes=3))
    assert "'wide'" in refusal_of(lambda: load(saved["RandWireClassifier"], wide=3))


def test_tools_read_the_folders_of_whole_models(saved: dict[str, Path]) -> None:
    """Wrong: tools/predict.py and its like read a checkpoint, but not what it was published as."""
    detector, classifier = load_detector(saved["Detector"]), load_classifier(saved["Classifier"])
    assert state_and_outputs(detector)[1][1].equal(state_and_outputs(build_detector())[1][1])
    assert classifier.class_names == NAMES
    assert "use load_classifier" in refusal_of(lambda: load_detector(saved["Classifier"]))
    assert "holds a RandWire" in refusal_of(lambda: load_detector(saved["RandWire"]))


# -------------------------------------------------------------------------------------------------
# Refusals
# -------------------------------------------------------------------------------------------------


def test_damaged_weights_are_refused(folder: Path) -> None:
    """Wrong: one bit of one weight, or the end of the file, is lost, and nobody notices."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-9], b""):
        file.write_bytes(damaged)
        assert "sha256" in refusal_of(lambda: RandWire.from_pretrained(folder))
    cut = whole[:-9]
    file.write_bytes(cut)
    edit(folder, lambda config: config.update(sha256=hashlib.sha256(cut).hexdigest()))
    assert "no whole .safetensors" in refusal_of(lambda: RandWire.from_pretrained(folder))
    file.unlink()
    assert "can't be read" in refusal_of(lambda: RandWire.from_pretrained(folder))


def test_a_pickle_in_disguise_is_refused_and_not_run(folder: Path) -> None:
    """Wrong: a stranger's code runs, because its file has the name of one that holds none."""
    file, exploded = folder / "model.safetensors", folder / "exploded"
    content = pickle.dumps(RunsCode(exploded))
    torch.save({"model": RunsCode(exploded)}, file)
    for disguised in (file.read_bytes(), content):
        file.write_bytes(disguised)
        digest = hashlib.sha256(disguised).hexdigest()
        edit(folder, lambda config, digest=digest: config.update(sha256=digest))
        for load in (RandWire.from_pretrained, from_pretrained, load_detector):
            assert "pickle" in refusal_of(lambda load=load: load(folder))
    assert not exploded.exists()


def test_equal_models_have_one_sha256(tmp_path: Path) -> None:
    """Wrong: the sha256 on the card is another whenever the same model is written."""
    state = {"ü": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.half)}
    entries = {name: {"value": name} for name in "zyxwvü"}
    content = safetensors_bytes(state, entries)
    assert content == safetensors_bytes(dict(state), dict(reversed(entries.items())))
    (tmp_path / "a.safetensors").write_bytes(content)
    found = read_safetensors(tmp_path / "a.safetensors")
    assert_equal(dict(sorted(found.pop("model").items())), dict(sorted(state.items())))
    assert found == entries


def test_a_header_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    """Wrong: one in 32 whole files is refused, whose header's length begins as a pickle does."""
    model, file = build_backbone(), tmp_path / "model.safetensors"
    for length in range(0, 256, 8):
        model.save_pretrained(tmp_path, class_names=["x" * length], overwrite=True)
        if file.read_bytes()[0] == 0x80:
            break
    assert file.read_bytes()[0] == 0x80
    assert RandWire.from_pretrained(tmp_path).spec == SPEC


def test_another_wiring_is_refused(folder: Path) -> None:
    """Wrong: weights of one wiring run in another, whose shapes are the same."""
    other = draw_spec("small", "WS", seed=2)
    entry = Wiring(other).to_dict()
    edit(folder, lambda c: c["entries"]["randwire"].update(fingerprint=other.fingerprint))
    refused = refusal_of(lambda: RandWire.from_pretrained(folder))
    assert other.fingerprint in refused and SPEC.fingerprint in refused
    edit(folder, lambda c: c["entries"].update(randwire=entry))
    assert "'randwire'" in refusal_of(lambda: RandWire.from_pretrained(folder))
    edit(folder, lambda c: c["entries"].update(randwire={"spec": "[", "fingerprint": ""}))
    assert "damaged" in refusal_of(lambda: RandWire.from_pretrained(folder))


def test_another_kind_is_refused(saved: dict[str, Path], tmp_path: Path, folder: Path) -> None:
    """Wrong: what is no backbone is loaded as one, or fails with a traceback."""
    for kind in BUILD:
        for other, build in BUILD.items():
            if other != kind:
                load = type(build()).from_pretrained
                refused = refusal_of(lambda load=load, kind=kind: load(saved[kind]))
                assert f"a {kind}, not a {other}" in refused
    edit(folder, lambda config: config.update(kind="RandWireClassifier"))
    assert "RandWireClassifier" in refusal_of(lambda: from_pretrained(folder))
    whole = build_detector().save_pretrained(tmp_path / "detector")
    edit(whole, lambda config: config.update(kind="Classifier"))
    assert "not that of a Classifier" in refusal_of(lambda: from_pretrained(whole))
    edit(folder, lambda config: config.update(kind="BertModel"))
    assert "'BertModel'" in refusal_of(lambda: from_pretrained(folder))
    edit(folder, lambda config: config.update(randwire_d2_format=2))
    assert "upgrade" in refusal_of(lambda: from_pretrained(folder))
    for text in ("{", "[]", '{"architectures": ["BertModel"]}'):
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal_of(lambda: from_pretrained(folder))
    (folder / "config.json").unlink()
    assert "does not exist" in refusal_of(lambda: from_pretrained(folder))
    assert "neither" in refusal_of(lambda: from_pretrained(folder / "README.md"))


def test_nothing_is_written_by_half(tmp_path: Path) -> None:
    """Wrong: an interrupted save leaves a folder that looks whole, or takes files of others."""
    model, folder = build_backbone(), tmp_path / "model"
    with pytest.raises(OSError), mock.patch.object(os, "replace", side_effect=OSError("full")):
        model.save_pretrained(folder)
    assert not list(tmp_path.iterdir())

    folder.mkdir()
    model.save_pretrained(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert "not empty" in refusal_of(lambda: model.save_pretrained(folder))
    other = RandWire(draw_spec("small", "WS", seed=2))
    other.save_pretrained(folder, overwrite=True)
    assert RandWire.from_pretrained(folder).spec == other.spec

    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(OSError):  # between the weights and the config
        model.save_pretrained(folder, overwrite=True)
    assert "states" in refusal_of(lambda: RandWire.from_pretrained(folder))
    (folder / "README.md").rmdir()
    model.save_pretrained(folder, overwrite=True)
    assert RandWire.from_pretrained(folder).spec == model.spec
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert "a file" in refusal_of(lambda: model.save_pretrained(folder / "model.safetensors"))


def test_a_folder_that_is_a_link_to_an_empty_one_takes_a_model(tmp_path: Path) -> None:
    """Wrong: a folder on another disk, a link or a mount, fails once the training is over."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    build_backbone().save_pretrained(tmp_path / "link")
    assert RandWire.from_pretrained(tmp_path / "disk").spec == SPEC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]


def dilate(model: RandWire) -> None:
    conv = model.get_submodule("res5.nodes.0.conv.depthwise")
    conv.dilation = conv.padding = (2, 2)


def add_an_activation(model: RandWire) -> None:
    model.get_submodule("res5.nodes.0.conv").add_module("act", nn.GELU())


def freeze_norms(model: RandWire) -> None:
    """As Detectron2's users do; ``model.freeze`` would be saved as ``freeze_at``."""
    model.res5 = FrozenBatchNorm2d.convert_frozen_batchnorm(model.res5)


@pytest.mark.parametrize(
    "change, where",
    [
        (dilate, "nodes.0.conv.depthwise"),
        (add_an_activation, "nodes.0.conv.act"),
        (freeze_norms, "nodes.0.norm"),
    ],
)
def test_a_network_that_computes_something_else_is_not_saved(
    change: Callable[[RandWire], None], where: str, tmp_path: Path
) -> None:
    """Wrong: a dilated backbone comes back without its dilation, or one with frozen norms trains
    with batch statistics, and without a word."""
    model = build_backbone()
    change(model)
    assert f"'res5.{where}'" in refusal_of(lambda: model.save_pretrained(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrap", [nn.SyncBatchNorm.convert_sync_batchnorm, checkpoint_wrapper])
def test_a_network_that_was_prepared_for_training_is_saved(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    """Wrong: it is refused, though it computes what the one that is built computes."""
    model = build_backbone()
    model.res4 = wrap(model.res4)
    model.save_pretrained(tmp_path / "model")
    expected, found = model(X), RandWire.from_pretrained(tmp_path / "model")(X)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_network_that_was_changed_is_not_saved(tmp_path: Path) -> None:
    """Wrong: a folder is written that its own options can't load."""
    model = build_classifier_network()
    model.fc = nn.Linear(1280, 7, bias=False)
    assert "'fc.bias'" in refusal_of(lambda: model.save_pretrained(tmp_path / "model"))
    norm: Any = partial(nn.GroupNorm, 1)  # Detectron2 takes functions, too
    odd = RandWire(SPEC, norm=norm)
    assert "options of this RandWire" in refusal_of(lambda: odd.save_pretrained(tmp_path / "odd"))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------
# The Hub
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Path], None]:
    """Puts folders into huggingface_hub's cache, as a download leaves them; there is no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    # Before 0.24, a copy of it is where it is read.
    copy_of_it = "huggingface_hub._snapshot_download.HF_HUB_CACHE"
    monkeypatch.setattr(copy_of_it, str(cache), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, revision: str, folder: Path) -> None:
        commit = hashlib.sha1(f"{repo}{revision}".encode()).hexdigest()
        root = cache / f"models--{repo.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / revision).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():
            (root / "snapshots" / commit / file.name).symlink_to(file)

    return put


def test_a_repository_is_a_model(hub: Callable, saved: dict[str, Path], tmp_path: Path) -> None:
    """Wrong: owner/name, or a revision of it, gives no model or another one."""
    other = RandWire(draw_spec("small", "WS", seed=2))
    hub("me/net", "main", saved["RandWire"])
    hub("me/net", "v2", other.save_pretrained(tmp_path / "other"))
    hub("me/detector", "main", saved["Detector"])
    for name, spec in (("me/net", SPEC), ("hf://me/net", SPEC), ("hf://me/net@v2", other.spec)):
        assert RandWire.from_pretrained(name).spec == spec
    assert load_detector("hf://me/detector", "cpu").class_names == NAMES
    assert "hf://me/none" in refusal_of(lambda: from_pretrained("hf://me/none"))
    assert "names no repository" in refusal_of(lambda: from_pretrained("hf://me"))


def test_a_missing_library_is_named(
    hub: Callable, saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who lacks an extra gets a traceback, and no word of what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    load = RandWire.from_pretrained
    assert "pip install huggingface_hub" in refusal_of(lambda: load("hf://me/net"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install safetensors" in refusal_of(lambda: load(saved["RandWire"]))
    save = build_backbone().save_pretrained
    assert "pip install safetensors" in refusal_of(lambda: save(tmp_path / "new"))


def test_a_repository_is_where_a_training_starts(
    hub: Callable, saved: dict[str, Path], tmp_path: Path
) -> None:
    """Wrong: MODEL.WEIGHTS hf://owner/name loads nothing into a detector's backbone, or weights of
    another wiring, or fails only when the processes are there."""
    hub("me/net", "main", saved["RandWire"])
    hub("me/detector", "main", saved["Detector"])
    wrong = build_backbone().save_pretrained(tmp_path / "wrong")
    (wrong / "model.safetensors").write_bytes(b"cut")
    hub("me/wrong", "main", wrong)

    file = tmp_path / "config.yaml"
    file.write_text(detector_cfg(draw_spec("small", "WS", seed=2)).dump())

    def config(weights: str, *flags: str) -> CfgNode:
        given = ["--config-file", str(file), *flags, "MODEL.WEIGHTS", weights]
        return load_config(argument_parser().parse_args(given))

    assert "sha256" in refusal_of(lambda: config("hf://me/wrong"))
    assert "hf://me/none" in refusal_of(lambda: config("hf://me/none"))
    cfg = config("hf://me/net", "--config-from-weights")
    model = build_model(cfg)
    RandWireCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    # Frozen or not: a backbone's norms that count batches keep their own number.
    expected, found = build_backbone().state_dict(), model.backbone.bottom_up.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    again = build_model(detector_cfg())
    RandWireCheckpointer(again).load("hf://me/detector")
    expected = build_detector().model.state_dict()
    assert all(torch.equal(expected[k], v) for k, v in again.state_dict().items())
    assert SPEC.fingerprint in refusal_of(lambda: config("hf://me/net"))


# -------------------------------------------------------------------------------------------------
# Publishing
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    draw_image_folders(root, train=4, val=2)
    output = root / "output"
    run_tool(
        "pretrain_imagenet.py", "--config-file", ROOT / "configs/imagenet/randwire_c78_250ep.yaml",
        "MODEL.DEVICE", "cpu", "MODEL.RANDWIRE.CHANNELS", 8, "MODEL.RANDWIRE.NUM_NODES", 6,
        "MODEL.CLASSIFIER.NUM_CLASSES", 3, "INPUT.TRAIN_CROP_SIZE", 32, "INPUT.TEST_CROP_SIZE", 32,
        "DATASETS.TRAIN", f"('{root / 'train'}',)", "DATASETS.TEST", f"('{root / 'val'}',)",
        "SOLVER.EPOCHS", 0, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()",
        "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", output, log=root / "log", pictures=True,
    )  # fmt: skip
    return output


def plain(card: Path) -> str:
    """Its words, without the lines of its tables."""
    return " ".join(card.read_text().replace("|", " ").split())


def test_a_run_is_published_with_its_record(run: Path, tmp_path: Path) -> None:
    """Wrong: the card states what the run's files do not, or the model is not the run's."""
    main([str(run), str(tmp_path / "published")])
    card = plain(tmp_path / "published" / "README.md")
    top1 = last_metrics(run)["classification/top1"]
    content = (tmp_path / "published" / "model.safetensors").read_bytes()
    command = "python tools/pretrain_imagenet.py --config-file"
    for stated in (
        f"classification/top1 {top1:.2f}", "trained on train", "3: a, b, c", command,
        f"OUTPUT_DIR {run}", hashlib.sha256(content).hexdigest(), "SOLVER.MAX_ITER 2",
        f"PyTorch {torch.__version__}", load_classifier(run).model.network.spec.fingerprint,
    ):  # fmt: skip
        assert stated in card
    again, ours = Classifier.from_pretrained(tmp_path / "published"), load_classifier(run)
    assert torch.equal(again(PIXELS), ours(PIXELS))


def test_a_card_names_data_by_path_as_their_owner_does() -> None:
    """Wrong: the reader is told a name that stands in a catalog of one process alone."""
    cfg = detector_config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_d8c06b41_train",), ("coco_d8c06b41_val",)
    assert sections_of("x.pth", cfg, None, None)["Data"]["trained on"] == "coco_d8c06b41_train"
    cfg.DATASETS.PATH = "/home/me/coco"
    data = sections_of("x.pth", cfg, None, None)["Data"]
    assert (data["trained on"], data["tested on"]) == ("coco (train)", "coco (val)")


def test_a_card_names_a_folder_that_ends_in_a_slash() -> None:
    """Wrong: the card says that the model was trained on nothing."""
    cfg = classifier_config()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("my/train/",), ("my/val",)
    data = sections_of("nowhere/model.pth", cfg, None, None)["Data"]
    assert isinstance(data, dict) and (data["trained on"], data["tested on"]) == ("train", "val")


def test_a_card_names_the_command_and_the_config_as_its_reader_has_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: who trained without a checkout publishes a script that they don't have, and the path
    of their own environment."""
    shutil.copytree(run, tmp_path / "run")
    log, name = tmp_path / "run" / "log.txt", "configs/imagenet/randwire_c78_250ep.yaml"
    installed = f"/venv/lib/python3.12/site-packages/randwire_d2/{name}"
    log.write_text(log.read_text().replace(str(ROOT / name), installed))
    monkeypatch.setattr(sys, "argv", ["/venv/bin/randwire-d2", "publish"])
    main([str(tmp_path / "run"), str(tmp_path / "published")])
    card = plain(tmp_path / "published" / "README.md")
    assert f"randwire-d2 pretrain --config-file {name} " in card and "/venv" not in card


def test_a_pretrained_backbone_is_published_alone(run: Path, tmp_path: Path) -> None:
    """Wrong: what detectors start from has other weights, or no record, once it is published."""
    main([str(run / "backbone.pth"), str(tmp_path / "published")])
    weights = RandWire.from_pretrained(tmp_path / "published", norm="FrozenBN").state_dict()
    source = load_checkpoint(str(run / "backbone.pth"))["model"]
    assert weights and len(weights) == len(source)
    for name, value in weights.items():
        assert torch.equal(value, source[f"backbone.bottom_up.{name}"])
    card = plain(tmp_path / "published" / "README.md")
    assert f"classification/top1 {last_metrics(run)['classification/top1']:.2f}" in card
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["entries"]["preprocessing"]["input_format"] == "RGB"


def test_what_is_no_model_is_not_published(tmp_path: Path) -> None:
    """Wrong: a folder is written of what nobody can load, or a traceback says why not."""
    bare = tmp_path / "bare.pth"
    torch.save({"model": {"backbone.res2.weight": torch.zeros(1)}}, bare)
    for source, word in ((bare, "wiring"), (tmp_path / "none", "does not exist")):
        with pytest.raises(SystemExit) as caught:
            main([str(source), str(tmp_path / "published")])
        said = str(caught.value)
        assert said.startswith("publish_model.py: error: ") and word in said and "\n" not in said
    assert not (tmp_path / "published").exists()


def test_a_card_has_no_figures_of_single_classes() -> None:
    """Wrong: AP of a class whose name has a slash is taken for one of the whole."""
    whole = {"bbox/AP": 1.0, "my-set/segm/AP50": 2.0, "classification/top1": 3.0}
    others = {"bbox/AP-nut/bolt": 4.0, "bbox/AP-cat": 5.0, "my-set/bbox/AP-a-b": 6.0, "lr": 7.0,
              "bbox_TTA/AP": 8.0}  # fmt: skip
    assert _results(whole | others) == whole
