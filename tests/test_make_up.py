"""`make up`: what is broken is said in one sentence, what dies comes back, and nothing is left."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import httpx
import psutil
import psycopg
import pytest
import redis
from botocore.config import Config

from api.__main__ import parser
from deploy import plan, reach, servers, settings, supervision
from deploy.errors import CannotStart
from deploy.terminal import Follower
from deploy.welcome import welcome
from storage import accounts, ledger
from storage.database import transaction
from storage.models import Account

if TYPE_CHECKING:
    from tests.warm import Warm

    Refused = Callable[[dict[str, str]], str]

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 90


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own: nobody else may enter that, and PostgreSQL may run as another user."""
    made = Path(tempfile.mkdtemp(prefix="zimage-up-"))
    yield made
    shutil.rmtree(made)


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """As in a new shell, with ports that are free."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")},
        "ZIMAGE_PORT": str(reach.free_port()),
        "ZIMAGE_S3_PORT": str(reach.free_port()),
        "ZIMAGE_DATA_DIR": str(folder / "data"),
        **changes,
    }


@contextmanager
def started(env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "deploy.local"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # a test that failed may have left it running


def s3_client(env: Mapping[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=env["ZIMAGE_S3_ENDPOINT_URL"],
        aws_access_key_id=env["ZIMAGE_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=env["ZIMAGE_S3_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )


@pytest.fixture
def refused(warm: Warm) -> Refused:
    """The sentence with which it does not start."""

    def run(env: dict[str, str]) -> str:
        ended = warm.run("-m", "deploy.local", env=env)
        assert ended.returncode == 1
        (sentence,) = ended.stderr.splitlines()
        return sentence

    return run


def nobody() -> str:
    return f"127.0.0.1:{reach.free_port()}"


S3_KEYS = {"ZIMAGE_S3_ACCESS_KEY_ID": "a-key-of-mine", "ZIMAGE_S3_SECRET_ACCESS_KEY": "a-secret"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ZIMAGE_PORT": "eighty"}, "ZIMAGE_PORT is not usable"),
        ({"ZIMAGE_PORT": "65535", "ZIMAGE_S3_PORT": ""}, "ZIMAGE_S3_PORT cannot be 65536"),
        ({"ZIMAGE_HOST": "no.such.host.invalid"}, "ZIMAGE_HOST is not an address"),
        ({"ZIMAGE_S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "needs ZIMAGE_S3_ACCESS_KEY_ID"),
        ({"ZIMAGE_S3_SECRET_ACCESS_KEY": "alone"}, "need ZIMAGE_S3_ENDPOINT_URL"),
        ({"ZIMAGE_DATABASE_URL": "mysql://me:hunter2@db/z"}, "begin with postgresql+psycopg://"),
        (
            {"ZIMAGE_DATABASE_URL": f"postgresql+psycopg://me:hunter2@{nobody()}/z"},
            "The database cannot be reached",
        ),
        ({"ZIMAGE_REDIS_URL": f"redis://:hunter2@{nobody()}/0"}, "Redis cannot be reached"),
        ({"ZIMAGE_S3_ENDPOINT_URL": f"http://{nobody()}", **S3_KEYS}, "S3 server at http://"),
        ({"ZIMAGE_DATA_DIR": __file__}, "cannot be written"),
    ],
)
def test_a_broken_setting_is_one_sentence(
    folder: Path, changes: dict[str, str], said: str, refused: Refused
) -> None:
    sentence = refused(environment(folder, **changes))

    assert said in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize("name", ["ZIMAGE_PORT", "ZIMAGE_S3_PORT"])
def test_a_port_in_use_is_one_sentence(folder: Path, name: str, refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = refused(environment(folder, **{name: port}))

    assert f"port {port} " in sentence
    assert name in sentence


def test_what_the_preparation_says_is_the_only_sentence(folder: Path, refused: Refused) -> None:
    settings = {name: value for name, value in os.environ.items() if name.startswith("ZIMAGE_")}
    own = {"ZIMAGE_PORT": str(reach.free_port()), "ZIMAGE_DATA_DIR": str(folder / "data")}

    sentence = refused(environment(folder, **settings | own, ZIMAGE_PRICE_CREDITS="many"))

    assert "ZIMAGE_PRICE_CREDITS" in sentence


def test_the_servers_find_their_data_again(folder: Path) -> None:
    with servers.running(folder, durable=False) as env:
        with psycopg.connect(env["ZIMAGE_DATABASE_URL"].replace("+psycopg", "")) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 'a row' AS it")
        with redis.Redis.from_url(env["ZIMAGE_REDIS_URL"]) as client:
            client.set("kept", "a job")
        with closing(s3_client(env)) as s3:
            s3.create_bucket(Bucket="zimage")
            s3.put_object(Bucket="zimage", Key="kept.png", Body=b"an image")
        first = env

    with servers.running(folder, durable=False) as env:
        with psycopg.connect(env["ZIMAGE_DATABASE_URL"].replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT it FROM kept").fetchone() == ("a row",)
        with redis.Redis.from_url(env["ZIMAGE_REDIS_URL"]) as client:
            assert client.get("kept") == b"a job"
        with closing(s3_client(env)) as s3:
            assert s3.get_object(Bucket="zimage", Key="kept.png")["Body"].read() == b"an image"
        # URLs that were signed before the restart must stay good.
        assert env["ZIMAGE_S3_SECRET_ACCESS_KEY"] == first["ZIMAGE_S3_SECRET_ACCESS_KEY"]


def test_a_lock_left_by_a_killed_postgres_does_not_stop_the_next(folder: Path) -> None:
    with servers.running(folder, durable=False):
        lock = folder / "postgres" / "data" / "postmaster.pid"
        content = lock.read_text().splitlines()
    owner = lock.parent.stat()
    # Its number has gone to another program of the same user, which PostgreSQL takes for its own.
    with subprocess.Popen(["sleep", str(TIMEOUT_S)], user=owner.st_uid) as other:
        try:
            lock.write_text("\n".join([str(other.pid), *content[1:]]) + "\n")
            os.chown(lock, owner.st_uid, owner.st_gid)

            with servers.running(folder, durable=False) as env:
                reach.check_postgres(env["ZIMAGE_DATABASE_URL"])
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("given", "account_id"),
    [({}, "acct_demo"), ({"ZIMAGE_LOCAL_ACCOUNT_ID": "acct_mine"}, "acct_mine")],
)
def test_who_pays_without_a_key_is_told_to_the_api_and_to_the_person(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], account_id: str
) -> None:
    monkeypatch.delenv("ZIMAGE_LOCAL_ACCOUNT_ID", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    chosen = settings.load()

    assert plan.environment(chosen, Path("/data"), [])["ZIMAGE_LOCAL_ACCOUNT_ID"] == account_id
    assert f"/v1/generate\n               from this machine; {account_id} pays" in welcome(
        chosen, Path("/data")
    )


def test_set_to_nothing_nobody_pays_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_LOCAL_ACCOUNT_ID", "")
    chosen = settings.load()

    assert "ZIMAGE_LOCAL_ACCOUNT_ID" not in plan.environment(chosen, Path("/data"), [])
    assert "/v1/generate" not in welcome(chosen, Path("/data"))


def test_a_second_data_folder_shares_the_demo_account_of_its_database(folder: Path) -> None:
    for name in ("first", "second"):
        args = parser().parse_args(["demo-credentials", str(folder / name), "acct_demo"])
        args.run(args)

    with transaction() as session:
        assert session.get_one(Account, "acct_demo").balance == 1500
        assert len(ledger.entries(session, None, before=None, limit=10)) == 1
        for name in ("first", "second"):
            shown = (folder / name).read_text().partition("ZIMAGE_API_KEY=")[2].split("\n")[0]
            found, _ = asyncio.run(accounts.authenticate([accounts.digest(shown)]))
            assert [each.account_id for each in found.values()] == ["acct_demo"]


def test_an_image_is_served_as_soon_as_it_is_put_and_only_to_who_has_its_url() -> None:
    """On the servers that every test uses."""
    with closing(s3_client(os.environ)) as s3, httpx.Client() as http:
        where = {"Bucket": os.environ["ZIMAGE_S3_BUCKET"], "Key": "images/one.png"}
        s3.put_object(**where, Body=b"an image", ContentType="image/png")
        url = s3.generate_presigned_url("get_object", Params=where, ExpiresIn=60)
        found = http.get(url)

        assert (found.status_code, found.content) == (200, b"an image")
        assert found.headers["content-type"] == "image/png"
        assert http.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code == 403
        assert http.get(url.partition("?")[0]).status_code >= 400

        s3.delete_object(**where)
        assert http.get(url).status_code == 404
        assert "Contents" not in s3.list_objects_v2(Bucket=where["Bucket"], Prefix="images/one")


def test_the_process_manager_reads_any_path_or_says_that_it_cannot() -> None:
    odd = supervision.Program("odd", ('/a 50% "folder"/it\'s', ""), supervision.APP, 1)

    assert "command='/a 50%% \"folder\"/it'\"'\"'s' ''\n" in supervision.configuration(
        [odd], Path("/socket")
    )
    with pytest.raises(CannotStart):
        supervision.configuration(
            [supervision.Program("x", ("/a ;b",), supervision.APP, 1)], Path("/socket")
        )


def test_the_terminal_shows_every_line_of_a_log_that_is_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "api.log"
    log.write_text("of the last run\n")
    with closing(Follower({"api": log})) as shown:
        with log.open("a") as file:
            file.write("one\ntw")
        shown.show()
        with log.open("a") as file:
            file.write("o\nthree\n")
        log.rename(tmp_path / "api.log.1")
        shown.show()
        log.write_text("four\n")
        shown.show()

    assert capsys.readouterr().out == "api | one\napi | two\napi | three\napi | four\n"


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes(folder: Path) -> dict[str, psutil.Process]:
    """All that runs for a data folder, supervisord without a name."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if env.get(supervision.MARK) == str(folder / "data") and process.is_running():
                top = env.get("SUPERVISOR_PROCESS_NAME", "")
                if top not in found or process.create_time() < found[top].create_time():
                    found[top] = process
        except psutil.Error:
            continue
    return found


def restarted(folder: Path, old: psutil.Process, name: str) -> bool:
    return processes(folder).get(name, old) != old


def wait_for_welcome(process: subprocess.Popen[str]) -> str:
    """Return what can be pasted to try it."""
    assert process.stdout is not None
    for line in process.stdout:
        if "Try it" in line:
            break
    pasted = ""
    for line in process.stdout:
        if pasted and not line.strip():
            return pasted
        pasted += line.strip(" ") if line.strip() else ""
    raise AssertionError("it ended before it was ready")


@pytest.mark.timeout(240)
def test_the_service_comes_up_survives_kills_and_leaves_nothing(
    folder: Path, refused: Refused
) -> None:
    env = environment(folder)
    keys = folder / "data" / "credentials.env"

    with (
        started(env) as first,
        httpx.Client(base_url=f"http://127.0.0.1:{env['ZIMAGE_PORT']}") as http,
    ):
        pasted = wait_for_welcome(first)
        assert stat.S_IMODE(keys.stat().st_mode) == 0o600
        tried = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, check=True)
        task_url = f"/v1/tasks/{json.loads(tried.stdout)['id']}"
        assert f"ZIMAGE_ACCOUNT_ID={settings.DEMO_ACCOUNT_ID}\n" in keys.read_text()
        small = {"prompt": "a cat", "width": 64, "height": 64}
        image = http.post("/v1/generate", json=small, timeout=TIMEOUT_S).json()["image"]
        assert base64.b64decode(image).startswith(b"\x89PNG")
        assert f"Process {first.pid} already runs" in refused(env)

        running = processes(folder)
        assert running.keys() == {"", "postgres", "valkey", "s3", "api", "worker", "courier"}
        for name in ("courier", "postgres"):
            running[name].kill()
            until(partial(restarted, folder, running[name], name))
            assert http.get("/health").status_code == 200
        until(lambda: http.get("/ready").status_code == 200)
        assert processes(folder)["api"] == running["api"]

        first.kill()

    # At once, while what the first has left is still being stopped.
    with (
        started(env) as second,
        httpx.Client(base_url=f"http://127.0.0.1:{env['ZIMAGE_PORT']}") as http,
    ):
        wait_for_welcome(second)
        key = keys.read_text().partition("ZIMAGE_API_KEY=")[2].split("\n")[0]
        auth = {"Authorization": f"Bearer {key}"}
        until(lambda: http.get(task_url, headers=auth).json()["status"] == "completed")

        second.send_signal(signal.SIGINT)
        _, errors = second.communicate(timeout=TIMEOUT_S)

    assert (second.returncode, errors) == (0, "")
    assert not processes(folder)
    for name in ("ZIMAGE_PORT", "ZIMAGE_S3_PORT"):
        reach.check_free("127.0.0.1", int(env[name]), name)
