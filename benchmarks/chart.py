"""`python -m benchmarks.chart FILE SVG`: what a request costs, drawn from `python -m benchmarks
--save FILE`.

Four panels, against what might make a request dearer: tasks that wait, tasks that have ended,
accounts, clients. There is no background, and the colours are of middle brightness, so that it
can be read on a light page and on a dark one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.report import Point

PANELS = {
    "waiting": "tasks that wait",
    "finished": "tasks that have ended",
    "accounts": "accounts that send",
    "clients": "clients at a time",
}
LINES = {
    "submit_us": ("submit", "#d9772b", "o-"),
    "read_us": ("read", "#3a86d8", "s--"),
}
"""By cost: its name, colour, and form: nobody has to tell colours apart."""
INK = "#7d8590"
SIZE_INCHES = (9, 5.6)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chart", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("svg", type=Path)
    asked = parser.parse_args()
    draw([Point(**point) for point in json.loads(asked.file.read_text())["points"]], asked.svg)


def draw(points: Sequence[Point], to: Path) -> None:
    """Write the chart. The same points give the same file."""
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style = dict.fromkeys(ink, INK) | {
        "svg.fonttype": "path",  # whoever looks may have other fonts
        "svg.hashsalt": "zimage",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(2, 2, sharey=True, figsize=SIZE_INCHES)
        for panel, (chart, title) in zip(panels.flat, PANELS.items(), strict=True):
            _panel(panel, title, [point for point in points if point.chart == chart])
        # One scale for all, from all: set for each panel, it would be that of the first.
        dearest = max((us for point in points for us in point.costs.values()), default=1.0)
        panels.flat[0].set_ylim(0, dearest * 1.08)
        figure.supylabel("CPU time of API and database per request, µs", fontsize=10)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=len(LINES), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        figure.savefig(to, transparent=True, metadata={"Date": None} if to.suffix == ".svg" else {})
        pyplot.close(figure)


def _panel(panel: Axes, title: str, points: Sequence[Point]) -> None:
    points = sorted(points, key=lambda point: point.x)
    for cost, (name, colour, form) in LINES.items():
        seen = [(point.x, point.costs[cost]) for point in points if cost in point.costs]
        panel.plot([x for x, _ in seen], [us for _, us in seen], form, color=colour, label=name)
    # None at all is a place of its own, left of 1 or of the first that is not none.
    first = min((point.x for point in points if point.x > 0), default=1)
    panel.set_xscale("symlog", linthresh=first, linscale=0.5)
    panel.set_xticks([point.x for point in points])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shortened(x)))
    panel.set_xlabel(title)
    panel.grid(axis="y", color=INK, alpha=0.3)


def shortened(number: float) -> str:
    """1000 is `1 k`, a million `1 M`."""
    for size, letter in ((1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


if __name__ == "__main__":
    main()
