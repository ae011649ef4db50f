"""Tasks by the million, made by SQL as the service itself leaves them.

Waiting tasks are whole. Of the finished ones those of the last day are whole as well; older ones
are erased, as `storage.erasure` does it after a day, and an erased row is small.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine, text

from benchmarks.stage import Account

LAST_DAY_SHARE = 0.05
"""Of the finished tasks: those that are not erased yet."""
AT_ONCE = 50_000
"""Tasks in one transaction."""
BULK = 200_000
"""From so many on it is quicker to make the indexes anew than to keep them up to date."""

# Both: task n belongs to account n mod the number of accounts.
_WAITING = """
    INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
                       height, seed, seed_given, steps, image_format, price, user_group, fair_tag,
                       status, progress, attempt, losses, created_at)
    SELECT format('task-unified-%s-w%s', 1700000000 + n / 100, lpad(to_hex(n), 7, '0')),
           (CAST(:accounts AS text[]))[1 + n % :of], (CAST(:keys AS text[]))[1 + n % :of],
           'evolink', 'req_' || md5(n::text), 'z-image-turbo', 'a red fox in the snow', 1024, 1024,
           n, false, 8, 'png', 15, 'default', n / :of, 'pending', 0, 0, 0,
           clock_timestamp() - (:last - n) * interval '10 us'
      FROM generate_series(CAST(:first AS int), :last) AS n
"""
_FINISHED = """
    INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
                       height, seed, seed_given, steps, image_format, price, user_group, fair_tag,
                       status, progress, attempt, losses, worker, image_key, image_url,
                       image_expires_at, image_sha256, image_size_bytes, image_width, image_height,
                       created_at, started_at, finished_at, erased_at)
    SELECT format('task-unified-%s-f%s', 1600000000 + n / 100, lpad(to_hex(n), 7, '0')),
           (CAST(:accounts AS text[]))[1 + n % :of], (CAST(:keys AS text[]))[1 + n % :of],
           'evolink', CASE WHEN whole THEN 'req_' || md5(n::text) END, 'z-image-turbo',
           CASE WHEN whole THEN 'a red fox in the snow' ELSE '' END, 1024, 1024,
           CASE WHEN whole THEN n ELSE 0 END, false, 8, 'png', 15, 'default', n / :of,
           'completed', 100, 1, 0, 'gpu-1',
           CASE WHEN whole THEN 'images/20200101T00/' || md5(n::text) || '.png' END,
           CASE WHEN whole THEN 'https://images.example.com/zimage/images/20200101T00/'
                                || repeat(md5(n::text), 12) END,
           ended, CASE WHEN whole THEN md5(n::text) || md5(n::text) END, 1500000, 1024, 1024,
           ended - interval '9 s', ended - interval '4 s', ended,
           CASE WHEN NOT whole THEN ended + interval '1 day' END
      FROM (SELECT n, n >= :whole_from AS whole,
                   now() - (:until - n) * CASE WHEN n >= :whole_from THEN interval '86 ms'
                                               ELSE interval '1 s' END - interval '1 min' AS ended
              FROM generate_series(CAST(:first AS int), :last) AS n) AS made
"""


def waiting(engine: Engine, accounts: Sequence[Account], first: int, until: int) -> None:
    """Let tasks `first` to `until` - 1 wait, each account's evenly spread over the fair order."""
    _fill(engine, _WAITING, accounts, first, until, {})
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(text(_RESERVED))


def finished(engine: Engine, accounts: Sequence[Account], first: int, until: int) -> None:
    """Let tasks `first` to `until` - 1 have ended well, LAST_DAY_SHARE of them in the last day."""
    whole_from = until - int((until - first) * LAST_DAY_SHARE)
    _fill(engine, _FINISHED, accounts, first, until, {"whole_from": whole_from, "until": until})


_RESERVED = """
    UPDATE accounts SET unfinished = theirs.tasks, reserved = theirs.price
      FROM (SELECT account_id, count(*) AS tasks, sum(price) AS price FROM tasks
             WHERE status IN ('pending', 'processing') GROUP BY account_id) AS theirs
     WHERE accounts.id = theirs.account_id
"""
_CLAIMED = """
    WITH claimed AS (
        UPDATE tasks
           SET status = 'processing', attempt = 1, worker = 'gpu-1', started_at = now(),
               lease_until = now() + interval '1 day'
         WHERE id IN (SELECT id FROM tasks WHERE status = 'pending'
                       ORDER BY fair_tag, id LIMIT :number)
        RETURNING fair_tag)
    UPDATE fair_clock SET virtual_now = (SELECT max(fair_tag) FROM claimed)
"""


def claim(engine: Engine, number: int) -> None:
    """Let the first of the order be claimed, as workers have done it since the last vacuum."""
    with engine.begin() as connection:
        connection.execute(text(_CLAIMED), {"number": number})


def _fill(
    engine: Engine,
    sql: str,
    accounts: Sequence[Account],
    first: int,
    until: int,
    more: dict[str, int],
) -> None:
    of = {
        "accounts": [account.id for account in accounts],
        "keys": [account.key_id for account in accounts],
        "of": len(accounts),
    }

    def some(start: int) -> None:
        with engine.begin() as connection:
            # Tasks whose price was never reserved: the database would refuse them.
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            connection.execute(
                text(sql), {**of, **more, "first": start, "last": min(start + AT_ONCE, until) - 1}
            )

    indexes = _dropped(engine) if until - first >= BULK else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(first, until, AT_ONCE)))
        list(pool.map(lambda definition: _run(engine, definition), indexes))
    _run(engine, "VACUUM (ANALYZE) tasks", "CHECKPOINT")


def _dropped(engine: Engine) -> list[str]:
    """Drop the tasks' indexes; how to make them again. Their primary key stays."""
    with engine.begin() as connection:
        found = connection.execute(
            text("""
                SELECT indexname, indexdef FROM pg_indexes
                 WHERE tablename = 'tasks' AND indexname NOT IN (SELECT conname FROM pg_constraint)
            """)
        ).all()
        for name, _ in found:
            connection.execute(text(f"DROP INDEX {name}"))
    return [definition for _, definition in found]


def _run(engine: Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in ("SET maintenance_work_mem = '256MB'", *statements):
            connection.execute(text(statement))
        connection.invalidate()
