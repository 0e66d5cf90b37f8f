"""Config files of strangers: what their YAML tags may compute, and that nothing else is run."""

from pathlib import Path

import pytest
from detectron2 import model_zoo
from helpers import raises_one_line, refusal

from randwire_d2.config import detector_config, merge_file
from randwire_d2.yaml_tags import MOST_CHARACTERS, check_yaml

EVAL = '!!python/object/apply:eval ["{}"]'
HARMLESS = {
    "plain values": "[1, 2.5, yes, ~, text, {a: b}]",
    "a tuple, as yacs writes it": "!!python/tuple [1, 2]",
    "arithmetic": EVAL.format("[2 ** (1 / 3), -4 // 3, 7 % 4]"),
    "a comprehension in a comprehension": EVAL.format("[[x * y for x in [1, 2]] for y in (3, 4)]"),
    "an alias": "[&a [1, 2], *a]",
}
HARMFUL = {
    "a call of anything": "!!python/object/apply:os.system ['true']",
    "an object": "!!python/object/new:os.system ['true']",
    "a name": "!!python/name:os.system",
    "a module": "!!python/module:os",
    "eval by its other name": "!!python/object/apply:builtins.eval ['1']",
    "eval with names of its own": "!!python/object/apply:eval {args: ['1'], kwds: {globals: {}}}",
    "a tag as a key": "{? !!python/object/apply:os.system ['true'] : 1}",
    "an import": EVAL.format("__import__('os').system('true')"),
    "an import in base64": "!!python/object/apply:eval [!!binary '1234']",
    "an attribute": EVAL.format("[x.__class__ for x in [1]]"),
    "a function": EVAL.format("(lambda: 1)()"),
    "a text": EVAL.format("'a' * 3"),
    "a list that grows": EVAL.format("[1] * 10"),
    "a name from nowhere": EVAL.format("x"),
    "a power that fills the memory": EVAL.format("9 ** 9 ** 9"),
    "a power below one": EVAL.format("0 ** -1"),
    "a loop without end": EVAL.format(
        "[[[[1 for d in r] for c in r] for b in r] for r in [[" + "1, " * 30 + "1]]]"
    ),
    "brackets without end": "[" * 3000,
    "an alias of itself": "&a [*a]",
    "aliases of aliases": "[&a [1, 2, 3], "
    + ", ".join(f"&{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefghijk", "bcdefghijkl"))
    + "]",
    "a text without end": "'" + "a" * MOST_CHARACTERS + "'",
    "values without end": "[" + "1," * 1000 + "]",
}


@pytest.mark.parametrize("value", HARMLESS.values(), ids=HARMLESS)
def test_harmless(value: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"A: {value}\n")
    check_yaml(tmp_path / "config.yaml")


@pytest.mark.parametrize("value", HARMFUL.values(), ids=HARMFUL)
def test_harmful(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randwire_d2.yaml_tags.MOST_VALUES", 1000)
    path = tmp_path / "config.yaml"
    path.write_text(f"A: {value}\n")
    with raises_one_line(ValueError, match=str(path)):
        check_yaml(path)


def test_base_files(tmp_path: Path) -> None:
    # fvcore resolves a _BASE_ from the folder of the file that names it.
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "first.yaml").write_text("_BASE_: second.yaml\n")
    (tmp_path / "bases" / "second.yaml").write_text("A: !!python/name:os.system\n")
    (tmp_path / "one.yaml").write_text("_BASE_: bases/first.yaml\n")
    (tmp_path / "list.yaml").write_text("_BASE_: [bases/first.yaml]\n")
    for name in ("one.yaml", "list.yaml"):
        with pytest.raises(ValueError, match=r"second\.yaml, line 1"):
            check_yaml(tmp_path / name)
    (tmp_path / "circle.yaml").write_text("_BASE_: circle.yaml\n")
    with pytest.raises(ValueError, match="its own _BASE_"):
        check_yaml(tmp_path / "circle.yaml")


def test_two_base_files_may_share_a_third(tmp_path: Path) -> None:
    """Wrong: it is taken for a circle; or thirty files that name the next one twice, which fvcore
    reads 2³⁰ times, are read without end."""
    (tmp_path / "0.yaml").write_text("SEED: 3\n")
    for i in range(1, 31):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: [{i - 1}.yaml, {i - 1}.yaml]\n")
    cfg = detector_config()
    merge_file(cfg, str(tmp_path / "2.yaml"))
    assert cfg.SEED == 3
    with pytest.raises(ValueError, match=r"/30\.yaml names more than 100 files as _BASE_"):
        merge_file(cfg, str(tmp_path / "30.yaml"))


@pytest.mark.parametrize(
    "hidden",
    [
        "<<: {_BASE_: bad.yaml}",
        "<<: [{A: 1}, {<<: {_BASE_: [bad.yaml]}}]",
        "? !!str {=: _BASE_}\n: bad.yaml",
        "_BASE_: !!str {=: bad.yaml}",
        "_BASE_: [good.yaml, !!str {=: bad.yaml}]",
    ],
)
def test_a_hidden_base_file_is_looked_at(hidden: str, tmp_path: Path) -> None:
    """Wrong: PyYAML finds a _BASE_ where the check does not, and runs what its tags name."""
    (tmp_path / "good.yaml").write_text("SEED: 1\n")
    (tmp_path / "bad.yaml").write_text(f"SEED: !!python/object/apply:os.mkdir [{tmp_path}/ran]\n")
    (tmp_path / "config.yaml").write_text(f"{hidden}\n")
    with pytest.raises(ValueError, match=r"bad\.yaml, line 1: the tag .* may run code"):
        merge_file(detector_config(), str(tmp_path / "config.yaml"))
    assert not (tmp_path / "ran").exists()


def test_detectron2_s_own_tag_is_read() -> None:
    cfg = detector_config()
    merge_file(cfg, model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes[0] == [32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)] and len(sizes) == 5


@pytest.mark.parametrize("tool", ["train_net.py", "pretrain_imagenet.py", "convert_checkpoint.py"])
def test_no_tool_runs_a_config(tool: str, tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    config = tmp_path / "config.yaml"
    config.write_text(f"SEED: !!python/object/apply:os.mkdir ['{proof}']\n")
    files = ["in.pth", "out.pth"] if tool == "convert_checkpoint.py" else []
    (tmp_path / "in.pth").write_bytes(b"")
    said = refusal(
        tool, *[tmp_path / name for name in files], "--config-file", config, log=tmp_path / "log"
    )
    assert "may run code" in said and not proof.exists()
