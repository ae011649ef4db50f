"""`python -m benchmarks.compare REVISION [MODULE ...]`: this tree beside an older revision.

The service of REVISION is measured by the benchmarks of this tree, so that both are measured by
the same; where they cannot run there, that is said as a crash. Both take turns, several times over,
and the medians are compared: a noisy machine disturbs both alike. Exits with 1 where a figure got
worse by more than TOLERANCE, or a module crashed.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.figures import Figure, say
from benchmarks.report import ROOT

MODULES = ("throughput", "life")
ROUNDS = 3
TOLERANCE = 0.10
"""A median of three rounds that is worse by more is told; an assumption, on a quiet machine."""

EXTRAS = "worker,local"


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a figure."""

    name: str
    base: float
    now: float
    at_most: bool = False

    @property
    def gain(self) -> float:
        """How many times as good as it was: less than 1 is worse, whichever way it counts."""
        better, worse = (self.base, self.now) if self.at_most else (self.now, self.base)
        return better / worse if worse else 1.0 if better == worse else float("inf")

    @property
    def worse(self) -> bool:
        return self.gain < 1 - TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    base: dict[str, list[Figure]] = defaultdict(list)
    now: dict[str, list[Figure]] = defaultdict(list)
    crashed: list[str] = []
    with _checked_out(asked.revision) as tree:
        python = _python_of(tree)
        for round_ in range(1, asked.rounds + 1):
            for name, root, interpreter, into in (
                (asked.revision, tree, python, base),
                ("this tree", ROOT, Path(sys.executable), now),
            ):
                for module in asked.modules:
                    say(f"\nround {round_} of {asked.rounds}, {name}: {module}")
                    ran = report.run(module, python=interpreter, root=root)
                    if ran.crashed:
                        crashed.append(f"{module} of {name}: {ran.crashed}")
                    for figure in ran.figures:
                        into[figure.name].append(figure)
    found = changes(base, now)
    print(table(found))
    for line in dict.fromkeys(crashed):
        print(f"CRASHED {line}")
    return 1 if crashed or not found or any(change.worse for change in found) else 0


def changes(
    base: Mapping[str, Sequence[Figure]], now: Mapping[str, Sequence[Figure]]
) -> list[Change]:
    """The medians of every figure that both have."""
    return [
        Change(
            name,
            statistics.median(figure.measured for figure in base[name]),
            statistics.median(figure.measured for figure in figures),
            figures[0].at_most,
        )
        for name, figures in now.items()
        if base.get(name)
    ]


def table(found: Sequence[Change]) -> str:
    lines = [("figure", "base", "now", "now / base", "")]
    for change in found:
        verdict = "WORSE" if change.worse else ""
        ratio = f"{change.now / change.base:.2f}" if change.base else ""
        less = " (less is better)" if change.at_most else ""
        before, after = report.number(change.base), report.number(change.now)
        lines.append((change.name + less, before, after, ratio, verdict))
    return report.aligned(lines)


@contextmanager
def _checked_out(revision: str) -> Iterator[Path]:
    """A worktree of `revision` with the benchmarks of this tree, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="zimage-compare-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL may have to run as another user
        tree = Path(folder, "base")
        _git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(
                ROOT / "benchmarks",
                tree / "benchmarks",
                ignore=shutil.ignore_patterns("__pycache__"),
            )
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    program = shutil.which("git") or "git"
    subprocess.run([program, *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


def _python_of(tree: Path) -> Path:
    """Our interpreter where `tree` needs the same packages, else one that has what it needs."""
    if needs(tree) == needs(ROOT):
        return Path(sys.executable)
    say("The base needs other packages: they are installed beside it; this may take minutes.")
    subprocess.run([sys.executable, "-m", "venv", str(tree / ".venv")], check=True)
    python = tree / ".venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "-c", "constraints.txt", "-e", f".[{EXTRAS}]"]
    subprocess.run(install, cwd=tree, check=True, stdout=sys.stderr)
    return python


def needs(tree: Path) -> tuple[str, object, object]:
    """What decides which packages a tree runs with: not those that only develop or draw charts."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = (tree / "constraints.txt").read_text()
    return pinned, project["dependencies"], {name: extras[name] for name in ("worker", "local")}


if __name__ == "__main__":
    sys.exit(main())
