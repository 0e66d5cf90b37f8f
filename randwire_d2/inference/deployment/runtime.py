"""What predicts fastest on a CPU: PyTorch, or what runs an exported graph; timed on the images."""

import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from ...export import FORMATS, RUNTIMES, check_runtime, format_of, installed_runtimes
from ...text import one_line
from ..models.classifier import Classifier
from ..models.detector import Detector
from ..models.exported import load_exported
from .export import write_proved

AUTO, EAGER = "auto", "eager"
CHOICES = (AUTO, EAGER, *RUNTIMES)
# The choice takes about as long as 40 images in PyTorch: C=109 is traced in the time of 11, then 11
# are computed in each runtime. It saved 0.2 to 0.4 of an image's time, of small models more.
LEAST_IMAGES = 200
_TIMED = 6  # images; the first, which pays for what is done once, does not count

Model = Detector | Classifier


def in_runtime(
    model: Model,
    runtime: str,
    images: int,
    samples: Iterable[dict[str, Any]],
    say: Callable[[str], None],
) -> Model:
    """The model, or the same one around an exported graph of it, which finds the same.

    Args:
        runtime: one of ``CHOICES``. "auto" keeps what the model runs in unless this is a CPU, at
            least ``LEAST_IMAGES`` images are to come, and another one that is installed takes less
            time for the first of them.
        images: how many are to be predicted.
        samples: the first of them, as ``model.read`` or ``model.prepare`` gives them.
        say: is called with what was chosen, and why.

    Raises:
        ValueError: the model can't run so; one line.
    """
    if runtime == AUTO:
        if images < LEAST_IMAGES or model.cfg.MODEL.DEVICE != "cpu":
            return model
        return _fastest(model, list(islice(samples, _TIMED)), say)
    own = format_of(model.file)
    if runtime == EAGER:
        if own:
            raise ValueError(f"{model.file} is an exported file: name its checkpoint to run eager")
        return model
    check_runtime(runtime)
    if model.cfg.MODEL.DEVICE != "cpu":
        raise ValueError(f"the runtime {runtime} is for the CPU: add --device cpu")
    if own and own.name != "onnx":
        raise ValueError(f"{model.file} is no ONNX file: only those run in {runtime}")
    return _in_runtimes(model, [runtime], samples)[runtime]


def _fastest(model: Model, samples: Sequence[dict[str, Any]], say: Callable[[str], None]) -> Model:
    own = format_of(model.file)
    usual = own.name if own else EAGER
    names = [name for name in installed_runtimes() if name != usual]
    if not names or not samples or usual not in (EAGER, "onnx"):
        return model
    try:
        models = {usual: model, **_in_runtimes(model, names, samples)}
        shares = _shares(models, samples, usual)
    except Exception as e:  # if it is an image's fault, or the model's, the prediction will tell
        reason = one_line(e, 300) or type(e).__name__
        say(f"Runtime: {usual}, because no other could be tried with this model: {reason}")
        return model
    fastest = min(shares, key=lambda name: shares[name])
    others = ", ".join(f"{name} {shares[name]:.2f}" for name in names)
    say(
        f"Runtime: {fastest}. Of the time of {usual}, for the first {len(samples)} images: {others}"
    )
    return models[fastest]


def _in_runtimes(
    model: Model, names: Sequence[str], samples: Iterable[dict[str, Any]]
) -> dict[str, Model]:
    """A model of each runtime; a checkpoint's is exported for it, and proved as every export."""
    if format_of(model.file):
        return {name: _around(model, model.model, name, model.file) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.onnx")
        # Two: each is computed in every runtime.
        images = [one["image"] for one in islice(samples, 2)]
        write_proved(model, file, FORMATS["onnx"], images=images, runtimes=names)
        exported = load_exported(file, FORMATS["onnx"], "cpu").model
        return {name: _around(model, exported, name, file) for name in names}


def _around(model: Model, exported: Any, runtime: str, file: str) -> Model:
    """A copy of a model, with its classes and ids, that computes with a file's graph."""
    other, graph = copy.copy(model), copy.copy(exported)
    graph.run = RUNTIMES[runtime](file)
    other.model, other.runtime = graph, runtime
    return other


def _shares(
    models: Mapping[str, Model], samples: Sequence[dict[str, Any]], usual: str
) -> dict[str, float]:
    """The median, over the images, of each one's share of the time of the usual one."""
    times = [{name: _seconds(model, one) for name, model in models.items()} for one in samples]
    counted = times[1:] or times
    return {name: statistics.median(own[name] / own[usual] for own in counted) for name in models}


def _seconds(model: Model, sample: dict[str, Any]) -> float:
    start = time.perf_counter()
    model.predict([sample])
    return time.perf_counter() - start
