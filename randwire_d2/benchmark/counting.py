"""Bytes, kernels and memory of a step, counted on fake tensors: nothing is computed.

The conventions:

- an operation is what PyTorch dispatches below autograd, forward and backward, and is one kernel.
  Views, metadata and uninitialised allocations are none;
- its traffic is the bytes of every tensor that it reads or writes. What it changes in place is
  read and written, unless it only overwrites; a dimension that is broadcast with stride 0 is
  there once; a custom operator moves its arguments and results, whatever it does inside;
- saved is the bytes of the different storages that autograd has kept by the end of the forward
  pass, but for parameters and buffers. Images count, where the first convolution keeps them;
- peak is the most that all storages hold together: parameters, buffers, images, activations and
  gradients. What a kernel allocates inside for itself is unknown.
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

# Memory is taken, and nothing is put into it.
ALLOCATIONS = {
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    )
}  # fmt: skip
# The first argument tells a shape; nothing is read from it.
SHAPE_ONLY = {
    f"aten::{name}"
    for name in (
        "full_like", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like", "randn_like",
        "zeros_like",
    )
}  # fmt: skip
# What was in the first argument is overwritten unread.
OVERWRITING = {
    f"aten::{name}" for name in ("bernoulli_", "copy_", "fill_", "normal_", "uniform_", "zero_")
}


class Operation(NamedTuple):
    """One kernel.

    Attributes:
        name: such as ``"aten.addmm.default"``.
        traffic: bytes read and written.
        flops: two for each multiply-add of a convolution or a matrix product, by PyTorch's
            formulas; of a custom operator, if ``torch.utils.flop_counter`` has a formula for it.
    """

    name: str
    traffic: int
    flops: int


@dataclass(frozen=True)
class Count:
    """What one step does; all sizes in bytes, for the whole batch.

    Attributes:
        operations: every kernel, in order.
        saved: kept for the backward pass.
        peak: the most that is held at once.
    """

    operations: tuple[Operation, ...]
    saved: int
    peak: int

    @property
    def traffic(self) -> int:
        return sum(operation.traffic for operation in self.operations)

    @property
    def kernels(self) -> int:
        return len(self.operations)

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

    The figures depend on shapes and types alone, not on the device that the model is on: it is
    counted as on a CPU, where every operator that both have is the same.

    Args:
        model: any module; it stays as it is, in train or eval mode as it was.
        make_inputs: makes the step's inputs; the tensors it creates are fake too.
        forward: called as ``forward(model, *inputs)``. For training it must return the loss, of
            which the backward pass is then run.
        training: else, eval mode without gradients.
    """
    # Tensors that a module keeps beside its parameters and buffers stay real and are only looked at
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    counted = copy.deepcopy(model, {id(t): _fake(fake, t) for t in tensors}).train(training)
    kept = [*counted.parameters(), *counted.buffers()]
    permanent = {_key(t) for t in kept}
    saved: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in permanent:
            storage = tensor.untyped_storage()
            saved[storage] = storage.nbytes()
        return tensor

    with fake, torch.set_grad_enabled(training):
        inputs = make_inputs()
        counter = _Counter()
        for tensor in (*kept, *inputs):
            counter.hold(tensor)
        with counter:
            # Only the forward pass: what is recomputed in the backward pass is not kept for it.
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                result = forward(counted, *inputs)
            saved_bytes = sum(saved.values())
            if training:
                result.backward()
    return Count(tuple(counter.operations), saved_bytes, counter.peak)


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of the same shape, strides and type, as on a CPU."""
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


class _Counter(TorchDispatchMode):
    """Lists every operation that is dispatched, and follows the storages that are alive."""

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
                self.operations.append(
                    Operation(str(func), traffic, _flops(func, args, kwargs, result))
                )
        return result


def _traffic(
    func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> int | None:
    """Bytes read and written by an operation; None if it touches no memory."""
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
            # An `out` argument, too, is only written.
            if argument.kwarg_only or (i == 0 and schema.name in OVERWRITING):
                continue
        if not (i == 0 and schema.name in SHAPE_ONLY):
            moved += size
    # Outputs that lie in an input's memory are views of it, or were counted as written.
    fresh = [tensor for tensor in outputs if _key(tensor) not in storages]
    return moved + sum(map(_size, fresh)) if fresh or writes else None


def _flops(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    if func is torch.ops.aten.convolution_backward.default:
        # PyTorch's own formula knows no groups. Each gradient takes as much as the forward pass.
        gradient, images, weight, *_, transposed, _, _, wanted = args
        per_position = images if transposed else gradient
        return 2 * per_position.numel() * weight.shape[1:].numel() * sum(wanted[:2])
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, as long as that is alive."""
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes of the different elements of a tensor."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size
