"""What operators send, and what they are answered: fields that scripts rely on."""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
)

from storage.accounts import CREATES_PER_MINUTE, GROUP
from storage.models import Account, ApiKey, LedgerEntry, Task
from storage.settings import settings

NAME_MAX_CHARACTERS = 200
NOTE_MAX_CHARACTERS = 1000
OVERLAP_S = 24 * 3600
"""How long a rotated key or secret stays valid, unless the operator says otherwise."""
OVERLAP_MAX_S = 30 * 24 * 3600
AMOUNT_DIGITS_MAX = 15
"""Of one movement, six of them after the point: what a JSON number carries exactly."""


_AMOUNT = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("must not contain control characters")
    return name


Name = Annotated[str, Field(max_length=NAME_MAX_CHARACTERS), AfterValidator(_printable)]
Group = Annotated[str, Field(pattern=f"^{GROUP.pattern}$")]
Limit = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]


def _written(moment: object) -> object:
    """Keeps pydantic from reading a number as seconds since 1970, and the first and last years from
    those that no date has in UTC."""
    if isinstance(moment, str) and "0001" < moment[:4] < "9999" and moment[4:5] == "-":
        return moment
    raise ValueError("must be a date and a time with its zone, as RFC 3339 writes them")


Moment = Annotated[AwareDatetime, BeforeValidator(_written)]


class Strict(BaseModel):
    """A body in which a misspelt field is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid")


WrittenAmount = Annotated[str, Field(pattern=r"^[-+]?[0-9]+(\.[0-9]+)?$")]


def _plain(amount: object) -> object:
    """Keeps Decimal from reading `1_000`, `1e3` and the digits of other scripts."""
    if isinstance(amount, str) and _AMOUNT.fullmatch(amount) is None:
        raise ValueError("must be a number, or one in a string: digits, a point, digits")
    return amount


def _example(**body: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"example": body})


class NewAccount(Strict):
    model_config = _example(name="Ada Lovelace", unfinished_max=100)

    name: Annotated[Name, Field(min_length=1)]
    user_group: Group = "default"
    unfinished_max: Limit | None = settings.unfinished_max


class AccountChange(Strict):
    model_config = _example(suspended=True)

    name: Annotated[Name, Field(min_length=1)] | None = None
    user_group: Group | None = None
    unfinished_max: Limit | None = None
    suspended: StrictBool | None = None


class NewKey(Strict):
    model_config = _example(name="laptop", requests_per_minute=60)

    name: Name = ""
    models: list[Annotated[Name, Field(min_length=1)]] | None = None
    requests_per_minute: Limit | None = CREATES_PER_MINUTE
    expires_at: Moment | None = None
    admin: StrictBool = False


class Rotation(Strict):
    model_config = _example(overlap_s=3600)

    overlap_s: Annotated[StrictInt, Field(ge=0, le=OVERLAP_MAX_S)] = OVERLAP_S


class Movement(Strict):
    model_config = _example(amount=1500, note="invoice 7")

    amount: Annotated[
        Decimal,
        Field(max_digits=AMOUNT_DIGITS_MAX, decimal_places=6),
        BeforeValidator(_plain, json_schema_input_type=float | WrittenAmount),
    ]
    note: (
        Annotated[str, Field(max_length=NOTE_MAX_CHARACTERS), AfterValidator(_printable)] | None
    ) = None


def render_account(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "name": account.name,
        "user_group": account.user_group,
        "balance": account.balance,
        "reserved": account.reserved,
        "unfinished_max": account.unfinished_max,
        "suspended": account.suspended,
        "created_at": account.created_at,
    }


def render_key(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "account_id": key.account_id,
        "name": key.name,
        "models": key.models,
        "admin": key.admin,
        "requests_per_minute": key.requests_per_minute,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }


def render_entry(entry: LedgerEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "account_id": entry.account_id,
        "kind": entry.kind,
        "amount": entry.amount,
        "balance_after": entry.balance_after,
        "actor": entry.actor,
        "note": entry.note,
        "task_id": entry.task_id,
        "created_at": entry.created_at,
    }


def render_task(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "account_id": task.account_id,
        "dialect": task.dialect,
        "model": task.model,
        "width": task.width,
        "height": task.height,
        "seed": task.seed,
        "price": task.price,
        "status": task.status,
        "progress": task.progress,
        "attempt": task.attempt,
        "worker": task.worker,
        "error_code": task.error_code,
        "error_message": task.error_message,
        "request_id": task.request_id,
        "created_at": task.created_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
    }


WORKER = (
    "name",
    "state",
    "device",
    "device_name",
    "model",
    "dtype",
    "started_at",
    "claimed",
    "images_total",
    "images_per_minute",
    "memory_used_mb",
    "memory_peak_mb",
    "memory_total_mb",
    "batch_limits",
)
"""What is shown of a worker, as it tells it itself: `state` is idle, drawing or stopping, `claimed`
the number of tasks in its hands, `batch_limits` how many images it draws together."""


def render_worker(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts.get(name) for name in WORKER}
