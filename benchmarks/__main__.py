"""`python -m benchmarks`: every figure that the README quotes, in one table with its goal.

Each module runs by itself, one after the other. A goal that is not met is said and is no failure;
a module that crashed is. `--save FILE` keeps what was measured, for `python -m benchmarks.chart`.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine, report
from benchmarks.figures import say
from benchmarks.report import Report

MODULES = ("throughput", "flat", "life", "callbacks", "waits", "idle")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=" ".join(MODULES))
    parser.add_argument("--save", type=Path, metavar="FILE")
    asked = parser.parse_args()
    began = time.monotonic()
    reports = []
    for module in asked.modules or MODULES:
        say(f"\n{module}")
        reports.append(report.run(module))
        say(f"{module} took {reports[-1].took_s:.0f} s")
    print(report.table(reports))
    figures = [figure for each in reports for figure in each.figures]
    crashed = [each.module for each in reports if each.crashed]
    print(
        f"{sum(figure.met for figure in figures)} of {len(figures)} goals met, "
        f"{len(crashed)} modules crashed, {time.monotonic() - began:.0f} s in all"
    )
    if asked.save is not None:
        asked.save.write_text(json.dumps(saved(reports), indent=1) + "\n")
    return 1 if crashed else 0


def saved(reports: list[Report]) -> dict[str, Any]:
    """All that was measured, and on what; `chart.points` reads it."""
    return {
        "machine": machine.facts(),
        "took_s": {each.module: round(each.took_s) for each in reports},
        "figures": [
            {"module": each.module} | asdict(figure) for each in reports for figure in each.figures
        ],
        "points": [asdict(point) for each in reports for point in each.points],
    }


if __name__ == "__main__":
    sys.exit(main())
