"""`make up`: the whole service on one machine, in the foreground, until Ctrl-C.

settings ─► lock ─► servers not configured ─► prepare ─► API, worker, courier ─► watch ─► stop

What prepares and the API are started early: they load while the servers start, and wait.
"""

import http.client
import json
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from deploy import folder, orphans, plan, private, servers, settings
from deploy.errors import CannotStart
from deploy.servers import Server
from deploy.settings import LocalSettings
from deploy.supervision import MARK, ROOT, Program, Supervision, supervised
from deploy.terminal import Follower, say
from deploy.welcome import welcome
from deploy.wish import Stopped, Wish

POLL_S = 0.2
QUICK_POLL_S = 0.02
"""While we start."""
LOOK_S = 1
PATIENCE_S = 30
"""How often we say what is waited for: the weights may have to be downloaded."""
OPEN_FILES = 8192
"""One for every connection that the API holds; many systems begin with 256 or 1024."""


def main() -> int:
    wish = Wish()
    try:
        up(settings.load(), wish)
    except Stopped:
        say("Stopped.")
    except CannotStart as error:
        print(f"make up: {error}", file=sys.stderr)
        return 1
    return 0


def up(chosen: LocalSettings, wish: Wish) -> None:
    """Run the service until we are asked to stop; whatever the end, all that was started has ended.

    Raises:
        Stopped: we were asked to.
        CannotStart: the message says what is wrong.
    """
    data = chosen.data_dir.expanduser().absolute()
    folder.make(data)
    with folder.locked(data, wish.check) as lock:
        orphans.end({MARK: str(data)})  # of a run whose process manager was killed as well
        plan.check_surroundings(chosen)
        own = plan.own_servers(chosen, data)
        env = plan.environment(chosen, data, own)
        _write_for_shells(data / "service.env", env)
        _allow_open_files()
        for turn in (plan.SERVERS_READY, plan.PREPARED):
            (data / turn).unlink(missing_ok=True)
        app = plan.app_programs(data)
        programs = [*map(plan.program, own), *app]
        with (
            closing(Follower({each.name: data / each.log for each in app})) as shown,
            _preparing(data, env) as preparing,
        ):
            try:
                with supervised(
                    programs, data, env, keep_open=lock, in_haste=wish.in_haste
                ) as running:
                    running.start("api")
                    _start_servers(running, own, data, wish)
                    (data / plan.SERVERS_READY).touch()
                    _wait_for(preparing, wish)
                    (data / plan.PREPARED).touch()
                    _start_app(running, app, chosen, data, wish, shown)
                    say(welcome(chosen, data))
                    _watch(running, wish, shown)
            finally:
                shown.show()


@contextmanager
def _preparing(data: Path, env: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run what prepares; if it fails, it says why. When the block ends it has ended."""
    with subprocess.Popen(
        plan.preparation(data),
        cwd=ROOT,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is for us
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def _start_servers(running: Supervision, own: Sequence[Server], data: Path, wish: Wish) -> None:
    if own:
        say(f"Starting {', '.join(server.name for server in own)} in {data}")
    for server in own:
        running.start(server.name)
    for server in own:

        def alive(name: str = server.name) -> bool:
            wish.check()
            return not running.states()[name].given_up

        servers.wait_until_ready(server, data / plan.program(server).log, alive)


def _wait_for(preparing: "subprocess.Popen[bytes]", wish: Wish) -> None:
    """Return when all is prepared; if it failed, we end as it did."""
    while preparing.poll() is None:
        wish.check()
        time.sleep(QUICK_POLL_S)
    if preparing.returncode:
        raise SystemExit(1)


def _start_app(
    running: Supervision,
    app: Sequence[Program],
    chosen: LocalSettings,
    data: Path,
    wish: Wish,
    shown: Follower,
) -> None:
    """Return when the API is ready and a worker has loaded its model.

    What ends before that will do so again, so it is not tried again: the person can mend it.
    """
    say(f"Starting the API at {chosen.address}, a worker with the model {chosen.model}, a courier")
    for program in app:
        running.start(program.name)  # the API runs already
    first = running.states()
    patience = time.monotonic() + PATIENCE_S
    while not _ready(chosen.address):
        states = running.states()
        for program in app:
            pid = states[program.name].pid if states else 0
            if pid == 0 or pid != first[program.name].pid:
                shown.show()
                raise CannotStart(f"The {program.name} ended: {_last_words(data / program.log)}")
        if time.monotonic() > patience:
            patience += PATIENCE_S
            say(f"Still starting; what is there and what is missing: {chosen.address}/ready")
        wish.check()
        shown.show()
        time.sleep(POLL_S)
    shown.show()


def _last_words(log: Path) -> str:
    if not log.exists():  # it could not even be run
        return f"why is in {log.with_name('supervisord.log')}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines and not lines[-1].startswith("{") else f"why is in {log}"


def _ready(address: str) -> bool:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        return answer.status == 200 and json.load(answer)["workers"] >= 1
    except (OSError, http.client.HTTPException, ValueError):
        return False
    finally:
        connection.close()


def _watch(running: Supervision, wish: Wish, shown: Follower) -> None:
    """Show the app's log, and see to it that what supervisord gave up on is tried again.

    Raises:
        Stopped: we are asked to stop.
        CannotStart: supervisord itself has ended.
    """
    pids: dict[str, int] = {}
    look = time.monotonic()
    while running.alive:
        wish.check()
        shown.show()
        time.sleep(POLL_S)
        if time.monotonic() < look:
            continue
        look += LOOK_S
        for name, state in running.states().items():
            if state.given_up:
                running.start(name)
            if state.pid and pids.setdefault(name, state.pid) != state.pid:
                pids[name] = state.pid
                say(f"The {name} had ended and was started again, as process {state.pid}")
    raise CannotStart("The process manager has ended; start again")


def _write_for_shells(path: Path, env: Mapping[str, str]) -> None:
    """For `. service.env`, after which `python -m api …` and `rq info` find the same servers."""
    private.write(
        path,
        "".join(
            f"export {name}={shlex.quote(value)}\n"
            for name, value in sorted(env.items())
            if name.startswith("ZIMAGE_")
        ),
    )


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
