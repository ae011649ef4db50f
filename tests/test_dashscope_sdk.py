"""Alibaba's own Python SDK, unmodified, works against this service: `dashscope` 2.0.2."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import dashscope
import pytest
import torch
from dashscope import AioMultiModalConversation, ImageSynthesis, MultiModalConversation
from dashscope.aigc.image_generation import AioImageGeneration, ImageGeneration
from dashscope.aigc.image_synthesis import AioImageSynthesis
from dashscope.api_entities.aio_session import close_shared_aio_session
from dashscope.api_entities.http_request import close_shared_sync_session
from dashscope.common.constants import DEFAULT_REQUEST_TIMEOUT_SECONDS
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM

from api.dialects.dashscope.routes import SYNC_TIMEOUT_S
from api.orders import DEADLINE_MARGIN_S
from benchmarks import byte_tokens
from storage import tasks
from storage.database import transaction
from storage.errors import GenerationFailed
from storage.models import TaskStatus
from tests import random_model
from tests.conftest import Atelier, Paint, case
from worker.prompt_extend import EncoderRewriter

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

MODEL = "z-image-turbo"
PROMPT = "a red fox in the snow"
SIZE = "512*640"
Result = Any
"""What the SDK answers; it has no types of its own for it."""


@pytest.fixture(autouse=True)
def _pointed_here(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a customer sets to come from DashScope to here."""
    monkeypatch.setattr(dashscope, "base_http_api_url", f"{server}/api/v1")
    yield
    close_shared_sync_session()


@pytest.fixture
def customer(new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch) -> Customer:
    customer = new_customer()
    monkeypatch.setattr(dashscope, "api_key", customer.key)
    return customer


def messages() -> Any:
    return [{"role": "user", "content": [{"text": PROMPT}]}]


def run(call: Callable[..., Awaitable[Result]], *args: object, **kwargs: object) -> Result:
    async def called() -> Result:
        try:
            return await call(*args, **kwargs)
        finally:
            await close_shared_aio_session()

    return asyncio.run(called())


def in_a_loop(call: Callable[..., Awaitable[Result]]) -> Callable[..., Result]:
    """A call of the SDK's Aio classes, as one of the others."""
    return lambda *args, **kwargs: run(call, *args, **kwargs)


def assert_drawn(customer: Customer, link: str, images: int = 1) -> None:
    """The image is there for anyone, has the asked pixels, and was charged once."""
    with urlopen(link) as answer:
        image = Image.open(BytesIO(answer.read()))
    assert (image.format, image.size) == ("PNG", (512, 640))
    assert customer.books() == (Decimal(1500 - 15 * images), Decimal(0))


def asked(**more: object) -> dict[str, Any]:
    return {"model": MODEL, "messages": messages(), "size": SIZE} | more


def prompted(**more: object) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "size": SIZE} | more


def of_choices(answer: Result) -> str:
    link: str = answer.output.choices[0].message.content[0]["image"]
    return link


def of_results(answer: Result) -> str:
    link: str = answer.output.results[0].url
    return link


Ask = Callable[..., dict[str, Any]]
Read = Callable[[Result], str]
AT_ONCE: dict[str, tuple[Callable[..., Result], Ask, Read]] = {
    "MultiModalConversation.call": (MultiModalConversation.call, asked, of_choices),
    "AioMultiModalConversation.call": (
        in_a_loop(AioMultiModalConversation.call),
        asked,
        of_choices,
    ),
    "ImageGeneration.call": (ImageGeneration.call, asked, of_choices),
    "AioImageGeneration.call": (in_a_loop(AioImageGeneration.call), asked, of_choices),
    "ImageSynthesis.sync_call": (ImageSynthesis.sync_call, prompted, of_results),
    "AioImageSynthesis.sync_call": (in_a_loop(AioImageSynthesis.sync_call), prompted, of_results),
}
POLLING: dict[str, tuple[Callable[..., Result], Ask, Read]] = {
    "ImageSynthesis.call": (ImageSynthesis.call, prompted, of_results),
    "AioImageSynthesis.call": (in_a_loop(AioImageSynthesis.call), prompted, of_results),
}
TASKS: dict[str, tuple[Any, Ask, Read]] = {
    "ImageGeneration": (ImageGeneration, asked, of_choices),
    "AioImageGeneration": (AioImageGeneration, asked, of_choices),
    "ImageSynthesis": (ImageSynthesis, prompted, of_results),
    "AioImageSynthesis": (AioImageSynthesis, prompted, of_results),
}


def verb(name: str, word: str) -> Callable[..., Result]:
    """What a class of the SDK can do, whether in a loop or not."""
    call = getattr(TASKS[name][0], word)
    return in_a_loop(call) if name.startswith("Aio") else call


@pytest.mark.parametrize("name", AT_ONCE | POLLING)
def test_one_call_gives_one_image(customer: Customer, drawing: None, name: str) -> None:
    call, ask, read = (AT_ONCE | POLLING)[name]

    answer = call(**ask(seed=7, n=1, prompt_extend=False, negative_prompt="a dog"))

    assert answer.status_code == 200
    assert not answer.code
    assert not answer.message
    assert answer.request_id.startswith("req_")
    assert answer.usage["image_count"] == 1
    assert_drawn(customer, read(answer))


def test_what_it_says_of_an_image_is_what_was_asked(customer: Customer, drawing: None) -> None:
    answer: Result = MultiModalConversation.call(**asked())

    (choice,) = answer.output.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content[1] == {"text": PROMPT}
    assert choice.message["reasoning_content"] == ""
    assert (answer.usage.width, answer.usage.height) == (512, 640)


def test_a_stream_has_one_item(customer: Customer, drawing: None) -> None:
    call: Any = MultiModalConversation.call

    (answer,) = call(**asked(stream=True))

    assert answer.status_code == 200
    assert_drawn(customer, of_choices(answer))


# --- Tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_created_fetched_listed_and_waited_for(
    customer: Customer, work: Work, name: str
) -> None:
    _, ask, read = TASKS[name]

    created = verb(name, "async_call")(**ask())
    pending = verb(name, "fetch")(created)
    listed = verb(name, "list")(status="PENDING")
    work()
    done = verb(name, "wait")(created.output.task_id)

    assert (created.status_code, created.output.task_status) == (200, "PENDING")
    assert (pending.status_code, pending.output.task_status) == (200, "PENDING")
    assert listed.status_code == 200
    assert [row["task_id"] for row in listed.output["data"]] == [created.output.task_id]
    assert (done.status_code, done.output.task_status) == (200, "SUCCEEDED")
    assert done.usage["image_count"] == 1
    assert_drawn(customer, read(done))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_cancelled_while_it_waits(customer: Customer, work: Work, name: str) -> None:
    created = verb(name, "async_call")(**TASKS[name][1]())

    cancelled = verb(name, "cancel")(created)
    again = verb(name, "cancel")(created)
    waited = verb(name, "wait")(created)

    assert cancelled.status_code == 200
    assert (again.status_code, again.code) == (400, "UnsupportedOperation")
    assert (waited.status_code, waited.output.task_status) == (200, "CANCELED")
    assert customer.books() == (Decimal(1500), Decimal(0))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_failed_says_why(customer: Customer, work: Work, name: str) -> None:
    def fail(*_: object, **__: object) -> Image.Image:
        raise GenerationFailed

    created = verb(name, "async_call")(**TASKS[name][1]())
    work(fail)
    failed = verb(name, "wait")(created)

    assert (failed.status_code, failed.output["task_status"]) == (200, "FAILED")
    assert failed.output["code"] == "InternalError.Algo"
    assert failed.output["message"] == str(GenerationFailed())
    assert customer.books() == (Decimal(1500), Decimal(0))


@pytest.mark.parametrize("name", TASKS)
def test_waiting_for_an_unknown_task_ends(customer: Customer, name: str) -> None:
    found = verb(name, "wait")("0385dc79-5ff8-4d82-bcb6-000000000000")

    assert (found.status_code, found.output["task_status"]) == (200, "UNKNOWN")


def test_a_running_task_is_fetched_and_not_cancelled(customer: Customer) -> None:
    created: Result = ImageGeneration.async_call(**asked())
    with transaction() as session:
        assert tasks.claim_next(session, "a worker") is not None

    assert ImageGeneration.fetch(created).output["task_status"] == "RUNNING"
    assert ImageGeneration.cancel(created).code == "UnsupportedOperation"
    assert customer.task(created.output.task_id).status is TaskStatus.PROCESSING


@pytest.mark.parametrize("name", TASKS)
def test_a_task_with_a_key_of_its_own_is_created_once(customer: Customer, name: str) -> None:
    ids = {
        verb(name, "async_call")(
            **TASKS[name][1](headers={"Idempotency-Key": "order-1"})
        ).output.task_id
        for _ in range(2)
    }

    assert len(ids) == 1
    assert customer.books() == (Decimal(1500), Decimal(15))


# --- A prompt that is rewritten -------------------------------------------------------------------

WRITTEN = "<think>\nwhy\n</think>\n\na rewritten prompt"
TEMPLATE = byte_tokens.CHAT_TEMPLATE.replace("in messages", "in messages if message.role == 'user'")
"""Qwen's turns without the instruction: there is less to learn."""


@pytest.fixture(scope="module")
def rewriter() -> EncoderRewriter:
    """A text encoder that was taught in a second to answer PROMPT with WRITTEN."""
    tokenizer = byte_tokens.tokenizer()
    tokenizer.chat_template = TEMPLATE
    asked, answer = (
        tokenizer(text).input_ids
        for text in (
            f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n",
            f"{WRITTEN}<|im_end|>",
        )
    )
    tokens = torch.tensor([asked + answer])
    labels = torch.tensor([[-100] * len(asked) + answer])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(**random_model.TEXT_ENCODER | {"tie_word_embeddings": True})
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(300):
        loss = model(input_ids=tokens, labels=labels).loss
        if loss.item() < 0.003:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return EncoderRewriter(
        model.model.eval(),  # as the pipeline has it: without a head
        tokenizer,
        lock=threading.Lock(),
        reasoning_tokens_max=100,
        tokens_max=100,
        timeout_s=60,
    )


class Sketch(Paint):
    """Paint that remembers what it was asked for."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, prompt: str, **asked: Any) -> Image.Image:
        self.prompts.append(prompt)
        return super().__call__(prompt, **asked)


def assert_counted(usage: Result) -> None:
    """The tokens are those of WRITTEN, a byte a token but for the end of the turn."""
    thought = WRITTEN.index("</think>") + len("</think>")
    asked = 1 + len(f"user\n{PROMPT}") + 1 + 1 + 1 + len("assistant\n")
    written = len(WRITTEN) + 1
    assert usage["input_tokens"] == asked
    assert usage["output_tokens"] == written
    assert usage["total_tokens"] == asked + written
    assert usage["output_tokens_details"] == {"reasoning_tokens": thought}


def test_a_rewritten_prompt_is_drawn_and_answered_with_its_reasoning(
    customer: Customer, rewriter: EncoderRewriter
) -> None:
    sketch = Sketch()
    call: Any = MultiModalConversation.call
    with closing(Atelier(sketch, rewriter)):
        answer = call(**asked(prompt_extend=True, seed=7))

    (choice,) = answer.output.choices
    assert choice.message.content[1] == {"text": "a rewritten prompt"}
    assert choice.message["reasoning_content"] == "why"
    assert sketch.prompts == ["a rewritten prompt"]
    assert_counted(answer.usage)
    assert_drawn(customer, of_choices(answer), images=2)  # at the price of two


@pytest.mark.parametrize("name", ["ImageGeneration", "ImageSynthesis"])
def test_a_task_whose_prompt_is_rewritten_says_so(
    customer: Customer, work: Work, rewriter: EncoderRewriter, name: str
) -> None:
    _, ask, read = TASKS[name]

    created = verb(name, "async_call")(**ask(prompt_extend=True))
    assert customer.books() == (Decimal(1500), Decimal(30))
    work(rewriter=rewriter)
    done = verb(name, "wait")(created)

    if name == "ImageSynthesis":
        (result,) = done.output.results
        assert (result.orig_prompt, result.actual_prompt) == (PROMPT, "a rewritten prompt")
        assert result["reasoning_content"] == "why"
    else:
        message = done.output.choices[0].message
        assert message.content[1]["text"] == "a rewritten prompt"
        assert message["reasoning_content"] == "why"
    assert_counted(done.usage)
    assert_drawn(customer, read(done), images=2)


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_prompt_that_could_not_be_rewritten_is_not_charged(
    customer: Customer, drawing: Atelier, name: str
) -> None:
    call, ask, _ = AT_ONCE[name]

    answer = call(**ask(prompt_extend=True))  # there is no rewriter

    assert (answer.status_code, answer.code) == (500, "RewriteFailed")
    assert customer.books() == (Decimal(1500), Decimal(0))


# --- What can go wrong ----------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "a wrong key": ({"api_key": "zk_wrong"}, 401, "InvalidApiKey", "Invalid API-key provided."),
    "a size too small": ({"size": "256*256"}, 400, "InvalidParameter", "parameters.size: "),
    "two images": ({"n": 2}, 400, "InvalidParameter", "num_images_per_prompt must be 1"),
    "maybe rewriting": ({"prompt_extend": 1}, 400, "InvalidParameter", "parameters.prompt_extend"),
    "a seed too large": ({"seed": 2**31}, 400, "InvalidParameter", "parameters.seed: "),
    "another model": ({"model": "z-image"}, 404, "ModelNotFound", "Model can not be found."),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_is_wrong_with_a_call_is_said(customer: Customer, name: str) -> None:
    call, ask, _ = AT_ONCE[name]
    for fault, (wrong, status, code, words) in FAULTS.items():
        with case(fault):
            answer = call(**ask(**wrong))

            assert (answer.status_code, answer.code) == (status, code)
            assert words in answer.message
            assert answer.request_id.startswith("req_")
            assert answer.output is None
    assert customer.books() == (Decimal(1500), Decimal(0))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_wrong_with_a_task_is_said(customer: Customer, name: str) -> None:
    for fault, (wrong, status, code, words) in FAULTS.items():
        with case(fault):
            answer = verb(name, "async_call")(**TASKS[name][1](**wrong))

            assert (answer.status_code, answer.code) == (status, code)
            assert words in answer.message
    wrong_key = verb(name, "list")(api_key="zk_wrong")
    assert (wrong_key.status_code, wrong_key.code) == (401, "InvalidApiKey")
    assert customer.books() == (Decimal(1500), Decimal(0))


@pytest.mark.parametrize("name", AT_ONCE)
def test_without_credits_the_account_is_in_arrears(
    new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(dashscope, "api_key", new_customer(14).key)
    call, ask, _ = AT_ONCE[name]

    answer = call(**ask())

    assert (answer.status_code, answer.code) == (400, "Arrearage")
    assert answer.message == "Access denied, please make sure your account is in good standing."


@pytest.mark.parametrize("name", AT_ONCE)
def test_one_create_too_many_a_minute_is_throttled(
    new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(dashscope, "api_key", new_customer(requests_per_minute=1).key)
    call, ask, _ = AT_ONCE[name]
    ImageGeneration.async_call(**asked())

    answer = call(**ask())

    assert (answer.status_code, answer.code) == (429, "Throttling.RateQuota")


def test_a_drawing_that_fails_is_said_at_once(customer: Customer, drawing: Atelier) -> None:
    def fail(*_: object, **__: object) -> Image.Image:
        raise GenerationFailed

    drawing.draw_with(fail)
    for call, ask, _ in AT_ONCE.values():
        answer = call(**ask())

        assert (answer.status_code, answer.code) == (500, "InternalError.Algo")
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_nobody_is_held_for_as_long_as_the_sdk_waits() -> None:
    assert SYNC_TIMEOUT_S + DEADLINE_MARGIN_S < 0.9 * DEFAULT_REQUEST_TIMEOUT_SECONDS
