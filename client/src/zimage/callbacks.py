"""What the service tells of its deliveries to callback URLs."""

from dataclasses import dataclass, field
from datetime import datetime

from zimage.answers import JSONObject


@dataclass(frozen=True, slots=True)
class CallbackAttempt:
    """One try to deliver: the receiver's HTTP status, or what kept it from answering."""

    at: datetime | None
    status: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Callback:
    """A delivery to a callback URL; `state` is `waiting`, `delivered` or `gave_up`."""

    id: str
    task_id: str
    url: str
    state: str
    attempts: list[CallbackAttempt]
    created_at: datetime | None
    delivered_at: datetime | None
    next_attempt_at: datetime | None
    raw: JSONObject = field(repr=False, compare=False)


def read_callback(said: JSONObject) -> Callback:
    attempts = [
        CallbackAttempt(_moment(tried.get("at")), tried.get("status"), tried.get("error"))
        for tried in said.get("attempts") or []
    ]
    return Callback(
        id=said["id"],
        task_id=said["task_id"],
        url=said["url"],
        state=said["state"],
        attempts=attempts,
        created_at=_moment(said.get("created_at")),
        delivered_at=_moment(said.get("delivered_at")),
        next_attempt_at=_moment(said.get("next_attempt_at")),
        raw=said,
    )


def _moment(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)
