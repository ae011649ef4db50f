"""`zimage generate` as the published skill calls it, and where its key and address come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from zimage import InvalidRequest
from zimage.credentials import environment, find_key
from zimage.skill import read_request

from tests.test_client_faults import (
    PNG,
    Double,
    Heard,
    Reply,
    _books_balance,
    _empty,
    answering,
)

__all__ = ["_books_balance", "_empty"]  # fixtures

ROOT = Path(__file__).parent.parent
ENDPOINT = "/api/v1/services/aigc/multimodal-generation/generation"


def answer(heard: Heard) -> Reply:
    """What DashScope's page shows as the answer, with a link of this server."""
    if heard.method == "GET":
        return Reply(200, PNG)
    link = f"http://{heard.headers['host']}/xxx.png?Expires=1&Signature=a%2Fb"
    message = {
        "content": [{"image": link}, {"text": "a rewritten prompt"}],
        "reasoning_content": "so I thought",
        "role": "assistant",
    }
    usage = {"height": 1440, "image_count": 1, "input_tokens": 0, "width": 1120}
    return Reply(
        200,
        {
            "output": {"choices": [{"finish_reason": "stop", "message": message}]},
            "usage": usage,
            "request_id": "8a0809b4",
        },
    )


@pytest.fixture
def dashscope() -> Iterator[Double]:
    with answering(answer) as double:
        yield double


class Shell:
    """A customer's folder and variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT / "client" / "src"),
        }

    def generate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zimage", "generate", *arguments],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_call_that_the_skill_prints_works(shell: Shell, dashscope: Double) -> None:
    shell.variables |= {
        "DASHSCOPE_API_KEY": "sk-mine",
        "DASHSCOPE_BASE_URL": dashscope.url + ENDPOINT,
    }
    output = "output/ai-image-zimage-turbo/images/fishing.png"
    ran = shell.generate(
        "--request",
        '{"prompt":"a fishing scene at dawn, cinematic, realistic","size":"1024*1024"}',
        *("--output", output, "--print-response"),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (shell.folder / output).read_bytes() == PNG
    assert ran.stdout.count("\n") == 1
    said = json.loads(ran.stdout)
    assert said.pop("image_url").startswith(dashscope.url)
    assert said == {
        "width": 1120,
        "height": 1440,
        "prompt": "a fishing scene at dawn, cinematic, realistic",
        "rewritten_prompt": "a rewritten prompt",
        "reasoning": "so I thought",
        "request_id": "8a0809b4",
    }
    post, get = dashscope.heard
    assert (post.path, get.path) == (ENDPOINT, "/xxx.png?Expires=1&Signature=a%2Fb")
    assert post.headers["authorization"] == "Bearer sk-mine"
    assert "authorization" not in get.headers
    content = [{"text": "a fishing scene at dawn, cinematic, realistic"}]
    assert json.loads(post.body) == {
        "model": "z-image-turbo",
        "input": {"messages": [{"role": "user", "content": content}]},
        "parameters": {"size": "1024*1024"},
    }


def test_the_request_may_lie_in_a_file_and_the_service_may_be_ours(
    shell: Shell, dashscope: Double
) -> None:
    shell.variables |= {"ZIMAGE_API_KEY": "zk", "ZIMAGE_BASE_URL": dashscope.url, "OUTPUT_DIR": "o"}
    asked = {"prompt": "茶", "seed": 0, "prompt_extend": True}
    (shell.folder / "req.json").write_text(json.dumps(asked), "utf-8")
    ran = shell.generate("--file", "req.json")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert (shell.folder / "o/ai-image-zimage-turbo/images/output.png").read_bytes() == PNG
    post, _ = dashscope.heard
    assert post.path == ENDPOINT
    assert "茶".encode() in post.body
    assert json.loads(post.body)["parameters"] == {
        "size": "1024*1024",
        "seed": 0,
        "prompt_extend": True,
    }


def test_a_refusal_is_one_line_with_the_services_words(shell: Shell) -> None:
    shell.variables["DASHSCOPE_API_KEY"] = "sk"
    said = {"code": "InvalidParameter", "message": "size is wrong", "request_id": "r-1"}
    with answering([Reply(400, said)]) as double:
        asked = {"prompt": "a cat", "base_url": double.url + ENDPOINT}
        ran = shell.generate("--request", json.dumps(asked))
    assert ran.returncode == 1
    assert ran.stderr == "zimage: InvalidParameter: size is wrong (HTTP 400, request r-1)\n"
    assert not (shell.folder / "output").exists()


def test_a_retry_has_the_key_of_the_first_try(shell: Shell) -> None:
    shell.variables["DASHSCOPE_API_KEY"] = "sk"
    replies = iter([Reply(dropped=True)])
    with answering(lambda heard: next(replies, None) or answer(heard)) as double:
        asked = {"prompt": "a cat", "base_url": double.url + ENDPOINT}
        assert shell.generate("--request", json.dumps(asked)).returncode == 0
    first, second, _ = double.heard
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]


def test_without_a_key_there_are_hints(shell: Shell) -> None:
    ran = shell.generate("--request", '{"prompt": "a cat"}')
    assert ran.returncode == 1
    assert "DASHSCOPE_API_KEY" in ran.stderr
    assert "~/.alibabacloud/credentials" in ran.stderr
    assert len(ran.stderr.splitlines()) == 3


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "prompt is required"),
        ({"prompt": ""}, "prompt is required"),
        ({"prompt": 7}, "prompt must be text"),
        ({"prompt": "a", "prompt_extend": "false"}, "prompt_extend must be true or false"),
        ({"prompt": "a", "seed": "7"}, "seed must be a whole number"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number"),
        (["a"], "must be a JSON object"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(asked: object, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        read_request(asked)


def test_an_empty_size_is_the_default_one() -> None:
    assert read_request({"prompt": "a", "size": ""}).size == "1024*1024"


def test_neither_request_nor_file_is_said(shell: Shell) -> None:
    shell.variables["DASHSCOPE_API_KEY"] = "sk"
    ran = shell.generate()
    assert ran.stderr == "zimage: Either --request or --file must be provided\n"
    ran = shell.generate("--request", "{not json")
    assert ran.stderr.startswith("zimage: The request is not JSON")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a folder in it, and a home with a credentials file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ZIMAGE_API_KEY", "DASHSCOPE_API_KEY", "ALIBABA_CLOUD_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    (tmp_path / "repo" / "here").mkdir()
    (tmp_path / ".alibabacloud").mkdir()
    (tmp_path / ".alibabacloud" / "credentials").write_text(
        "[default]\ndashscope_api_key = from-file\npassword = 50%\n"
        "[other]\nDASHSCOPE_API_KEY=from-other\n"
    )
    return tmp_path


def test_a_key_is_looked_for_in_the_order_of_the_skill(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = home / "repo" / "here"

    def found(**more: str) -> str | None:
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        return find_key(environment(here), ("DASHSCOPE_API_KEY",))

    assert found() == "from-file"
    assert found(ALIBABA_CLOUD_PROFILE="other") == "from-other"
    assert found(ALIBABA_CLOUD_PROFILE="missing") is None
    (home / "repo" / ".env").write_text("# keys\nexport DASHSCOPE_API_KEY='from-root'\n")
    assert found() == "from-root"
    (here / ".env").write_text('DASHSCOPE_API_KEY="from-here"\nOTHER=1 # one\n')
    assert found() == "from-here"
    assert environment(here)["OTHER"] == "1"
    assert found(DASHSCOPE_API_KEY="from-environment") == "from-environment"


@pytest.mark.parametrize("text", ["not an ini file", "[default]\n", "\xff", ""])
def test_a_credentials_file_that_cannot_be_read_is_no_key(home: Path, text: str) -> None:
    (home / ".alibabacloud" / "credentials").write_text(text, "latin-1")
    assert find_key(environment(home / "repo")) is None


def test_our_own_key_comes_before_the_one_of_the_skill() -> None:
    both: dict[str, Any] = {"ZIMAGE_API_KEY": "ours", "DASHSCOPE_API_KEY": "theirs"}
    assert find_key(both) == "ours"
    assert find_key(both | {"ZIMAGE_API_KEY": " "}) == "theirs"
