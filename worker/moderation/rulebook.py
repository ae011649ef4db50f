"""The rules for prompts: read from TOML files, and asked of all of a prompt's readings at once.

What a file may say is in `docs/moderation.md`. All words of all rules stand in two tries, which are
walked from every place where a word can begin: the time grows with the prompt, hardly with the
number of rules.
"""

import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.moderation.folding import END, UNSPACED, Reading, fold, readings

BUILT_IN = Path(__file__).parent / "rules"

PATTERN_WINDOW = 2000
"""Characters that a pattern is given at a time, so that a slow one is not given a novel."""
PATTERN_OVERLAP = 200
"""Characters of a window that the next one has too."""

_UNLESS = -1
"""The part of a rule that lets pass; the others are numbers of the groups that must all occur."""

_unspaced = re.compile(f"[{UNSPACED}]").match


class RulesUnusable(Exception):
    """The rules cannot be read; the message says which file, which rule, and why."""


class _RuleText(BaseModel):
    """A rule as it stands in a file. An entry is a word, a phrase, a `@group` or a `/pattern/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    level: Literal["base", "strict"]
    any: list[str] = []
    all: list[list[str]] = []
    unless: list[str] = []


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    disable: list[str] = []
    groups: dict[str, list[str]] = {}
    rule: list[_RuleText] = []


@dataclass(frozen=True, slots=True)
class _Target:
    rule: int
    part: int


_Hit = tuple[int, int, _Target]
"""From where to where in a reading, and what was found there."""


@dataclass(slots=True)
class _Node:
    """A letter on the way through the words that begin alike."""

    next: dict[str, Self] = field(default_factory=dict)
    closed: list[_Target] = field(default_factory=list)
    """Of a word that ends here, and only where the text's word ends too."""
    open: list[_Target] = field(default_factory=list)
    """Of a word that may go on."""


@dataclass(frozen=True, slots=True)
class _Rule:
    id: str
    strict: bool
    parts: int
    """How many groups must all occur."""


class Rules:
    """Rules that can be asked; threads may share them."""

    def __init__(self, files: dict[Path, _File]) -> None:
        self._rules: list[_Rule] = []
        self._starting: _Node = _Node()
        """Words that begin where a word of the text does."""
        self._anywhere: _Node = _Node()
        self._patterns: dict[re.Pattern[str], list[_Target]] = {}
        groups: dict[str, list[str]] = {}
        for file in files.values():
            for name, entries in file.groups.items():
                groups.setdefault(name, []).extend(entries)
        off = {identity for file in files.values() for identity in file.disable}
        known: set[str] = set()
        texts = [(path, text) for path, file in files.items() for text in file.rule]
        # A refusal names the first rule that applies: rather one of the base.
        for path, text in sorted(texts, key=lambda both: both[1].level):
            if text.id in known:
                raise RulesUnusable(f"{path}: rule {text.id}: there is another rule of this id")
            known.add(text.id)
            if text.id not in off:
                try:
                    self._add(text, groups)
                except ValueError as error:
                    raise RulesUnusable(f"{path}: rule {text.id}: {error}") from None
        for path, file in files.items():
            for identity in file.disable:
                if identity not in known:
                    raise RulesUnusable(f"{path}: disable: there is no rule {identity}")
        self._word_starts = re.compile(
            rf"(?<![^\s{UNSPACED}])[{_class(self._starting)}]" if self._starting.next else r"(?!)"
        )
        self._any_starts = re.compile(
            f"[{_class(self._anywhere)}]" if self._anywhere.next else r"(?!)"
        )

    def __len__(self) -> int:
        return len(self._rules)

    def refusing(self, prompt: str, *, strict: bool) -> str | None:
        """Return the id of a rule that refuses `prompt`; None where all let it pass."""
        plain, *others = readings(prompt)
        met = list(self._occur(plain, chain(self._words(plain.text), self._matches(plain.text))))
        for reading in others:
            met += self._occur(reading, self._words(reading.text))
        parts: dict[int, set[int]] = {}
        for target in met:
            parts.setdefault(target.rule, set()).add(target.part)
        for index in sorted(parts):
            rule = self._rules[index]
            if len(parts[index]) == rule.parts and (strict or not rule.strict):
                return rule.id
        return None

    def _occur(self, reading: Reading, found: Iterable[_Hit]) -> Iterator[_Target]:
        """Yield what occurs in a reading outside of the `unless` of its rule."""
        hits = list(found)
        pardoned: dict[int, list[tuple[int, int]]] = {}
        for begin, end, target in hits:
            if target.part == _UNLESS:
                pardoned.setdefault(target.rule, []).append((begin, end))
        for begin, end, target in hits:
            if target.part != _UNLESS and _is_news(reading.changed, begin, end):
                spans = pardoned.get(target.rule, ())
                if not any(first <= begin and end <= last for first, last in spans):
                    yield target

    def _words(self, text: str) -> Iterator[_Hit]:
        for start in self._word_starts.finditer(text):
            yield from _walk(self._starting, text, start.start())
        for start in self._any_starts.finditer(text):
            yield from _walk(self._anywhere, text, start.start())

    def _matches(self, text: str) -> Iterator[_Hit]:
        for pattern, targets in self._patterns.items():
            for window in range(0, max(1, len(text)), PATTERN_WINDOW - PATTERN_OVERLAP):
                for found in pattern.finditer(text, window, window + PATTERN_WINDOW):
                    for target in targets:
                        yield found.start(), found.end(), target

    def _add(self, text: _RuleText, groups: dict[str, list[str]]) -> None:
        if bool(text.any) == bool(text.all):
            raise ValueError("it needs either `any` or `all`")
        rule = _Rule(text.id, text.level == "strict", len(text.all) or 1)
        parts = {_UNLESS: text.unless} | dict(enumerate(text.all or [text.any]))
        for part, entries in parts.items():
            if part != _UNLESS and not entries:
                raise ValueError("a list of `all` is empty")
            for entry in _spread(entries, groups):
                target = _Target(len(self._rules), part)
                if len(entry) > 1 and entry.startswith("/") and entry.endswith("/"):
                    self._patterns.setdefault(_compiled(entry[1:-1]), []).append(target)
                else:
                    self._learn(entry, target)
        self._rules.append(rule)

    def _learn(self, entry: str, target: _Target) -> None:
        word = _folded(entry)
        if not word:
            raise ValueError(f"{entry!r} has no letters")
        free = entry.startswith("*") or _unspaced(word[0])
        node = self._anywhere if free else self._starting
        for char in word:
            following = node.next.get(char)
            if following is None:
                following = node.next[char] = _Node()
            node = following
        goes_on = entry.endswith("*") or _unspaced(word[-1])
        (node.open if goes_on else node.closed).append(target)


def load(*places: Path) -> Rules:
    """Read the rules of `places`, each a file or a folder of `*.toml`, as one book.

    Raises:
        RulesUnusable: a file cannot be read or says what no rule can.
    """
    return Rules({file: _read(file) for place in places for file in _files(place)})


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(place.glob("*.toml"))
        if not found:
            raise RulesUnusable(f"{place}: there is no *.toml in this folder")
        return found
    return [place]


def _read(path: Path) -> _File:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
        return _File.model_validate(raw)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RulesUnusable(f"{path}: {error}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place, *rest = fault["loc"]
        if place == "rule" and rest:
            number = int(rest[0])
            identity = raw["rule"][number].get("id", f"number {number + 1}")
            where = " ".join(["rule", str(identity), *map(str, rest[1:])])
        else:
            where = ".".join(map(str, fault["loc"]))
        raise RulesUnusable(f"{path}: {where}: {fault['msg']}") from None


def _spread(
    entries: Sequence[str], groups: dict[str, list[str]], within: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield `entries` with those of the groups that they name."""
    for entry in entries:
        if not entry.startswith("@"):
            yield entry
            continue
        name = entry[1:]
        if name not in groups:
            raise ValueError(f"there is no group {name}")
        if name in within:
            raise ValueError(f"the group {name} contains itself")
        yield from _spread(groups[name], groups, (*within, name))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"/{pattern}/ is no regular expression: {error}") from None
    if compiled.search(""):
        raise ValueError(f"/{pattern}/ matches where there is nothing")
    return compiled


_folded = cache(fold)
"""Many rules pardon the same phrases."""


def _class(root: _Node) -> str:
    return "".join(map(re.escape, root.next))


def _walk(node: _Node, text: str, begin: int) -> Iterator[_Hit]:
    """Yield the words of the trie that stand in `text` from `begin` on."""
    at, size = begin, len(text)
    while at < size:
        following = node.next.get(text[at])
        if following is None:
            return
        node, at = following, at + 1
        for target in node.open:
            yield begin, at, target
        if node.closed and (at == size or text[at] in (" ", END) or _unspaced(text[at])):
            for target in node.closed:
                yield begin, at, target


def _is_news(changed: tuple[tuple[int, int], ...] | None, begin: int, end: int) -> bool:
    if changed is None:
        return True
    # The first changed place that ends behind `begin`.
    index = bisect_left(changed, begin + 1, key=lambda span: span[1])
    return index < len(changed) and changed[index][0] < end
