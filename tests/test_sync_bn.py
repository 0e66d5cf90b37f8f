"""Synchronised norms on the fast path: two processes are one with the whole batch."""

from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_same, in_two_processes, randomise
from torch import Tensor

from randwire_d2.modeling import RandWireStage, fused
from randwire_d2.modeling.weights import MULTIPLES
from randwire_d2.wiring import NetworkGenerator
from randwire_d2.wiring.plan import Plan

SPEC = NetworkGenerator("small", 5, 12, "WS", {"k": 4, "p": 0.75})(1)
PARTS = (3, 1)  # images of each process
DAG = SPEC.stages[0].dag
KEPT = torch.arange(len(Plan(DAG).learned)) != 1
NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def build(norm: str, recompute: bool, dtype: torch.dtype) -> RandWireStage:
    torch.manual_seed(0)
    stage = RandWireStage(SPEC.stages[0], "sep_conv3x3", norm, fused="on", recompute=recompute)
    return randomise(stage.to(dtype)).train()  # type: ignore[return-value]


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images, and the gradient of the loss by the output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(PARTS), 5, 9, 6, generator=generator, dtype=torch.float64) + 3
    gradient = torch.randn(sum(PARTS), 5, 5, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), gradient.to(dtype)


def step(stage: RandWireStage, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x.requires_grad_()
    y = stage(x, KEPT.to(x.device))
    y.backward(gradient)
    assert x.grad is not None
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input's gradient": x.grad, **gradients}


def in_one_of_two(
    rank: int, recompute: bool, dtype: torch.dtype, multiple: int, kind: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """A process's results, its statistics afterwards, and how many messages it sent."""
    sent = 0

    def counting(function: Any) -> Any:
        def send(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += 1
            return function(*args, **kwargs)

        return send

    dist = torch.distributed
    stage = build("SyncBN", recompute, dtype)
    x, gradient = (whole.split(PARTS)[rank] for whole in batch(dtype))
    if kind == "cuda":
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False
        x, gradient = x.cuda(), gradient.cuda()
        group = dist.new_group(backend="nccl")
        for norm in stage.cuda().modules():
            if isinstance(norm, torch.nn.SyncBatchNorm):
                norm.process_group = group
    with (
        mock.patch.object(dist, "all_gather", side_effect=AssertionError("copies each tensor")),
        mock.patch.object(dist, "all_gather_into_tensor", counting(dist.all_gather_into_tensor)),
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce)),
        mock.patch.dict(MULTIPLES, {dtype: multiple}),
    ):
        results = step(stage, x.clone(), gradient)
    buffers = dict(stage.named_buffers())
    results, statistics = ({k: v.cpu() for k, v in own.items()} for own in (results, buffers))
    return results, statistics, sent


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=NEEDS_TWO_GPUS)])
@pytest.mark.parametrize(
    ("recompute", "dtype", "multiple"),
    [(False, torch.float64, 8), (True, torch.float64, 1), (False, torch.float32, 1)],
)
def test_two_processes_are_one_with_the_whole_batch(
    recompute: bool, dtype: torch.dtype, multiple: int, kind: str
) -> None:
    """Wrong: statistics of one process's images alone, in the output, the running statistics or the
    gradients; images counted alike where processes have different numbers of them; more messages
    than the wiring is deep."""
    whole = build("BN", recompute, dtype)
    expected = step(whole, *batch(dtype))
    parts = in_two_processes(in_one_of_two, recompute, dtype, multiple, kind)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for name, value in expected.items():
        own = [results[name] for results, _, _ in parts]
        joined = torch.cat(own) if name in ("output", "input's gradient") else own[0] + own[1]
        error = (joined - value).norm() / max(float(value.norm()), 1.0)
        assert error < tolerance, f"{name}: off by {error:.1e}"
    for _, statistics, _ in parts:
        for name, value in whole.named_buffers():
            torch.testing.assert_close(statistics[name], value, msg=name)
    levels = len(Plan(DAG, by_level=True).groups)
    # One asks how many images there are.
    assert [sent for _, _, sent in parts] == [2 * levels + 1] * 2
    assert levels < DAG.num_nodes


def test_a_process_without_images_says_so() -> None:
    """Wrong: a GPU's kernels read a pixel of a batch that has none, and the process dies later, at
    an operation that is not to blame."""
    shared = fused.Settings(1e-5, True, 0.1, object())
    with pytest.raises(ValueError, match=r"images in each process; .* \(0, 5, 9, 6\): leave no"):
        fused._count_values(torch.empty(0, 5, 9, 6), shared)


def test_alone_it_is_a_batch_norm() -> None:
    """Wrong: a network with SyncBN can't be trained, or tested, by one process."""
    one, other = (build(norm, False, torch.float64) for norm in ("SyncBN", "BN"))
    x, gradient = batch(torch.float64)
    for training in (True, False):
        results, expected = (
            step(stage.train(training), x.clone(), gradient) for stage in (one, other)
        )
        for name, value in expected.items():
            assert_same(results[name], value, name)
    assert fused.sharing(one.nodes[0].norm) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("by_level", [True, False])
def test_groups_need_only_what_came_before(by_level: bool) -> None:
    """Wrong: a node runs before one that it reads, or twice, or not at all; or nodes that could be
    normalised together are not."""
    for stage in SPEC.stages:
        plan = Plan(stage.dag, by_level=by_level)
        assert sorted(plan.order) == [*range(stage.dag.num_nodes)]
        assert [plan.order[place] for place in plan.places] == [*plan.groups]
        done: set[int] = set()
        for group in plan.groups:
            assert all(done.issuperset(stage.dag.predecessors[v]) for v in group)
            assert not done or any(done & set(stage.dag.predecessors[v]) for v in group)
            done.update(group)
        assert len(plan.groups) < stage.dag.num_nodes
