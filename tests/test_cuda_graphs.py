"""Stages that are replayed as CUDA graphs, against stages that are launched one by one: to the bit.

Without a GPU, there is a stand-in for what records: see ``recording``.
"""

import copy
import gc
import itertools
import json
import logging
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import default_setup
from helpers import ROOT, assert_equal, draw_spec, images, in_two_processes, randomise
from recording import StandIn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from randwire_d2 import RandWire
from randwire_d2.engine import Trainer, argument_parser, load_config
from randwire_d2.engine.trainer import parallel_options
from randwire_d2.modeling import RandWireStage, cuda_graphs, graph_recorder, stage_graphs
from randwire_d2.modeling.graph_recorder import CudaRecorder, Recording
from randwire_d2.modeling.shadow import shadow
from randwire_d2.modeling.stage_graphs import FIRST_CALLS
from randwire_d2.modeling.weights import MULTIPLES, whole_image, zeros_of


class Counted(CudaRecorder):
    """The real one, which counts."""

    recorded = 0

    def record(self, *arguments: Any, **options: Any) -> list[Recording]:
        self.recorded += 1
        return super().record(*arguments, **options)


@pytest.fixture
def recorder(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    chosen = Counted() if device.type == "cuda" else StandIn()
    monkeypatch.setattr(cuda_graphs, "recorder", chosen)
    return chosen


class Pair:
    """A stage that may be replayed, and the same that is not; both do the same."""

    def __init__(self, device: torch.device, norm: str = "BN", **options: Any) -> None:
        torch.manual_seed(0)
        spec = draw_spec("small", "WS").stages[0]
        self.stage = RandWireStage(spec, "sep_conv3x3", norm, fused="on", **options)
        randomise(self.stage).to(device).train()
        self.other = copy.deepcopy(self.stage)
        self.other.cuda_graphs = False
        self.device, self.drawn = device, 0
        self.amp: torch.dtype | None = None

    @property
    def both(self) -> tuple[RandWireStage, RandWireStage]:
        return self.stage, self.other

    def x(self, size: int = 8, batch: int = 2) -> Tensor:
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        return torch.randn(batch, 5, size, size, generator=generator).to(self.device)

    def kept(self, i: int) -> Tensor:
        n = len(self.stage.plan.learned)
        return torch.arange(n, device=self.device) != i % n

    def step(self, size: int = 8, kept: int | None = None, needs_x: bool = True) -> None:
        """Forward and backward, whose gradients add up."""
        x, mask = self.x(size), None if kept is None else self.kept(kept)
        results = []
        for one in self.both:
            own = x.clone().requires_grad_(needs_x)
            y = self.call(one, own, mask)
            if y.requires_grad:
                y.square().sum().backward()
            results.append([y.detach(), own.grad])
        assert_equal(*results)
        self.same()

    def infer(self, size: int = 8, batch: int = 2) -> None:
        x = self.x(size, batch)
        with torch.no_grad():
            assert_equal(*(self.call(one, x) for one in self.both))
        self.same()

    def call(self, one: RandWireStage, *arguments: Any) -> Tensor:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            return one(*arguments)

    def same(self) -> None:
        state, other = (dict(one.state_dict()) for one in self.both)
        assert_equal(state, other)
        assert_equal(*([p.grad for p in one.parameters()] for one in self.both))

    @contextmanager
    def launched(self, expected: bool = True) -> Iterator[None]:
        """In the block, the stage is launched, or it is replayed."""
        original = self.stage.run_fused
        with mock.patch.object(self.stage, "run_fused", side_effect=original) as launched:
            yield
        assert launched.called == expected

    def start(self, **options: Any) -> None:
        """Until there is a training graph."""
        for _ in range(FIRST_CALLS):
            self.step(**options)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN"])
def test_training(norm: str, recompute: bool, recorder: Any, device: torch.device) -> None:
    """Wrong: a replay gives other results, gradients or statistics, a statistic moves twice in the
    step that records, gradients of several steps share memory, or nothing is replayed."""
    pair = Pair(device, norm, recompute=recompute)
    for i in range(2 * FIRST_CALLS):
        pair.step()
        assert recorder.recorded == (i + 1 >= FIRST_CALLS) == pair.stage.graphs.replayed
    for one in pair.both:  # as an optimizer does
        for p in one.parameters():
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None
    pair.step()
    pair.step()
    for one in pair.both:
        for p in one.parameters():
            p.grad.zero_()
    pair.step()
    assert recorder.recorded == 1


def test_an_edge_that_is_dropped_is_data(recorder: Any, device: torch.device) -> None:
    """Wrong: the edge of the step that was recorded is dropped for ever."""
    pair = Pair(device)
    for i in range(2 * FIRST_CALLS):
        pair.step(kept=i)
    pair.step()
    assert recorder.recorded == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype, recorder: Any, device: torch.device) -> None:
    """Wrong: weights of the step that was recorded, cast once, are used for ever."""
    pair = Pair(device)
    pair.amp = dtype
    for _ in range(2 * FIRST_CALLS):
        pair.step()
        pair.infer()
        for one in pair.both:
            with torch.no_grad():
                for p in one.parameters():
                    p *= 1.1
    pair.amp = None
    pair.step()
    pair.infer()
    assert recorder.recorded == 2


def test_inference(recorder: Any, device: torch.device) -> None:
    """Wrong: shapes are mixed up, a result that is kept changes with the next, each of a detector's
    sizes takes memory for a graph, or what inference mode made can't be used outside of it."""
    pair = Pair(device)
    pair.stage.eval(), pair.other.eval()
    sizes = range(4, 4 + stage_graphs.MOST_INFERENCE + 2)
    for _ in range(FIRST_CALLS + 1):
        with torch.inference_mode():
            for size in sizes:
                pair.infer(size)
    assert recorder.recorded == stage_graphs.MOST_INFERENCE
    pair.infer()
    x = pair.x()
    with torch.no_grad():
        first = pair.stage(x)
        before = first.clone()
        pair.stage(2 * x)
    assert torch.equal(first, before)
    pair.stage.train(), pair.other.train()
    pair.start()
    pair.infer()
    assert recorder.recorded == stage_graphs.MOST_INFERENCE + 1


def test_who_asks_for_deterministic_kernels_gets_none_that_were_recorded_before(
    recorder: Any, device: torch.device
) -> None:
    """Wrong: a graph goes on with convolutions that add up in any order."""
    pair = Pair(device)
    torch.backends.cudnn.deterministic = False  # the fixture of ``device`` gives it back
    for _ in range(FIRST_CALLS):
        pair.infer()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pair.launched():
            pair.infer()
    finally:
        torch.use_deterministic_algorithms(False)
    with pair.launched(False):
        pair.infer()
    assert recorder.recorded == 1


def test_a_thread_waits_for_a_replay_and_not_for_a_recording(
    recorder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: where a server's threads meet, one launches hundreds of kernels, though the other is
    done at once; or a thread waits for a recording that waits for it."""
    pair = Pair(device)
    for _ in range(FIRST_CALLS):
        pair.infer()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with stage_graphs._lock:
            held.set()
            done.wait(0.2 if stage_graphs.WAIT > 1 else None)

    for wait in (60.0, 0.01):
        monkeypatch.setattr(stage_graphs, "WAIT", wait)
        held.clear()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        with pair.launched(expected=wait < 1):
            pair.infer()
        done.set()
        thread.join()
        done.clear()


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_modes_and_what_needs_gradients(norm: str, recorder: Any, device: torch.device) -> None:
    """Wrong: a graph of one mode answers in another; an input's gradient is missing, or asked for
    where there is none; a stage that was frozen still gets gradients, or moves its statistics."""
    pair = Pair(device, norm)
    pair.start(needs_x=False)
    pair.step(needs_x=True)
    pair.infer()
    pair.stage.eval(), pair.other.eval()
    with pair.launched(norm == "BN"):
        pair.step(needs_x=False)
    pair.stage.train(), pair.other.train()
    with pair.launched(False):
        pair.step(needs_x=False)
    assert recorder.recorded == 1
    for one in pair.both:
        one.nodes[1].conv.pointwise.weight.requires_grad_(False)
    for _ in range(FIRST_CALLS + 1):
        pair.step()
    assert recorder.recorded == 2
    for one in pair.both:
        one.freeze()
    for _ in range(FIRST_CALLS + 1):
        pair.step(needs_x=False)
    assert recorder.recorded == 3, "without a backward pass"


def test_a_training_whose_sizes_change(
    recorder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a detector's training is launched one by one, or fills the memory with graphs that it
    will not need again; graphs that share memory spoil each other's results; or a training whose
    images have grown goes on one by one."""
    for name, value in {"LATER_CALLS": 4, "MOST_TRAINING": 3, "MANY_CALLS": 6}.items():
        monkeypatch.setattr(stage_graphs, name, value)
    pair = Pair(device)
    for sizes, recorded, held in (
        ([8, 8, 4, 4, 8], 0, 0),
        ([8, 4, 6, 7, 4], 2, 2),
        ([6, 6], 2, 2),
        ([6], 3, 3),
        ([7, 4, 8, 6, 7, 7, 7], 3, 3),  # one more than there can be
        ([6, 8, 4], 3, 3),
        ([9] * 5, 3, 3),
        ([9], 4, 1),  # those of all others are gone
        ([6, 8, 4, 9], 6, 3),
    ):
        for size in sizes:
            pair.step(size)
        assert (recorder.recorded, len(pair.stage.graphs._graphs)) == (recorded, held), sizes
    with pair.launched(False):
        pair.step(9)


def test_the_largest_size_comes_first(
    recorder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: each larger size takes memory of its own, beside that of all smaller ones."""
    monkeypatch.setattr(stage_graphs, "LATER_CALLS", 3)
    pair = Pair(device)
    for size in (4, 6, 8) * 3:
        pair.step(size)
    assert (recorder.recorded, len(pair.stage.graphs._graphs)) == (3, 1)
    for _ in range(2):
        for size in (4, 6, 8):
            pair.step(size)
        assert (recorder.recorded, len(pair.stage.graphs._graphs)) == (5, 3)
    graphs = pair.stage.graphs._graphs.values()
    for shared in ("x", "grad"):
        assert len({getattr(graph, shared).data_ptr() for graph in graphs}) == 1
    flat = [graph._gradients.results[-1] for graph in graphs if graph._gradients]
    assert len(flat) == 3 and len({gradients.data_ptr() for gradients in flat}) == 1
    memory = cuda_graphs.Memory()
    known = weakref.ref(memory)
    del memory
    assert known() is None, "what is shared would be freed when Python looks for cycles"


def test_memory_that_is_given_up_is_free(recorder: Any, device: torch.device) -> None:
    """Wrong: where memory has run out, what records keeps the images and gradients of all graphs
    that are gone, for the rest of the training."""
    pair = Pair(device)
    pair.start()
    known = [weakref.ref(t) for t in pair.stage.graphs._memory[True]._largest.values()]
    assert len(known) == 3 and all(tensor() is not None for tensor in known)
    pair.stage.graphs.give_up("no room")
    gc.collect()  # the stand-in's graphs are cycles
    assert all(tensor() is None for tensor in known)


COCO = ROOT.parent / "shared" / "data" / "coco" / "annotations" / "instances_train2017.json"


def detector_sizes(short: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Of 2 COCO images each, as Detectron2 loads them: height and width, in 32 pixels."""
    known = json.loads(COCO.read_text())["images"]
    np.random.seed(0)
    resize = ResizeShortestEdge(short, 1333, "choice")

    def resized() -> Iterator[dict[str, int]]:
        for i in TrainingSampler(len(known), seed=0):
            size = known[i]["height"], known[i]["width"]
            height, width = resize.get_transform(np.empty(size)).apply_image(np.empty(size)).shape
            yield {"height": height, "width": width}

    for pair in AspectRatioGroupedDataset(resized(), 2):
        height, width = (max(image[side] for image in pair) for side in ("height", "width"))
        yield -(-height // 32), -(-width // 32)


@pytest.mark.slow
@pytest.mark.skipif(not COCO.exists(), reason="no COCO images in ../shared/data")
@pytest.mark.parametrize("short", [(800,), (640, 672, 704, 736, 768, 800)], ids=["1x", "3x"])
def test_most_steps_of_a_detector_are_replayed(
    short: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: what GUIDE.md says of how many batches have a graph (pytest -s prints the share)."""
    stand_in = StandIn()
    monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
    stage, replayed = Pair(torch.device("cpu")).stage, []
    for height, width in itertools.islice(detector_sizes(short), 1000):
        before = stand_in.replays
        stage(torch.ones(1, 5, height, width)).sum().backward()
        replayed.append(stand_in.replays - before >= 2)
    print(f"\n{short}: {np.mean(replayed):.1%}, and {np.mean(replayed[-500:]):.1%} of the last 500")
    assert np.mean(replayed) > (0.8 if len(short) == 1 else 0.35)


@pytest.mark.slow
def test_a_detectors_training_is_the_same_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: between a real trainer's other parts, images of three sizes give other weights."""
    monkeypatch.setattr(stage_graphs, "LATER_CALLS", 4)

    def train(graphs: bool) -> tuple[StandIn, dict[str, Tensor]]:
        stand_in = StandIn()
        monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
        args = argument_parser().parse_args(
            ["--config-file", str(ROOT / "configs/faster_rcnn_randwire_shapes.yaml"),
             "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RANDWIRE.NORM", "BN",
             "MODEL.RANDWIRE.FUSED", "on", "MODEL.RANDWIRE.CUDA_GRAPHS", str(graphs),
             "INPUT.MIN_SIZE_TRAIN", "(64, 96, 128)", "SOLVER.IMS_PER_BATCH", "2",
             "SOLVER.MAX_ITER", "24", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0",
             "MODEL.DEVICE", "cpu", "SEED", "1", "OUTPUT_DIR", str(tmp_path / str(graphs))]
        )  # fmt: skip
        cfg = load_config(args)
        default_setup(cfg, args)
        trainer = Trainer(cfg)
        trainer.train()
        return stand_in, trainer.model.state_dict()

    (recorded, weights), (others, others_weights) = train(True), train(False)
    assert recorded.recorded > 6 and recorded.replays > 100 and others.recorded == 0
    assert_equal(weights, others_weights)


# -------------------------------------------------------------------------------------------------
# Calls that a graph is not made for
# -------------------------------------------------------------------------------------------------


def test_two_forward_passes_before_a_backward_pass(recorder: Any, device: torch.device) -> None:
    """Wrong: the second pass writes over what the first one's gradients are computed from."""
    pair = Pair(device)
    pair.start(needs_x=False)
    a, b = pair.x(), pair.x()
    for one in pair.both:
        (one(a) * one(b) + one(a).square()).sum().backward()
    pair.same()
    for one in pair.both:
        one(a)  # nobody wants its gradient
    pair.step(needs_x=False)
    before = pair.stage.graphs.replayed
    assert recorder.recorded == 1 and before


def test_passes_of_two_sizes_before_a_backward_pass(
    recorder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the pass of another size, or its recording, writes over what the first one's gradients
    are computed from, since their graphs share memory."""
    monkeypatch.setattr(stage_graphs, "LATER_CALLS", 4)
    pair = Pair(device)

    def both_sizes(first: int, second: int) -> None:
        a, b = pair.x(first), pair.x(second)
        for one in pair.both:
            y, z = one(a), one(b)
            z.square().sum().backward()
            y.square().sum().backward()
        pair.same()

    pair.start(size=8, needs_x=False)
    for _ in range(6):
        both_sizes(8, 4)
    assert recorder.recorded == 1, "that of 4 would be, if the first pass were over"
    pair.step(4, needs_x=False)
    assert recorder.recorded == 2
    both_sizes(4, 8)
    both_sizes(8, 4)
    assert recorder.recorded == 2 and len(pair.stage.graphs._graphs) == 2


def test_a_pass_lasts_until_its_gradients_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong: another thread begins a pass, and writes over the activations that this one's backward
    pass is about to read; or a pass that could not be differentiated blocks graphs for ever."""
    stand_in = StandIn()
    monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
    pair, busy = Pair(torch.device("cpu")), list[bool]()
    pair.start()
    stand_in.broken = lambda result: busy.append(pair.stage.graphs._busy)
    pair.step()
    assert len(busy) > 2 and all(busy) and not pair.stage.graphs._busy
    output = pair.stage(pair.x().requires_grad_()).sum()
    stand_in.broken = mock.Mock(side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        output.backward()
    assert not pair.stage.graphs._busy


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_backward_pass_can_be_repeated(
    amp: torch.dtype | None, recorder: Any, device: torch.device
) -> None:
    """Wrong: gradients of activations that are gone, or statistics that are counted twice."""
    pair = Pair(device)
    pair.amp = amp
    pair.start()
    x = pair.x().requires_grad_()
    found = []
    for one in pair.both:
        y, wanted = pair.call(one, x), [x, *one.parameters()]
        sums = (y.float().pow(n).sum() for n in (1, 2))
        found.append([torch.autograd.grad(total, wanted, retain_graph=True) for total in sums])
    for actual, expected in zip(*found, strict=True):
        assert_equal(actual, expected)
    pair.same()
    assert recorder.recorded


def test_a_backward_pass_that_can_not_be_repeated(recorder: Any, device: torch.device) -> None:
    """Wrong: gradients of another pass's activations, or of weights that were written to."""
    pair = Pair(device)
    pair.start(needs_x=False)
    y = pair.stage(pair.x()).sum()
    y.backward(retain_graph=True)
    pair.stage(pair.x()).sum().backward()
    with pytest.raises(RuntimeError, match="gone since the first; set MODEL.RANDWIRE.CUDA_GRAPHS"):
        y.backward()
    y = pair.stage(pair.x()).sum()
    with torch.no_grad():
        pair.stage.nodes[1].conv.pointwise.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_replayed_gradient_is_not_differentiated(recorder: Any, device: torch.device) -> None:
    """Wrong: a penalty on gradients is left out of a loss, as that of a constant."""
    pair = Pair(device)
    pair.start(needs_x=True)
    x = pair.x().requires_grad_()
    y = pair.stage(x).sum()
    with pytest.raises(RuntimeError, match="differentiated again.*; set MODEL.RANDWIRE.FUSED off"):
        torch.autograd.grad(y, x, create_graph=True)


def test_weights_that_move_before_the_backward_pass(recorder: Any, device: torch.device) -> None:
    """Wrong: gradients of what lies where a weight was, as where FSDP gathers them once more."""
    pair = Pair(device)

    def backward_elsewhere() -> None:
        x = pair.x()
        outputs = [one(x).sum() for one in pair.both]
        for one in pair.both:
            for p in one.parameters():
                p.data = p.data.clone()
        for y in reversed(outputs):
            y.backward()

    pair.start(needs_x=False)
    with pytest.raises(RuntimeError, match="weights have moved; set MODEL.RANDWIRE.CUDA_GRAPHS"):
        backward_elsewhere()
    pair = Pair(device)
    pair.amp = torch.bfloat16  # of what is cast, a graph has a copy
    pair.start(needs_x=False)
    with torch.autocast(device.type, pair.amp):
        backward_elsewhere()
    pair.same()


def test_buffers_that_are_replaced_now_and_then(
    recorder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: a long training whose evaluations each make precise batch norms, with new buffers, is
    launched one by one after the first of them."""
    monkeypatch.setattr(stage_graphs, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(stage_graphs, "MANY_CALLS", 4)
    pair = Pair(device)
    for _ in range(5):
        for _ in range(FIRST_CALLS + 4):
            pair.step()
        for one in pair.both:
            norm = one.nodes[0].norm
            norm.running_mean = norm.running_mean.clone()
    assert recorder.recorded == 5


def test_weights_that_have_moved(
    recorder: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the graph reads the weights that were there before."""
    pair = Pair(device)

    def again(change: Callable[[RandWireStage], object]) -> None:
        pair.start()
        before = recorder.recorded
        pair.step()
        assert recorder.recorded == before and pair.stage.graphs._graphs
        for one in pair.both:
            change(one)
        with pair.launched():
            pair.step()

    def swap(stage: RandWireStage) -> None:
        for p in stage.parameters():
            p.data = p.data * 1.5

    def assign(stage: RandWireStage) -> None:
        state = {name: 1.5 * t for name, t in stage.state_dict().items() if t.is_floating_point()}
        stage.load_state_dict(state, strict=False, assign=True)
        stage.requires_grad_()

    def momentum(stage: RandWireStage) -> None:
        for node in stage.nodes:
            node.norm.momentum = 0.5

    def buffer(stage: RandWireStage) -> None:
        stage.nodes[0].norm.running_mean = torch.ones_like(stage.nodes[0].norm.running_mean)

    def wrap(stage: RandWireStage) -> None:
        conv = stage.nodes[1].conv.pointwise
        conv.weight = nn.Parameter(conv.weight.detach())

    for change in (swap, assign, momentum, buffer, wrap):
        again(change)
    pair.start()
    for one in pair.both:
        one.to(torch.float64).to(torch.float32)
    assert not pair.stage.graphs._graphs
    pair.step()
    monkeypatch.setattr(stage_graphs, "MOST_RECORDINGS", recorder.recorded)
    pair.start()
    assert not pair.stage.graphs._graphs, "somebody moves weights for ever"


@pytest.mark.parametrize(
    "options",
    [
        {},
        parallel_options(),
        {**parallel_options(), "find_unused_parameters": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_distributed_data_parallel(
    options: dict[str, bool], recorder: Any, device: torch.device
) -> None:
    """Wrong: gradients that share memory, or come all at once, are not what its buckets, steps
    without messages, clipping or an optimizer expect."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        pair = Pair(device)
        both = [DistributedDataParallel(one, bucket_cap_mb=0.001, **options) for one in pair.both]
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in both]
        for i in range(FIRST_CALLS + 4):
            last = i % 2 == 0  # of two steps whose gradients add up; static graphs begin so
            x = pair.x()
            for model, optimizer in zip(both, optimizers, strict=True):
                with nullcontext() if last else model.no_sync():
                    model(x).square().sum().backward()
                if last:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
            pair.same()
            for optimizer in optimizers if last else ():
                optimizer.zero_grad(set_to_none=i % 4 == 0)
        assert recorder.recorded == 1
    finally:
        torch.distributed.destroy_process_group()


def in_one_of_two(rank: int) -> tuple[int, list[Tensor]]:
    """How many graphs a process has recorded, and its weights after some steps."""
    stand_in = StandIn()
    if rank == 1:
        stand_in.record = mock.Mock(side_effect=MemoryError)  # type: ignore[method-assign]
    with mock.patch.object(cuda_graphs, "recorder", stand_in):
        pair = Pair(torch.device("cpu"))
        options = parallel_options()
        both = [DistributedDataParallel(one, bucket_cap_mb=0.001, **options) for one in pair.both]
        for step in range(FIRST_CALLS + 2):
            pair.drawn = 2 * step + rank
            x = pair.x()
            for model in both:
                model.zero_grad()
                model(x).square().sum().backward()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.01 * p.grad
            pair.same()
    return stand_in.recorded, [p.detach() for p in pair.stage.parameters()]


def test_processes_need_not_record_together() -> None:
    """Wrong: a process without a graph waits for ever for one that has one, or they part."""
    (recorded, weights), (others_recorded, others_weights) = in_two_processes(in_one_of_two)
    assert (recorded, others_recorded) == (1, 0)
    assert_equal(weights, others_weights)


def test_hooks_of_parameters(recorder: Any, device: torch.device) -> None:
    """Wrong: a hook is called in a replay and after it."""
    pair = Pair(device)
    for one in pair.both:
        one.nodes[1].conv.pointwise.weight.register_hook(lambda grad: 2 * grad)
    pair.start()
    pair.step()
    assert recorder.recorded == 1


def test_copies_have_no_graphs(recorder: Any, device: torch.device) -> None:
    """Wrong: a model that was trained can't be copied, sent to a process or saved."""
    pair = Pair(device)
    names = list(pair.stage.state_dict())
    pair.start()
    assert list(pair.stage.state_dict()) == names
    for copied in (copy.deepcopy, lambda stage: pickle.loads(pickle.dumps(stage))):
        other: Any = copied(pair.stage)
        assert not other.graphs._graphs and pair.stage.graphs._graphs
        pair.other = other
        other.cuda_graphs = False
        for p, own in zip(other.parameters(), pair.stage.parameters()):
            p.grad = own.grad.clone()
        pair.step()


def test_saved_tensors_that_others_handle(recorder: Any, device: torch.device) -> None:
    """Wrong: activation checkpoints find other tensors when they compute again."""
    pair = Pair(device)
    pair.start(needs_x=False)
    x = pair.x()
    for one in pair.both:
        checkpoint(one, x, use_reentrant=False).square().sum().backward()
    pair.same()


# -------------------------------------------------------------------------------------------------
# What fails, and who says so
# -------------------------------------------------------------------------------------------------


def test_a_call_that_gives_nan_ends_no_graphs(recorder: Any, device: torch.device) -> None:
    """Wrong: one batch that overflows, as float16's first ones may, ends graphs for good."""
    pair = Pair(device)
    for one in pair.both:
        one.eval()  # whose statistics stay finite
    with torch.no_grad():
        for _ in range(FIRST_CALLS):
            assert all(one(pair.x() * float("nan")).isnan().any() for one in pair.both)
    for _ in range(FIRST_CALLS):
        pair.infer()
    with pair.launched(expected=False):
        pair.infer()
    assert not pair.stage.graphs.failure


def test_memory_that_runs_out_ends_graphs_and_not_the_training(
    recorder: Any,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong: a launch finds no memory, as long as graphs, of other stages too, keep it; or one that
    finds none, without any graph, has there be none for ever, without a word."""
    monkeypatch.setattr(stage_graphs, "_all", weakref.WeakSet())  # not those of other tests
    pair, other = Pair(device), Pair(device)
    launch = pair.stage.run_fused

    def try_to_launch(x: Tensor, kept: Tensor | None = None) -> Tensor:
        full()
        return launch(x, kept)

    full = mock.Mock(side_effect=torch.OutOfMemoryError("too large a batch"))
    with (
        mock.patch.object(pair.stage, "run_fused", try_to_launch),
        pytest.raises(torch.OutOfMemoryError),
    ):
        pair.step()
    pair.start()
    other.start()
    assert pair.stage.graphs._graphs and not caplog.records
    full = mock.Mock(side_effect=[torch.OutOfMemoryError("no\nroom"), None])
    with mock.patch.object(pair.stage, "run_fused", try_to_launch):
        pair.step(size=6)
    assert full.call_count == 2 and not (pair.stage.graphs._graphs or other.stage.graphs._graphs)
    (record,) = caplog.records
    assert "no room" in record.message
    with other.launched():
        other.start()
    full = mock.Mock(side_effect=torch.OutOfMemoryError("no room"))
    with (
        mock.patch.object(pair.stage, "run_fused", try_to_launch),
        pytest.raises(torch.OutOfMemoryError),
    ):
        pair.step(size=6)


def test_a_graph_that_fails_in_inference(recorder: Any, device: torch.device) -> None:
    """Wrong: an evaluation for which memory does not do takes the training's graphs."""
    pair = Pair(device)
    pair.start()
    with mock.patch.object(recorder, "record", side_effect=torch.OutOfMemoryError("no room")):
        for _ in range(FIRST_CALLS):
            pair.infer(size=6)
    with pair.launched(expected=False):
        pair.step()
    assert recorder.recorded == 1


@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_graph_that_fails(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: a training ends, or goes on with other numbers, for want of a graph; or each step
    warns of it."""
    stand_in = StandIn()
    if how == "wrong":
        stand_in.broken = lambda result: result.mul_(1.01)
    else:
        monkeypatch.setattr(stand_in, "record", mock.Mock(side_effect=MemoryError("no\nmemory")))
    monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
    pair = Pair(torch.device("cpu"))
    for _ in range(3 * FIRST_CALLS):
        pair.step()
    monkeypatch.setattr(stage_graphs, "MANY_CALLS", 4 * FIRST_CALLS)
    for _ in range(3 * FIRST_CALLS):
        pair.step()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "5 channels" in record.message
    assert ("no memory" if how == "raises" else "off by 0.01") in record.message


def test_a_replay_that_leaves_other_values_than_zeros(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: a replay is taken for right that spoils what the next stage reads of its images."""
    stand_in = StandIn()
    stand_in.broken = lambda result: zeros_of(result) and whole_image(result)[:, -1].fill_(1)
    monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
    monkeypatch.setitem(MULTIPLES, torch.float32, 8)
    pair = Pair(torch.device("cpu"))
    for _ in range(FIRST_CALLS):
        pair.step()
    (record,) = caplog.records
    assert "off by" in record.message and not pair.stage.graphs.replayed


def test_memory_for_some_sizes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: for want of memory for the largest size, or for one more, none has a graph."""
    monkeypatch.setattr(stage_graphs, "LATER_CALLS", 3)
    stand_in = StandIn()
    monkeypatch.setattr(cuda_graphs, "recorder", stand_in)
    pair = Pair(torch.device("cpu"))
    record, graphs = stand_in.record, pair.stage.graphs

    def record_within_bounds(x: Tensor, *others: Any) -> list[Recording]:
        if x.shape[-1] > 8 or len(graphs._graphs) == 2:
            raise torch.OutOfMemoryError("no\nroom")
        return record(x, *others)

    monkeypatch.setattr(stand_in, "record", record_within_bounds)
    for size in (8, 4, 9, 6) * 10:
        pair.step(size)
    assert sorted(graph.x.shape[-1] for graph in graphs._graphs.values()) == [4, 8]
    said = [record.message for record in caplog.records]
    assert len(said) == 2 and all("no room" in message for message in said)
    assert "as large as (2, 5, 9, 9), a stage of 5 channels" in said[0]
    assert "more than 2 sizes, a stage" in said[1]


class Allocator:
    """PyTorch's memory pools, as far as a recording that fails leaves something behind.

    Attributes:
        to: where what is allocated goes.
        users: of the pool.
    """

    def __init__(self, resets: bool) -> None:
        self.resets, self.to, self.users = resets, "", 1  # another graph shares the pool

    def end(self, device: int, pool: str) -> None:
        assert self.to == pool, "not currently recording to mempool_id"
        self.to = ""

    def release(self, device: int, pool: str) -> None:
        self.users -= 1
        assert self.users >= 1, "the other graph's memory"


class FailingGraph:
    """A CUDAGraph whose recording fails: at PyTorch 2.9 its end leaves things as they are; in 2.13
    it ends the allocations; from 2.14 on a reset undoes all, with which it is destroyed, too."""

    def __init__(self, allocator: Allocator, where: str) -> None:
        self.allocator, self.where = allocator, where
        self.begun = self.allocates = False

    def capture_begin(self, pool: str, **options: str) -> None:
        assert self.where != "before", "a device that fails"
        self.begun = self.allocates = True
        self.allocator.to = pool
        self.allocator.users += 1
        assert self.where != "begin", "a stream that is recorded already"

    def pool(self) -> str:
        raise RuntimeError("without a preceding successful capture")

    def reset(self) -> None:
        if self.allocator.resets and self.begun:
            if self.allocates:
                self.allocator.end(0, "pool")
            self.allocator.release(0, "pool")
            self.begun = self.allocates = False


@pytest.mark.parametrize("version", ["2.9.1", "2.13.0", "2.14.0"])
@pytest.mark.parametrize("where", ["before", "begin", "end"])
def test_what_a_recording_that_fails_leaves_behind(
    where: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the memory that it had is nobody's for ever, or that of another graph is given away,
    or the end of the graph raises, in a destructor; or work goes on in the wrong stream."""
    allocator, streams = Allocator(resets=version >= "2.14"), ["own"]
    graph = FailingGraph(allocator, where)

    @contextmanager
    def record(graph: FailingGraph, pool: str, stream: str, **options: str) -> Iterator[None]:
        streams.append(stream)
        graph.capture_begin(pool)
        yield
        if version >= "2.13":
            allocator.end(0, pool)
            graph.allocates = False
        raise RuntimeError("invalidated")

    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", allocator.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", allocator.release, raising=False)
    failed = pytest.raises((RuntimeError, AssertionError))
    with failed, graph_recorder._recording(graph, "pool", "side"):  # type: ignore[arg-type]
        pass
    graph.reset()  # as its end does
    assert (allocator.to, allocator.users, streams[-1]) == ("", 1, "own")


def memory_pools() -> set[tuple[int, ...]]:
    """Those of the graphs that are alive, and of no graph."""
    gc.collect()
    torch.cuda.empty_cache()
    return {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recording_that_a_gpu_ends_on_cuda(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong: what PyTorch leaves behind when a recording ends in the middle stops the next dropout,
    or the graphs that there were."""
    device = torch.device("cuda")
    whole, broken = Pair(device), Pair(device)
    for _ in range(FIRST_CALLS):
        whole.step()
    before = memory_pools()
    launch = broken.stage.run_fused

    def wait(x: Tensor, kept: Tensor | None = None) -> Tensor:
        y = launch(x, kept)
        if torch.cuda.is_current_stream_capturing():
            y.sum().item()  # nothing runs while it is recorded: there is no result to wait for
        return y

    with mock.patch.object(broken.stage, "run_fused", wait):
        for _ in range(2 * FIRST_CALLS):
            broken.step()
    assert memory_pools() <= before
    assert "its CUDA graph failed" in caplog.text
    assert nn.functional.dropout(torch.ones(1000, device=device)).unique().tolist() == [0, 2]
    whole.step()


def test_the_log_says_so_once(
    recorder: Any, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong: nobody knows how a model runs."""
    caplog.set_level(logging.INFO)
    backbone = RandWire(draw_spec("small", "WS"), fused="on").double().eval().to(device)
    with torch.no_grad():
        for _ in range(2 * FIRST_CALLS):
            backbone(images(device=device))
    said = [r.message for r in caplog.records if "RandWire runs" in r.message]
    assert len(said) == 2 and "graph" not in said[0]
    assert "launches of res3, res4, res5 are replayed as CUDA graphs" in said[1]


def test_what_is_timed_is_what_a_training_runs(recorder: Any, device: torch.device) -> None:
    """Wrong: "auto" compares launches that a training would not wait for, or the graphs of one
    iteration's images stay."""
    pair = Pair(device)
    found = shadow(pair.stage, pair.x().requires_grad_(), rounds=1)
    assert recorder.recorded == 2 and found.seconds.keys() == {True, False}
    assert not pair.stage.graphs._graphs and not pair.stage.graphs.replayed
    pair.same()
    shadow(pair.other, pair.x().requires_grad_(), rounds=1)
    assert recorder.recorded == 2
