"""The formats of exported graphs: how each is written, with its metadata, and run again."""

import hashlib
import importlib
import io
import logging
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor

from ..environment import variable
from ..weight_files.checksum import check_whole
from .archives import check_program, holds_code, metadata_in
from .graphs import DETECTOR, Graph

# A tensor in, a tuple of tensors out, in the CPU's memory.
Run = Callable[[Tensor], tuple[Tensor, ...]]
ONNX_OPSET = 17
_symbolic_shapes: Any = importlib.import_module("torch.fx.experimental._config")
_METADATA = "metadata/"  # the folder of the metadata in an archive of torch
# An entry of ONNX's metadata: the SHA-256 of the file in which it is _UNKNOWN.
_SHA256 = re.compile(rb"\x06sha256\x12\x40([0-9a-f]{64})")
_UNKNOWN = "0" * 64


class Format(ABC):
    """A file format, and what runs it.

    Attributes:
        name: of ``--format``.
        suffixes: of its files; the first is the usual one.
        opset: the version of the operators that ``write`` uses, for people.
    """

    name: str
    suffixes: tuple[str, ...]
    opset: str

    def check(self) -> None:  # noqa: B027 (most need nothing)
        """What can be known before any work.

        Raises:
            ValueError: a package is missing; one line with the way to get it.
        """

    @abstractmethod
    def write(
        self, graph: Graph, example: Tensor, metadata: Mapping[str, str], file: IO[bytes]
    ) -> None:
        """Write a graph of dynamic sizes.

        Args:
            example: an input; others may have another size and, if the graph takes a batch, number.

        Raises:
            ValueError: the format can't hold such a graph.
        """

    @abstractmethod
    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        """The graph, ready to run on a CPU, and its metadata.

        Raises:
            Exception: of the kinds that its library has for damaged files.
        """


class Onnx(Format):
    """ONNX, run by ONNX Runtime."""

    name, suffixes = "onnx", (".onnx",)
    opset = f"ai.onnx {ONNX_OPSET}"

    def check(self) -> None:
        for package in ("onnx", "onnxruntime"):
            _require(package)

    def write(
        self, graph: Graph, example: Tensor, metadata: Mapping[str, str], file: IO[bytes]
    ) -> None:
        onnx = _require("onnx")
        signature = graph.signature
        buffer: Any = io.BytesIO()  # which torch takes, though its type hint does not say so
        with _quiet():
            torch.onnx.export(
                graph,
                (example,),
                buffer,
                # The exporter by torch.export can't follow Detectron2's choice of proposals, and
                # takes twenty times as long for a classifier.
                dynamo=False,
                opset_version=ONNX_OPSET,
                input_names=[signature.input],
                output_names=list(signature.outputs),
                dynamic_axes=signature.axes,
            )
        model = onnx.load_model_from_string(buffer.getvalue())
        model.producer_name, model.producer_version = "randwire_d2", metadata["version"]
        file.write(onnx_bytes(model, metadata))

    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        runtime = _require("onnxruntime")
        _check_sum(path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # That of the file, which holds the fewest results at once. Its own choice held 18% more
        # (measured: C=109, eight images of 320 pixels, 1007 MB against 854).
        options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        options.log_severity_level = 3  # errors: it warns of shapes that it can't infer
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

        def run(images: Tensor) -> tuple[Tensor, ...]:
            outputs = session.run(None, {given.name: images.numpy()})
            return tuple(torch.from_numpy(output) for output in outputs)

        return run, dict(session.get_modelmeta().custom_metadata_map)


class TorchScript(Format):
    """A trace, run by libtorch or PyTorch."""

    name, suffixes = "torchscript", (".ts", ".pt")
    opset = f"TorchScript of torch {torch.__version__}"

    def write(
        self, graph: Graph, example: Tensor, metadata: Mapping[str, str], file: IO[bytes]
    ) -> None:
        with _quiet(), torch.no_grad():
            # Its own check runs on the example alone; the caller's is the stricter one.
            traced = torch.jit.trace(graph, (example,), check_trace=False)
            files = {_METADATA + key: value for key, value in metadata.items()}
            torch.jit.save(traced, file, _extra_files=files)

    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        check_whole(path)  # which PyTorch does not look at
        files: dict[str, Any] = {_METADATA + key: "" for key in metadata_in(path)}
        with _quiet():
            module = torch.jit.load(path, map_location="cpu", _extra_files=files)
        texts = {key.removeprefix(_METADATA): _text(value) for key, value in files.items()}
        return _without_gradients(module), texts


class TorchExport(Format):
    """A program of torch.export."""

    name, suffixes = "torch", (".pt2",)
    opset = f"ATen of torch {torch.__version__}"

    def write(
        self, graph: Graph, example: Tensor, metadata: Mapping[str, str], file: IO[bytes]
    ) -> None:
        signature = graph.signature
        if signature.kind == DETECTOR:
            raise ValueError(
                "torch.export can't follow how Detectron2 chooses proposals (`if not "
                "valid_mask.all()` in find_top_rpn_proposals): export a detector as onnx or "
                "torchscript, or its --part backbone"
            )
        size = [torch.export.Dim(name, min=1) for name in ("height", "width")]
        height, width = (signature.multiple * s if signature.multiple > 1 else s for s in size)
        dynamic = {0: torch.export.Dim("batch", min=1), 2: height, 3: width}
        # Else a batch of one, or a feature of one pixel, would be another case than the example's.
        with _quiet(), _symbolic_shapes.patch(backed_size_oblivious=True):
            program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))
            torch.export.save(program, file, extra_files=dict(metadata))

    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        check_whole(path)
        check_program(path)
        files = dict.fromkeys(metadata_in(path), "")
        # A file that is open, as it may not have its name yet; and no objects, whatever asks for
        # them: this is the way that PyTorch has for that.
        no_objects = variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        with _quiet(), no_objects, open(path, "rb") as file:
            program = torch.export.load(file, extra_files=files)
        # PyTorch 2.9 guards what it has seen of the example's sizes, which others need not share.
        graph = program.module(check_guards=False)
        return _without_gradients(graph), {k: _text(v) for k, v in files.items()}


FORMATS: dict[str, Format] = {f.name: f for f in (Onnx(), TorchScript(), TorchExport())}


def format_of(path: str) -> Format | None:
    """The format of an existing file; None of what is none of an exported graph."""
    for known in FORMATS.values():
        if path.lower().endswith(known.suffixes):
            # What torch.save wrote may be called .pt, too.
            return None if path.lower().endswith(".pt") and not holds_code(path) else known
    return None


def onnx_bytes(model: Any, metadata: Mapping[str, str]) -> bytes:
    """The file of a model of the package onnx, with its metadata and a checksum in it."""
    onnx = _require("onnx")
    onnx.helper.set_model_props(model, {**metadata, "sha256": _UNKNOWN})
    content: bytes = model.SerializeToString()
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(_UNKNOWN.encode(), digest)


def _check_sum(path: str) -> None:
    """Refuse an ONNX file of ours that is damaged: its format has no checksum."""
    with open(path, "rb") as file:
        content = file.read()
    for entry in _SHA256.finditer(content):
        rest = content[: entry.start(1)], _UNKNOWN.encode(), content[entry.end(1) :]
        if hashlib.sha256(b"".join(rest)).hexdigest().encode() != entry[1]:
            raise ValueError("it is damaged: its checksum is another than when it was written")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracers warn of each branch and constant; what is traced is compared afterwards. And
    torch.export logs tracebacks of errors that it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _without_gradients(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Run:
    def run(images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(function(images))

    return run


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ValueError(
            f"the format onnx needs the package {package}: pip install onnx onnxruntime"
        ) from e
