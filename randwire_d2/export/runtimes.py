"""Runtimes that run an ONNX file on a CPU: ONNX Runtime and OpenVINO."""

import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .formats import FORMATS, Run


def _onnx_runtime(path: str) -> Run:
    return FORMATS["onnx"].read(path)[0]


def _compile(path: str) -> Any:
    openvino = importlib.import_module("openvino")
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 if the CPU has it
    }
    # Given a path, OpenVINO goes by its suffix, which an unfinished file does not have yet.
    with open(path, "rb") as file:
        model = openvino.Core().read_model(file.read())
    return openvino.Core().compile_model(model, "CPU", options)


def _openvino(path: str) -> Run:
    # OpenVINO gives the compiling thread an alternate signal stack and frees it with the model. If
    # another thread frees the model, the next signal in the compiling thread is a crash.
    with ThreadPoolExecutor(1) as alone:
        compiled = alone.submit(_compile, path).result()

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = compiled([images.numpy()])
        # Copies: the next run writes into the same memory.
        return tuple(torch.tensor(outputs[i]) for i in range(len(compiled.outputs)))

    return run


# For each runtime, a function that loads an ONNX file; it runs with as many threads as PyTorch.
RUNTIMES: dict[str, Callable[[str], Run]] = {"onnx": _onnx_runtime, "openvino": _openvino}


def check_runtime(name: str) -> None:
    """Check that a runtime exists and its package is installed.

    Raises:
        ValueError: there is no such runtime, or its package is missing; one line.
    """
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}; known are {', '.join(RUNTIMES)}")
    FORMATS["onnx"].check()
    if name == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ValueError("the runtime openvino needs its package: pip install openvino")


def installed_runtimes() -> list[str]:
    """The names of the runtimes whose packages are installed."""
    found = []
    for name in RUNTIMES:
        with suppress(ValueError):
            check_runtime(name)
            found.append(name)
    return found
