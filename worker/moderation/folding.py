"""A prompt as the rules read it: plain, and once more with what may hide a word undone.

The words of the rules are folded in the same way, so that both sides meet in one spelling.
"""

import re
import unicodedata
from dataclasses import dataclass

UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff"
    r"\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of words that stand without spaces, or with endings attached: Thai, Lao, Burmese, Khmer,
Japanese, Chinese, Korean. For the brackets of a regular expression."""

END = "\n"
"""Stands in folded text only between pieces that do not belong together."""

_HIDING = "".join(re.escape(char) for char in "-._*~+/\\|•·")
"""What is put between the letters of a word to hide it. Not the apostrophe: "we'll", "Dick's"."""

_TOKEN = re.compile(r"([a-z]+)[.,;:!?]*(?!\S)|\S+")
"""A word that needs no second look, or anything else between spaces."""
_DRAWN_OUT = re.compile(r"([^\W\d_])\1{2,}")
_HIDDEN = re.compile(rf"(?<=[^\W_])[{_HIDING}]+(?=[^\W_])")
_SPELLED_OUT = re.compile(
    rf"(?:(?<![^\W_])[^\W_{UNSPACED}][\s,{_HIDING}]{{1,3}}){{2,}}[^\W_](?![^\W_])"
    rf"|(?:(?<![{UNSPACED}])[{UNSPACED}][ {_HIDING}]{{1,3}})+[{UNSPACED}](?![{UNSPACED}])"
)
_LATIN = re.compile(r"[a-z]")


class _Characters(dict[int, str | None]):
    """A table for `str.translate` that asks once about each character it meets."""

    def __missing__(self, code: int) -> str | None:
        self[code] = becomes = self._becomes(chr(code))
        return becomes

    def _becomes(self, char: str) -> str | None:
        raise NotImplementedError


class _Seen(_Characters):
    """Characters that show nothing go, and variants that readers take for one letter are one."""

    ONE_LETTER = str.maketrans("أإآٱىةё", "اااايهе")
    NOTHING = re.compile(
        "[\u0300-\u036f\u0483-\u0489\u064b-\u065f\u0670\u0640\u115f\u1160\u1ab0-\u1aff\u1dc0-\u1dff"
        "\u20d0-\u20ff\u2800\u3164\ufe00-\ufe0f\ufe20-\ufe2f\uffa0\U000e0100-\U000e01ef]"
    )
    """Marks that nothing composes with, variation selectors, Arabic vowels and blank letters. The
    vowels of Hindi or Thai are marks too, and stay."""

    def _becomes(self, char: str) -> str | None:
        category = unicodedata.category(char)
        if category == "Cf" or self.NOTHING.match(char):
            return None
        if category in ("Cc", "Co", "Cn", "Cs"):
            return " "
        for first in (0x1F1E6, 0x1F150, 0x1F170):  # letters in circles and boxes, and of flags
            if first <= ord(char) < first + 26:
                return chr(ord("a") + ord(char) - first)
        return char.translate(self.ONE_LETTER)


class _Spaced(_Characters):
    """Only letters, their marks and digits stay; whatever else stands between words is a space."""

    def _becomes(self, char: str) -> str:
        return " " if unicodedata.category(char)[0] in "PSZ" else char


class _Clear(_Characters):
    """In a word with Latin letters: figures that stand for letters, Greek and Cyrillic ones that
    look like them, and accents."""

    LETTERS = str.maketrans(
        "03457@$!|аеорсухіјѕмнтвкαοερνυικτ", "oeastasiiaeopcyxijsmhtbkaoepvuikt"
    )

    def __init__(self, one: str) -> None:
        super().__init__({ord("1"): one, ord("!"): one, ord("|"): one})

    def _becomes(self, char: str) -> str | None:
        return None if "\u0300" <= char <= "\u036f" else char.translate(self.LETTERS)


_seen, _spaced = _Seen(), _Spaced()
_clear, _clear_l = _Clear("i"), _Clear("l")


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to read a prompt: lower case, with one space for whatever stands between words."""

    text: str
    changed: tuple[tuple[int, int], ...] | None = None
    """The only places that differ from the plain reading; None where all of it is to be read."""


def fold(text: str) -> str:
    """Return `text` in the spelling of the plain reading."""
    return _between_spaces(_visible(text))


def readings(text: str) -> list[Reading]:
    """Return the plain reading of `text`, and others where a word may be in disguise.

    Undone are: zero-width and control characters, letters of another width or style, accents,
    figures for letters, letters of other scripts that look alike, signs between the letters of a
    word, spelled-out words, letters drawn out.
    """
    visible = _visible(text)
    found = [Reading(_between_spaces(visible))]
    words: list[str] = []
    apart: list[str] = []
    changed: list[tuple[int, int]] = []
    at = 0
    drawn_out = _DRAWN_OUT.search(visible) is not None
    for token in _TOKEN.finditer(visible):
        word = plain = token[1]
        if word is None or (drawn_out and _DRAWN_OUT.search(word)):
            plain = _between_spaces(token[0])
            word, *others = _undisguised(token[0])
            apart += others
        if word:
            if word != plain:
                changed.append((at, at + len(word)))
            words.append(word)
            at += len(word) + 1
    if changed:
        found.append(Reading(" ".join(words), tuple(changed)))
    apart += _spelled_out(visible)
    if apart:
        found.append(Reading(END.join(apart)))
    return found


def _visible(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().translate(_seen)


def _between_spaces(visible: str) -> str:
    return " ".join(visible.translate(_spaced).split())


def _undisguised(token: str) -> list[str]:
    """Return the ways to read a word of its own; the first is the likeliest."""
    token = _HIDDEN.sub("", token.rstrip("!?.,:;|"))
    ways = {token: None}
    if _LATIN.search(token):
        letters = unicodedata.normalize("NFD", token)
        ways = {
            unicodedata.normalize("NFC", letters.translate(table)): None
            for table in (_clear, _clear_l)
        }
    if _DRAWN_OUT.search(token):  # what was meant had one of the letters, or two
        ways = {_DRAWN_OUT.sub(by, way): None for by in (r"\1", r"\1\1") for way in ways}
    return [_between_spaces(way) for way in ways]


def _spelled_out(visible: str) -> list[str]:
    """Return words whose letters stand apart: "n u d e", "n-u-d-e"."""
    words = []
    for found in _SPELLED_OUT.finditer(visible):
        for run in re.split(r"\s{2,}", found[0]):  # a wide gap ends a word
            word = "".join(filter(str.isalnum, run)).translate(_clear)
            words.append(word)
            if word[:1] in ("a", "i", "o"):  # "a n u d e": an article stands before it
                words.append(word[1:])
    return words
