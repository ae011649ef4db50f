"""What benchmark modules have printed, read back: their figures, the points of a chart, a table."""

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.figures import Figure

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Point:
    """What a request costs at one place of a chart."""

    chart: str
    x: float
    costs: dict[str, float]


@dataclass(slots=True)
class Report:
    """What one run of a module has given."""

    module: str
    figures: list[Figure] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    took_s: float = 0.0
    crashed: str = ""
    """Why it ended badly; empty where it did not."""


def parsed(line: str) -> Figure | Point:
    """Read a line that `figures.tell` or `figures.point` wrote. Raises: ValueError: neither did."""
    try:
        found = json.loads(line)
        if "chart" in found:
            chart, x = found.pop("chart"), float(found.pop("x"))
            return Point(chart, x, {name: float(cost) for name, cost in found.items()})
        return Figure(**found)
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"Neither a figure nor a point: {line}") from error


def run(module: str, *, python: Path = Path(sys.executable), root: Path = ROOT) -> Report:
    """Run `python -m benchmarks.MODULE` in `root`; what it says is passed through."""
    report = Report(module)
    began = time.monotonic()
    command = [str(python), "-m", f"benchmarks.{module}"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            try:
                found = parsed(line)
            except ValueError as error:
                report.crashed = str(error).strip()
                continue
            if isinstance(found, Figure):
                report.figures.append(found)
            else:
                report.points.append(found)
    if child.returncode:
        report.crashed = f"ended with status {child.returncode}"
    elif not report.figures:
        report.crashed = report.crashed or "told no figure"
    report.took_s = time.monotonic() - began
    return report


def table(reports: Iterable[Report]) -> str:
    """A line for each figure, and one for each module that crashed."""
    lines = [("figure", "measured", "goal", "", "detail")]
    for report in reports:
        lines += [_cells(figure) for figure in report.figures]
        if report.crashed:
            lines.append((report.module, "", "", "CRASHED", report.crashed))
    return aligned(lines)


def _cells(figure: Figure) -> tuple[str, str, str, str, str]:
    unit = f" {figure.unit}" if figure.unit else ""
    bound = "at most" if figure.at_most else "at least"
    return (
        figure.name,
        number(figure.measured) + unit,
        f"{bound} {number(figure.goal)}{unit}",
        "met" if figure.met else "MISSED",
        figure.detail,
    )


def number(value: float) -> str:
    """Three figures that count, and no more digits than that."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
