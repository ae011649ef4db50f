"""The unmodified `openai` package against the service: its answers, its errors, and its re-sends.

The package re-sends by itself what was lost on the way. Nothing that it re-sends is drawn or
charged twice: that is proved with answers that are lost, and with a process that is killed.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx
import openai
import pytest
from openai.types import Image as OpenAIImage
from openai.types import ImageGenCompletedEvent, ImagesResponse
from PIL import Image
from sqlalchemy import select

from api import callbacks
from api.dialects.openai.routes import SYNC_TIMEOUT_S
from deploy import reach
from storage import accounts, deliveries, queue
from storage.database import transaction
from storage.errors import GenerationFailed, ResourceExhausted, ServiceError
from storage.models import LedgerEntry, Task, TaskStatus
from tests.conftest import Paint

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work
    from tests.warm import Child, Warm

    Submit = Callable[..., Task]

SIZE = "256x256"


@pytest.fixture
def client(server: str, customer: Customer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/openai/v1", api_key=customer.key) as made:
        yield made


def generate(client: openai.OpenAI, **asked: Any) -> ImagesResponse:
    answer = client.images.generate(**({"prompt": "a cat", "size": SIZE} | asked))
    assert isinstance(answer, ImagesResponse)
    return answer


Calls = Callable[..., "Future[ImagesResponse]"]


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Start `images.generate` of a client, and let it wait for its answer."""
    with ThreadPoolExecutor() as pool:

        def start(client: openai.OpenAI, **asked: Any) -> Future[ImagesResponse]:
            return pool.submit(lambda: generate(client, **asked))

        yield start


def wait_until(true: Callable[[], bool]) -> None:
    while not true():  # pytest's own limit ends it
        time.sleep(0.01)


def wait_for_jobs(times: int) -> None:
    """Wait until a worker has so much to look for: a task is there a moment before its job."""
    wait_until(lambda: queue.count() == times)


def statuses() -> list[TaskStatus]:
    """Of all tasks, the first one first."""
    with transaction() as session:
        return list(session.scalars(select(Task.status).order_by(Task.created_at)))


def charges() -> list[str]:
    """The tasks that were charged."""
    with transaction() as session:
        query = select(LedgerEntry.task_id).where(LedgerEntry.task_id.is_not(None))
        return [str(task_id) for task_id in session.scalars(query)]


def failing(error: ServiceError, *seeds: int) -> Callable[..., Image.Image]:
    """A pipeline that cannot draw some seeds, or any if none is named."""
    paint = Paint()

    def draw(prompt: str, *, seed: int, **how: Any) -> Image.Image:
        if not seeds or seed in seeds:
            raise error
        return paint(prompt, seed=seed, **how)

    return draw


def images_of(answer: ImagesResponse) -> list[OpenAIImage]:
    assert answer.data is not None
    return answer.data


def download(image: OpenAIImage) -> Image.Image:
    assert image.url is not None
    with urlopen(image.url) as answer:
        found = Image.open(BytesIO(answer.read()))
    found.load()
    return found


def resends(error: openai.APIStatusError) -> int:
    """How often the library had sent the request again when it gave up."""
    return int(error.response.request.headers["x-stainless-retry-count"])


# --- Images, streams and models -------------------------------------------------------------------


@pytest.mark.usefixtures("drawing")
def test_an_image_can_be_fetched_and_has_the_pixels_that_were_asked_for(
    client: openai.OpenAI, customer: Customer
) -> None:
    answer = client.images.generate(
        model="z-image-turbo",
        prompt="a cat",
        size="512x256",
        quality="high",
        style="vivid",
        moderation="low",
        background="opaque",
        user="somebody",
        extra_body={"seed": 7, "negative_prompt": "dogs"},
    )

    (image,) = images_of(answer)
    assert download(image).size == (512, 256)
    assert download(image).getpixel((0, 0)) == (7, 0, 0)
    assert (image.b64_json, image.revised_prompt) == (None, None)
    assert (answer.size, answer.output_format, answer.background) == ("512x256", "png", "opaque")
    assert (answer.quality, answer.safety_identifier) == ("high", "somebody")
    assert answer.usage is not None
    assert answer.usage.total_tokens == len("a cat")
    assert answer.created <= datetime.now(UTC).timestamp()
    with transaction() as session:
        assert answer._request_id == session.scalars(select(Task.request_id)).one()
    assert customer.books() == (1485, 0)


@pytest.mark.usefixtures("drawing")
def test_images_in_the_answer_are_files(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a cat", size=SIZE, n=3, response_format="b64_json", output_format="webp"
    )

    for image in images_of(answer):
        assert image.url is None
        assert Image.open(BytesIO(base64.b64decode(image.b64_json or ""))).format == "WEBP"
    assert len(images_of(answer)) == 3


@pytest.mark.usefixtures("drawing")
def test_a_stream_is_one_completed_event_for_each_image(client: openai.OpenAI) -> None:
    with client.images.generate(
        prompt="a cat", size=SIZE, n=2, stream=True, partial_images=2, extra_body={"seed": 7}
    ) as stream:
        events = list(stream)

    assert [event.type for event in events] == ["image_generation.completed"] * 2
    for event, red in zip(events, (7, 8), strict=True):
        assert isinstance(event, ImageGenCompletedEvent)
        image = Image.open(BytesIO(base64.b64decode(event.b64_json)))
        assert (image.size, image.getpixel((0, 0))) == ((256, 256), (red, 0, 0))
        assert (event.size, event.output_format, event.quality) == (SIZE, "png", "auto")
        assert event.usage.total_tokens == len("a cat")


def test_a_failure_in_a_stream_is_raised_after_the_images(
    client: openai.OpenAI, customer: Customer, work: Work
) -> None:
    got: list[str] = []

    def read() -> None:
        with client.images.generate(
            prompt="a cat", size=SIZE, n=2, stream=True, extra_body={"seed": 7}
        ) as stream:
            got.extend(event.type for event in stream)

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        wait_for_jobs(2)
        work(failing(GenerationFailed(), 8))
        with pytest.raises(openai.APIError) as raised:
            reading.result()

    assert got == ["image_generation.completed"]
    assert (raised.value.code, raised.value.type) == ("generation_failed", "api_error")
    assert raised.value.message == str(GenerationFailed())
    assert customer.books() == (1485, 0)


@pytest.mark.usefixtures("drawing")
def test_the_client_for_asyncio_is_served_as_well(server: str, customer: Customer) -> None:
    async def use() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{server}/openai/v1", api_key=customer.key
        ) as client:
            answer = await client.images.generate(prompt="a cat", size=SIZE)
            assert download(images_of(answer)[0]).size == (256, 256)
            events = await client.images.generate(prompt="a cat", size=SIZE, stream=True)
            assert [event.type async for event in events] == ["image_generation.completed"]
            assert [model.id async for model in client.models.list()] == ["z-image-turbo"]
            with pytest.raises(openai.BadRequestError):
                await client.images.generate(prompt="")

    asyncio.run(use())


def test_the_model_is_listed_and_described(client: openai.OpenAI) -> None:
    (model,) = client.models.list()

    assert client.models.retrieve(model.id) == model
    assert (model.id, model.object) == ("z-image-turbo", "model")
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-image-1")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_the_answer_comes_before_the_library_hangs_up() -> None:
    assert isinstance(openai.DEFAULT_TIMEOUT.read, float | int)
    assert openai.DEFAULT_TIMEOUT.read > SYNC_TIMEOUT_S


def test_the_library_verifies_our_callbacks(
    client: openai.OpenAI, customer: Customer, submit: Submit, work: Work
) -> None:
    submit(customer, callback_url="https://shop.example.com/")
    work()
    with transaction() as session:
        (attempt,) = deliveries.claim_due(session, limit=1, except_accounts=())
        secret = accounts.get(session, customer.id).callback_secret
    body = b'{"id":"task-unified-1757165031-uyujaw3d"}'
    headers = callbacks.sign(attempt, body, datetime.now(UTC))

    client.webhooks.verify_signature(body, headers, secret=secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(body + b" ", headers, secret=secret)


# --- Errors ---------------------------------------------------------------------------------------


def raised_by(server: str, key: str, **asked: Any) -> openai.APIStatusError:
    """What a client that re-sends nothing raises."""
    with (
        openai.OpenAI(base_url=f"{server}/openai/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as raised,
    ):
        generate(client, **asked)
    assert raised.value.request_id
    return raised.value


def described(error: openai.APIStatusError) -> tuple[object, ...]:
    return type(error), error.status_code, error.type, error.code, error.param


def test_each_error_of_the_caller_is_its_own_exception(
    server: str, customer: Customer, new_customer: NewCustomer
) -> None:
    assert described(raised_by(server, customer.key, size="1x1")) == (
        openai.BadRequestError,
        *(400, "invalid_request_error", "invalid_value", "size"),
    )
    assert described(raised_by(server, customer.key, output_format="svg")) == (
        openai.BadRequestError,
        *(400, "invalid_request_error", "invalid_value", "output_format"),
    )
    assert described(raised_by(server, "zk_wrong")) == (
        openai.AuthenticationError,
        *(401, "authentication_error", "invalid_api_key", None),
    )
    assert described(raised_by(server, new_customer(0).key)) == (
        openai.APIStatusError,
        *(402, "insufficient_quota", "insufficient_quota", None),
    )
    assert described(raised_by(server, new_customer(models=["another"]).key)) == (
        openai.PermissionDeniedError,
        *(403, "invalid_request_error", "model_access_denied", None),
    )
    assert described(raised_by(server, customer.key, model="gpt-image-1")) == (
        openai.NotFoundError,
        *(404, "invalid_request_error", "model_not_found", "model"),
    )
    assert described(raised_by(server, new_customer(unfinished_max=1).key, n=2)) == (
        openai.RateLimitError,
        *(429, "rate_limit_error", "too_many_unfinished", None),
    )
    limited = new_customer(0, requests_per_minute=1).key
    raised_by(server, limited)
    assert described(raised_by(server, limited)) == (
        openai.RateLimitError,
        *(429, "rate_limit_error", "rate_limit_exceeded", None),
    )
    assert statuses() == []


@pytest.mark.usefixtures("drawing")
def test_a_key_of_the_users_own_makes_calls_one(client: openai.OpenAI, customer: Customer) -> None:
    key = {"Idempotency-Key": "order-4711"}

    first, second = (generate(client, extra_headers=key) for _ in range(2))
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        generate(client, prompt="a dog", extra_headers=key)

    assert first.data == second.data
    assert raised.value.code == "idempotency_conflict"
    assert resends(raised.value) == 0
    assert statuses() == [TaskStatus.COMPLETED]
    assert customer.books() == (1485, 0)


def test_what_failed_is_sent_again_drawn_anew_and_charged_once(
    client: openai.OpenAI, customer: Customer, calls: Calls, work: Work
) -> None:
    calling = calls(client)
    wait_for_jobs(1)
    work(failing(GenerationFailed()))
    wait_for_jobs(1)
    assert statuses() == [TaskStatus.FAILED, TaskStatus.PENDING]
    work()

    (image,) = images_of(calling.result())
    assert download(image).size == (256, 256)
    assert customer.books() == (1485, 0)


def test_what_cannot_be_drawn_is_not_sent_again(
    client: openai.OpenAI, customer: Customer, calls: Calls, work: Work
) -> None:
    calling = calls(client)
    wait_for_jobs(1)
    work(failing(ResourceExhausted()))

    with pytest.raises(openai.InternalServerError) as raised:
        calling.result()
    assert raised.value.code == "resource_exhausted"
    assert resends(raised.value) == 0
    assert statuses() == [TaskStatus.FAILED]
    assert customer.books() == (1500, 0)


# --- Re-sends -------------------------------------------------------------------------------------

HELD, ANSWERED = "while it is held", "when it is answered"


class Relay:
    """Stands between the library and the service, and breaks off each call's first connection."""

    def __init__(self, server: str) -> None:
        self.sends: list[str] = []
        """What the library said of each request that came: how often it had been sent before."""
        self.broken_off = HELD
        self.break_off = threading.Event()
        """When to break off what is held."""
        relay = self
        parts = urlsplit(server)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                sent = self.headers["x-stainless-retry-count"]
                with closing(http.client.HTTPConnection(parts.hostname or "", parts.port)) as on:
                    on.request("POST", self.path, body, dict(self.headers))
                    relay.sends.append(sent)
                    if sent == "0" and relay.broken_off == HELD:
                        relay.break_off.wait()
                        return
                    answer = on.getresponse()
                    content = answer.read()
                if sent == "0":
                    return
                self.send_response(answer.status)
                self.send_header("content-type", answer.headers["content-type"])
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Nothing: the service logs."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/openai/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def relay(server: str) -> Iterator[Relay]:
    with closing(Relay(server)) as made:
        yield made


@pytest.fixture
def relayed(relay: Relay, customer: Customer) -> Iterator[openai.OpenAI]:
    """A client whose first connection of each call is lost."""
    with openai.OpenAI(base_url=relay.url, api_key=customer.key) as client:
        yield client


def test_a_call_whose_connection_is_lost_while_it_waits_is_one_task(
    relay: Relay, relayed: openai.OpenAI, customer: Customer, calls: Calls, work: Work
) -> None:
    calling = calls(relayed)
    wait_for_jobs(1)
    relay.break_off.set()
    wait_until(lambda: relay.sends == ["0", "1"])
    work()

    (image,) = images_of(calling.result())
    assert download(image).size == (256, 256)
    assert statuses() == [TaskStatus.COMPLETED]
    assert customer.books() == (1485, 0)


@pytest.mark.usefixtures("drawing")
def test_a_call_whose_answer_is_lost_gets_the_same_images_again(
    relay: Relay, relayed: openai.OpenAI, customer: Customer
) -> None:
    relay.broken_off = ANSWERED

    answer = generate(relayed, n=2)

    assert relay.sends == ["0", "1"]
    assert statuses() == [TaskStatus.COMPLETED] * 2
    assert sorted(charges()) == sorted(
        str(image.to_dict()["task_id"]) for image in images_of(answer)
    )
    assert customer.books() == (1470, 0)


def test_a_lost_answer_with_a_failure_in_it_is_not_drawn_again(
    relay: Relay, relayed: openai.OpenAI, customer: Customer, calls: Calls, work: Work
) -> None:
    relay.broken_off = ANSWERED
    calling = calls(relayed, n=2, extra_body={"seed": 1})
    wait_for_jobs(2)
    work(failing(GenerationFailed(), 2))
    wait_until(lambda: relay.sends == ["0", "1"])

    assert len(images_of(calling.result())) == 1
    assert customer.books() == (1485, 0)


@pytest.mark.parametrize("broken_off", [HELD, ANSWERED])
def test_two_equal_calls_at_once_that_are_both_lost_are_two_tasks(
    relay: Relay,
    relayed: openai.OpenAI,
    customer: Customer,
    calls: Calls,
    work: Work,
    broken_off: str,
) -> None:
    relay.broken_off = broken_off
    callings = [calls(relayed) for _ in range(2)]
    wait_for_jobs(2)
    if broken_off is ANSWERED:
        work()
    relay.break_off.set()
    wait_until(lambda: sorted(relay.sends) == ["0", "0", "1", "1"])
    work()

    drawn = {str(images_of(calling.result())[0].url) for calling in callings}
    assert len(drawn) == 2
    assert statuses() == [TaskStatus.COMPLETED] * 2
    assert customer.books() == (1470, 0)


def test_an_equal_call_before_it_is_not_taken_for_it(
    relay: Relay, client: openai.OpenAI, relayed: openai.OpenAI, calls: Calls, work: Work
) -> None:
    before = calls(client)
    wait_for_jobs(1)
    work()
    calling = calls(relayed)
    wait_for_jobs(1)
    relay.break_off.set()
    wait_until(lambda: relay.sends == ["0", "1"])
    work()

    assert calling.result().data != before.result().data
    assert len(statuses()) == 2


def test_a_stream_that_is_lost_before_it_begins_is_charged_once(
    relay: Relay, relayed: openai.OpenAI, customer: Customer, work: Work
) -> None:
    def read() -> list[str]:
        with relayed.images.generate(prompt="a cat", size=SIZE, stream=True) as stream:
            return [event.type for event in stream]

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        wait_for_jobs(1)
        relay.break_off.set()
        wait_for_jobs(2)
        work()

        assert reading.result() == ["image_generation.completed"]
    assert statuses() == [TaskStatus.CANCELLED, TaskStatus.COMPLETED]
    assert customer.books() == (1485, 0)


@contextmanager
def api_process(warm: Warm, port: int) -> Iterator[Child]:
    """A process that answers HTTP; it is told to stop at the end if it still runs."""
    with (
        warm.process("api", "serve", ZIMAGE_PORT=str(port)) as child,
        # Plain HTTP: reading the certificates would only take its time.
        httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False) as http,
    ):
        wait_until(lambda: _answers(http))
        yield child


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_process_that_is_killed_while_it_holds_a_call_loses_nothing(
    customer: Customer, calls: Calls, work: Work, warm: Warm
) -> None:
    port = reach.free_port()
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/openai/v1", api_key=customer.key, max_retries=20
    ) as client:
        with api_process(warm, port) as first:
            calling = calls(client)
            wait_for_jobs(1)
            first.kill()
            first.wait()
        with api_process(warm, port):
            work()
            (image,) = images_of(calling.result())

    assert download(image).size == (256, 256)
    assert statuses() == [TaskStatus.COMPLETED]
    assert charges() == [image.to_dict()["task_id"]]
    assert customer.books() == (1485, 0)


def test_a_process_that_is_told_to_stop_sends_the_call_to_the_next(
    client: openai.OpenAI, customer: Customer, calls: Calls, work: Work, warm: Warm
) -> None:
    port = reach.free_port()
    with (
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/openai/v1", api_key=customer.key, max_retries=0
        ) as stopped,
        api_process(warm, port) as process,
    ):
        calling = calls(stopped)
        wait_for_jobs(1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.InternalServerError) as raised:
            calling.result()
    # Here the library would wait for as long as it was told to.
    calling = calls(client, extra_headers={"x-stainless-retry-count": "1"})
    work()

    assert (raised.value.status_code, raised.value.code) == (503, "service_unavailable")
    assert raised.value.response.headers["retry-after"] == "5"
    (image,) = images_of(calling.result())
    assert charges() == [image.to_dict()["task_id"]]
    assert statuses() == [TaskStatus.COMPLETED]
    assert customer.books() == (1485, 0)
