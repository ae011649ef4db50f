"""`python -m benchmarks.peers.prepare NUMBER`: tables, a bucket and accounts; prints their keys."""

import json
import secrets
import sys

from benchmarks.peers import images
from benchmarks.peers.rows import Account, ApiKey, Row, Sessions, engine, hashed

CREDITS = 2**31 - 1


def main(number: int) -> None:
    Row.metadata.create_all(engine)
    images.client.create_bucket(Bucket=images.BUCKET)
    keys = [secrets.token_urlsafe(32) for _ in range(number)]
    with Sessions.begin() as session:
        for key in keys:
            account = Account(balance=CREDITS)
            session.add(account)
            session.flush()
            session.add(ApiKey(hash=hashed(key), account_id=account.id))
    print(json.dumps(keys))


if __name__ == "__main__":
    main(int(sys.argv[1]))
