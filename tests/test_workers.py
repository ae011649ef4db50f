"""Workers announce themselves: who was heard of lately, what they tell, and who may see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from storage import queue

if TYPE_CHECKING:
    from tests.conftest import Customer

FACTS: dict[str, Any] = {
    "state": "drawing",
    "device": "cuda:0",
    "device_name": "NVIDIA H200",
    "model": "Tongyi-MAI/Z-Image-Turbo",
    "dtype": "bfloat16",
    "started_at": "2026-11-21T13:00:00+00:00",
    "claimed": 2,
    "images_total": 4711,
    "images_per_minute": 85.5,
    "memory_used_mb": 19100,
    "memory_peak_mb": 23500,
    "memory_total_mb": 143771,
    "batch_limits": {"512x512": 4, "1024x1024": 1},
}


def silent_for(worker: str, seconds: int) -> None:
    """Let `worker` have been heard of so long ago."""
    queue.connection.zincrby(queue._WORKERS, -seconds, worker)


def left_of_workers() -> int:
    """Keys in an otherwise empty Redis."""
    count: int = queue.connection.dbsize()
    return count


def test_an_operator_sees_what_each_worker_tells_of_itself(operator: Customer) -> None:
    queue.announce("gpu-2", FACTS)
    queue.announce("gpu-1", FACTS | {"state": "idle", "device": "cuda:1"})

    answer = operator.http.get("/admin/workers")

    assert answer.status_code == 200
    assert answer.json() == {
        "data": [
            {"name": "gpu-1"} | FACTS | {"state": "idle", "device": "cuda:1"},
            {"name": "gpu-2"} | FACTS,
        ]
    }


def test_the_last_announcement_counts(operator: Customer) -> None:
    queue.announce("gpu-1", FACTS)
    queue.announce("gpu-1", FACTS | {"images_total": 4712})

    (worker,) = operator.http.get("/admin/workers").json()["data"]
    assert worker["images_total"] == 4712
    assert queue.workers() == 1


def test_where_nobody_works_the_list_is_empty(operator: Customer) -> None:
    assert operator.http.get("/admin/workers").json() == {"data": []}


def test_a_worker_that_stops_is_forgotten_at_once() -> None:
    queue.announce("gpu-1", FACTS)
    queue.withdraw("gpu-1")

    assert left_of_workers() == 0


def test_a_silent_worker_is_believed_for_a_while_and_then_forgotten_with_its_facts() -> None:
    queue.announce("dead", FACTS)
    queue.announce("alive", FACTS)
    silent_for("dead", queue.HEARD_S - 3)
    assert [facts["name"] for facts in queue.worker_facts()] == ["alive", "dead"]

    silent_for("dead", 3)
    assert [facts["name"] for facts in queue.worker_facts()] == ["alive"]
    assert queue.workers() == 1
    silent_for("alive", queue.HEARD_S)
    assert queue.worker_facts() == []
    assert left_of_workers() == 0


def test_the_facts_of_one_that_only_the_count_forgot_go_as_well() -> None:
    queue.announce("dead", FACTS)
    silent_for("dead", queue.HEARD_S)
    assert queue.workers() == 0

    queue.worker_facts()

    assert left_of_workers() == 0


@pytest.mark.parametrize("told", [None, b"", b"{", b"[]", b"null", b"\xff", b'{"n": NaN}'])
def test_a_worker_that_is_not_understood_is_there_and_hides_no_other(
    operator: Customer, told: bytes | None
) -> None:
    """None: a worker of an earlier version, which says only that it is alive."""
    queue.announce("gpu-1", FACTS)
    queue.announce("gpu-2", FACTS)
    if told is None:
        queue.connection.hdel(queue._FACTS, "gpu-1")
    else:
        queue.connection.hset(queue._FACTS, "gpu-1", told)

    with capture_logs() as logs:
        odd, other = operator.http.get("/admin/workers").json()["data"]
        ready = operator.http.get("/ready").json()

    assert odd == dict.fromkeys(FACTS) | {"name": "gpu-1"}
    assert other == {"name": "gpu-2"} | FACTS
    assert (ready["workers"], ready["workers_by_state"]) == (2, {"drawing": 1, "unknown": 1})
    complaints = [log["worker"] for log in logs if log["event"] == "queue.worker_not_understood"]
    assert complaints == ([] if told is None else ["gpu-1", "gpu-1"])


def test_an_odd_fact_keeps_no_worker_from_being_heard_of() -> None:
    queue.announce("gpu-1", {"device": Path("cuda"), "batch_limits": {512: 4}})

    assert queue.worker_facts() == [{"name": "gpu-1", "device": "cuda", "batch_limits": {"512": 4}}]


def test_a_later_version_may_tell_more_and_none_can_claim_another_name(operator: Customer) -> None:
    queue.announce("gpu-1", FACTS)
    told = {"name": "gpu-9", "state": None, "fans": [1, 2], "claimed": 10**30}
    queue.connection.hset(queue._FACTS, "gpu-1", json.dumps(told))

    (facts,) = queue.worker_facts()
    assert (facts["name"], facts["fans"]) == ("gpu-1", [1, 2])
    (worker,) = operator.http.get("/admin/workers").json()["data"]
    assert set(worker) == {"name"} | set(FACTS)
    assert operator.http.get("/ready").json()["workers_by_state"] == {"unknown": 1}


def test_a_job_ends_when_a_claim_hangs_and_knows_nothing_of_how_long_an_image_takes() -> None:
    queue.ring(1)

    (job,) = queue.generate_queue.jobs
    assert job.timeout == queue.JOB_TIMEOUT_S
