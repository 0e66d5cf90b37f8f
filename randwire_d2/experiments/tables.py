"""Tables as text, Markdown and JSON, whose numbers may be means over several networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

UNITS = {"": 1, "M": 1e6, "B": 1e9}


def mean_and_std(values: Sequence[float], digits: int) -> str:
    """The mean ± sample standard deviation, the latter with ``digits`` decimals; or the only value.

    A dash if there is no value, or one is not finite, such as APl of a set without large objects.
    """
    if not values or not all(map(math.isfinite, values)):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values):.{digits}f}"


def finite(value: float | None) -> float | None:
    """A number for JSON: None in place of NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Quantity:
    """A number, or the mean ± sample standard deviation of several networks' numbers.

    Attributes:
        values: one number per network.
        unit: the unit for printing, ``"M"``, ``"B"`` or ``""``.
        digits: the numbers of decimals to print, of the mean and of the deviation.
    """

    values: tuple[float, ...]
    unit: str = "M"
    digits: tuple[int, int] = (2, 2)

    @property
    def numbers(self) -> list[float]:
        """The mean, followed by the deviation if there are several networks."""
        several = len(self.values) > 1
        return [mean(self.values), stdev(self.values)] if several else [self.values[0]]

    def in_digits(self, digits: Sequence[int], cut: bool = False) -> list[str]:
        """The numbers in the unit, as text with so many decimals, rounded or cut off."""
        numbers = [number / UNITS[self.unit] for number in self.numbers]
        if cut:
            numbers = [math.floor(n * 10**d) / 10**d for n, d in zip(numbers, digits)]
        return [f"{number:,.{d}f}" for number, d in zip(numbers, digits)]

    def __str__(self) -> str:
        number = self.numbers[0] / UNITS[self.unit]
        # Print two significant digits of a small number.
        more = 0 if number >= 0.1 or number == 0 else 1 - math.floor(math.log10(number))
        # Print no deviation if all networks have the same value.
        digits = [max(d, more) for d in self.digits[: len(set(self.values))]]
        return f"{' ± '.join(self.in_digits(digits))} {self.unit}".rstrip()

    def against(self, paper: str) -> str:
        """How the paper's number comes from these: ``"rounded"``, ``"cut off"``, or ``"not …"``
        with the rounded numbers."""
        printed = paper.split("±")
        digits = [len(number.partition(".")[2]) for number in printed]
        rounded = self.in_digits(digits)
        if rounded == printed:
            return "rounded"
        cut_off = self.in_digits(digits, cut=True) == printed
        return "cut off" if cut_off else f"not {'±'.join(rounded)}"

    @property
    def raw(self) -> Any:
        """The numbers for JSON."""
        numbers = self.numbers
        return {"mean": numbers[0], "std": numbers[1]} if len(numbers) > 1 else numbers[0]


@dataclass(frozen=True)
class Table:
    """Rows of named cells: text, numbers, sizes as (height, width), ``Quantity``; None is empty.

    If a column's name contains a colon, only the part after it is printed.
    """

    title: str
    rows: Sequence[dict[str, Any]]
    note: str = ""

    def to_text(self, markdown: bool) -> str:
        """The table as text or Markdown, without the columns in which every cell is empty."""
        columns = [c for c in self.rows[0] if any(row[c] is not None for row in self.rows)]
        lines = [[_cell(row[column]) for column in columns] for row in self.rows]
        numeric = [
            any(isinstance(row[c], (int, float, Quantity)) for row in self.rows) for c in columns
        ]
        table = tabulate(
            lines,
            [column.rpartition(": ")[2] for column in columns],
            tablefmt="pipe" if markdown else "simple",
            disable_numparse=True,
            colalign=["right" if number else "left" for number in numeric],
        )
        title = f"**{self.title}**" if markdown else self.title
        return f"{title}\n\n{table}"

    def to_json(self) -> dict[str, Any]:
        rows = [{column: _raw(cell) for column, cell in row.items()} for row in self.rows]
        return {"title": self.title, "rows": rows, "note": self.note}


def _cell(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell[0]}×{cell[1]}" if isinstance(cell, tuple) else str(cell)


def _raw(cell: Any) -> Any:
    return cell.raw if isinstance(cell, Quantity) else cell
