"""One line of the table that `make bench` prints: a figure, what it is held against, its goal."""

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    measured: float
    goal: float
    unit: str = ""
    """Empty where `measured` is a ratio."""
    at_most: bool = False
    """Whether less is better."""
    detail: str = ""
    """What the figure was made of, in absolute numbers."""

    @property
    def met(self) -> bool:
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal


def tell(figure: Figure) -> None:
    """Write a figure as a line of JSON: for `python -m benchmarks`, and readable by itself."""
    print(json.dumps(asdict(figure)), flush=True)


def say(text: str) -> None:
    """Write what is no figure: progress, and what was seen on the way."""
    print(text, file=sys.stderr, flush=True)


def point(chart: str, x: float, **costs: float) -> None:
    """Write a point of a chart as a line of JSON, beside the figures."""
    print(json.dumps({"chart": chart, "x": x} | costs), flush=True)
