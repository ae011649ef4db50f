"""What a customer can ask of the service, as steps: written once, for threads and event loops."""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from zimage import answers, watching
from zimage.answers import Credits, Image, Quote, Task, TaskPage, read
from zimage.callbacks import Callback, read_callback
from zimage.errors import Conflict, InvalidRequest
from zimage.exchange import Answer, exchange
from zimage.fetching import completed, download
from zimage.retries import Retries
from zimage.steps import Request, Steps

MODEL = "z-image-turbo"
BATCH_MAX = 50
"""Ids in one look; more are asked for in several."""
CREATE = "/v1/images/generations"


@dataclass(frozen=True, slots=True)
class Operations:
    """Each operation raises what `zimage.errors` lists; requests are retried as `retries` says."""

    retries: Retries

    def create(
        self,
        prompt: str,
        *,
        size: str | None = None,
        seed: int | None = None,
        callback_url: str | None = None,
        idempotency_key: str | None = None,
        cancel_after: str | int | None = None,
    ) -> Steps[Task]:
        """Submit one image; it is charged when it completes.

        `size` is a ratio such as `16:9` or pixels such as `1024x768`. The same `idempotency_key`
        never draws twice: it answers the first task, with `replayed` set. Without one, a new one is
        made, so that retries are safe. `cancel_after` is seconds, or such as `90s`, `5m`, `1h`.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        if cancel_after is not None:
            headers["Cancel-After"] = (
                cancel_after if isinstance(cancel_after, str) else f"{cancel_after}s"
            )
        body = _image(prompt, size, seed, callback_url)
        answer = yield from self._send("POST", CREATE, headers=headers, body=body)
        replayed = answer.headers.get("idempotency-replayed") == "true"
        return replace(read(answer.body, answers.read_task), replayed=replayed)

    def quote(
        self, prompt: str = "a quote", *, size: str | None = None, seed: int | None = None
    ) -> Steps[Quote]:
        """What the image would cost now, and whether the account can pay it. Submits nothing."""
        body = _image(prompt, size, seed, None)
        answer = yield from self._send("POST", CREATE, query={"dry_run": "true"}, body=body)
        return read(answer.body, answers.read_quote)

    def get(self, task_id: str) -> Steps[Task]:
        """How a task stands."""
        answer = yield from self._send("GET", f"/v1/tasks/{_path(task_id)}")
        return read(answer.body, answers.read_task)

    def list_tasks(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        page: int = 1,
        page_size: int = 20,
    ) -> Steps[TaskPage]:
        """A page of the account's tasks, newest first."""
        query = {"status": status, "model": model, "page": str(page), "page_size": str(page_size)}
        answer = yield from self._send("GET", "/v1/tasks", query=_given(query))
        return read(answer.body, answers.read_task_page)

    def batch(self, task_ids: Iterable[str]) -> Steps[list[Task]]:
        """Many tasks in few requests; what is not the account's own is left out."""
        ids, found = list(task_ids), list[Task]()
        for start in range(0, len(ids), BATCH_MAX):
            body = {"task_ids": ids[start : start + BATCH_MAX]}
            answer = yield from self._send("POST", "/v1/tasks/batch", body=body)
            found += read(answer.body, lambda said: [answers.read_task(t) for t in said["data"]])
        return found

    def cancel(self, task_id: str) -> Steps[Task]:
        """End a task that goes on; it is not charged. One that was cancelled already is fine.

        One that is being drawn may be answered unfinished: it ends at its next step.

        Raises:
            Conflict: it has ended in another way.
        """
        try:
            answer = yield from self._send("POST", f"/v1/tasks/{_path(task_id)}/cancel")
        except Conflict:
            # Perhaps by this very request, whose answer was lost.
            task = yield from self.get(task_id)
            if task.cancelled:
                return task
            raise
        return read(answer.body, answers.read_task)

    def credits(self) -> Steps[Credits]:
        """What is left of the account's credits, and of the key's."""
        answer = yield from self._send("GET", "/v1/credits")
        return read(answer.body, answers.read_credits)

    def events(self, task_id: str) -> Steps[Task]:
        """The task as it is now, then each change of it, until it has ended."""
        return watching.watch(_path(task_id), self.retries)

    def wait(self, task_id: str, timeout_s: float = 600.0) -> Steps[Task]:
        """The task once it has ended, however it did.

        Raises:
            Timeout: it is unfinished after `timeout_s` seconds; it goes on regardless.
        """
        return watching.watch(_path(task_id), self.retries, timeout_s)

    def download(self, task: Task) -> Steps[bytes]:
        """The PNG of a completed task; its length and SHA-256 are checked.

        Raises: TaskFailed, ImageExpired, IntegrityError.
        """
        return download(task, self.retries)

    def generate(
        self,
        prompt: str,
        *,
        size: str | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = 600.0,
    ) -> Steps[Image]:
        """Submit one image, wait for it, download it and check it.

        Raises:
            TaskFailed: it could not be drawn, and was not charged.
            Timeout: it is unfinished after `timeout_s` seconds; it goes on regardless.
        """
        task = yield from self.create(prompt, size=size, seed=seed, idempotency_key=idempotency_key)
        if task.error is None and task.image_url is None:
            task = yield from self.wait(task.id, timeout_s)
        return Image(completed(task), (yield from self.download(task)))

    def callbacks(
        self,
        *,
        task_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        state: str | None = None,
        limit: int = 100,
    ) -> Steps[list[Callback]]:
        """The newest `limit` deliveries to callback URLs; moments must know their time zone."""
        query = _given(
            {
                "task_id": task_id,
                "since": _rfc3339(since),
                "until": _rfc3339(until),
                "state": state,
                "limit": str(min(limit, 100)),
            }
        )
        found = list[Callback]()
        while True:
            answer = yield from self._send("GET", "/v1/callbacks", query=query)
            said = read(answer.body, lambda said: (said["data"], said.get("next_cursor")))
            found += [read_callback(line) for line in said[0]]
            if said[1] is None or len(found) >= limit:
                return found[:limit]
            query["cursor"] = said[1]

    def redeliver(self, callback_id: str) -> Steps[Callback]:
        """Have a delivery made again, under its old id."""
        path = f"/v1/callbacks/{_path(callback_id)}/redeliver"
        answer = yield from self._send("POST", path)
        return read(answer.body, read_callback)

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Steps[Answer]:
        request = Request(method, path, query=query or {}, headers=headers or {}, body=body)
        return exchange(request, self.retries)


def _image(
    prompt: str, size: str | None, seed: int | None, callback_url: str | None
) -> dict[str, Any]:
    asked = {"prompt": prompt, "size": size, "seed": seed, "callback_url": callback_url}
    return {"model": MODEL} | _given(asked)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _path(part: str) -> str:
    # An id that is none must not become another route.
    if not part or not all(letter.isalnum() or letter in "-_" for letter in part):
        raise InvalidRequest(f"{part!r} is not an id")
    return part


def _rfc3339(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise InvalidRequest(f"{moment} does not say in which time zone it is")
    return moment.isoformat()
