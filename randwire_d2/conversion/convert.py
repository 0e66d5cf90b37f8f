"""The conversion: read a checkpoint of any layout, write it for Detectron2, prove it right."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..checkpoint import PREPROCESSING_KEY, WIRING_KEY, Preprocessing, Wiring
from ..files import atomic_open
from ..wiring import NetworkSpec
from . import public, randwire, resnet
from .detector import PREFIXES, Config, Verification, default_image, verify
from .formats import RESNETS_KEY, Checkpoint, check_format, read_checkpoint, write_checkpoint
from .source import ResNetArch, Source, some

# In the order in which they are recognised.
LAYOUTS = {
    public.SEUNGWONPARK: public.recognise_seungwonpark,
    public.JIAMINREN: public.recognise_jiaminren,
    resnet.TORCHVISION: resnet.recognise_torchvision,
    resnet.DETECTRON2: resnet.recognise_detectron2,
    randwire.LAYOUT: randwire.recognise,
}


@dataclass(frozen=True)
class Conversion:
    """What was converted, and what that proved.

    Attributes:
        source: the network that was read.
        output: the file that was written.
        to: ``"fpn"`` or ``"bare"``.
        keys: the number of weights in it.
        options: the KEY VALUE pairs that a training with it needs.
        spec_file: the file that holds the spec, if one was written.
        needs_spec: whether no keys of MODEL.RANDWIRE draw the wiring.
        verification: None if none was asked for.
    """

    source: Source
    output: str
    to: str
    keys: int
    options: list[str]
    spec_file: str | None
    needs_spec: bool
    verification: Verification | None


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
    """Convert a checkpoint; nothing is written unless all went well.

    Args:
        source_file: the checkpoint, of a layout in ``LAYOUTS``.
        output: the file to write, ``.pth``, ``.pkl`` or ``.safetensors``; it is replaced.
        layout: that of the source, or ``"auto"``.
        to: ``"fpn"`` for a backbone inside an FPN, ``"bare"`` for a detector's plain backbone.
        graphs: for the public layouts, see ``read_seungwonpark`` and ``read_jiaminren``.
        preprocessing: for a source that does not say how its images were prepared.
        config_file: the config of the detector to verify in; by default a Faster R-CNN that has the
            source's preprocessing.
        options: KEY VALUE pairs for it.
        spec_output: a file for the network's spec, MODEL.RANDWIRE.SPEC_FILE.
        image: (H, W, 3), uint8, RGB, sizes multiples of 32; by default one of the built-in set.
        verified: whether to verify.

    Raises:
        ValueError: one line that names what is wrong, and the way out.
    """
    output = os.fspath(output)
    check_format(output)
    _check_folder(output)
    if os.path.realpath(output) == os.path.realpath(source_file):
        raise ValueError(f"OUTPUT is SOURCE, {output!r}: choose another name")
    if spec_output is not None:
        _check_folder(os.fspath(spec_output))
    if to not in PREFIXES:
        raise ValueError(f"to must be one of {sorted(PREFIXES)}; got {to!r}")
    config = Config(config_file, options, to)
    source = read_source(
        read_checkpoint(source_file), layout, graphs=graphs, preprocessing=preprocessing,
        config=config,
    )  # fmt: skip
    if spec_output is not None and isinstance(source.network, ResNetArch):
        raise ValueError("--spec-output: a ResNet has no spec; MODEL.RESNETS describes it")
    state = {PREFIXES[to] + name: value for name, value in source.weights.items()}
    entries: dict[str, object] = {PREPROCESSING_KEY: source.preprocessing.to_dict()}
    if isinstance(source.network, NetworkSpec):
        entries[WIRING_KEY] = Wiring(source.network).to_dict()
    else:
        entries[RESNETS_KEY] = dict(vars(source.network))
    # Beside the output, so that it can take its name; under its suffix, which says how to load it.
    folder = os.path.dirname(os.path.abspath(output))
    with tempfile.TemporaryDirectory(prefix=".convert_checkpoint_", dir=folder) as temporary:
        spec_file = os.path.join(temporary, "spec.json")
        if isinstance(source.network, NetworkSpec):
            with atomic_open(spec_file) as f:
                f.write(source.network.to_json())
        needed = config.fit(source, spec_file)
        unproven = os.path.join(temporary, os.path.basename(output))
        write_checkpoint(unproven, state, entries)
        verification = None
        if verified:
            if image is None:
                image = default_image()
            verification = verify(unproven, source, config, image)
        if spec_output is not None:
            os.replace(spec_file, spec_output)
        os.replace(unproven, output)
    needs_spec = spec_file in needed
    if needs_spec:
        place = needed.index(spec_file)
        if spec_output is not None:
            needed[place] = os.fspath(spec_output)
        else:
            del needed[place - 1 : place + 1]
    return Conversion(
        source=source,
        output=output,
        to=to,
        keys=len(state),
        options=[*needed, "MODEL.WEIGHTS", output],
        spec_file=None if spec_output is None else os.fspath(spec_output),
        needs_spec=needs_spec,
        verification=verification,
    )


def read_source(
    checkpoint: Checkpoint,
    layout: str = "auto",
    *,
    graphs: Sequence[str | os.PathLike[str]] = (),
    preprocessing: Preprocessing | None = None,
    config: Config | None = None,
) -> Source:
    """The network in a checkpoint; see ``convert``.

    Raises:
        ValueError: if the layout is unknown, or the file does not fit it.
    """
    if layout == "auto":
        layout = recognise(checkpoint)
    try:
        return _read(checkpoint, layout, graphs, preprocessing, config)
    except (IndexError, RuntimeError, TypeError) as e:  # a scalar where a convolution should be
        reason = (str(e).splitlines() or [""])[0]
        raise ValueError(
            f"{checkpoint.path!r} (layout {layout}): its weights have shapes of no such network "
            f"({reason})"
        ) from e


def _read(
    checkpoint: Checkpoint,
    layout: str,
    graphs: Sequence[str | os.PathLike[str]],
    preprocessing: Preprocessing | None,
    config: Config | None,
) -> Source:
    public_layout = layout in (public.SEUNGWONPARK, public.JIAMINREN)
    if graphs and not public_layout:
        raise ValueError(f"--graphs: the layout {layout} does not have its wiring in other files")
    if layout == public.SEUNGWONPARK:
        return public.read_seungwonpark(checkpoint, preprocessing, graphs=graphs)
    if layout == public.JIAMINREN:
        configured = None if config is None else config.graph_config
        return public.read_jiaminren(
            checkpoint, preprocessing, graphs=graphs, configured=configured
        )
    if layout == resnet.TORCHVISION:
        return resnet.read_torchvision(checkpoint, preprocessing)
    if layout == resnet.DETECTRON2:
        stride = None if config is None else config.stride_in_1x1()
        return resnet.read_detectron2(checkpoint, preprocessing, stride_in_1x1=stride)
    if layout == randwire.LAYOUT:
        spec = None if config is None else config.spec
        return randwire.read(checkpoint, preprocessing, configured=spec)
    raise ValueError(f"the layout {layout!r} is unknown; known are {sorted(LAYOUTS)}")


def recognise(checkpoint: Checkpoint) -> str:
    """The layout of a checkpoint, by its keys.

    Raises:
        ValueError: if it is none that is known.
    """
    for layout, recognised in LAYOUTS.items():
        if recognised(checkpoint.state):
            return layout
    raise ValueError(
        f"{checkpoint.path!r} is of no known layout ({', '.join(sorted(LAYOUTS))}): its keys are "
        f"{some(sorted(checkpoint.state))}"
    )


def _check_folder(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"the folder of {path!r} does not exist")
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder of {path!r} can't be written to")
