"""An image is at an unguessable address that works for its time and not after, and then says so."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import httpx
from sqlalchemy import update

from storage import objects
from storage.database import transaction
from storage.models import ImageFormat, Task
from storage.settings import settings

if TYPE_CHECKING:
    from tests.conftest import Customer, Work
    from tests.warm import Warm

    Submit = Callable[..., Task]

IMAGE = b"some bytes"
REFUSED = (400, 403)
"""S3 servers differ in how they say no."""


def test_what_was_put_is_got_by_its_url() -> None:
    url, _ = objects.url(objects.put(IMAGE, ImageFormat.PNG).key)

    answer = httpx.get(url)

    assert answer.content == IMAGE
    assert answer.headers["content-type"] == "image/png"


def test_a_key_cannot_be_guessed() -> None:
    first, second = (objects.put(IMAGE, ImageFormat.JPEG).key for _ in range(2))

    assert re.fullmatch(r"images/\d{8}T\d\d/[A-Za-z0-9_-]{43}\.jpeg", first)
    assert first != second


def test_without_the_signature_or_with_another_there_is_no_image() -> None:
    url, _ = objects.url(objects.put(IMAGE, ImageFormat.PNG).key)

    assert httpx.get(url.partition("?")[0]).status_code in REFUSED
    assert httpx.get(url[:-1] + ("0" if url[-1] != "0" else "1")).status_code in REFUSED


def test_the_url_lives_for_a_day_and_says_when_it_ends() -> None:
    url, expires_at = objects.url("images/x.png")

    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == [str(24 * 3600)]
    assert abs(expires_at - datetime.now(UTC) - timedelta(hours=24)) < timedelta(seconds=60)


def test_a_url_whose_time_is_over_is_refused(warm: Warm) -> None:
    key = objects.put(IMAGE, ImageFormat.PNG).key
    signed_long_ago = _sign_at(
        warm, key, datetime.now(UTC) - timedelta(seconds=settings.image_ttl_s + 1)
    )
    signed_just_in_time = _sign_at(
        warm, key, datetime.now(UTC) - timedelta(seconds=settings.image_ttl_s - 60)
    )

    assert httpx.get(signed_long_ago).status_code in REFUSED
    assert httpx.get(signed_just_in_time).status_code == 200


def _sign_at(warm: Warm, key: str, moment: datetime) -> str:
    """A URL as the service would have signed it at `moment`: in a process whose clock says so."""
    script = (
        "import sys, botocore.auth, datetime\n"
        "moment = datetime.datetime.fromisoformat(sys.argv[2])\n"
        "botocore.auth.get_current_datetime = lambda *a, **k: moment.replace(tzinfo=None)\n"
        "from storage import objects\n"
        "print(objects.url(sys.argv[1])[0])\n"
    )
    url = warm.run("-c", script, key, moment.isoformat()).stdout.strip()
    assert f"X-Amz-Date={moment:%Y%m%dT%H%M%S}Z" in url
    return url


def test_an_expired_image_is_told_and_not_linked(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)
    work()
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=datetime.now(UTC)))

    evolink = customer.http.get(f"/v1/tasks/{task.id}").json()
    zimageturbo = customer.http.get("/api/status", params={"task_id": task.id}).json()["data"]

    assert (evolink["status"], evolink["results"], evolink["result_data"]) == ("completed", [], [])
    assert evolink["results_expired"] is True
    assert (zimageturbo["status"], zimageturbo["response"]) == ("SUCCESS", [])
    assert "expired" in zimageturbo["error_message"]


def test_image_urls_carry_the_public_address(warm: Warm) -> None:
    env = os.environ | {"ZIMAGE_S3_PUBLIC_URL": "https://images.example.com"}
    script = "from storage import objects; print(objects.url('images/x.png')[0])"
    url = warm.run("-c", script, env=env).stdout

    assert url.startswith("https://images.example.com/zimage/images/x.png?")


def test_credentials_that_expire_are_refused_at_start(warm: Warm) -> None:
    keys = {"ZIMAGE_S3_ACCESS_KEY_ID", "ZIMAGE_S3_SECRET_ACCESS_KEY"}
    env = {name: value for name, value in os.environ.items() if name not in keys}
    env |= {
        "AWS_ACCESS_KEY_ID": "ASIATEMPORARY",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_SESSION_TOKEN": "a token",
    }
    for command in (["api", "serve"], ["api", "prepare"], ["worker"]):
        done = warm.run("-m", *command, env=env)
        assert done.returncode == 1
        assert "temporary" in done.stderr
        assert "Traceback" not in done.stderr
