"""`python -m benchmarks.callbacks`: callbacks per second, and what receivers that hang cost others.

A thousand customers with a receiver each, to whom callbacks are owed all at once. In turns: nine
hundred receivers that answer, and the same nine hundred beside a hundred that take a callback and
never say a word. What is compared is how long it takes until all that answer have heard.
"""

import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from statistics import median

from benchmarks import receiver, stage
from benchmarks.figures import Figure, say, tell

RECEIVERS = 1000
HANGING = 100
EACH = 2
"""Callbacks for each receiver."""
ROUNDS = 2
AT_ONCE = 200
HEARD_S = 60.0


def main() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(stage.running())
        told = stack.enter_context(receiver.running(folder))
        accounts = stage.accounts(RECEIVERS)
        _owe(accounts, told)
        alone, beside = [], []
        _per_s(told, hanging=False)  # uncounted
        for number in range(ROUNDS):
            alone.append(_per_s(told, hanging=False))
            beside.append(_per_s(told, hanging=True))
            say(f"round {number + 1}: alone {alone[-1]:.0f}/s, beside {beside[-1]:.0f}/s")
    ratio = median(then / before for before, then in zip(alone, beside, strict=True))
    detail = (
        f"{EACH} callbacks for each of {RECEIVERS - HANGING} receivers that answer: "
        f"alone {median(alone):.0f} per s, beside {HANGING} that hang {median(beside):.0f} per s"
    )
    tell(Figure("callbacks beside receivers that hang", ratio, 0.95, detail=detail))


def _owe(accounts: list[stage.Account], told: receiver.Receiver) -> None:
    """Tasks that have ended, each with its callback; the first accounts' receivers hang."""
    from storage import tasks
    from storage.database import transaction
    from storage.models import ImageFormat

    submissions = []
    for number, account in enumerate(accounts):
        url = told.url(number, hangs=number < HANGING)
        image = tasks.ImageRequest("a red fox", 376, 376, ImageFormat.PNG, callback_url=url)
        one = tasks.Submission(account.id, account.key_id, (image,), "evolink", image.price)
        submissions += [one] * EACH
    for start in range(0, len(submissions), AT_ONCE):
        with transaction() as session:
            tasks.submit_many(session, submissions[start : start + AT_ONCE])
    for _ in range(0, len(submissions), AT_ONCE):
        with transaction() as session:
            for _ in range(AT_ONCE):
                claimed = tasks.claim_next(session, "benchmark")
                assert claimed is not None
                tasks.complete(
                    session,
                    tasks.claim_of(claimed),
                    image_key="images/x.png",
                    image_sha256="00" * 32,
                    image_size_bytes=1,
                    image_width=claimed.width,
                    image_height=claimed.height,
                    image_url="https://x/x.png",
                    expires_at=datetime.now(UTC) + timedelta(hours=1),
                    prompt_tokens=3,
                    prompt_tokens_read=3,
                )


def _per_s(told: receiver.Receiver, *, hanging: bool) -> float:
    """Callbacks per second that are answered, from the first one on."""
    from sqlalchemy import text

    from storage.database import transaction

    # Shuffled, and due in that order, as callbacks of many customers come.
    owe = text("""
        UPDATE deliveries SET state = 'waiting', attempts = 0, delivered_at = NULL,
               next_attempt_at = clock_timestamp() - random() * interval '10 s'
         WHERE :hanging OR url NOT LIKE '%hangs'
    """)
    settle = text("UPDATE deliveries SET state = 'gave_up' WHERE state = 'waiting'")
    with transaction() as session:
        session.execute(owe, {"hanging": hanging})
    expected = (RECEIVERS - HANGING) * EACH
    with stage.process("api.courier") as courier:
        _, began = told.hear(HEARD_S)
        for _ in range(expected - 1):
            _, ended = told.hear(HEARD_S)
        took_s = ended - began
        courier.kill()  # it would wait for those that hang
    with transaction() as session:
        session.execute(settle)
    return (expected - 1) / took_s


if __name__ == "__main__":
    started = time.monotonic()
    main()
    say(f"took {time.monotonic() - started:.0f} s")
