"""Requests that are almost right: a valid one of some route, with one thing wrong with it.

Each is given by a seed and its number alone, so that a failure is repeated by naming both.
"""

import gzip
import json
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from soak.target import CALLBACK

BODY_MAX_BYTES = 400 * 1024
"""As the service bounds a body."""
HUGE_BYTES = 10 * 1024 * 1024

Random = random.Random
Headers = dict[bytes, bytes]

FULL: dict[str, dict[str, Any]] = {
    "DrawRequest": {"width": 64, "height": 64, "seed": 1, "num_inference_steps": 8,
                    "guidance_scale": 0.0, "output_format": "jpg", "negative_prompt": "a dog"},
    "GenerationRequest": {"size": "376x376", "seed": 1, "nsfw_check": True,
                          "callback_url": CALLBACK, "allow_downscale": True},
    "GenerateRequest": {"size": "256*256", "seed": "-1", "allow_downscale": False},
    "ImagesRequest": {"size": "256x256", "seed": 1, "n": 1, "response_format": "url",
                      "quality": "hd", "user": "me", "stream": False},
    "MessagesRequest": {"parameters": {"size": "512*512", "seed": 1, "n": 1}},
    "PromptRequest": {"parameters": {"size": "512*512", "seed": 1, "prompt_extend": False}},
    "Redelivery": {"since": "2026-01-01T00:00:00Z", "until": "2026-01-02T00:00:00+01:00"},
    "NewKey": {"models": ["z-image-turbo"], "expires_at": "2036-01-01T00:00:00Z"},
    "Movement": {"amount": "0.000001", "note": "invoice 7"},
}  # fmt: skip
"""Beside the documented example of a body: the other members, and sizes that are quickly drawn."""


@dataclass(frozen=True)
class Shot:
    """A request as it goes over the wire. `path` has its query, percent-encoded."""

    number: int
    operation: str
    """The route that it was made for, as `POST /v1/…`."""
    method: str
    path: bytes
    headers: Headers
    body: bytes
    wrong: str = "nothing"
    """What was done to it."""
    rerouted: bool = False
    """Whether it may lead to another route."""

    def wire(self, host: str) -> bytes:
        """The request, with a `Content-Length` unless a mutation has set one."""
        headers = {b"Host": host.encode(), **self.headers}
        if not {b"Content-Length", b"Transfer-Encoding"} & headers.keys():
            headers[b"Content-Length"] = str(len(self.body)).encode()
        lines = [self.method.encode() + b" " + self.path + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in headers.items()]
        return b"\r\n".join([*lines, b"", self.body])


# --- What may stand in the place of a value -------------------------------------------------------

RAW = "@raw@"
"""Marks a string that is written into the JSON without its quotes."""
NUMBERS = (
    "1e400", "-1e400", "1e-400", "1E+9999999999", "9" * 400, "9" * 5000, "-0", "-0.0", "1.0",
    "2147483648", "9223372036854775808", "18446744073709551616", "0.1e1", "01", "+1", "0x10", "1_0",
    ".5", "5.", "NaN", "Infinity", "-Infinity", "1e3", "0.30000000000000004", "1" + "0" * 300,
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "a\udfff", "\ufeff", "\u202e", "\u2028", "a" * 3000,
    "\N{GRINNING FACE}" * 801, "１０２４x１０２４", "٥١٢*٥١٢", "512×512", "512*512\n", " 512*512",
    "0512*512", "9999*9999", "99999999999999999999x1", "-1x-1", "1e3x1e3", "true", "null",
    "{0.__class__}", "%s%n", "'; DROP TABLE tasks; --", "../../etc/passwd", "<script>", "${jndi:x}",
    "https://[", "https://\ud800", "https://127.0.0.1", "2026-13-45T99:99:99Z",
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "task-unified-" + "9" * 99,
    "task-unified-1-\0", "1e400", "NaN", "-1", "2147483648",
)  # fmt: skip
NAMES = ("__proto__", "constructor", "__class__", "", "\0", "\ud800", "k" * 5000, "a.b", "$where",
         "prompt ", "Prompt", "dry_run", "model_config", "self")  # fmt: skip


def _value(rng: Random) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: RAW + rng.choice(NUMBERS),
        lambda: RAW + rng.choice(NUMBERS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice([None, True, False, 0, -1, 1.5, [], {}, [[]], [None], {"a": None}]),
        lambda: "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 20))),
        lambda: RAW + _nested(rng, rng.choice((10, 100, rng.randrange(850, 1000), 5000))),
    ]
    return rng.choice(kinds)()


def _nested(rng: Random, depth: int) -> str:
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + rng.choice(("1", "null", '"a"')) + closing * depth


def _written(value: Any) -> bytes:
    """As JSON, with raw values as they are and lone surrogates escaped."""
    text = json.dumps(value)
    while (at := text.find(f'"{RAW}')) >= 0:
        raw, end = json.JSONDecoder().raw_decode(text, at)
        text = text[:at] + raw.removeprefix(RAW) + text[end:]
    return text.encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in `value`, however deep."""
    if not isinstance(value, dict | list):
        return []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [place for key, inner in pairs for place in [(value, key), *_places(inner)]]


# --- What may be wrong with a body ----------------------------------------------------------------


def wrong_value(rng: Random, body: dict[str, Any]) -> bytes:
    if places := _places(body):
        container, key = rng.choice(places)
        container[key] = _value(rng)
    return _written(body)


def missing(rng: Random, body: dict[str, Any]) -> bytes:
    if places := _places(body):
        container, key = rng.choice(places)
        del container[key]
    return _written(body)


def unknown_member(rng: Random, body: dict[str, Any]) -> bytes:
    objects = [body, *(c[k] for c, k in _places(body) if isinstance(c[k], dict))]
    rng.choice(objects)[rng.choice(NAMES)] = _value(rng)
    return _written(body)


def twice(rng: Random, body: dict[str, Any]) -> bytes:
    name = rng.choice([*body, "a"])
    again = _written({name: _value(rng)})[1:-1]
    plain = _written(body)[1:-1]
    return b"{" + b", ".join(filter(None, rng.sample([again, plain], 2))) + b"}"


def other_top(rng: Random, body: dict[str, Any]) -> bytes:
    return _written(rng.choice([[body], _value(rng), json.dumps(body)]))


def truncated(rng: Random, body: dict[str, Any]) -> bytes:
    plain = _written(body)
    return plain[: rng.randrange(len(plain))]


def flipped(rng: Random, body: dict[str, Any]) -> bytes:
    plain = bytearray(_written(body))
    for _ in range(rng.randrange(1, 4)):
        plain[rng.randrange(len(plain))] ^= 1 << rng.randrange(8)
    return bytes(plain)


def inserted(rng: Random, body: dict[str, Any]) -> bytes:
    plain = _written(body)
    at = rng.randrange(len(plain) + 1)
    junk = (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\x1f", b"/**/",
            b"//", b"'", b",", b"]", b"\\u00", b"\\x41", b"\r\n\r\n", b"\xe2\x80\xa8")  # fmt: skip
    return plain[:at] + rng.choice(junk) + plain[at:]


def other_charset(rng: Random, body: dict[str, Any]) -> bytes:
    charset = rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "utf-16-be"))
    return _written(body).decode().encode(charset)


def no_json(rng: Random, body: dict[str, Any]) -> bytes:
    plain = _written(body)
    return rng.choice(
        [b"", b" ", b"\n", b"{}", b"{", b"null", b"prompt=a+cat", gzip.compress(plain), plain * 2,
         b"--x\r\nContent-Disposition: form-data; name=prompt\r\n\r\na cat\r\n--x--\r\n",
         b"\0" * 99]
    )  # fmt: skip


def deep(rng: Random, body: dict[str, Any]) -> bytes:
    """Around the depth at which Python gives up, and up to as deep as a body may be long."""
    depth = rng.choice((rng.randrange(800, 1000), rng.randrange(1000, BODY_MAX_BYTES // 2)))
    nested = _nested(rng, depth)[: BODY_MAX_BYTES - 3000]
    return _written(body | {rng.choice((*body, "metadata")): RAW + nested})


def long(rng: Random, body: dict[str, Any]) -> bytes:
    length = rng.choice((BODY_MAX_BYTES - 2000, BODY_MAX_BYTES + 1, HUGE_BYTES))
    filling = rng.choice(("[" * length, "1" * length, '"' + "a" * length + '"', "[],[]," * 9999))
    return _written(body | {"metadata": RAW + filling[:length]})


BODIES = (
    *(wrong_value, wrong_value, wrong_value, wrong_value, missing, unknown_member, unknown_member),
    *(twice, other_top, truncated, flipped, flipped, inserted, other_charset, no_json, deep),
)

# --- What may be wrong with the rest --------------------------------------------------------------

HEADERS: dict[bytes, tuple[bytes, ...]] = {
    b"Content-Type": (b"", b"text/plain", b"application/json; charset=utf-16", b"application/xml",
                      b"application/json; charset=x", b"multipart/form-data; boundary=x",
                      b"multipart/form-data", b"application/x-www-form-urlencoded", b"json",
                      b"\xff",
                      b"application/vnd.api+json", b"application/json, text/html", b";" * 999),
    b"Content-Encoding": (b"gzip", b"br", b"deflate", b"identity", b"zstd, gzip"),
    b"Idempotency-Key": (b"", b" ", b'"', b'""', b"a b", b"\xff", b"a" * 256, b"a" * 8000, b"\x01",
                         b"'; --", b"key", "ключ".encode()),
    b"Authorization": (b"", b"Bearer", b"Bearer ", b"Basic Og==", b"Bearer \xff\xfe", b"\xff",
                       b"Bearer " + b"a" * 9000, b"Bearer a b", b"bearer\tx",
                       b"Bearer \xed\xa0\x80"),
    b"Prefer": (b"wait=99999999", b"wait=-1", b"wait=1e3", b"wait", b"wait=\xff", b"wait=0",
                b"a" * 9000, "wait=٣".encode()),
    b"Cancel-After": (b"", b"0", b"-1s", b"1e3", b"999999h", b"1d", b"9" * 400, "٣s".encode(),
    b"\xff"),
    b"Content-Length": (b"-1", b"1e3", b"0x10", b"+5", b"", b"5 5", b"9" * 30, b"\xff"),
    b"Transfer-Encoding": (b"gzip", b"chunked, gzip", b"\x0bchunked", b"chunk"),
    b"X-DashScope-Async": (b"enable", b"ENABLE", b"\xff", b"maybe", b""),
    b"X-Request-ID": (b"\xff", b"a" * 9000, b"a b", b'"><script>'),
    b"x-stainless-retry-count": (b"1", b"999", b"-1", b"\xb2", b"1" * 99, b"0"),
    b"x-stainless-read-timeout": (b"NaN", b"inf", b"-1", b"1e400", b"\xff", b"0x1p3"),
    b"Expect": (b"100-continue", b"x"), b"Accept": (b"\xff", b"text/html"), b"Host": (b"",
    b"\xff", b"a b"),
    b"Origin": (b"null", b"\xff"), b"Forwarded": (b"for=\xff",), b"Upgrade": (b"websocket", b"h2c"),
}  # fmt: skip
QUERY = (b"%00", b"%ff", b"%ed%a0%80", b"%", b"%zz", b"", b"-1", b"0", b"1e3", b"9" * 400, b"NaN",
         b"%d9%a3", b"a" * 9000, b"WyIwMDAxLTAxLTAxVDAwOjAwOjAwKzE0OjAwIiwiYSJd", b"WzFlNDAwXQ==",
         b"WzkyMjMzNzIwMzY4NTQ3NzU4MDhd", b"WyJhIiwiYiJd", b"W10=", b"bnVsbA==", b"=", b"true",
         b"%F0%9F",
         b"0001-01-01T00:00:00%2B14:00", b"9999-12-31T23:59:59-14:00", b"20260230000000",
         b"[]")  # fmt: skip
SEGMENTS = (b"%00", b"%ff", b"%ed%a0%80", b"..", b"%2e%2e", b"%2f", b"", b"a" * 9000, b"%",
    b"%zz", b";a=b",
            b"task-unified-%00", b"task-unified-1-aaaaaaaa", b"\xff", b"*", b"%0a", b"-1",
            b"{task_id}",
            b"task-unified-" + b"9" * 99 + b"-aaaaaaaa", b"%F0%9F%98%80")  # fmt: skip


def _other_header(rng: Random, shot: Shot) -> Shot:
    name = rng.choice([*HEADERS])
    headers = shot.headers | {name: rng.choice(HEADERS[name])}
    return replace(shot, headers=headers, wrong=f"header {name.decode()}")


def _other_query(rng: Random, shot: Shot, names: list[str]) -> Shot:
    """A few nonsensical values of what the route asks for; one may come twice."""
    path, _, query = shot.path.partition(b"?")
    asked = [
        quote(rng.choice([*names, "dry_run", "a"])).encode() for _ in range(rng.randrange(1, 4))
    ]
    pairs = [name + b"=" + rng.choice(QUERY) for name in asked]
    pairs = [*pairs, query] if query and rng.random() < 0.5 else pairs
    return replace(shot, path=path + b"?" + b"&".join(pairs), wrong="query")


def _other_path(rng: Random, shot: Shot) -> Shot:
    path, mark, query = shot.path.partition(b"?")
    segments = path.split(b"/")
    segments[rng.randrange(1, len(segments))] = rng.choice(SEGMENTS)
    return replace(shot, path=b"/".join(segments) + mark + query, wrong="path", rerouted=True)


def shoot(seed: int, number: int, shots: list[tuple[Shot, Any, list[str]]]) -> Shot:
    """Number `number` of this seed: one of `shots`, with something wrong with it.

    Each of `shots` comes with the value of its body, None if it has none, and with the names of its
    query parameters.
    """
    rng = Random(f"{seed}:{number}")
    shot, body, names = rng.choice(shots)
    shot = replace(shot, number=number)
    if body is None or rng.random() < 0.2:
        others: list[Callable[[], Shot]] = [
            lambda: _other_header(rng, shot),
            lambda: _other_query(rng, shot, names),
            lambda: _other_path(rng, shot),
        ]
        return rng.choice(others)()
    mutate = long if rng.random() < 0.005 else rng.choice(BODIES)
    shot = replace(shot, body=mutate(rng, deepcopy(body)), wrong=mutate.__name__)
    return _other_header(rng, shot) if rng.random() < 0.05 else shot
