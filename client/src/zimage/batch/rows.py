"""The images that a CSV file asks for: a row is one, or one for each style."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zimage.errors import InvalidRequest

TEMPLATE = "{prompt}"
STYLED_TEMPLATE = "{prompt}, {style} style"
"""Of a job with styles, where no template is given."""
SEED = r"[0-9]{1,19}"
"""No service takes a longer one, and Python reads none of thousands of digits."""
NAME_MAX_CHARACTERS = 60
"""Three bytes each in Chinese: with its ending a name stays under what file systems take."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image. `key` names it in the results and its file; no two rows have the same."""

    key: str
    prompt: str
    size: str | None = None
    seed: int | None = None

    @property
    def content(self) -> str:
        """Changes exactly when another image is asked for; hex."""
        return _digest(json.dumps([self.prompt, self.size, self.seed]))


def read_rows(path: Path, *, styles: Sequence[str] = (), template: str | None = None) -> list[Row]:
    """The images that the CSV file at `path` asks for, in its order.

    Columns: `prompt`; optionally `id` or `name`, `size`, `seed`, `style` and any that `template`
    names in braces. With `styles`, each row is drawn once in each of them. Without an id, a row is
    known by its content, so that rows may be moved and added.

    Raises:
        InvalidRequest: the message names the line and what is wrong with it.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a BOM
            rows = list(_read(csv.DictReader(file, strict=True), styles, template))
    except (UnicodeError, csv.Error) as error:
        raise InvalidRequest(f"{path} is not CSV in UTF-8: {error}") from None
    if not rows:
        raise InvalidRequest(f"{path} has no rows")
    return rows


def _read(
    reader: "csv.DictReader[str]", styles: Sequence[str], template: str | None
) -> Iterator[Row]:
    if "prompt" not in (reader.fieldnames or ()):
        raise InvalidRequest("The first line must name the columns, and one must be `prompt`")
    named: dict[str, int] = {}
    alike: Counter[str] = Counter()
    for cells in reader:
        line = reader.line_num
        if None in cells:
            raise InvalidRequest(f"line {line}: more cells than columns; quote what has commas")
        columns = {name: (cell or "").strip() for name, cell in cells.items()}
        if not any(columns.values()):
            continue
        for style in styles or (columns.get("style", ""),):
            row = _row(columns | {"style": style}, template, line, many=bool(styles))
            if not row.key:
                alike[row.content] += 1
                row = _named_by_content(row, alike[row.content])
            # Not every file system tells A from a.
            if (twin := named.get(row.key.casefold())) is not None:
                raise InvalidRequest(f"line {line}: {row.key} is the name of line {twin} already")
            named[row.key.casefold()] = line
            yield row


def _row(columns: Mapping[str, str], template: str | None, line: int, *, many: bool) -> Row:
    style = columns["style"]
    template = template or (STYLED_TEMPLATE if style else TEMPLATE)
    if not columns["prompt"]:
        raise InvalidRequest(f"line {line}: no prompt")
    try:
        prompt = template.format_map(columns)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InvalidRequest(
            f"line {line}: the template {template!r} does not fit the columns: {error}"
        ) from None
    seed = columns.get("seed") or None
    if seed is not None and not re.fullmatch(SEED, seed):
        raise InvalidRequest(f"line {line}: the seed {seed!r} is not a whole number")
    name = columns.get("id") or columns.get("name") or ""
    return Row(
        key=_file_name(f"{name}-{style}" if name and many else name),
        prompt=prompt,
        size=columns.get("size") or None,
        seed=None if seed is None else int(seed),
    )


def _named_by_content(row: Row, ordinal: int) -> Row:
    key = f"{_file_name(row.prompt)[:40]}-{row.content[:8]}".lstrip("-")
    return replace(row, key=key if ordinal == 1 else f"{key}-{ordinal}")


def _file_name(text: str) -> str:
    """`text` without what a file name may not hold on some system; long ones keep their digest."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    if len(name) <= NAME_MAX_CHARACTERS:
        return name
    return f"{name[: NAME_MAX_CHARACTERS - 9]}-{_digest(text)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_styles(text: str | None) -> list[str]:
    """`main,detail,social` in parts. Raises: InvalidRequest, if one comes twice."""
    styles = [style for part in (text or "").split(",") if (style := part.strip())]
    if len(set(styles)) < len(styles):
        raise InvalidRequest(f"{text}: a style comes twice")
    return styles
