"""INT8: ONNX Runtime's static quantisation of an ONNX file."""

import importlib
import os
import tempfile
from collections.abc import Iterable, Mapping

from torch import Tensor

from .formats import FORMATS, onnx_bytes

# Convolutions and the fc layer have nearly all multiply-adds. The nodes' weighted sums stay
# float32: quantising them, too, would round every node's input twice.
_QUANTISED = ["Conv", "Gemm", "MatMul"]


def quantise(source: str, target: str, images: Iterable[Tensor], said: Mapping[str, str]) -> None:
    """Write a copy of an ONNX file whose convolutions and linear layers compute in int8.

    Weights have a scale for each channel. Activations have one for each tensor, from the range of
    its values for the images.

    Args:
        source: a file of the format "onnx".
        target: the file to write.
        images: inputs of the graph, for calibration.
        said: metadata that is added to the source's.
    """
    FORMATS["onnx"].check()
    onnx = importlib.import_module("onnx")
    quantization = importlib.import_module("onnxruntime.quantization")
    model = onnx.load(source)
    given = model.graph.input[0].name
    inputs = ({given: one.numpy()} for one in images)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> dict | None:
            return next(inputs, None)

    metadata = {prop.key: prop.value for prop in model.metadata_props}
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantised = (os.path.join(folder, name) for name in ("prepared", "quantised"))
        quantization.shape_inference.quant_pre_process(source, prepared)
        quantization.quantize_static(
            prepared,
            quantised,
            Reader(),
            op_types_to_quantize=_QUANTISED,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        model = onnx.load(quantised)
    with open(target, "wb") as file:
        file.write(onnx_bytes(model, {**metadata, **said}))
