"""A comparison as tables in Markdown, and as JSON."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from .comparison import Benchmark, Row
from .growth import GrowthPoint
from .models import MODELS, REFERENCE

MB = 1e6  # bytes; decimal, as on disks, and as the paper's "M"


def to_markdown(benchmark: Benchmark, command: str) -> str:
    """The conditions, a table of counts and, if steps were timed, a table of times, in Markdown.

    All numbers are per image, except peaks.
    """
    machine, rounds = benchmark.machine, benchmark.settings.rounds
    where = describe(machine)
    if "cudnn_benchmark" in machine:
        where += f", cudnn.benchmark {machine['cudnn_benchmark']}"
    paragraphs = [
        f"`{command}`",
        f"{benchmark.case}; {benchmark.settings}",
        "Counted on fake tensors; per image, but for the peak of the whole batch:",
        _counts(benchmark),
    ]
    if not rounds:
        return "\n\n".join([*paragraphs, f"{where}; no times were taken."])
    on_gpu = any(row.gpu_peak is not None for row in benchmark.rows)
    paragraphs += [
        f"Measured on {where}; medians over {rounds} round(s), per image"
        + (" but for the peak:" if on_gpu else ":"),
        _times(benchmark, on_gpu),
    ]
    if ceilings := benchmark.ceilings:
        paragraphs.append(
            f"Ceilings measured in the same run: {ceilings.flops / 1e9:,.0f} GFLOP/s in matrix "
            f"products, {ceilings.bandwidth / 1e9:,.1f} GB/s in copies. A dense 3×3 convolution "
            "can be faster than its floor: Winograd's method does with fewer multiply-adds."
        )
    return "\n\n".join(paragraphs)


def _counts(benchmark: Benchmark) -> str:
    batch = benchmark.case.batch
    header = ["multiply-adds (M)", "traffic (MB)", "launches", "saved (MB)", "peak (MB)"]
    rows = [
        [
            *_title(row),
            f"{row.count.flops / 2 / batch / MB:,.0f}",
            f"{row.count.traffic / batch / MB:,.0f}",
            f"{row.count.launches:,}",
            f"{row.count.saved / batch / MB:,.1f}",
            f"{row.count.peak / MB:,.0f}",
        ]
        for row in benchmark.rows
    ]
    return table(["", "step", *header], rows)


def _times(benchmark: Benchmark, on_gpu: bool) -> str:
    batch = benchmark.case.batch
    header = ["", "step", "time (ms)", f"× {MODELS[REFERENCE]} (quartiles)"]
    header += ["floor (ms)", "time / floor"] if benchmark.ceilings else []
    header += ["measured peak (MB)", "host (ms)", "kernels"] if on_gpu else []
    rows = []
    for row in benchmark.rows:
        time = statistics.median(row.times)
        cells = [*_title(row), f"{time / batch * 1e3:,.2f}"]
        cells.append("{:.2f} ({:.2f} … {:.2f})".format(*row.versus) if row.versus else "")
        if row.floor is not None:
            cells += [f"{row.floor / batch * 1e3:,.2f}", f"{time / row.floor:.1f}"]
        if row.gpu_peak is not None:
            host = f"{statistics.median(row.host) / batch * 1e3:,.2f}" if row.host else ""
            cells += [f"{row.gpu_peak / MB:,.0f}", host, f"{row.gpu_kernels or 0:,}"]
        rows.append(cells)
    return table(header, rows)


def to_json(benchmark: Benchmark, command: str, growth: Iterable[GrowthPoint] = ()) -> str:
    """All results as JSON, in bytes and seconds for the whole batch; null if not measured."""
    counted = ("traffic", "launches", "saved", "peak", "flops")
    measured = ("times", "floor", "gpu_peak", "host", "gpu_kernels")
    rows = [
        {
            "model": row.model,
            "step": row.step,
            **{name: getattr(row.count, name) for name in counted},
            **{name: getattr(row, name) for name in measured},
            "versus_resnet50": None if row.versus is None else row.versus._asdict(),
        }
        for row in benchmark.rows
    ]
    content: dict[str, Any] = {
        "command": command,
        "machine": benchmark.machine,
        "case": asdict(benchmark.case),
        "settings": asdict(benchmark.settings),
        "ceilings": None if benchmark.ceilings is None else asdict(benchmark.ceilings),
        "rows": rows,
        "growth": [asdict(point) for point in growth],
    }
    return json.dumps(content, indent=2)


def overview(comparisons: Mapping[str, Any]) -> str:
    """A table of the times for the whole batch, with their ratios to ResNet-50's, in Markdown.

    It is "" without any times: tabulate 0.9 can't make a table without rows.

    Args:
        comparisons: title -> the parsed output of ``to_json``; values without "rows" are ignored.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for title, content in comparisons.items():
        for row in content.get("rows", ()):
            versus, ms = row["versus_resnet50"], 1e3 * statistics.median(row["times"])
            times = f"{ms:,.1f}" + (f" ({versus['median']:.2f})" if versus else "")
            cells.setdefault((title, row["step"]), {})[row["model"]] = times
    if not cells:
        return ""
    names = [name for name in MODELS if any(name in own for own in cells.values())]
    header = ["ms of a step (× ResNet-50)", "step", *(MODELS[name] for name in names)]
    return table(header, [[*key, *(own.get(n, "") for n in names)] for key, own in cells.items()])


def describe(machine: Mapping[str, str | int]) -> str:
    """The result of ``describe_machine`` as text, without cuDNN."""
    return (
        f"{machine['device']}, {machine['threads']} threads on {machine['cpus']} CPUs, "
        f"PyTorch {machine['torch']}"
    )


def _title(row: Row) -> list[str]:
    return [MODELS[row.model], row.step]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose first two columns are text, and the others numbers."""
    align = ("left", "left", *("right",) * (len(header) - 2))
    return tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)
