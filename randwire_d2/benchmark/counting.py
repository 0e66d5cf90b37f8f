"""The bytes, launches and memory of a step, counted on fake tensors: nothing is computed.

The conventions:

- An operation is an operator that PyTorch dispatches below autograd, forward or backward. Views,
  metadata and uninitialised allocations are no operations.
- An operation counts as one kernel launch, though cuDNN may need several. An operator of
  ``randwire_d2.ops`` counts as the Triton kernels that it launches on CUDA.
- Its traffic is the bytes of every tensor that it reads or writes. A tensor that it changes in
  place is both read and written, unless it is only overwritten. A dimension that is broadcast with
  stride 0 counts once. A custom operator's traffic is that of its arguments and results alone.
- "Saved" is the bytes of the different storages that autograd keeps at the end of the forward
  pass, without parameters and buffers. Images count if the first convolution keeps them.
- "Peak" is the largest sum of all storages that are alive: parameters, buffers, images, activations
  and gradients. A kernel's own workspace is not counted.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..modeling import RandWireStage
from ..modeling.weights import as_on_cuda

# These operators allocate memory and write nothing into it.
ALLOCATIONS = {
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    )
}  # fmt: skip
# These operators read only the shape of their first argument.
SHAPE_ONLY = {
    f"aten::{name}"
    for name in (
        "full_like", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like", "randn_like",
        "zeros_like",
    )
}  # fmt: skip
# These operators overwrite their first argument without reading it.
OVERWRITING = {
    f"aten::{name}" for name in ("bernoulli_", "copy_", "fill_", "normal_", "uniform_", "zero_")
}


class Operation(NamedTuple):
    """One operation.

    Attributes:
        name: PyTorch's name, such as ``"aten.addmm.default"``.
        traffic: the bytes that it reads and writes.
        flops: two for each multiply-add of a convolution or a matrix product, by the formulas of
            ``torch.utils.flop_counter``; 0 where it has no formula, as for most custom operators.
        launches: the kernels that it launches on a GPU.
    """

    name: str
    traffic: int
    flops: int
    launches: int = 1


@dataclass(frozen=True)
class Count:
    """The counts of one step with the whole batch; all sizes are in bytes.

    Attributes:
        operations: all operations, in order.
        saved: the size of the tensors that autograd keeps for the backward pass.
        peak: the peak memory.
    """

    operations: tuple[Operation, ...]
    saved: int
    peak: int

    @property
    def traffic(self) -> int:
        return sum(operation.traffic for operation in self.operations)

    @property
    def launches(self) -> int:
        return sum(operation.launches for operation in self.operations)

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)


def count(
    model: nn.Module,
    make_inputs: Callable[[], Sequence[Tensor]],
    forward: Callable[..., Any],
    training: bool = True,
) -> Count:
    """Count one step of a model, on a fake copy of it.

    The counts depend on shapes and types alone. The copy is on a CPU, whatever device the model is
    on: the operators are the same there, and its channels are padded with zeros as on CUDA.

    Args:
        model: any module; it is not changed, nor is its train or eval mode.
        make_inputs: makes the step's inputs; the tensors that it creates are fake, too.
        forward: is called as ``forward(model, *inputs)``. For training it must return the loss,
            from which the backward pass then runs.
        training: count a training step, else one in eval mode without gradients.
    """
    # Other tensors that a module keeps stay real; they are only read.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counted = copy.deepcopy(model, {id(t): _fake(fake, t) for t in _kept(model)}).train(training)
    kept = _kept(counted)
    permanent = {_key(t) for t in kept}
    saved: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in permanent:
            storage = tensor.untyped_storage()
            saved[storage] = storage.nbytes()
        return tensor

    with fake, as_on_cuda(), torch.set_grad_enabled(training):
        inputs = make_inputs()
        counter = _Counter()
        for tensor in (*kept, *inputs):
            counter.hold(tensor)
        with counter:
            # In the forward pass only: tensors that the backward pass recomputes were not saved.
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = forward(counted, *inputs)
            saved_bytes = sum(saved.values())
            if training:
                result.backward()
    return Count(tuple(counter.operations), saved_bytes, counter.peak)


def _kept(model: nn.Module) -> list[Tensor]:
    stages = (module for module in model.modules() if isinstance(module, RandWireStage))
    edges = (edges for stage in stages for edges in stage.edges)
    return [*model.parameters(), *model.buffers(), *edges]


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of the same shape, strides and type, on a CPU."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


class _Counter(TorchDispatchMode):
    """Lists every dispatched operation, and tracks the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.peak = 0
        self._held = 0
        self._storages: dict[int, weakref.ref] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage among those in memory until it dies."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return

        def forget(_: object) -> None:
            del self._storages[key]
            self._held -= size

        self._storages[key] = weakref.ref(storage, forget)
        self._held += size
        self.peak = max(self.peak, self._held)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        for tensor in outputs:
            self.hold(tensor)
        if isinstance(func, OpOverload):
            traffic = _traffic(func, args, kwargs, outputs)
            if traffic is not None:
                flops = _flops(func, args, kwargs, result)
                own = func.namespace == "randwire"
                launches = ops.launches(func._opname, args) if own else 1
                self.operations.append(Operation(str(func), traffic, flops, launches))
        return result


def _traffic(
    func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> int | None:
    """The bytes that an operation reads and writes; None if it touches no memory."""
    schema = func._schema
    if (
        func.namespace == "prim"
        or schema.name in ALLOCATIONS
        or torch.Tag.inplace_view in func.tags
    ):
        return None
    moved, writes = 0, False
    storages: set[int] = set()
    for i, argument in enumerate(schema.arguments):
        tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        size = sum(map(_size, tensors))
        storages.update(map(_key, tensors))
        if tensors and argument.alias_info is not None and argument.alias_info.is_write:
            writes = True
            moved += size
            # An `out` argument is only written.
            if argument.kwarg_only or (i == 0 and schema.name in OVERWRITING):
                continue
        if not (i == 0 and schema.name in SHAPE_ONLY):
            moved += size
    # Outputs that share an input's storage are views of it, or were counted as written.
    fresh = [tensor for tensor in outputs if _key(tensor) not in storages]
    return moved + sum(map(_size, fresh)) if fresh or writes else None


def _flops(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    if func is torch.ops.aten.convolution_backward.default:
        # PyTorch's formula ignores groups. Each gradient takes as many FLOPs as the forward pass.
        gradient, images, weight, *_, transposed, _, _, wanted = args
        per_position = images if transposed else gradient
        return 2 * per_position.numel() * weight.shape[1:].numel() * sum(wanted[:2])
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, as long as the storage is alive."""
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """The bytes of a tensor's different elements."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size
