"""Secrets: sealed where they lie, found in no log and no error, and replaced without a gap."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alembic.command
import httpx
import pytest
from alembic.config import Config
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url
from standardwebhooks import Webhook

import api.__main__
from deploy import plan, reach
from deploy import settings as deploy_settings
from storage import accounts, sealing
from storage.database import engine, transaction
from storage.settings import load, settings
from tests.conftest import RECEIVER_HOST

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer

ROOT = Path(__file__).parent.parent
CONFIG = Config(toml_file=ROOT / "pyproject.toml")
OURS = os.environ["ZIMAGE_SECRET_KEYS"]
ANOTHER = "ab" * 32
CLEAR = "whsec_" + "Q0xFQVI" * 6
"""A callback secret as an older version wrote it."""


def kept(account_id: str) -> tuple[str, str | None]:
    """What lies in the database: the callback secret, and the one before."""
    query = text("SELECT callback_secret, callback_secret_before FROM accounts WHERE id = :id")
    with engine.connect() as connection:
        secret, before = connection.execute(query, {"id": account_id}).one()
    return secret, before


def keep(account_id: str, secret: str) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE accounts SET callback_secret = :secret WHERE id = :id"),
            {"secret": secret, "id": account_id},
        )


def secret_of(customer: Customer) -> str:
    secret: str = customer.http.get("/v1/callbacks/secret").json()["key"]
    return secret


# --- Sealed ---------------------------------------------------------------------------------------


def test_no_callback_secret_lies_in_the_database_in_clear(customer: Customer) -> None:
    first = secret_of(customer)
    second = customer.http.post("/v1/callbacks/secret/rotate").json()["key"]

    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    with engine.connect() as connection:
        rows = [
            row
            for table in connection.scalars(text(tables)).all()
            for row in connection.scalars(text(f"SELECT t::text FROM {table} t"))
        ]

    assert first != second
    assert [sealing.unseal(each or "") for each in kept(customer.id)] == [second, first]
    for secret in (first, second):
        assert not any(secret.removeprefix("whsec_") in row for row in rows)


def test_what_an_older_version_wrote_is_read_and_is_sealed_at_the_next_rotation_but_one(
    customer: Customer,
) -> None:
    keep(customer.id, CLEAR)
    assert secret_of(customer) == CLEAR

    customer.http.post("/v1/callbacks/secret/rotate")
    with transaction() as session:
        assert accounts.get(session, customer.id).callback_secret_before == CLEAR
    assert secret_of(customer) != CLEAR


def test_an_older_version_cannot_sign_with_what_is_sealed(customer: Customer) -> None:
    """It would sign wrongly and use up the attempts; so it fails, and a newer courier delivers."""
    with pytest.raises(ValueError, match="ASCII"):
        Webhook(kept(customer.id)[0])


def test_the_migration_seals_and_unseals(customer: Customer, new_customer: NewCustomer) -> None:
    """Also where it was stopped half-way: one of the two is sealed already."""
    half = new_customer()
    secrets = [secret_of(customer), secret_of(half)]
    customer.http.post("/v1/callbacks/secret/rotate")
    secrets[0] = secret_of(customer)
    sealed = kept(half.id)[0]

    alembic.command.downgrade(CONFIG, "0005")
    try:
        in_clear = [kept(customer.id)[0], kept(half.id)[0]]
        before = kept(customer.id)[1]
        keep(half.id, sealed)
    finally:
        alembic.command.upgrade(CONFIG, "head")

    assert in_clear == secrets
    assert before is not None
    assert before.startswith("whsec_")
    assert all(str(each).startswith(sealing.MARK) for each in kept(customer.id))
    assert [secret_of(customer), secret_of(half)] == secrets


def test_every_key_opens_and_the_first_one_seals() -> None:
    old, new = (sealing.box(SecretStr(each)) for each in (OURS, ANOTHER))
    both = sealing.box(SecretStr(f"{ANOTHER},{OURS}"))

    assert both.decrypt(old.encrypt(b"secret")) == b"secret"
    assert new.decrypt(both.encrypt(b"secret")) == b"secret"


def test_what_no_key_opens_is_told_apart_from_a_secret() -> None:
    with pytest.raises(sealing.CannotUnseal, match="ZIMAGE_SECRET_KEYS"):
        sealing.unseal(sealing.MARK + sealing.box(SecretStr(ANOTHER)).encrypt(b"secret").decode())


@pytest.fixture
def two_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ANOTHER was put before the key that there was, and the process started again."""
    with monkeypatch.context() as changed:
        changed.setenv("ZIMAGE_SECRET_KEYS", f"{ANOTHER},{OURS}")
        sealing._box.cache_clear()
        yield
    sealing._box.cache_clear()


def test_a_key_is_replaced_by_a_command(
    customer: Customer,
    new_customer: NewCustomer,
    two_keys: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what an older version has left in clear is sealed by it as well."""
    left = new_customer()
    keep(left.id, CLEAR)
    secrets = [secret_of(customer), CLEAR]

    api.__main__.seal_secrets(Namespace())

    assert capsys.readouterr().out.splitlines()[-1] == "2"
    alone = sealing.box(SecretStr(ANOTHER))
    opened = [
        alone.decrypt(kept(account.id)[0].removeprefix(sealing.MARK)).decode()
        for account in (customer, left)
    ]
    assert opened == secrets


@pytest.mark.parametrize("keys", ["", "secret", "AB" * 32, "ab" * 31, f"{ANOTHER},", f"{ANOTHER} "])
def test_keys_that_are_none_are_refused_and_not_repeated(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIMAGE_SECRET_KEYS", keys)

    with pytest.raises(SystemExit, match="ZIMAGE_SECRET_KEYS is not usable") as refused:
        load(sealing.SealingSettings)
    assert not keys or keys not in str(refused.value)


def test_make_up_makes_a_key_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIMAGE_SECRET_KEYS")
    chosen = deploy_settings.load()
    made = [plan.environment(chosen, tmp_path, ())["ZIMAGE_SECRET_KEYS"] for _ in range(2)]

    assert sealing.KEY.fullmatch(made[0])
    assert made[0] == made[1]
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setenv("ZIMAGE_SECRET_KEYS", ANOTHER)
    assert plan.environment(chosen, tmp_path, ())["ZIMAGE_SECRET_KEYS"] == ANOTHER


# --- In no log ------------------------------------------------------------------------------------

PASSWORD = "database-pass-word"
PROMPT = "a heron that nobody else has thought of"
TOKEN = "token-of-the-receiver"
FAILING = "a name that the database refuses"


@pytest.fixture
def broken() -> Iterator[None]:
    """A database that fails in two ways that nobody has foreseen."""
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE delivery_attempts RENAME TO away"))
        refuse = f"CHECK (name <> '{FAILING}') NOT VALID"
        connection.execute(text(f"ALTER TABLE accounts ADD CONSTRAINT refuse {refuse}"))
    yield
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO delivery_attempts"))
        connection.execute(text("ALTER TABLE accounts DROP CONSTRAINT refuse"))


def test_no_log_and_no_refusal_has_a_secret(
    operator: Customer, broken: None, tmp_path: Path
) -> None:
    """From a real process: all that it writes, of a day on which much goes wrong."""
    port = reach.free_port()
    url = make_url(settings.database_url.get_secret_value()).set(password=PASSWORD)
    given = {
        "ZIMAGE_PORT": str(port),
        "ZIMAGE_DATABASE_URL": url.render_as_string(hide_password=False),
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        serving = subprocess.Popen(
            [sys.executable, "-m", "api", "serve"],
            cwd=ROOT,
            env=os.environ | given,
            stdout=file,
            stderr=file,
        )
    try:
        while b"Uvicorn running" not in log.read_bytes():
            assert serving.poll() is None, log.read_text()
            time.sleep(0.05)
        secrets, refusals = day(f"http://127.0.0.1:{port}", operator)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(f"GET /?key={secrets[0]}&{'x' * 40_000} HTTP/1.1\r\n\r\n".encode())
            head = connection.recv(65536)
    finally:
        serving.terminate()
        serving.wait(30)

    assert head.startswith(b"HTTP/1.1 431 ")  # so the bounds of `api.connections` are in force
    assert b"\r\nserver:" not in head.lower()
    said = log.read_text()
    assert said.count('"request.failed"') == 2
    assert said.count("Traceback") >= 2
    assert "Invalid HTTP request" in said
    redis = re.search(r":([^:@]+)@", settings.redis_url.get_secret_value())
    assert redis is not None
    assert settings.s3_secret_access_key is not None
    secrets += [
        PROMPT,
        PASSWORD,
        TOKEN,
        OURS,
        redis[1],
        settings.s3_secret_access_key.get_secret_value(),
    ]
    for secret in secrets:
        assert secret not in said
        assert not any(secret in refusal.text for refusal in refusals)


def day(base: str, operator: Customer) -> tuple[list[str], list[httpx.Response]]:
    """Accounts, keys and secrets are made, used, replaced and mistaken.

    Returns the secrets, and the answers that had no business to repeat one.
    """
    asked: dict[str, Any] = {"base_url": base, "timeout": 30, "verify": False}
    with httpx.Client(headers=bearer(operator.key), **asked) as admin:
        account = admin.post("/admin/accounts", json={"name": "new"}).json()["id"]
        issued = admin.post(f"/admin/accounts/{account}/keys", json={}).json()
        rotated = admin.post(f"/admin/keys/{issued['id']}/rotate").json()["key"]
        admin.post(f"/admin/accounts/{account}/credits", json={"amount": 100})
        path = f"/admin/accounts/{account}/callback-secret"
        signing = [admin.get(path).json()["key"], admin.post(f"{path}/rotate").json()["key"]]
        failed = admin.post("/admin/accounts", json={"name": FAILING})
    key, wrong = issued["key"], f"zk_{'wrong-' * 7}x"
    callback = f"https://{RECEIVER_HOST}/done?token={TOKEN}"
    order = {"model": "z-image-turbo", "prompt": PROMPT, "callback_url": callback}
    with httpx.Client(headers=bearer(key), **asked) as http:
        accepted = http.post("/v1/images/generations", json=order)
        refusals = [
            failed,
            http.get("/v1/callbacks"),
            http.get("/v1/credits", headers=bearer(wrong)),
            http.get("/v1/credits", headers={"Authorization": f"Basic {wrong}"}),
            http.post("/v1/images/generations", json=order | {"prompt": {key: rotated}}),
            http.post("/v1/images/generations", json=order | {"callback_url": signing[0]}),
            http.post("/v1/images/generations", content=f'{{"prompt": "{key}'),
            http.post("/api/generate", json={"prompt": "a cat", "size": key}),
            http.get("/v1/callbacks/secret", params={"key": key}, headers=bearer(wrong)),
        ]
        http.get(f"/v1/tasks/{key}")  # whoever mistakes the one for the other sees it again
        http.get(f"/{signing[1]}")
    assert accepted.status_code == 200, accepted.text
    assert [each.status_code for each in refusals[:4]] == [500, 500, 401, 401]
    assert {each.status_code for each in refusals[4:8]} == {400}
    return [key, rotated, wrong, operator.key, *signing], refusals


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
