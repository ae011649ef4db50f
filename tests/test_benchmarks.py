"""What the benchmarks make of their numbers: goals, tables, charts, and what counts as slower."""

import re

import pytest

from benchmarks import compare, report
from benchmarks.compare import TOLERANCE, Change
from benchmarks.figures import Figure, point, tell
from benchmarks.report import Point, Report


@pytest.mark.parametrize(
    ("measured", "at_most", "met"),
    [
        (1.0, False, True),
        (0.99, False, False),
        (1.0, True, True),
        (1.01, True, False),
    ],
)
def test_a_goal_is_met_from_its_own_side(measured: float, at_most: bool, met: bool) -> None:
    assert Figure("a figure", measured, 1.0, at_most=at_most).met is met


def test_the_table_says_which_goals_were_met_and_what_crashed() -> None:
    figures = [
        Figure("reads", 0.31, 0.25, detail="310 of 1000 per s"),
        Figure("life", 187.4, 150, "ms", at_most=True),
    ]

    lines = report.table([Report("throughput", figures), Report("idle", crashed="status 1")])

    assert [re.split(" {2,}", line) for line in lines.splitlines()] == [
        ["figure", "measured", "goal", "detail"],
        ["reads", "0.31", "at least 0.25", "met", "310 of 1000 per s"],
        ["life", "187 ms", "at most 150 ms", "MISSED"],
        ["idle", "CRASHED", "status 1"],
    ]


def test_what_a_module_tells_is_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    figure = Figure("reads", 0.31, 0.25, detail="310 of 1000 per s")
    tell(figure)
    point("waiting", 1000, submit_us=610, read_us=190.5)

    lines = capsys.readouterr().out.splitlines()

    assert list(map(report.parsed, lines)) == [
        figure,
        Point("waiting", 1000, {"submit_us": 610, "read_us": 190.5}),
    ]


@pytest.mark.parametrize("line", ["ready", "7", "{}", '{"chart": "waiting"}', '{"name": "x"}'])
def test_anything_else_is_not_taken_for_a_figure(line: str) -> None:
    with pytest.raises(ValueError, match="Neither a figure nor a point"):
        report.parsed(line)


def test_a_module_that_is_not_there_has_crashed() -> None:
    assert report.run("no_such_module").crashed == "ended with status 1"


@pytest.mark.parametrize("at_most", [False, True])
def test_worse_is_more_than_the_tolerance_in_the_direction_that_counts(at_most: bool) -> None:
    def became(gain: float) -> Change:
        return Change("a figure", 100, 100 / gain if at_most else 100 * gain, at_most)

    assert became(1 - TOLERANCE - 0.01).worse
    assert not became(1 - TOLERANCE + 0.01).worse
    assert not became(2).worse


def test_revisions_are_compared_by_the_medians_of_the_figures_that_both_have() -> None:
    def rounds(*measured: float) -> list[Figure]:
        return [Figure("reads", value, 1.0) for value in measured]

    base = {"reads": rounds(100, 10, 101), "of the base only": rounds(1)}
    now = {"reads": rounds(80, 900, 81), "new": rounds(1)}

    assert compare.changes(base, now) == [Change("reads", 100, 81)]
    assert "WORSE" in compare.table(compare.changes(base, now))
