"""Answers for people on a terminal, and for programs in a pipe."""

import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(said: object) -> None:
    """One line; a fraction is a number again."""
    print(json.dumps(said, default=_number))


def print_fields(fields: Mapping[str, object]) -> None:
    """One field a line; what is None is left out."""
    for name, value in fields.items():
        if value is not None:
            print(f"{name:15} {value}")


def print_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on a terminal, else lines with tabs, so that nothing is cut to a width."""
    console = Console()
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        for line in [names, *texts]:
            print("\t".join(line))
        return
    table = Table(*names)
    for line in texts:
        table.add_row(*map(Text, line))  # not markup: the service's words may hold brackets
    console.print(table)


def _number(value: object) -> float:
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(type(value).__name__)
