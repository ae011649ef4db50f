"""An auditor who trusts nobody: it compares what customers and receivers have written down with
the rows of the database and the bytes in the bucket, and uses none of the service's code.

It asserts: every accepted task has ended exactly once; a completed one is charged exactly once and
its image is there, any other is not charged; what has a key was submitted once; every callback was
tried as promised; the books balance, at every moment that was looked at.
"""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import boto3
import psycopg
from botocore.config import Config
from PIL import Image
from psycopg.rows import dict_row

from soak.colours import STEP, colour_of
from soak.customers import Wish
from soak.receiver import Heard
from soak.stage import Addresses

ATTEMPTS = 4
"""One, and three again after 1, 2 and 4 s: the promise."""
FAULTS_SHOWN = 20

OPEN = "SELECT count(*) FROM tasks WHERE status IN ('pending', 'processing')"
OWED = "SELECT count(*) FROM deliveries WHERE state = 'waiting'"

BOOKS = """
    SELECT a.id, a.balance, a.reserved, a.unfinished, coalesce(e.sum, 0) AS sum,
           coalesce(t.held, 0) AS held, coalesce(t.open, 0) AS open
      FROM accounts a
      LEFT JOIN (SELECT account_id, sum(amount) FROM ledger_entries GROUP BY 1) e
             ON e.account_id = a.id
      LEFT JOIN (SELECT account_id, sum(price) AS held, count(*) AS open FROM tasks
                  WHERE status IN ('pending', 'processing') GROUP BY 1) t
             ON t.account_id = a.id
"""


@dataclass
class Findings:
    """What was counted, and every breach of the promise."""

    counted: dict[str, int] = field(default_factory=dict)
    breaches: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def breach(self, kind: str, what: str) -> None:
        self.breaches[kind].append(what)

    @property
    def clean(self) -> bool:
        return not any(self.breaches.values())

    def line(self) -> str:
        """One line of figures: what must be 0 comes last."""
        figures = [f"{number} {name}" for name, number in self.counted.items()]
        return (
            ", ".join(figures)
            + " | "
            + ", ".join(f"{len(self.breaches[kind])} {kind}" for kind in PROMISES)
        )

    def details(self) -> Iterable[str]:
        for kind, breaches in self.breaches.items():
            for breach in breaches[:FAULTS_SHOWN]:
                yield f"{kind}: {breach}"


PROMISES = (
    "lost",
    "charged twice",
    "charged without an image",
    "uncharged with an image",
    "submitted twice",
    "ended twice",
    "callbacks fewer than promised",
    "books out of balance",
    "wrong answers",
)


class Checker:
    """Reads the servers at `addresses`."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self.findings = Findings()
        self.looks_at_books = 0
        self._given: psycopg.Connection[Any] | None = None

    def read_by(self, connection: psycopg.Connection[Any]) -> None:
        """Read the database by this connection, and what it has not committed."""
        self._given = connection

    def _read(self, query: str) -> list[dict[str, Any]]:
        """Raises: psycopg.OperationalError."""
        if self._given is not None:
            return self._given.cursor(row_factory=dict_row).execute(query).fetchall()
        with psycopg.connect(self._addresses.database, connect_timeout=5) as connection:
            return connection.cursor(row_factory=dict_row).execute(query).fetchall()

    def quiet(self) -> bool:
        """Whether nothing is left to be done. Raises: psycopg.OperationalError."""
        return all(self._read(query) == [{"count": 0}] for query in (OPEN, OWED))

    def look_at_books(self) -> None:
        """The books balance at this moment. Raises: psycopg.OperationalError."""
        rows = self._read(BOOKS)
        self.looks_at_books += 1
        for row in rows:
            if (row["balance"], row["reserved"], row["unfinished"]) != (
                row["sum"],
                row["held"],
                row["open"],
            ):
                self.findings.breach("books out of balance", str(row))

    def check(
        self, wishes: Sequence[Wish], heard: Sequence[Heard], unsigned: Sequence[str]
    ) -> None:
        """Everything, once nothing moves any more."""
        self.look_at_books()
        tasks = {row["id"]: row for row in self._read("SELECT * FROM tasks")}
        charges = self._read("SELECT * FROM ledger_entries WHERE kind = 'charge'")
        deliveries = self._read("SELECT * FROM deliveries")
        attempts = self._read("SELECT * FROM delivery_attempts")
        self._check_charges(tasks, charges)
        self._check_images(tasks)
        self._check_wishes(tasks, wishes)
        self._check_callbacks(tasks, deliveries, attempts, heard)
        for fault in unsigned:
            self.findings.breach("wrong answers", fault)
        ends = Counter(task["status"] for task in tasks.values())
        self.findings.counted |= {
            "requests": len(wishes),
            "sends": sum(wish.sends for wish in wishes),
            "tasks": len(tasks),
            "completed": ends["completed"],
            "failed": ends["failed"],
            "cancelled": ends["cancelled"],
            "claims": sum(task["attempt"] for task in tasks.values()),
            "callbacks": len(deliveries),
            "callback attempts heard": len(heard),
            "looks at the books": self.looks_at_books,
        }

    def _check_charges(self, tasks: dict[str, Any], charges: Sequence[dict[str, Any]]) -> None:
        per_task: defaultdict[str, list[Decimal]] = defaultdict(list)
        for charge in charges:
            per_task[charge["task_id"]].append(charge["amount"])
        for task_id, task in tasks.items():
            charged = per_task.pop(task_id, [])
            if task["status"] not in ("completed", "failed", "cancelled"):
                self.findings.breach("lost", f"{task_id} is {task['status']}")
            if len(charged) > 1:
                self.findings.breach("charged twice", f"{task_id}: {charged}")
            if task["status"] == "completed" and charged[:1] != [-task["price"]]:
                self.findings.breach("uncharged with an image", f"{task_id}: {charged}")
            if task["status"] != "completed" and charged:
                self.findings.breach("charged without an image", f"{task_id} {task['status']}")
        for task_id in per_task:
            self.findings.breach("charged without an image", f"{task_id} is not there")

    def _check_images(self, tasks: dict[str, Any]) -> None:
        where = self._addresses
        s3 = boto3.client(
            "s3",
            endpoint_url=where.s3_endpoint,
            aws_access_key_id=where.s3_access_key_id,
            aws_secret_access_key=where.s3_secret_access_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        there: set[str] = set()
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=where.bucket):
            there.update(item["Key"] for item in page.get("Contents", ()))
        known = set()
        for task in tasks.values():
            if task["status"] != "completed":
                continue
            known.add(task["image_key"])
            if task["image_key"] not in there:
                self.findings.breach("charged without an image", f"{task['id']}: not in the bucket")
                continue
            data = s3.get_object(Bucket=where.bucket, Key=task["image_key"])["Body"].read()
            if hashlib.sha256(data).hexdigest() != task["image_sha256"]:
                self.findings.breach("charged without an image", f"{task['id']}: other bytes")
            elif not _is_the_image(data, task):
                self.findings.breach("charged without an image", f"{task['id']}: another's image")
        self.findings.counted["images nobody knows"] = len(there - known)

    def _check_wishes(self, tasks: dict[str, Any], wishes: Sequence[Wish]) -> None:
        by_wish: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for task in tasks.values():
            by_wish[task["account_id"], task["prompt"]].append(task)
        for wish in wishes:
            found = by_wish.pop((wish.account_id, wish.name), [])
            for fault in wish.faults:
                self.findings.breach("wrong answers", f"{wish.name} ({wish.dialect}): {fault}")
            self._check_wish(wish, {task["id"]: task for task in found})
        for account_id, prompt in by_wish:
            self.findings.breach("wrong answers", f"nobody asked for {prompt!r} of {account_id}")

    def _check_wish(self, wish: Wish, found: dict[str, dict[str, Any]]) -> None:
        for task_id in wish.task_ids - found.keys():
            self.findings.breach("lost", f"{task_id} of {wish.name} is not there")
        painted = [task for task in found.values() if str(task["worker"]).startswith("painter")]
        if painted and wish.colour not in (None, colour_of(wish.seed)):
            self.findings.breach("wrong answers", f"{wish.name} was shown another's image")
        completed = sum(task["status"] == "completed" for task in found.values())
        if completed < wish.shown:
            self.findings.breach("uncharged with an image", f"{wish.name}: {wish.shown} were shown")
        if wish.refused is not None and wish.answers == 0 and found and not wish.hung_up:
            self.findings.breach("wrong answers", f"{wish.name} was refused, and is there")
        # Whose library counts its sends is drawn again if nothing came of the first.
        counts = (
            found
            if wish.dialect != "openai"
            else [task for task in found.values() if task["status"] == "completed"]
        )
        known_again = wish.key is not None or wish.dialect == "openai"
        if len(counts) > wish.images * (1 if known_again else wish.sends):
            self.findings.breach("submitted twice", f"{wish.name}: {sorted(found)}")
        for task_id, end in wish.ends.items():
            status = found[task_id]["status"] if task_id in found else None
            # zimageturbo.ai has no word for what was cancelled.
            same = status == end or (
                (wish.dialect, end, status) == ("zimageturbo", "failed", "cancelled")
            )
            if not same:
                self.findings.breach("ended twice", f"{task_id} was {end}, is {status}")

    def _check_callbacks(
        self,
        tasks: dict[str, Any],
        deliveries: Sequence[dict[str, Any]],
        attempts: Sequence[dict[str, Any]],
        heard: Sequence[Heard],
    ) -> None:
        owed = {delivery["task_id"]: delivery for delivery in deliveries}
        tried: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for attempt in attempts:
            tried[attempt["delivery_id"]].append(attempt)
        by_message: defaultdict[str, list[Heard]] = defaultdict(list)
        for each in heard:
            by_message[each.message_id].append(each)
        for task in tasks.values():
            if task["callback_url"] is None:
                continue
            delivery = owed.get(task["id"])
            if delivery is None:
                self.findings.breach("callbacks fewer than promised", f"{task['id']}: not owed")
                continue
            fault = _fault_of(task, delivery, tried[delivery["id"]], by_message[delivery["id"]])
            if fault is not None:
                self.findings.breach("callbacks fewer than promised", f"{task['id']}: {fault}")


def _fault_of(
    task: dict[str, Any],
    delivery: dict[str, Any],
    tried: Sequence[dict[str, Any]],
    heard: Sequence[Heard],
) -> str | None:
    """What is wrong with how a task was told; None is nothing."""
    if any((each.task_id, each.status) != (task["id"], task["status"]) for each in heard):
        return f"something else was told: {heard}"
    if delivery["state"] == "delivered":
        well = any(each.answered == 200 for each in heard)
        return None if well else f"delivered, but the receiver answered {heard}"
    if delivery["state"] != "gave_up":
        return f"still {delivery['state']}"
    # What a receiver that is gone was asked, only the log of the attempts can know.
    refused = sum(attempt["status"] is None for attempt in tried)
    if len(tried) < ATTEMPTS:
        return f"given up after {len(tried)} attempts"
    if len(heard) < ATTEMPTS - refused:
        return f"{len(heard)} heard and {refused} refused, of {ATTEMPTS}"
    return None


def _is_the_image(data: bytes, task: dict[str, Any]) -> bool:
    """Whether it has the task's size and the colour of its seed, or a real model has drawn it."""
    image = Image.open(io.BytesIO(data))
    if image.size != (task["image_width"], task["image_height"]):
        return False
    if not str(task["worker"]).startswith("painter"):
        return True
    found = image.convert("RGB").getpixel((0, 0))
    assert isinstance(found, tuple)
    wanted = colour_of(task["seed"])
    return all(abs(a - b) < STEP / 2 for a, b in zip(found, wanted, strict=True))
