"""Checkpoints appear whole, run no code when loaded, and refuse another wiring."""

import logging
import os
import pickle
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from helpers import FORK_SERVER, ROOT, RunsCode, raises_one_line

from randwire_d2 import NetworkGenerator, RandWire, RandWireClassifier, add_randwire_config
from randwire_d2.checkpoint import (
    CLASS_NAMES_KEY,
    CONFIG_KEY,
    KEYPOINTS_KEY,
    PREPROCESSING_KEY,
    STUFF_KEY,
    WIRING_KEY,
    Classes,
    RandWireCheckpointer,
    Wiring,
    check_wiring,
    load_checkpoint,
    stored_config,
)
from randwire_d2.config import classifier_config, detector_config, spec_from_config
from randwire_d2.engine import argument_parser, read_config
from randwire_d2.files import atomic_open
from randwire_d2.weight_files.safetensors_file import safetensors_bytes
from randwire_d2.wiring import NetworkSpec

GENERATOR = NetworkGenerator(channels=8, num_nodes=10)


def small_backbone(seed: int = 1) -> RandWire:
    return RandWire(GENERATOR(seed))


def test_atomic_open_leaves_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_open(path) as f:
        f.write("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_checkpoint_round_trip_carries_the_spec(tmp_path: Path) -> None:
    model = small_backbone()
    RandWireCheckpointer(model, str(tmp_path)).save("model", iteration=3)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]

    file = torch.load(tmp_path / "model.pth", weights_only=True)
    assert NetworkSpec.from_json(file[WIRING_KEY]["spec"]) == model.spec
    assert file[WIRING_KEY]["fingerprint"] == model.spec.fingerprint

    torch.manual_seed(7)
    other = small_backbone()
    rest = RandWireCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 3
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_another_wiring_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    model, other = small_backbone(1), small_backbone(2)
    RandWireCheckpointer(model, str(tmp_path)).save("model")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError) as e:
        RandWireCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert model.spec.fingerprint in str(e.value)
    assert other.spec.fingerprint in str(e.value)
    assert "--config-from-weights" in str(e.value)
    assert "convert_checkpoint.py" in str(e.value)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())


def test_a_classifier_with_another_relu_in_its_head_is_refused(tmp_path: Path) -> None:
    """Wrong: a classifier that was trained with HEAD_RELU is evaluated without it: the shapes are
    the same, and the accuracy would be another network's."""
    spec, path = GENERATOR(1), str(tmp_path / "model.pth")
    RandWireCheckpointer(RandWireClassifier(spec, 3, head_relu=True), str(tmp_path)).save("model")
    assert torch.load(path, weights_only=True)[WIRING_KEY]["head_relu"] is True
    RandWireCheckpointer(RandWireClassifier(spec, 3, head_relu=True)).load(path)
    with pytest.raises(ValueError, match=r"HEAD_RELU True.* False.*--config-from-weights"):
        RandWireCheckpointer(RandWireClassifier(spec, 3)).load(path)
    without_head = torch.nn.ModuleDict({"backbone": RandWire(spec)})
    RandWireCheckpointer(without_head).load(path)

    # As --config-from-weights does it; a config that has no classifier is left alone.
    for cfg, taken in ((classifier_config(), True), (detector_config(), None)):
        if taken:
            cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
        args = argument_parser().parse_args(["--config-from-weights", "MODEL.WEIGHTS", path])
        cfg = read_config(args, cfg)
        assert spec_from_config(cfg) == spec
        assert cfg.MODEL.get("CLASSIFIER", {}).get("HEAD_RELU") is taken

    # A classifier has no features that a detector reads.
    cfg = classifier_config()
    cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
    file = torch.load(path, weights_only=True)
    check_wiring(RandWire(spec, relu_features=False), {**file, CONFIG_KEY: cfg.dump()})

    # A file of before this key existed says nothing, and one whose entry is no truth is damaged.
    del file[WIRING_KEY]["head_relu"]
    assert Wiring.of(file) == Wiring(spec)
    file[WIRING_KEY]["head_relu"] = "yes"
    with pytest.raises(ValueError, match="head_relu is 'yes'"):
        Wiring.of(file)


def detector_cfg(*options: str) -> CfgNode:
    cfg = get_cfg()
    add_randwire_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml"))
    cfg.merge_from_list(["MODEL.RANDWIRE.CHANNELS", "8", *options])
    return cfg


def detector(*options: str) -> torch.nn.Module:
    return build_model(detector_cfg(*options))


def test_checkpoint_knows_the_images_and_warns_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Features of RGB images mean nothing on BGR ones, and the shapes are the same."""
    RandWireCheckpointer(detector(), str(tmp_path)).save("model")
    file = torch.load(tmp_path / "model.pth", weights_only=True)
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    assert file[PREPROCESSING_KEY] == {
        "input_format": "RGB",
        "pixel_mean": mean,
        "pixel_std": std,
    }
    with caplog.at_level(logging.WARNING):
        RandWireCheckpointer(detector()).load(str(tmp_path / "model.pth"))
    assert "trained with" not in caplog.text
    for options in (["INPUT.FORMAT", "BGR"], ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            RandWireCheckpointer(detector(*options)).load(str(tmp_path / "model.pth"))
        assert f"trained with INPUT.FORMAT RGB MODEL.PIXEL_MEAN {mean}" in caplog.text
        assert options[1] in caplog.text


def test_a_checkpoint_carries_its_config_and_class_names(tmp_path: Path) -> None:
    """Wrong: a copied checkpoint names files of the machine that wrote it, describes another
    network than its weights are of, or can't be read with weights_only."""
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(GENERATOR(5).to_json())
    options = ["MODEL.RANDWIRE.SPEC_FILE", str(spec_file), "OUTPUT_DIR", str(tmp_path),
               "MODEL.WEIGHTS", "/home/somebody/r50.pkl", "INPUT.MIN_SIZE_TEST", "99"]  # fmt: skip
    cfg = detector_cfg(*options)
    cfg.freeze()
    names = ("circle", "cat, wild")
    checkpointer = RandWireCheckpointer(
        build_model(cfg), str(tmp_path), cfg=cfg, classes=Classes(names)
    )
    checkpointer.save("model", iteration=3)
    file = torch.load(tmp_path / "model.pth", weights_only=True)
    assert str(tmp_path) not in file[CONFIG_KEY] and "/home" not in file[CONFIG_KEY]
    assert Classes.of(file).names == ["circle", "cat, wild"]
    stored = stored_config(file)
    assert stored is not None
    assert spec_from_config(stored) == GENERATOR(5)
    other = stored_config({**file, WIRING_KEY: Wiring(GENERATOR(6)).to_dict()})
    assert other is not None and spec_from_config(other) == GENERATOR(6)
    assert (stored.INPUT.MIN_SIZE_TEST, stored.MODEL.WEIGHTS) == (99, "")
    assert stored.MODEL.FPN == cfg.MODEL.FPN and stored.SOLVER.BASE_LR == cfg.SOLVER.BASE_LR

    # Of before: it loads as it did, and says that it doesn't know.
    for key in (CONFIG_KEY, CLASS_NAMES_KEY):
        del file[key]
    torch.save(file, tmp_path / "old.pth")
    assert RandWireCheckpointer(build_model(cfg)).load(str(tmp_path / "old.pth"))["iteration"] == 3
    assert stored_config(file) is None and Classes.of(file) == Classes([])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("MODEL: !!python/object/apply:os.mkdir ['{proof}']", "python/object/apply:os.mkdir"),
        ("_BASE_: '{proof}'", "_BASE_"),
        ("MODEL: {{NOBODY_KNOWS: 1}}", "NOBODY_KNOWS"),
        ("- a list", "'config'"),
        (3, "'config' is damaged: a int"),
    ],
)
def test_a_strangers_config_runs_no_code(tmp_path: Path, text: str | int, named: str) -> None:
    """Wrong: what is in a checkpoint's config is executed, or fails with a traceback."""
    proof = tmp_path / "code-has-run"
    given = text.format(proof=proof) if isinstance(text, str) else text
    with raises_one_line(ValueError, match=named):
        stored_config({CONFIG_KEY: given})
    assert not proof.exists()


def test_a_strangers_config_asks_for_no_file() -> None:
    """Wrong: to load a checkpoint fetches a URL, or reads a file, that its config names."""
    text = "MODEL: {WEIGHTS: 'http://a/b', RANDWIRE: {SPEC_FILE: 'http://a/b'}}\nOUTPUT_DIR: /a"
    stored = stored_config({CONFIG_KEY: text})
    assert stored is not None
    assert not stored.MODEL.RANDWIRE.SPEC_FILE and not stored.MODEL.WEIGHTS
    assert stored.OUTPUT_DIR == "./output"


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        (CLASS_NAMES_KEY, ["a", 1]),
        (STUFF_KEY, {"names": ["sky"], "ids": [1, 2]}),
        (STUFF_KEY, {"names": ["sky"]}),
        (KEYPOINTS_KEY, {"names": ["nose", "tail"], "connections": [["nose", "ear"]]}),
        (KEYPOINTS_KEY, {"names": ["nose", "tail"], "connections": [["nose"]]}),
        (KEYPOINTS_KEY, {"names": [], "connections": []}),
    ],
)
def test_damaged_classes_are_refused(key: str, entry: Any) -> None:
    """Wrong: stuff gets another class's name, or a picture fails with a traceback."""
    with raises_one_line(ValueError, match=f"its entry '{key}' is damaged"):
        Classes.of({key: entry})


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """Else Detectron2 logs the missing keys and trains a random backbone with frozen norms."""
    path = tmp_path / "resnet.pth"
    torch.save({"stem.conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(9)}, path)
    model = torch.nn.ModuleDict({"backbone": small_backbone(), "fc": torch.nn.Linear(1, 9)})
    with pytest.raises(ValueError, match=r"'backbone'.*MODEL\.WEIGHTS"):
        RandWireCheckpointer(model).load(str(path))


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, suffix: str) -> None:
    proof = tmp_path / "code-has-run"
    path = tmp_path / f"model.{suffix}"
    data = {"model": {"weight": RunsCode(proof)}, "__author__": "a stranger"}
    if suffix != "pkl":
        torch.save(data, path)
    else:
        path.write_bytes(pickle.dumps(data))
    with pytest.raises(ValueError, match="holds posix.mkdir, .*could run code"):
        RandWireCheckpointer(small_backbone()).load(str(path))
    assert not proof.exists()


def test_an_entry_model_in_the_metadata_of_others_is_not_the_weights(tmp_path: Path) -> None:
    """Wrong: a .safetensors that names its model in its metadata is said to hold no weights."""
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(safetensors_bytes({"weight": torch.ones(2)}, {"model": "theirs"}))
    assert load_checkpoint(str(path))["model"]["weight"].sum() == 2


@pytest.mark.parametrize("suffix", ["pth", "pkl", "pyth", "safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    """Wrong: a traceback of torch or pickle, or a line without the file or the way out."""
    path = tmp_path / f"model.{suffix}"
    state = {"weight": torch.zeros(100)}
    if suffix == "pkl":
        whole = pickle.dumps({"model": {"weight": np.zeros(100)}, "__author__": "test"})
    elif suffix == "safetensors":
        whole = safetensors_bytes(state, {})
    else:
        torch.save({"model": state}, path)
        whole = path.read_bytes()
    contents = {
        b"": "is empty",
        whole[:200]: "cut off",
        b"<!DOCTYPE html><html>": "no checkpoint",
        pickle.dumps([1, 2]): "holds a list" if suffix == "pkl" else "damaged, cut off, or no",
    }
    if suffix == "pkl":
        contents[pickle.dumps({"model": {}, "__author__": "test"})] = "holds no weights"
    for content, says in contents.items():
        path.write_bytes(content)
        with raises_one_line(ValueError, match=says) as e:
            RandWireCheckpointer(small_backbone()).load(str(path))
        assert repr(str(path)) in str(e.value)
        assert re.search("copy or download it again|save ", str(e.value)), e.value
    path.unlink()
    with pytest.raises(ValueError, match="can't be read: No such file"):
        load_checkpoint(str(path))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_load_as_detectron2_writes_them(protocol: int, tmp_path: Path) -> None:
    """Wrong: those that Python 2 reads, or of the highest protocol, are taken for code."""
    model, other = small_backbone(), small_backbone()
    path = tmp_path / "model.pkl"
    arrays = {name: np.asarray(value) for name, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}, protocol))
    RandWireCheckpointer(other).load(str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_an_array_with_moved_axes_loads(protocol: int, tmp_path: Path) -> None:
    """Wrong: a convolution whose axes a conversion has moved, as from Caffe2 or TensorFlow, is
    refused, or the numbers are in another order."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": array}, "__author__": ""}, protocol))
    assert load_checkpoint(str(path))["model"]["a"].tolist() == array.tolist()


@pytest.mark.parametrize("order", "<>")
def test_a_pickle_says_nothing_of_a_type_but_its_order(order: str, tmp_path: Path) -> None:
    """Wrong: numpy takes an array's numbers for the addresses of objects, and follows them; or
    numbers in the other order are read wrong."""
    array = np.arange(3, dtype=f"{order}i8")
    sound = pickle.dumps({"model": {"a": array}, "__author__": ""}, 3)
    assert sound.count(b"\xffK\0t") == 1  # the flags of its type, none
    path = tmp_path / "model.pkl"
    path.write_bytes(sound.replace(b"\xffK\0t", b"\xffK\1t"))  # NPY_ITEM_REFCOUNT
    read = load_checkpoint(str(path))["model"]["a"]
    assert read.tolist() == [0, 1, 2] and read.dtype.flags == 0


def save_until_killed(folder: str, name: str) -> None:
    """Save a whole checkpoint, and a half one of that name."""
    checkpointer, save = RandWireCheckpointer(small_backbone(), folder), torch.save
    checkpointer.save("model_0000001", iteration=1)

    def save_half(data: Any, f: Any) -> None:
        save(data, f)
        f.truncate(f.tell() // 2)
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
    checkpointer.save(name, iteration=2)


@pytest.mark.parametrize("name", ["model_0000002", "model_0000001"])
def test_kill_in_the_middle_of_a_save_leaves_the_last_complete_one(
    tmp_path: Path, name: str
) -> None:
    killed = FORK_SERVER.Process(target=save_until_killed, args=(str(tmp_path), name))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    rest = RandWireCheckpointer(small_backbone(), str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 1
