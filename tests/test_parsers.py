"""What strangers write is read exactly or refused: any text, and text that is almost right."""

import base64
import csv
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as some
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from zimage.batch.rows import read_rows, read_styles
from zimage.errors import InvalidRequest as NotRows

from api import cursors, idempotency, preferences
from api.dialects import local, zimageturbo
from api.dialects.dashscope.request import PromptRequest
from api.dialects.evolink.request import SIZES, GenerationRequest
from api.dialects.openai.request import ImagesRequest
from storage import tasks
from storage.errors import InvalidRequest
from worker.moderation import folding

settings.register_profile(
    "parsers",
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
parsers = settings(settings.get_profile("parsers"))

anything = some.text(max_size=40)
digits = some.sampled_from("0123456789٣१９²")
numbers = some.one_of(some.integers(-1, 9999).map(str), some.text(digits, max_size=6))
almost_sizes = some.builds(
    "{}{}{}{}".format,
    numbers,
    some.sampled_from(["x", "*", "X", "×", ":", "x ", ""]),
    numbers,
    some.sampled_from(["", "", "", "\n", " ", "\0", "x"]),
)
sizes = some.one_of(anything, almost_sizes, some.sampled_from([*SIZES, "auto"]))


def asked(form: type[BaseModel], /, **body: Any) -> Any | None:
    """What a body means; None if it is refused. Nothing else may happen."""
    try:
        return form.model_validate(body)
    except ValidationError:
        return None


def zimageturbo_pixels(size: str) -> tuple[int, int] | None:
    body = asked(zimageturbo.GenerateRequest, prompt="a", aspect_ratio="1:1", size=size)
    return None if body is None else body.pixels()


def evolink_pixels(size: str) -> tuple[int, int] | None:
    body = asked(GenerationRequest, model="z-image-turbo", prompt="a", size=size)
    return None if body is None else body.pixels()


def openai_pixels(size: str) -> tuple[int, int] | None:
    body = asked(ImagesRequest, prompt="a", size=size)
    return None if body is None else (body.images()[0].width, body.images()[0].height)


def dashscope_pixels(size: str) -> tuple[int, int] | None:
    body = asked(
        PromptRequest, model="z-image-turbo", input={"prompt": "a"}, parameters={"size": size}
    )
    return None if body is None else (body.image().width, body.image().height)


@pytest.mark.parametrize(
    ("read", "sign", "words", "fits"),
    [
        (zimageturbo_pixels, "*", {}, lambda w, h: min(w, h) >= 256 and max(w, h) <= 1536),
        (evolink_pixels, "x", SIZES, lambda w, h: min(w, h) >= 376 and max(w, h) <= 1536),
        (
            openai_pixels,
            "x",
            {"auto": (1024, 1024)},
            lambda w, h: min(w, h) >= 256 and max(w, h) <= min(2048, 3 * min(w, h)),
        ),
        (
            dashscope_pixels,
            "*",
            {},
            lambda w, h: 512 * 512 <= w * h <= 2048 * 2048 and max(w, h) <= 8192,
        ),
    ],
)
def test_a_size_is_read_exactly_or_refused(
    read: Callable[[str], tuple[int, int] | None],
    sign: str,
    words: dict[str, tuple[int, int]],
    fits: Callable[[int, int], bool],
) -> None:
    """In every dialect: plain ASCII digits within its limits, or one of its words."""

    @parsers
    @given(sizes)
    @example(f"512{sign}512")
    @example(f"１０２４{sign}１０２４")
    @example(f"512{sign}512\n")
    def check(size: str) -> None:
        sides = re.fullmatch(r"([0-9]{2,4})" + re.escape(sign) + r"([0-9]{2,4})", size, re.ASCII)
        expected = words.get(size)
        if sides is not None and fits(int(sides[1]), int(sides[2])):
            expected = int(sides[1]), int(sides[2])
        assert read(size) == expected

    check()


@parsers
@given(some.one_of(sizes, some.sampled_from([*zimageturbo.SIZES])))
def test_an_aspect_ratio_is_one_of_the_documented(ratio: str) -> None:
    body = asked(zimageturbo.GenerateRequest, prompt="a", aspect_ratio=ratio)

    assert (body is not None) == (ratio in zimageturbo.SIZES)


@parsers
@given(some.one_of(some.integers(), some.floats(), some.booleans(), numbers, anything))
def test_a_side_is_a_whole_number_of_steps(side: object) -> None:
    body = asked(local.DrawRequest, prompt="a", width=side)

    fits = type(side) is int and 64 <= side <= 2048 and side % 16 == 0
    assert (body is not None) == fits


@parsers
@given(some.text(min_size=1, max_size=900))
@example("\ud800")
@example(" " * 800 + "a")
@example("a" * 799 + "\ud83d\ude00")
def test_a_prompt_that_is_taken_can_be_stored_and_drawn(prompt: str) -> None:
    body = asked(PromptRequest, model="z-image-turbo", input={"prompt": prompt})

    if body is not None:
        taken = body.image().prompt
        assert taken.strip()
        assert prompt.startswith(taken)
        assert "\0" not in taken
        taken.encode()


# --- Headers --------------------------------------------------------------------------------------


def request(**headers: str) -> Request:
    """A request with these headers, as they come over the wire."""
    pairs = [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, value in headers.items()
    ]
    return Request({"type": "http", "headers": pairs, "query_string": b"", "path": "/"})


latin = some.text(some.characters(max_codepoint=255), max_size=300)


@parsers
@given(some.one_of(latin, some.from_regex(r'\A"?[!-~]{0,260}"?\Z')))
@example('"')
@example('""')
@example('"key"')
def test_an_idempotency_key_is_visible_ascii_with_or_without_quotes(sent: str) -> None:
    bare = sent[1:-1] if len(sent) > 1 and sent[0] == sent[-1] == '"' else sent
    valid = re.fullmatch(r"[!-~]{1,255}", bare, re.ASCII) is not None
    try:
        key = idempotency.read_key(request(idempotency_key=sent))
    except InvalidRequest:
        assert not valid
    else:
        assert valid
        assert key == bare


@parsers
@given(some.one_of(latin, some.builds("wait={}{}".format, numbers.filter(str.isascii), latin)))
@example("respond-async, wait=5")
@example("wait=\xb2")
@example("wait=999999")
def test_a_preference_waits_for_at_most_a_minute_or_is_none(sent: str) -> None:
    wait_s = preferences.read_wait(request(prefer=sent))

    assert wait_s is None or 0 <= wait_s <= preferences.WAIT_MAX_S
    if re.fullmatch(r"wait=[0-9]{1,6}", sent):
        assert wait_s == min(int(sent[5:]), preferences.WAIT_MAX_S)


@parsers
@given(some.one_of(latin, some.from_regex(r"\A[0-9]{1,7}[smhd]?\Z")))
@example("90s")
@example("24h")
@example("86401")
def test_a_period_is_of_one_second_to_one_day_or_refused(sent: str) -> None:
    try:
        asked = preferences.read(request(cancel_after=sent), b"{}")
    except InvalidRequest:
        return
    assert asked.cancel_after_s is not None
    assert 1 <= asked.cancel_after_s <= 24 * 3600


@parsers
@given(some.one_of(latin, some.floats().map(str)))
@example("inf")
@example("1e400")
def test_no_header_makes_a_resend_remembered_for_longer_than_an_hour(sent: str) -> None:
    read_timeout_s = idempotency._read_timeout_s(request(x_stainless_read_timeout=sent))

    assert 0 < read_timeout_s <= idempotency.READ_TIMEOUT_MAX_S


# --- Cursors and ids ------------------------------------------------------------------------------

json_values = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | anything,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(anything, inner, max_size=2),
    max_leaves=4,
)
positions = some.one_of(
    some.lists(json_values, max_size=3),
    some.tuples(some.datetimes().map(str), anything).map(list),
    some.tuples(some.integers(-(2**65), 2**65)).map(list),
    json_values,
)
cursor_texts = some.one_of(
    anything,
    positions.map(lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode()),
)


@parsers
@given(cursor_texts)
@example(base64.urlsafe_b64encode(b'["0001-01-01T00:00:00+14:00","a\\u0000"]').decode())
@example("ключ")
def test_a_cursor_is_one_of_ours_or_refused(cursor: str) -> None:
    try:
        _, row_id = cursors.moment(cursor) or (None, "")
        assert "\0" not in row_id
    except InvalidRequest:
        pass
    try:
        number = cursors.number(cursor)
        assert number is not None
        assert abs(number) < 2**63
    except InvalidRequest:
        pass


@parsers
@given(some.integers(-(2**63) + 1, 2**63 - 1))
def test_a_cursor_leads_back_to_its_row(number: int) -> None:
    assert cursors.number(cursors._cursor(number)) == number


@parsers
@given(some.one_of(anything, some.from_regex(r"\Atask-unified-[0-9]{1,12}-[a-z0-9]{0,9}\n?\Z")))
def test_what_passes_for_a_task_id_is_plain(text: str) -> None:
    if tasks.is_id(text):
        assert text.isascii()
        assert text.isprintable()
        assert text.startswith("task-unified-")
        assert len(text) < 100


# --- The client's CSV -----------------------------------------------------------------------------

cells = some.one_of(
    anything,
    some.sampled_from(
        ["", " ", "1", "007", "9" * 5000, "²", "a,b", 'a"b', "a\nb", "CON", "..", "A"]
    ),
)
columns = some.lists(
    some.sampled_from(["prompt", "id", "name", "size", "seed", "style", "Prompt", ""]),
    max_size=5,
    unique=True,
)


def rows_of(content: bytes, **options: Any) -> list[Any] | None:
    """What a file asks for; None if it is refused. Nothing else may happen."""
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        Path(file.name).write_bytes(content)
        try:
            return read_rows(Path(file.name), **options)
        except NotRows:
            return None


def assert_usable(rows: list[Any] | None) -> None:
    """Every row has a file name of its own that is one on every system, and a prompt."""
    names = [row.key.casefold() for row in rows or ()]
    assert len(set(names)) == len(names)
    for row in rows or ():
        assert re.fullmatch(r"[\w.-]{1,80}", row.key)
        assert row.key.strip("-.") == row.key
        assert row.prompt
        assert row.seed is None or row.seed >= 0


@parsers
@given(columns, some.lists(some.lists(cells, max_size=6), max_size=4), some.data())
def test_a_table_is_read_or_refused(
    columns: list[str], lines: list[list[str]], data: some.DataObject
) -> None:
    with tempfile.TemporaryFile("w+", newline="", errors="surrogatepass") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *lines])
        file.seek(0)
        written = file.read()
    template = data.draw(some.sampled_from([None, "{prompt}", "{id} {prompt!r:>9}", "{", "{0}"]))

    assert_usable(rows_of(written.encode(errors="replace"), template=template))


@parsers
@given(
    some.one_of(some.binary(max_size=200), some.binary(max_size=99).map(b"prompt,seed\n".__add__))
)
@example(b"\xef\xbb\xbfprompt\na cat\n")
@example(b"prompt,seed\na cat," + b"9" * 5000)
@example(b"prompt\n" + b"a" * 200_000)
def test_any_bytes_are_a_table_or_refused(content: bytes) -> None:
    assert_usable(rows_of(content))


@parsers
@given(some.lists(some.text(some.characters(exclude_characters=","), max_size=5), max_size=4))
def test_styles_are_what_stands_between_the_commas(parts: list[str]) -> None:
    named = [part.strip() for part in parts if part.strip()]
    assume(len(set(named)) == len(named))

    assert read_styles(",".join(parts)) == named


# --- Moderation -----------------------------------------------------------------------------------

SPELLINGS = some.text(some.characters(), max_size=60) | some.text(
    "nude -_.*\u200b\u0301ñû", max_size=30
)


@parsers
@given(SPELLINGS)
@example("\ufdfa" * 50)
@example("\ud800")
def test_any_text_can_be_folded_and_folds_to_the_same_again(text: str) -> None:
    """As whichever composition of characters it comes."""
    readings = folding.readings(text)

    assert readings
    assert folding.readings(text) == readings
    composed, apart = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert folding.readings(composed)[0] == folding.readings(apart)[0]
    for reading in readings:
        assert all(0 <= start < end <= len(reading.text) for start, end in reading.changed or ())


@parsers
@given(some.sampled_from(["nude", "nаked"]), some.text(some.characters(), max_size=9))
def test_characters_that_show_nothing_hide_nothing(word: str, around: str) -> None:
    hidden = "\u200b\u2060\ufe0f\u00ad".join(word)

    assert folding.readings(hidden)[0] == folding.readings(word)[0]


def test_the_addresses_of_images_are_those_of_the_store() -> None:
    """Whatever the key, the address leads to the store's host and to nothing beside its bucket."""
    from storage import objects
    from storage.settings import settings as storage

    @parsers
    @given(some.text(some.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
    def check(key: str) -> None:
        address = urlsplit(objects.url(key)[0])
        home = urlsplit(str(storage.s3_endpoint_url))
        assert address.netloc == home.netloc
        assert address.path.startswith(f"/{storage.s3_bucket}/")
        assert address.fragment == ""

    check()
