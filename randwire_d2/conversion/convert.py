"""The conversion: read a checkpoint of any layout, rename its weights, verify and write them."""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..checkpoint import CLASS_NAMES_KEY, PREPROCESSING_KEY, WIRING_KEY, Preprocessing, Wiring
from ..files import check_file, make_folder_of, write_or_print
from ..wiring import NetworkSpec
from . import public, randwire, resnet
from .formats import RESNETS_KEY, Checkpoint, check_format, read_checkpoint, write_checkpoint
from .source import ResNetArch, Source, some
from .target import PREFIXES, Target
from .verification import Verification, default_image, verify


class Layout(NamedTuple):
    """How a layout is recognised, by the name of a weight, and the function that reads it."""

    weight: str  # a regular expression
    read: Callable[..., Source]


# The layouts, in the order in which ``recognise`` tries them.
LAYOUTS = {
    public.SEUNGWONPARK: Layout(r"^dagly3\.nodes\.", public.read_seungwonpark),
    public.JIAMINREN: Layout(r"^conv3\.nodeop\.", public.read_jiaminren),
    resnet.TORCHVISION: Layout(r"^layer1\.0\.conv1\.weight$", resnet.read_torchvision),
    resnet.DETECTRON2: Layout(r"^conv1_w$|(^|\.)stem\.conv1\.weight$", resnet.read_detectron2),
    randwire.LAYOUT: Layout(r"(^|\.)stem\.conv\.weight$", randwire.read),
}
AVERAGED = "the weights are the average of SOLVER.EMA, as evaluated, and not the last ones"


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source: the network that was read.
        output: the file that was written.
        to: ``"fpn"``, ``"bare"`` or ``"classifier"``.
        keys: the number of weights in ``output``.
        options: the KEY VALUE pairs that a training or a test with ``output`` needs.
        spec_file: the file that contains the spec, if one was written.
        verification: the verification's result; None without a verification.
    """

    source: Source
    output: str
    to: str
    keys: int
    options: list[str]
    spec_file: str | None
    verification: Verification | None

    @property
    def config_from_weights(self) -> bool:
        """Whether only ``output`` gives the wiring, and none of ``options``."""
        randwire = isinstance(self.source.network, NetworkSpec)
        return randwire and not any(key.startswith("MODEL.RANDWIRE.") for key in self.options)


def convert(
    source_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: str = "auto",
    to: str = "fpn",
    graphs: Sequence[str | os.PathLike[str]] = (),
    preprocessing: Preprocessing | None = None,
    config_file: str | None = None,
    options: Sequence[str] = (),
    spec_output: str | os.PathLike[str] | None = None,
    image: np.ndarray | None = None,
    verified: bool = True,
) -> Conversion:
    """Convert a checkpoint; write nothing if any step fails.

    Args:
        source_file: the checkpoint, in a layout of ``LAYOUTS``.
        output: the file to write, ``.pth``, ``.pkl`` or ``.safetensors``; an old one is replaced.
        layout: the layout of the source; ``"auto"`` recognises it.
        to: ``"fpn"`` for a backbone inside an FPN, ``"bare"`` for a detector's plain backbone,
            ``"classifier"`` for the ImageClassifier of tools/pretrain_imagenet.py; this needs a
            RandWire whose file contains its classifier.
        graphs: the wiring's files for the public layouts, see ``read_seungwonpark`` and
            ``read_jiaminren``.
        preprocessing: that of the images, for a source that does not state it.
        config_file: the config of the detector or classifier that verifies the weights; by default
            a Faster R-CNN or a classifier with the source's preprocessing.
        options: KEY VALUE pairs that are merged into this config.
        spec_output: the file to write the network's spec to, for MODEL.RANDWIRE.SPEC_FILE.
        image: (H, W, 3), uint8, RGB, H and W multiples of 32; by default one of the built-in set.
        verified: whether to verify.

    Raises:
        ValueError: one line that names what is wrong, and the way out.
    """
    output = os.fspath(output)
    spec_file = None if spec_output is None else os.fspath(spec_output)
    check_format(output)
    check_file("OUTPUT", output)
    check_file("--spec-output", spec_file)
    if os.path.realpath(output) == os.path.realpath(source_file):
        raise ValueError(f"OUTPUT is SOURCE, {output!r}: choose another name")
    target = Target(config_file, options, to)
    checkpoint = read_checkpoint(source_file)
    source = read_source(checkpoint, target, layout, graphs=graphs, preprocessing=preprocessing)
    if spec_file is not None and isinstance(source.network, ResNetArch):
        raise ValueError("--spec-output: a ResNet has no spec; MODEL.RESNETS describes it")
    needed = target.fit(source, spec_file)
    if verified and image is None:
        image = default_image()
    state = _state(source, to)
    verification = _write(output, spec_file, state, source, target, image if verified else None)
    needed += ["MODEL.WEIGHTS", output]
    return Conversion(source, output, to, len(state), needed, spec_file, verification)


def _state(source: Source, to: str) -> dict[str, Tensor]:
    """The weights under their names in a detector or a classifier."""
    state = {PREFIXES[to] + name: value for name, value in source.weights.items()}
    if source.head is not None:
        before = PREFIXES[to].removesuffix("backbone.")
        state |= {before + name: value for name, value in source.head.weights.items()}
    return state


def _write(
    output: str,
    spec_file: str | None,
    state: dict[str, Tensor],
    source: Source,
    target: Target,
    image: np.ndarray | None,
) -> Verification | None:
    """Write the files; with an image, verify the weights first."""
    entries: dict[str, object] = {PREPROCESSING_KEY: source.preprocessing.to_dict()}
    if source.head is not None and source.head.class_names:
        entries[CLASS_NAMES_KEY] = source.head.class_names
    if isinstance(source.network, NetworkSpec):
        head_relu = None if source.head is None else source.head.relu
        entries[WIRING_KEY] = Wiring(source.network, head_relu).to_dict()
    else:
        entries[RESNETS_KEY] = dict(vars(source.network))
    # In the output's folder, so that a rename suffices; with its suffix, which tells the format.
    folder = os.path.dirname(os.path.abspath(output))
    make_folder_of(output)
    with tempfile.TemporaryDirectory(prefix=".convert_checkpoint_", dir=folder) as temporary:
        unproven = os.path.join(temporary, os.path.basename(output))
        write_checkpoint(unproven, state, entries)
        verification = None if image is None else verify(unproven, source, target, image)
        if spec_file is not None and isinstance(source.network, NetworkSpec):
            write_or_print(source.network.to_json(), spec_file)
        os.replace(unproven, output)
    return verification


def read_source(
    checkpoint: Checkpoint,
    target: Target,
    layout: str = "auto",
    *,
    graphs: Sequence[str | os.PathLike[str]] = (),
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Read the network in a checkpoint; see ``convert`` for the arguments.

    Raises:
        ValueError: if the layout is unknown, or the file does not fit it.
    """
    if layout == "auto":
        layout = recognise(checkpoint)
    if layout not in LAYOUTS:
        raise ValueError(f"the layout {layout!r} is unknown; known are {sorted(LAYOUTS)}")
    has_graphs = layout in (public.SEUNGWONPARK, public.JIAMINREN)
    if graphs and not has_graphs:
        raise ValueError(f"--graphs: the layout {layout} does not have its wiring in other files")
    if target.with_head and layout in (resnet.TORCHVISION, resnet.DETECTRON2):
        raise ValueError(
            f"--to classifier is for RandWires; the layout {layout} is a ResNet's, whose backbone "
            "alone is converted, with --to fpn or bare"
        )
    files = {"graphs": graphs} if has_graphs else {}
    try:
        source = LAYOUTS[layout].read(checkpoint, target, preprocessing, **files)
    except (IndexError, RuntimeError, TypeError) as e:  # a scalar where a convolution should be
        reason = (str(e).splitlines() or [""])[0]
        raise ValueError(
            f"{checkpoint.path!r} (layout {layout}): its weights have shapes of no such network "
            f"({reason})"
        ) from e
    if checkpoint.averaged:
        return replace(source, notes=[*source.notes, AVERAGED])
    return source


def recognise(checkpoint: Checkpoint) -> str:
    """The layout of a checkpoint, recognised by the names of its weights.

    Raises:
        ValueError: if they are those of no known layout.
    """
    for name, layout in LAYOUTS.items():
        if any(re.search(layout.weight, key) for key in checkpoint.state):
            return name
    raise ValueError(
        f"{checkpoint.path!r} is of no known layout ({', '.join(sorted(LAYOUTS))}): its keys are "
        f"{some(sorted(checkpoint.state))}"
    )
