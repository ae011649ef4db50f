"""A prompt is rewritten by the pipeline's text encoder or by an endpoint, or says why not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks import byte_tokens
from benchmarks.byte_tokens import END_OF_TEXT, TURN_END
from storage.errors import RewriteFailed
from storage.tasks import Rewrite
from tests import random_model
from tests.conftest import case
from worker import prompt_extend
from worker.prompt_extend import EncoderRewriter, EndpointRewriter
from worker.prompt_extend.encoder import language_model
from worker.prompt_extend.wording import (
    CHINESE_INSTRUCTION,
    OTHER_INSTRUCTION,
    PROMPT_MAX_CHARACTERS,
    cleaned,
    messages,
    split,
)
from worker.settings import WorkerSettings

PROMPT = "a red fox"
TINY = random_model.TEXT_ENCODER | {"tie_word_embeddings": True}


def unchecked() -> None: ...


class Enough(Exception):
    """What a caller who no longer wants the prompt raises."""


def after(calls: int) -> Callable[[], None]:
    """A check that passes `calls` times."""
    numbers = count(1)

    def check() -> None:
        if next(numbers) > calls:
            raise Enough

    return check


# --- By the pipeline's own text encoder -----------------------------------------------------------


BYTES = byte_tokens.tokenizer()
WORDS = byte_tokens.tokenizer("<think>", "</think>")
LETTERS: list[int] = BYTES("abcdefghijklmnopqrstuvwxyz").input_ids


class Scripted(Qwen3ForCausalLM):  # type: ignore[misc] # transformers has no types
    """A model that thinks and answers what it was given, and then ends its turn.

    A dictionary in the answer is a choice of tokens with their logits. `on_token` is called before
    each token.
    """

    def __init__(
        self,
        thinking: str = "why",
        answer: str | list[dict[int, float]] = "a fox at dawn",
        *,
        tokenizer: Any = BYTES,
        ends_thinking: bool = True,
        end: str = TURN_END,
        on_token: Callable[[], object] = unchecked,
    ) -> None:
        super().__init__(Qwen3Config(**TINY | {"vocab_size": len(tokenizer)}))
        self.eval()
        self.end_of_thinking = tokenizer("</think>").input_ids
        (self.end,) = tokenizer(end).input_ids
        last = "\n</think>" if ends_thinking else ""
        self.thinking = tokenizer(f"<think>\n{thinking}{last}").input_ids
        written = tokenizer(f"\n\n{answer}").input_ids if isinstance(answer, str) else answer
        self.answer = [*written, self.end]
        self.asked = False
        self.said: list[int] = []
        self.on_token = on_token

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> Any:
        self.on_token()
        if self.asked:
            self.said += input_ids[0].tolist()
        self.asked = True
        logits = torch.full((1, 1, self.config.vocab_size), -1e9)
        following = self._next()
        for token, logit in ({following: 0} if isinstance(following, int) else following).items():
            logits[0, 0, token] = logit
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _next(self) -> int | dict[int, float]:
        mark = self.end_of_thinking
        for begun in range(len(self.said) - len(mark) + 1):
            if self.said[begun : begun + len(mark)] == mark:
                following: int | dict[int, float] = self.answer[len(self.said) - begun - len(mark)]
                return following
        thought = len(self.said)
        token: int = self.thinking[thought] if thought < len(self.thinking) else self.end
        return token


def encoder(
    model: Any,
    *,
    tokenizer: Any = BYTES,
    lock: Any = None,
    reasoning_tokens_max: int = 100,
    tokens_max: int = 100,
    timeout_s: float = 60,
) -> EncoderRewriter:
    return EncoderRewriter(
        model,
        tokenizer,
        lock=lock or threading.Lock(),
        reasoning_tokens_max=reasoning_tokens_max,
        tokens_max=tokens_max,
        timeout_s=timeout_s,
    )


def asked_tokens(tokenizer: Any, prompt: str = PROMPT) -> int:
    turns = tokenizer.apply_chat_template(
        messages(prompt), tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer(turns).input_ids)


def test_a_text_encoder_becomes_a_language_model_without_a_weight_more() -> None:
    whole = Qwen3ForCausalLM(Qwen3Config(**TINY)).eval()
    tokens = torch.tensor([[1, 2, 3]])

    model = language_model(whole.model)

    assert {weight.data_ptr() for weight in model.parameters()} == {
        weight.data_ptr() for weight in whole.model.parameters()
    }
    assert model.model is whole.model
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)
    assert language_model(whole) is whole


@pytest.mark.parametrize(
    "text_encoder",
    [
        Qwen3Model(Qwen3Config(**TINY | {"tie_word_embeddings": False})),
        Qwen3Model(Qwen3Config(**TINY)).to("meta"),
        torch.nn.Linear(2, 2),
    ],
    ids=["without a head", "whose weights are elsewhere", "of another class"],
)
def test_an_encoder_that_cannot_write_says_so(text_encoder: Any) -> None:
    with pytest.raises(RewriteFailed, match=r"cannot rewrite prompts\. You were not charged"):
        encoder(text_encoder)(PROMPT, seed=1, check=unchecked)


@pytest.mark.parametrize("tokens", [BYTES, WORDS], ids=["several tokens", "one token"])
def test_reasoning_and_answer_are_told_apart_and_counted(tokens: Any) -> None:
    model = Scripted("because", "a fox at dawn", tokenizer=tokens)

    rewrite = encoder(model, tokenizer=tokens)(PROMPT, seed=1, check=unchecked)

    thought = len(tokens("<think>\nbecause\n</think>").input_ids)
    assert rewrite == Rewrite(
        text="a fox at dawn",
        reasoning="because",
        input_tokens=asked_tokens(tokens),
        output_tokens=thought + len("\n\na fox at dawn") + 1,
        reasoning_tokens=thought,
    )


@pytest.mark.parametrize("tokens", [BYTES, WORDS], ids=["several tokens", "one token"])
def test_who_thinks_too_long_is_told_to_come_to_the_answer(tokens: Any) -> None:
    model = Scripted("la " * 100, tokenizer=tokens)

    rewrite = encoder(model, tokenizer=tokens, reasoning_tokens_max=20)(
        PROMPT, seed=1, check=unchecked
    )

    assert rewrite.text == "a fox at dawn"
    assert len(tokens(f"<think>\n{rewrite.reasoning}").input_ids) in (19, 20)  # a blank at the end
    assert rewrite.reasoning.startswith("la la ")
    assert rewrite.reasoning_tokens == 20 + len(tokens("\n</think>").input_ids)
    assert rewrite.output_tokens == rewrite.reasoning_tokens + len("\n\na fox at dawn") + 1


def test_who_ends_the_turn_while_thinking_is_told_to_answer() -> None:
    model = Scripted("because", ends_thinking=False)

    rewrite = encoder(model)(PROMPT, seed=1, check=unchecked)

    assert (rewrite.text, rewrite.reasoning) == ("a fox at dawn", "because")


@pytest.mark.parametrize("end", [TURN_END, END_OF_TEXT])
def test_an_answer_ends_with_its_turn_or_with_the_text(end: str) -> None:
    rewrite = encoder(Scripted(end=end))(PROMPT, seed=1, check=unchecked)

    assert rewrite.text == "a fox at dawn"
    assert rewrite.output_tokens - rewrite.reasoning_tokens == len("\n\na fox at dawn") + 1


def test_without_a_budget_nothing_is_thought() -> None:
    rewrite = encoder(Scripted(), reasoning_tokens_max=0)(PROMPT, seed=1, check=unchecked)

    assert (rewrite.text, rewrite.reasoning) == ("a fox at dawn", "")
    assert rewrite.reasoning_tokens == len("<think>\n\n</think>")


def test_an_answer_that_is_too_long_ends_with_a_sentence() -> None:
    model = Scripted(answer="一只狐狸在雪地里。远处是松树，天快亮了")
    tokens_max = len("\n\n一只狐狸在雪地里。远处".encode()) + 1  # and a byte of the next character

    rewrite = encoder(model, tokens_max=tokens_max)(PROMPT, seed=1, check=unchecked)

    assert rewrite.text == "一只狐狸在雪地里。"
    assert rewrite.output_tokens - rewrite.reasoning_tokens == tokens_max + 1


def test_a_seed_gives_one_text_and_the_process_keeps_its_dice() -> None:
    letters = [dict.fromkeys(LETTERS[:20], 0.0)] * 30
    before = torch.random.get_rng_state()

    def text(seed: int) -> str:
        model = Scripted(answer=letters)
        before = torch.random.get_rng_state()
        written = encoder(model)(PROMPT, seed=seed, check=unchecked).text
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)  # whatever else the process throws
        return written

    assert text(7) == text(7)
    assert text(7) != text(8)
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_it_throws_its_dice_as_qwen_recommends() -> None:
    likely, other = LETTERS[:2]
    # At temperature 1 the other would have 1 in 8.4, and so be among the best 95 %.
    for name, choice, chosen in (
        ("what is left of 95 %", {likely: 2.0, other: 0.0}, {1}),
        ("two that are close", {likely: 1.0, other: 0.0}, {2}),
        ("more than twenty", dict.fromkeys(LETTERS[:26], 0.0), {19, 20}),
    ):
        with case(name):
            model = Scripted(answer=[choice] * 150)
            text = encoder(model, tokens_max=200)(PROMPT, seed=1, check=unchecked).text

            assert len(set(text)) in chosen
            assert len(text) == 150


def test_it_is_asked_before_every_token_whether_to_go_on() -> None:
    tokens = count()
    lock = threading.Lock()
    model = Scripted("la " * 100, on_token=lambda: next(tokens))

    with pytest.raises(Enough):
        encoder(model, lock=lock)(PROMPT, seed=1, check=after(10))

    assert next(tokens) == 10
    assert not lock.locked()


def test_who_takes_too_long_is_stopped() -> None:
    model = Scripted("la " * 100_000)
    lock = threading.Lock()

    with pytest.raises(RewriteFailed), capture_logs() as logs:
        encoder(model, lock=lock, reasoning_tokens_max=300_000, timeout_s=0.2)(
            PROMPT, seed=1, check=unchecked
        )

    assert model.said
    assert [line["reason"] for line in logs] == ["no answer in time"]
    assert not lock.locked()


def test_the_weights_stay_where_they_are_while_it_writes() -> None:
    lock = threading.Lock()
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        seen.append((lock.locked(), torch.is_inference_mode_enabled()))

    encoder(Scripted(on_token=look), lock=lock)(PROMPT, seed=1, check=unchecked)

    assert set(seen) == {(True, True)}
    assert not lock.locked()


def test_it_waits_for_weights_that_are_moved_and_may_be_stopped_meanwhile() -> None:
    lock = threading.Lock()
    model = Scripted()

    with lock, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(encoder(model, lock=lock), PROMPT, seed=1, check=after(1))
        with pytest.raises(Enough):
            waiting.result()
        assert lock.locked()

    assert not model.asked


def test_no_memory_is_told_as_a_prompt_that_could_not_be_rewritten() -> None:
    def refuse() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(RewriteFailed), capture_logs() as logs:
        encoder(Scripted(on_token=refuse))(PROMPT, seed=1, check=unchecked)

    assert [line["reason"] for line in logs] == ["out of memory"]


# --- What is asked, and what is made of the answer ------------------------------------------------


INSTRUCTIONS = {
    "一只红狐狸在雪地里": CHINESE_INSTRUCTION,
    "一只猫，穿着写有 LOVE 的毛衣": CHINESE_INSTRUCTION,
    "a red fox in the snow": OTHER_INSTRUCTION,
    "a red fox beside a sign that says “你好世界”": OTHER_INSTRUCTION,
    "雪の中の赤い狐": OTHER_INSTRUCTION,
    "눈 속의 붉은 여우 繪畫": OTHER_INSTRUCTION,
    "рыжая лиса": OTHER_INSTRUCTION,
    "🦊": OTHER_INSTRUCTION,
}


def test_the_instruction_is_in_the_language_of_the_prompt() -> None:
    for prompt, instruction in INSTRUCTIONS.items():
        with case(prompt):
            assert messages(prompt) == [
                {"role": "system", "content": instruction},
                {"role": "user", "content": prompt},
            ]


ANSWERS = {
    "  a fox\n": "a fox",
    '"a fox"': "a fox",
    "“一只狐狸”": "一只狐狸",
    "「狐」": "狐",
    '"Hi" says a fox, "Ho" a bear and "Hey"': '"Hi" says a fox, "Ho" a bear and "Hey"',
    '"a fox with a sign "Hi""': '"a fox with a sign "Hi""',
    "a fox.\r\nSnow\tfalls.": "a fox.\nSnow\tfalls.",
    "a fox 👩‍🚀　雪": "a fox 👩‍🚀　雪",
    "</think>a fox<think>": "a fox",
}


def test_an_answer_is_freed_of_what_is_around_it() -> None:
    for answer, prompt in ANSWERS.items():
        with case(answer):
            assert cleaned(answer) == prompt


@pytest.mark.parametrize(
    "answer",
    ["", " \n", '""', '" "', "<think>", "a \ufffd fox", "a\0fox", "a \x1b[0m fox", "\ud83e"],
)
def test_an_answer_that_is_no_prompt_is_refused(answer: str) -> None:
    with pytest.raises(RewriteFailed):
        cleaned(answer)


def test_a_long_answer_is_cut_where_a_sentence_or_a_word_ends() -> None:
    limit = PROMPT_MAX_CHARACTERS
    for name, answer, prompt in (
        ("as long as may be", "a" * limit, "a" * limit),
        ("sentences", "A fox in 2.5 m. " * 200, ("A fox in 2.5 m. " * 125).strip()),
        ("Chinese sentences", "一只狐狸。" * 500, "一只狐狸。" * 400),
        ("words", "foxes " * 400, ("foxes " * 333).strip()),
        ("one sentence early", "Foxes. " + "foxes " * 400, ("Foxes. " + "foxes " * 332).strip()),
        ("Chinese clauses", "一只狐狸，" * 500, "一只狐狸，" * 400),
        ("one word", "狐" * (limit + 1), "狐" * limit),
    ):
        with case(name):
            assert len(prompt) <= limit
            assert cleaned(answer) == prompt
    assert cleaned("一只狐狸\ufffd", whole=False) == "一只狐狸"


def test_who_was_interrupted_while_thinking_has_not_answered() -> None:
    assert split("<think>\nwhy</think>a fox") == ("\nwhy", "a fox")
    assert split("a fox") == ("", "a fox")
    assert split("\n<think>why, becau")[1] == ""


# --- By an endpoint -------------------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler], object]


class Endpoint:
    """An OpenAI-compatible endpoint that answers as a test wants it to."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.hung_up = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.append(json.loads(body))
                outer.headers.append(dict(self.headers.items()))
                outer.paths.append(self.path)
                try:
                    answer(self)
                except OSError:
                    outer.hung_up.set()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def endpoint(answer: Answer) -> Iterator[Endpoint]:
    running = Endpoint(answer)
    try:
        yield running
    finally:
        running.close()


def saying(body: object, status: int = 200) -> Answer:
    """Answer `body`, as JSON where it is not bytes."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        written = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(written)))
        request.end_headers()
        request.wfile.write(written)

    return answer


def completion(usage: object = None, finish_reason: str = "stop", **message: object) -> Any:
    said = {"role": "assistant", "content": "a fox at dawn"} | message
    choice = {"index": 0, "message": said, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}


USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 7,
    "total_tokens": 18,
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def by_endpoint(url: str, *, api_key: str | None = None, timeout_s: float = 30) -> EndpointRewriter:
    return EndpointRewriter(
        url,
        model="qwen3",
        api_key=api_key,
        reasoning_tokens_max=1000,
        tokens_max=500,
        timeout_s=timeout_s,
    )


def test_an_endpoint_is_asked_as_openai_documents_it() -> None:
    with endpoint(saying(completion(USAGE))) as running:
        rewrite = by_endpoint(running.url + "/", api_key="sk-1")(PROMPT, seed=7, check=unchecked)
        by_endpoint(running.url)(PROMPT, seed=7, check=unchecked)

    assert rewrite == Rewrite("a fox at dawn", "", 11, 7, 3)
    assert running.paths[0] == "/v1/chat/completions"
    assert running.asked[0] == {
        "model": "qwen3",
        "messages": messages(PROMPT),
        "max_tokens": 1500,
        "seed": 7,
        "stream": False,
    }
    keys = [headers.get("Authorization") for headers in running.headers]
    assert keys == ["Bearer sk-1", None]
    assert running.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("said", "rewrite"),
    [
        (completion(reasoning_content="why"), Rewrite("a fox at dawn", "why", 0, 0, 0)),
        (completion(reasoning="why"), Rewrite("a fox at dawn", "why", 0, 0, 0)),
        (completion(reasoning=None), Rewrite("a fox at dawn", "", 0, 0, 0)),
        (completion(content="<think>\nwhy\n</think>\n\nfoxes"), Rewrite("foxes", "why", 0, 0, 0)),
        (completion(reasoning_content="a\0b"), Rewrite("a fox at dawn", "ab", 0, 0, 0)),
        (completion(reasoning="la" * 20_000), Rewrite("a fox at dawn", "la" * 10_000, 0, 0, 0)),
        (
            completion({"prompt_tokens": 1, "completion_tokens": 2}),
            Rewrite("a fox at dawn", "", 1, 2, 0),
        ),
        (
            completion(content="A fox at dawn. It sle", finish_reason="length"),
            Rewrite("A fox at dawn.", "", 0, 0, 0),
        ),
    ],
)
def test_what_endpoints_say_in_their_several_ways_is_read(said: Any, rewrite: Rewrite) -> None:
    with endpoint(saying(said)) as running:
        assert by_endpoint(running.url)(PROMPT, seed=1, check=unchecked) == rewrite


def endless(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b" " * 65536)


def half(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b'{"choices":')


FAULTS: dict[str, tuple[Answer, str]] = {
    "refused": (saying({"error": {"message": PROMPT}}, 401), "status 401"),
    "broken": (saying(PROMPT, 500), "status 500"),
    "elsewhere": (saying(b"", 307), "status 307"),
    "created": (saying(completion(), 201), "status 201"),
    "hung up": (lambda request: request.connection.close(), "RemoteProtocolError"),
    "half": (half, "RemoteProtocolError"),
    "endless": (endless, "an answer longer than 1000000 bytes"),
    "no JSON": (saying(PROMPT.encode()), "malformed answer"),
    "no UTF-8": (saying(b'{"choices": "\xff"}'), "malformed answer"),
    "half a character": (saying(completion(content="\ud83e")), "malformed answer"),
    "a list": (saying([PROMPT]), "malformed answer"),
    "no choice": (saying({"choices": []}), "malformed answer: choices"),
    "no content": (saying(completion(content=None)), "malformed answer: choices.0.message.content"),
    "fewer than no tokens": (saying(completion({"prompt_tokens": -1})), "malformed answer: usage"),
    "too many tokens": (saying(completion({"completion_tokens": 2**31})), "malformed answer"),
    "nothing": (saying(completion(content=" ")), "an empty answer"),
    "thoughts only": (saying(completion(content="<think>why")), "an empty answer"),
    "not text": (saying(completion(content="a\0b")), "an answer that is not text"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_an_endpoint_does_wrong_fails_the_rewriting(name: str) -> None:
    answer, reason = FAULTS[name]

    with endpoint(answer) as running, capture_logs() as logs:  # noqa: SIM117
        with pytest.raises(RewriteFailed) as raised:
            by_endpoint(running.url)(PROMPT, seed=1, check=unchecked)

    assert str(raised.value) == str(RewriteFailed())
    (line,) = logs
    assert line["reason"].startswith(reason)
    assert PROMPT not in str(line)
    if name == "endless":
        assert running.hung_up.wait(30)


def test_an_endpoint_that_is_not_there_fails_the_rewriting() -> None:
    with socket.socket() as taken, capture_logs() as logs:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(RewriteFailed):
            by_endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")(
                PROMPT, seed=1, check=unchecked
            )

    assert logs[0]["reason"].startswith("ConnectError: ")


def test_a_key_that_cannot_be_sent_is_not_logged() -> None:
    with endpoint(saying(completion())) as running, capture_logs() as logs:  # noqa: SIM117
        with pytest.raises(RewriteFailed) as raised:
            by_endpoint(running.url, api_key="sk-1\n")(PROMPT, seed=1, check=unchecked)

    assert logs[0]["reason"] == "LocalProtocolError"
    assert raised.value.__suppress_context__


def test_an_endpoint_that_is_slow_is_left() -> None:
    let_go = threading.Event()
    with endpoint(lambda _: let_go.wait(30)) as running:
        rewriter = by_endpoint(running.url, timeout_s=0.1)
        with pytest.raises(RewriteFailed), capture_logs() as logs:
            rewriter(PROMPT, seed=1, check=unchecked)
        let_go.set()

    assert [line["reason"] for line in logs] == ["no answer in time"]


def test_whoever_no_longer_wants_the_answer_does_not_wait_for_it() -> None:
    gone = threading.Event()

    def hold(request: BaseHTTPRequestHandler) -> None:
        if request.connection.recv(1) == b"":  # the caller hung up
            gone.set()

    with endpoint(hold) as running:

        def check() -> None:
            if running.asked:
                raise Enough

        with pytest.raises(Enough):
            by_endpoint(running.url)(PROMPT, seed=1, check=check)
        assert gone.wait(30)
        with pytest.raises(Enough):
            by_endpoint(running.url)(PROMPT, seed=1, check=after(0))
        assert len(running.asked) == 1


# --- By the settings ------------------------------------------------------------------------------


def test_without_an_endpoint_the_text_encoder_writes_one_prompt_at_a_time() -> None:
    settings = WorkerSettings(rewrite_reasoning_tokens_max=20, rewrite_tokens_max=16)
    model = Scripted("la " * 100, "foxes " * 10)

    rewriter = prompt_extend.of_settings(settings, model, BYTES, threading.Lock())
    rewrite = rewriter(PROMPT, seed=1, check=unchecked)

    assert prompt_extend.concurrency(settings) == 1
    assert rewrite.reasoning_tokens == 20 + len("\n</think>")
    assert rewrite.output_tokens - rewrite.reasoning_tokens == 16 + 1


def test_with_an_endpoint_it_writes_several() -> None:
    with endpoint(saying(completion())) as running:
        settings = WorkerSettings.model_validate(
            {
                "rewrite_url": running.url,
                "rewrite_model": "qwen3",
                "rewrite_api_key": "sk-1",
                "rewrite_reasoning_tokens_max": 20,
                "rewrite_tokens_max": 16,
            }
        )
        rewriter = prompt_extend.of_settings(settings, None, None, threading.Lock())
        rewriter(PROMPT, seed=1, check=unchecked)

    assert prompt_extend.concurrency(settings) == 4
    assert (running.asked[0]["model"], running.asked[0]["max_tokens"]) == ("qwen3", 36)
    assert running.headers[0]["Authorization"] == "Bearer sk-1"


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9/v1"])
def test_it_takes_no_longer_than_is_set(url: str | None) -> None:
    settings = WorkerSettings.model_validate({"rewrite_url": url, "rewrite_timeout_s": 1e-9})
    rewriter = prompt_extend.of_settings(settings, Scripted(), BYTES, threading.Lock())

    with pytest.raises(RewriteFailed), capture_logs() as logs:
        rewriter(PROMPT, seed=1, check=unchecked)

    assert [line["reason"] for line in logs] == ["no answer in time"]
