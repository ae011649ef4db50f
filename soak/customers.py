"""Customers of every dialect who never give up, and their own record of what they were told.

A customer makes one request after the other. What has an idempotency key is sent again until it is
answered, to any API process; what has none is sent again too, and may then be drawn twice, as such
customers know. Some hang up, some cancel, some wait, some want a callback.
"""

import asyncio
import base64
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from soak.colours import LEVELS
from soak.receiver import Receiver, evolink_status

SENDS_MAX = 200
AGAIN_S = (0.1, 0.8)
"""At least and at most between two sends of a request that was not answered."""
POLL_S = 0.4
TIMEOUT_S = 15.0
HELD_TIMEOUT_S = 40.0
HANG_UP_S = (0.05, 1.5)
SEED_MAX = 2**31 - 1
FINAL_REFUSALS = (400, 401, 402, 403, 404, 409, 410, 422)
ENDS = {
    **dict.fromkeys(("completed", "SUCCESS", "SUCCEEDED"), "completed"),
    **dict.fromkeys(("failed", "FAILED"), "failed"),
    **dict.fromkeys(("cancelled", "CANCELED", "CANCELLED"), "cancelled"),
}


@dataclass(slots=True)
class Wish:
    """One request of a customer, and everything that became of it as far as the customer knows."""

    name: str
    """Part of the prompt, so that its tasks are found."""
    account_id: str
    dialect: str
    images: int
    seed: int
    key: str | None
    """None: it has no idempotency key."""
    callback: str | None = None
    """The mode of the receiver."""
    sends: int = 0
    answers: int = 0
    """How often it was answered with tasks or images."""
    refused: int | None = None
    """The status of the answer that refused it for good."""
    hung_up: int = 0
    task_ids: set[str] = field(default_factory=set)
    ends: dict[str, str] = field(default_factory=dict)
    """Task to the end that the customer was told."""
    shown: int = 0
    """The most images that one answer carried."""
    colour: object = None
    """Of the image, where the answer had it whole."""
    faults: list[str] = field(default_factory=list)
    """Answers that no customer should get."""


@dataclass(frozen=True, slots=True)
class Account:
    id: str
    api_key: str


class Customer:
    """Makes wishes until it is told to stop, and sees the last one through."""

    def __init__(
        self,
        number: int,
        seed: int,
        accounts: Sequence[Account],
        bases: Sequence[str],
        receiver: Receiver,
        modes: Sequence[str],
    ) -> None:
        self._number = number
        self._chance = random.Random(f"{seed}/{number}")
        self._accounts = accounts
        self._bases = bases
        self._receiver = receiver
        self._modes = modes
        self._http = httpx.AsyncClient(verify=False, timeout=TIMEOUT_S)  # noqa: S501 - plain HTTP
        self._waiting = 0
        self.wishes: list[Wish] = []

    async def live(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await self._make_a_wish()
        await self._http.aclose()

    async def _make_a_wish(self) -> None:
        chance = self._chance
        account = chance.choices(self._accounts, [*([10] * (len(self._accounts) - 1)), 1])[0]
        dialect = chance.choices(list(DIALECTS), [d.weight for d in DIALECTS.values()])[0]
        how = DIALECTS[dialect]
        wish = Wish(
            name=f"wish-{self._number}-{len(self.wishes)}",
            account_id=account.id,
            dialect=dialect,
            images=chance.choice((1, 2, 4)) if how.several else 1,
            seed=chance.randrange(SEED_MAX - LEVELS),
            key=None,
        )
        if chance.random() < how.keyed:
            wish.key = f"key-{wish.name}-{chance.randrange(10**9)}"
        if dialect == "evolink" and chance.random() < 0.6:
            wish.callback = chance.choice(self._modes)
        self.wishes.append(wish)
        moods = [chance.random() for _ in range(3)]
        headers = {"Authorization": f"Bearer {account.api_key}"}
        if await self._ask(wish, how, headers, moods) and not how.held:
            await self._follow(wish, headers, cancels=moods[1] < 0.06)

    async def _ask(
        self, wish: Wish, how: "Dialect", headers: dict[str, str], moods: Sequence[float]
    ) -> bool:
        """Send until there is an answer. False: refused, or the customer hung up."""
        body = how.body(wish, self._url(wish))
        hangs_up = how.held and moods[0] < 0.06
        timeout_s = HELD_TIMEOUT_S if how.held else TIMEOUT_S
        if hangs_up:
            timeout_s = self._chance.uniform(*HANG_UP_S)
        while wish.sends < SENDS_MAX:
            more = how.headers | ({"Idempotency-Key": wish.key} if wish.key else {})
            if how.resends and wish.key is None:
                more |= {"x-stainless-retry-count": str(min(wish.sends, 20))}
                more |= {"x-stainless-read-timeout": "600"}
            if not how.held and moods[2] < 0.3:
                more |= {"Prefer": "wait=10"}
            wish.sends += 1
            try:
                answer = await self._http.post(
                    self._base() + how.path, json=body, headers=headers | more, timeout=timeout_s
                )
            except httpx.HTTPError:
                if hangs_up:
                    wish.hung_up += 1
                    return False
            else:
                if answer.is_success:
                    wish.answers += 1
                    how.read(wish, answer.json())
                    return True
                if answer.status_code in FINAL_REFUSALS:
                    wish.refused = answer.status_code
                    return False
                if how.held and _failed_for_good(answer):
                    return False
                self._check_refusal(wish, answer)
            await asyncio.sleep(self._chance.uniform(*AGAIN_S))
        wish.faults.append(f"not answered after {wish.sends} sends")
        return False

    async def _follow(self, wish: Wish, headers: dict[str, str], *, cancels: bool) -> None:
        """Ask for the task until it has ended."""
        if len(wish.task_ids) != 1:
            wish.faults.append("one key, several tasks")
            return
        (task_id,) = wish.task_ids
        how = DIALECTS[wish.dialect]
        if cancels:
            await asyncio.sleep(self._chance.uniform(0, 0.3))
            await self._cancel(wish, task_id, headers)
        for _ in range(4 * SENDS_MAX):
            more = {"Prefer": "wait=5"} if self._chance.random() < 0.6 else {}
            answer = await self._get(self._base() + how.poll.format(task_id), headers | more)
            if answer is not None and answer.status_code == 200:
                end = ENDS.get(how.status(answer.json()))
                if end is not None:
                    wish.ends[task_id] = end
                    return
            elif answer is not None and answer.status_code == 404:
                wish.faults.append(f"{task_id} is not found")
                return
            elif answer is not None:
                self._check_refusal(wish, answer)
            await asyncio.sleep(POLL_S)
        wish.faults.append(f"{task_id} has not ended")

    async def _cancel(self, wish: Wish, task_id: str, headers: dict[str, str]) -> None:
        url = f"{self._base()}/v1/tasks/{task_id}/cancel"
        try:
            answer = await self._http.post(url, headers=headers)
        except httpx.HTTPError:
            return  # whether it was cancelled is seen when it is asked for
        if answer.status_code == 200:
            wish.ends[task_id] = "cancelled"

    async def _get(self, url: str, headers: dict[str, str]) -> httpx.Response | None:
        try:
            return await self._http.get(url, headers=headers)
        except httpx.HTTPError:
            return None

    def _check_refusal(self, wish: Wish, answer: httpx.Response) -> None:
        """Only 429 and 5xx that say when to come again are what a customer may get meanwhile."""
        if answer.status_code == 500 and "internal" in answer.text.lower():
            wish.faults.append(f"500: {answer.text[:200]}")
        if answer.status_code in (429, 503) and "retry-after" not in answer.headers:
            wish.faults.append(f"{answer.status_code} without Retry-After: {answer.text[:200]}")

    def _base(self) -> str:
        return self._chance.choice(self._bases)

    def _url(self, wish: Wish) -> str | None:
        return wish.callback and self._receiver.url(wish.callback, wish.name)


def _failed_for_good(answer: httpx.Response) -> bool:
    """Whether a held caller was told that the task has ended without an image."""
    return "not charged" in answer.text


# --- The dialects, as their clients speak them ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialect:
    path: str
    weight: int
    body: Callable[[Wish, str | None], dict[str, Any]]
    read: Callable[[Wish, Any], None]
    """Notes in the wish what an answer says."""
    poll: str = ""
    status: Callable[[Any], str] = str
    held: bool = False
    """Whether the answer to the create has the images."""
    several: bool = False
    resends: bool = False
    """Whether its library says how often it has sent a request before."""
    keyed: float = 1.0
    """Share of requests with an idempotency key."""
    headers: dict[str, str] = field(default_factory=dict)


def _told_of(find: Callable[[Any], str]) -> Callable[[Wish, Any], None]:
    def read(wish: Wish, answer: Any) -> None:
        wish.task_ids.add(find(answer))

    return read


def _zimageturbo(wish: Wish, url: str | None) -> dict[str, Any]:
    return {"prompt": wish.name, "aspect_ratio": "1:1", "size": "512*512", "seed": wish.seed}


def _evolink(wish: Wish, url: str | None) -> dict[str, Any]:
    body = {"model": "z-image-turbo", "prompt": wish.name, "size": "512x512", "seed": wish.seed}
    return body | ({"callback_url": url} if url else {})


def _dashscope(wish: Wish, url: str | None) -> dict[str, Any]:
    return {
        "model": "z-image-turbo",
        "input": {"messages": [{"role": "user", "content": [{"text": wish.name}]}]},
        "parameters": {"size": "512*512", "seed": wish.seed},
    }


def _openai(wish: Wish, url: str | None) -> dict[str, Any]:
    return {
        "model": "z-image-turbo",
        "prompt": wish.name,
        "n": wish.images,
        "size": "512x512",
        "seed": wish.seed,
    }


def _local(wish: Wish, url: str | None) -> dict[str, Any]:
    return {"prompt": wish.name, "width": 64, "height": 64, "seed": wish.seed}


def _read_dashscope(wish: Wish, answer: Any) -> None:
    (content,) = answer["output"]["choices"][0]["message"]["content"][:1]
    wish.shown = max(wish.shown, int("image" in content))


def _read_openai(wish: Wish, answer: Any) -> None:
    for image in answer["data"]:
        wish.task_ids.add(image["task_id"])
        wish.ends[image["task_id"]] = "completed"
    wish.shown = max(wish.shown, len(answer["data"]))


def _read_local(wish: Wish, answer: Any) -> None:
    image = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
    wish.shown = 1
    wish.colour = image.convert("RGB").getpixel((0, 0))


DIALECTS = {
    "zimageturbo": Dialect(
        "/api/generate",
        weight=20,
        body=_zimageturbo,
        read=_told_of(lambda answer: str(answer["data"]["task_id"])),
        poll="/api/status?task_id={}",
        status=lambda answer: str(answer["data"]["status"]),
    ),
    "evolink": Dialect(
        "/v1/images/generations",
        weight=35,
        body=_evolink,
        read=_told_of(lambda answer: str(answer["id"])),
        poll="/v1/tasks/{}",
        status=evolink_status,
    ),
    "dashscope": Dialect(
        "/api/v1/services/aigc/image-generation/generation",
        weight=15,
        body=_dashscope,
        read=_told_of(lambda answer: str(answer["output"]["task_id"])),
        poll="/api/v1/tasks/{}",
        status=lambda answer: str(answer["output"]["task_status"]),
        headers={"X-DashScope-Async": "enable"},
    ),
    "dashscope-held": Dialect(
        "/api/v1/services/aigc/multimodal-generation/generation",
        weight=8,
        body=_dashscope,
        read=_read_dashscope,
        held=True,
        keyed=0.5,
    ),
    "openai": Dialect(
        "/openai/v1/images/generations",
        weight=14,
        body=_openai,
        read=_read_openai,
        held=True,
        several=True,
        resends=True,
        keyed=0.3,
    ),
    "local": Dialect("/v1/generate", weight=8, body=_local, read=_read_local, held=True, keyed=0.6),
}
