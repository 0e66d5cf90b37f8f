"""The formats of exported graphs: how to write them with their metadata, and how to run them."""

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

# A graph that is ready to run: from a tensor to a tuple of tensors, on the CPU.
Run = Callable[[Tensor], tuple[Tensor, ...]]
ONNX_OPSET = 17
_symbolic_shapes: Any = importlib.import_module("torch.fx.experimental._config")
_METADATA = "metadata/"  # the folder of the metadata in an archive of TorchScript
# The checksum in ONNX's metadata: the SHA-256 of the file with _UNKNOWN in place of the checksum.
_SHA256 = re.compile(rb"\x06sha256\x12\x40([0-9a-f]{64})")
_UNKNOWN = "0" * 64


class Format(ABC):
    """A file format, with the functions that write and read it.

    Attributes:
        name: its name, a value of ``--format``.
        suffixes: the suffixes of its files; the first is the usual one.
        opset: the version of the operators that ``write`` uses, as text.
    """

    name: str
    suffixes: tuple[str, ...]
    opset: str

    def check(self) -> None:  # noqa: B027 (most need nothing)
        """Check that ``write`` can work, before any model is built.

        Raises:
            ValueError: a package is missing; one line with the way to get it.
        """

    @abstractmethod
    def write(
        self, graph: Graph, example: Tensor, metadata: Mapping[str, str], file: IO[bytes]
    ) -> None:
        """Write a graph with dynamic axes.

        Args:
            graph: the model to write, in eval mode.
            example: an input to trace with; only its batch, height and width are dynamic.
            metadata: key → text, written into the file.
            file: a binary file, open for writing.

        Raises:
            ValueError: the format can't represent this graph.
        """

    @abstractmethod
    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        """Read a file: the graph, ready to run on a CPU, and its metadata.

        Raises:
            Exception: any that the format's library raises for damaged files.
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
        buffer: Any = io.BytesIO()  # torch accepts it, though its type hint does not say so
        with _quiet():
            torch.onnx.export(
                graph,
                (example,),
                buffer,
                # The newer exporter, which uses torch.export, can't trace Detectron2's choice of
                # proposals, and takes twenty times as long for a classifier.
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
        # The order of the file needs the least memory. ONNX Runtime's default needed 18% more
        # (measured: C=109, eight images of 320 pixels, 1007 MB instead of 854).
        options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
        options.log_severity_level = 3  # errors: it warns of shapes that it can't infer
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()

        def run(images: Tensor) -> tuple[Tensor, ...]:
            outputs = session.run(None, {given.name: images.numpy()})
            return tuple(torch.from_numpy(output) for output in outputs)

        return run, dict(session.get_modelmeta().custom_metadata_map)


class TorchScript(Format):
    """TorchScript: a trace that libtorch or PyTorch runs."""

    name, suffixes = "torchscript", (".ts", ".pt")
    opset = f"TorchScript of torch {torch.__version__}"

    def write(
        self, graph: Graph, example: Tensor, metadata: Mapping[str, str], file: IO[bytes]
    ) -> None:
        with _quiet(), torch.no_grad():
            # PyTorch's check runs on the example only; the caller's check is stricter.
            traced = torch.jit.trace(graph, (example,), check_trace=False)
            files = {_METADATA + key: value for key, value in metadata.items()}
            torch.jit.save(traced, file, _extra_files=files)

    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        check_whole(path)  # PyTorch does not verify the checksums
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
        # Otherwise sizes of 1, of a batch or a feature map, would be specialised.
        with _quiet(), _symbolic_shapes.patch(backed_size_oblivious=True):
            program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic,))
            torch.export.save(program, file, extra_files=dict(metadata))

    def read(self, path: str) -> tuple[Run, dict[str, str]]:
        check_whole(path)
        check_program(path)
        files = dict.fromkeys(metadata_in(path), "")
        # Pass an open file, as an unfinished one may not have its suffix yet. PyTorch's variable
        # refuses to unpickle anything but tensors.
        no_objects = variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        with _quiet(), no_objects, open(path, "rb") as file:
            program = torch.export.load(file, extra_files=files)
        # PyTorch 2.9 adds guards on the example's sizes, which other inputs need not meet.
        graph = program.module(check_guards=False)
        return _without_gradients(graph), {k: _text(v) for k, v in files.items()}


FORMATS: dict[str, Format] = {f.name: f for f in (Onnx(), TorchScript(), TorchExport())}


def format_of(path: str) -> Format | None:
    """The format of an existing file; None if it is not an exported graph."""
    for known in FORMATS.values():
        if path.lower().endswith(known.suffixes):
            # A checkpoint of torch.save may have the suffix .pt, too.
            return None if path.lower().endswith(".pt") and not holds_code(path) else known
    return None


def onnx_bytes(model: Any, metadata: Mapping[str, str]) -> bytes:
    """Serialise an onnx.ModelProto with metadata and a checksum of the file."""
    onnx = _require("onnx")
    onnx.helper.set_model_props(model, {**metadata, "sha256": _UNKNOWN})
    content: bytes = model.SerializeToString()
    digest = hashlib.sha256(content).hexdigest().encode()
    return content.replace(_UNKNOWN.encode(), digest)


def _check_sum(path: str) -> None:
    """Refuse a damaged ONNX file, if it has this project's checksum: the format itself has none."""
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
    """Silence the tracers' warnings of branches and constants: callers compare the outputs. Also
    silence torch.export's log, which repeats the tracebacks of errors that it raises."""
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
