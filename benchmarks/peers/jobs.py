"""What a worker of the peers does with a task, and the two queues that bring it there."""

import os
from collections.abc import Callable
from uuid import UUID

from celery import Celery
from redis import Redis
from rq import Queue

from benchmarks.peers import images
from benchmarks.peers.rows import PRICE, Account, Charge, Sessions, Task

rq_queue = Queue("peers", connection=Redis.from_url(os.environ["PEER_REDIS_URL"]))
celery_app = Celery("peers", broker=os.environ["PEER_REDIS_URL"])
celery_app.conf.update(
    task_ignore_result=True,  # the row has it
    task_acks_late=True,
    worker_prefetch_multiplier=1,  # a worker that draws takes no second task
    broker_connection_retry_on_startup=True,
)


def draw(task_id: str) -> None:
    """Draw at once, store, and charge."""
    with Sessions.begin() as session:
        session.get_one(Task, UUID(task_id)).status = "processing"

    key = f"{task_id}.png"
    images.client.put_object(
        Bucket=images.BUCKET, Key=key, Body=images.PNG, ContentType="image/png"
    )

    with Sessions.begin() as session:
        task = session.get_one(Task, UUID(task_id), with_for_update=True)
        account = session.get_one(Account, task.account_id, with_for_update=True)
        task.status, task.image_key = "completed", key
        account.balance -= PRICE
        account.reserved -= PRICE
        session.add(Charge(task_id=task.id, account_id=account.id, credits=PRICE))


_draw_by_celery = celery_app.task(draw, name="draw")


def _by_rq(task_id: str) -> None:
    rq_queue.enqueue(draw, task_id, result_ttl=0)


def _by_celery(task_id: str) -> None:
    _draw_by_celery.delay(task_id)


enqueue: Callable[[str], None] = {"rq": _by_rq, "celery": _by_celery}[os.environ["PEER_QUEUE"]]
