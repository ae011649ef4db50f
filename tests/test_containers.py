"""The containers, as far as tools can tell without an engine: files, and what they would run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from api.settings import ApiSettings
from deploy import reach, servers
from storage import queue
from storage.settings import StorageSettings
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from tests.warm import Warm

ROOT = Path(__file__).parent.parent
COMPOSE_FILE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
EXAMPLE = (ROOT / "deploy" / "env.example").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
SERVERS = {"postgres", "valkey", "s3"}
OURS = {"migrate", "api", "courier", "worker", "worker-cpu"}

Stage = list[tuple[str, str]]


def _stages() -> dict[str, Stage]:
    """The instructions of each stage, those of the stages that it is built on first."""
    lines = re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()).replace("\\\n", " ").splitlines()
    stages: dict[str, Stage] = {}
    for instruction, _, value in (line.partition(" ") for line in lines if line.strip()):
        if instruction == "FROM":
            base, name = value.split(" AS ")
            stages[name] = [*stages.get(base, [(instruction, base)])]
        else:
            stages[name].append((instruction, " ".join(value.split())))
    return stages


STAGES = _stages()


def _last(stage: str, instruction: str) -> str | None:
    return next(
        (value for name, value in reversed(STAGES.get(stage, [])) if name == instruction), None
    )


def _stage_of(service: str) -> str | None:
    build = SERVICES[service].get("build")
    return build and build["target"]


def _run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=60)


def _tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(str(Path(sysconfig.get_path("scripts")) / name), *arguments)


def test_the_compose_file_is_one_by_the_compose_specification() -> None:
    checked = _tool(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE_FILE)
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_linter_has_nothing_to_say_of_the_dockerfile() -> None:
    linted = _tool("hadolint", "--failure-threshold", "style", str(DOCKERFILE))
    assert (linted.returncode, linted.stdout) == (0, ""), linted.stdout + linted.stderr


def test_every_image_is_pinned_to_an_exact_version() -> None:
    foreign = {service["image"] for service in SERVICES.values() if "build" not in service}
    foreign |= {value for stage in STAGES.values() for name, value in stage if name == "FROM"}
    assert len(foreign) == 4
    for image in foreign:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+[\w.-]*", image), image


def test_what_is_built_carries_the_version_of_the_project() -> None:
    for name, service in SERVICES.items():
        if "build" in service:
            assert service["image"] == f"zimage-{_stage_of(name)}:{PROJECT['version']}"
    for stage in ("api", "worker"):
        assert f'image.version="{PROJECT["version"]}"' in (_last(stage, "LABEL") or "")


def test_the_services_are_those_of_the_house() -> None:
    assert set(SERVICES) == SERVERS | OURS


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_is_confined(name: str) -> None:
    service, stage = SERVICES[name], _stage_of(name)
    user = service.get("user") or _last(stage or "", "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user or "")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert service["deploy"]["resources"]["limits"]["memory"]


def test_every_service_tells_its_health_but_those_that_listen_nowhere() -> None:
    silent = set()
    for name, service in SERVICES.items():
        stage = _stage_of(name)
        check = service.get("healthcheck") or _last(stage or "", "HEALTHCHECK")
        assert check, name
        if isinstance(check, dict) and check.get("disable"):
            silent.add(name)
    assert silent == {"migrate", "courier"}


def test_every_process_is_started_again_but_the_one_that_ends() -> None:
    restarts = {name: service["restart"] for name, service in SERVICES.items()}
    assert restarts.pop("migrate") == "no"
    assert set(restarts.values()) == {"unless-stopped"}


def test_nothing_starts_before_the_database_is_migrated() -> None:
    for name in OURS - {"migrate"}:
        assert SERVICES[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"}
        }
    assert SERVICES["migrate"]["depends_on"] == {
        server: {"condition": "service_healthy"} for server in SERVERS
    }


def test_processes_are_told_to_stop_and_given_the_time_they_need() -> None:
    assert SERVICES["worker"]["stop_grace_period"] == "90s"
    assert SERVICES["worker-cpu"]["stop_grace_period"] == "90s"
    for stage in ("api", "worker"):
        assert _last(stage, "STOPSIGNAL") == "SIGTERM"
        assert json.loads(_last(stage, "CMD") or "")[:2] == ["python", "-m"]


def test_only_the_api_and_the_image_store_are_reached_from_outside() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {
        "api": ["${PUBLISH_ADDRESS:-127.0.0.1}:${API_PORT:-8000}:8000"],
        "s3": ["${PUBLISH_ADDRESS:-127.0.0.1}:${S3_PORT:-7070}:7070"],
    }
    for name in SERVERS - {"s3"}:
        assert SERVICES[name]["networks"] == ["servers"]
    assert yaml.safe_load(COMPOSE_FILE.read_text())["networks"]["servers"] == {"internal": True}
    assert "ZIMAGE_HOST=0.0.0.0 ZIMAGE_PORT=8000" in (_last("api", "ENV") or "")


def test_only_the_gpu_profile_asks_for_a_gpu() -> None:
    profiles = {
        name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service
    }
    assert profiles == {"worker": ["gpu"], "worker-cpu": ["cpu"]}
    asking = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in SERVICES.items()
        if "reservations" in service["deploy"]["resources"]
    }
    assert asking == {
        "worker": [
            {"driver": "nvidia", "count": "${GPU_COUNT:-all}", "capabilities": ["gpu"]},
        ]
    }


def _settings(*classes: type[BaseSettings]) -> dict[str, object]:
    """Variable to default."""
    return {
        f"ZIMAGE_{name.upper()}": field.default
        for settings in classes
        for name, field in settings.model_fields.items()
    }


DOCUMENTED = dict(re.findall(r"(?m)^#?([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE))
REQUIRED = set(re.findall(r"(?m)^([A-Z][A-Z0-9_]*)=", EXAMPLE)) - {"COMPOSE_PROFILES"}


def test_every_setting_is_documented_with_its_default() -> None:
    settings = _settings(StorageSettings, ApiSettings, WorkerSettings)
    documented = {name for name in DOCUMENTED if name.startswith("ZIMAGE_")}
    assert documented == set(settings)
    for name, default in settings.items():
        if default in (PydanticUndefined, None, {}, [], ""):
            continue
        plain = isinstance(default, bool | list)
        said = f"{json.dumps(default)}" if plain else str(default)
        assert DOCUMENTED[name].strip("'") == said, name


def test_what_the_compose_file_asks_for_is_documented_and_nothing_else() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", COMPOSE_FILE.read_text()))
    assert used <= set(DOCUMENTED)
    of_the_machine = {name for name in DOCUMENTED if not name.startswith("ZIMAGE_")}
    assert of_the_machine - used == {"COMPOSE_PROFILES"}


def test_what_is_required_is_refused_where_it_is_missing() -> None:
    text = COMPOSE_FILE.read_text()
    for name in REQUIRED - {"ZIMAGE_S3_ACCESS_KEY_ID"}:
        assert DOCUMENTED[name] in ("", "https://images.example.com")
    for name in REQUIRED:
        assert f"${{{name}:?" in text
    assert set(re.findall(r"\$\{(\w+):\?", text)) == REQUIRED


def test_every_setting_reaches_the_processes_that_read_it() -> None:
    common = set(_settings(StorageSettings))
    api = common | set(_settings(ApiSettings)) - {"ZIMAGE_HOST", "ZIMAGE_PORT"}  # of the image
    worker = common | set(_settings(WorkerSettings))
    for name in ("migrate", "api", "courier"):
        assert set(SERVICES[name]["environment"]) == api
    for name in ("worker", "worker-cpu"):
        assert set(SERVICES[name]["environment"]) == worker


def _names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def _needed(requirements: list[str]) -> Iterator[str]:
    """The distributions that pip would install for `requirements`, by what is installed here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), wanted)) not in seen:
                seen.add(key)
                waiting += [(Requirement(text), wanted) for text in requires(key[0]) or []]
    return (name for name, _ in seen)


def test_the_image_of_the_api_has_no_torch_and_no_tools() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = set(_needed(PROJECT["dependencies"]))
    assert {"fastapi", "starlette", "sqlalchemy", "botocore"} <= needed
    others = set().union(*map(_names, extras.values())) - _names(PROJECT["dependencies"])
    assert needed & others == set()
    assert "torch" in set(_needed(extras["worker"]))

    installs = [value for name, value in STAGES["api-dependencies"] if "pip install" in value]
    assert len(installs) == 1
    assert installs[0].endswith("pip install -c constraints.txt .")
    sources = {value.split()[0] for name, value in STAGES["api"] if value.startswith("--from")}
    assert sources == {"--from=api-dependencies"}


def _lay_out(stage: str, folder: Path) -> Path:
    """Copy what the image gets from the build context into `folder`."""
    let_through = re.findall(r"(?m)^!(\S+)$", (ROOT / ".dockerignore").read_text())
    copies = [value.split() for name, value in STAGES[stage] if name == "COPY"]
    for source, target in (copy for copy in copies if not copy[0].startswith("--from")):
        assert source in let_through
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / source, folder / target)
    return folder


def test_the_image_of_the_api_holds_what_its_processes_import(tmp_path: Path, warm: Warm) -> None:
    image = _lay_out("api", tmp_path)
    loaded = _run(
        *(sys.executable, "-c"),
        "import sys; import api.app, api.courier; api.app.create_app(); print(*sys.modules)",
        cwd=image,
    )
    assert loaded.returncode == 0, loaded.stderr
    packages = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert {"fastapi", "sqlalchemy"} <= packages
    assert packages & {"torch", "diffusers", "transformers", "PIL", "numpy", "worker"} == set()

    prepared = warm.run("-m", "api", "prepare", cwd=image)
    assert prepared.returncode == 0, prepared.stderr


def test_the_image_of_the_worker_holds_what_it_imports(tmp_path: Path, warm_model: Warm) -> None:
    image = _lay_out("worker", tmp_path)
    loaded = warm_model.run(
        "-c",
        "import sys; import worker.__main__, worker.generate, worker.pipeline; print(*sys.modules)",
        cwd=image,
    )
    assert loaded.returncode == 0, loaded.stderr
    packages = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert packages & {"api", "fastapi", "uvicorn"} == set()


def _health_check(stage: str) -> list[str]:
    """What the engine would run in a container, with the Python that is here."""
    _, _, command = (_last(stage, "HEALTHCHECK") or "").partition("CMD ")
    program, *arguments = json.loads(command)
    assert program == "python"
    return [sys.executable, *arguments]


def test_the_api_is_healthy_while_it_answers(server: str) -> None:
    option, code = _health_check("api")[1:]
    address = server.removeprefix("http://")
    assert "127.0.0.1:8000" in code
    assert _run(sys.executable, option, code.replace("127.0.0.1:8000", address)).returncode == 0
    closed = f"127.0.0.1:{reach.free_port()}"
    assert _run(sys.executable, option, code.replace("127.0.0.1:8000", closed)).returncode == 1


def test_a_worker_is_healthy_while_it_is_heard_of(warm: Warm) -> None:
    _, *check = _health_check("worker")
    ours = f"{socket.gethostname()}-1-ab"
    queue.announce("another-machine-1-ab", {})
    assert warm.run(*check).returncode == 1
    queue.announce(ours, {})
    assert warm.run(*check).returncode == 0
    queue.withdraw(ours)
    assert warm.run(*check).returncode == 1


def test_valkey_as_composed_asks_for_its_password_and_keeps_what_it_holds(tmp_path: Path) -> None:
    shell, option, script = SERVICES["valkey"]["command"]
    port = reach.free_port()
    script = script.replace("$$", "$").replace("--dir /data", f"--dir {tmp_path} --port {port}")
    binary = Path(servers.valkey(tmp_path / "other", port).argv[0])
    path = f"{binary.parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [shell, option, script],
        env={"PATH": path, "VALKEY_PASSWORD": "a-password"},
        stdout=subprocess.PIPE,
        text=True,
    ) as valkey:
        assert valkey.stdout
        try:
            next(line for line in valkey.stdout if "Ready to accept connections" in line)
            with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
                stranger.sendall(b"PING\r\n")
                assert stranger.recv(100).startswith(b"-NOAUTH")
            with redis.Redis(port=port, password="a-password", decode_responses=True) as known:
                wanted = ("appendonly", "maxmemory-policy")
                assert known.config_get(*wanted) == {
                    "appendonly": "yes",
                    "maxmemory-policy": "noeviction",
                }
        finally:
            valkey.terminate()
