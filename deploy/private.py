"""Files and folders that other users of the machine cannot read."""

import atexit
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

FITS_SOCKETS = re.compile(r"[\w/.-]{1,80}", re.ASCII)
"""A socket's path may have 103 bytes on macOS, 107 on Linux, and its name takes up to 23; libpq
splits at a comma, and the rest of what a path may contain needs quoting in one place or another."""


def write(path: Path, text: str) -> None:
    """Write `path` with mode 0600, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def kept_secret(path: Path) -> str:
    """The 256-bit secret in `path`, made on first use: URLs signed with it outlive a restart."""
    if not path.exists():
        write(path, secrets.token_hex(32))
    return path.read_text()


def socket_folder(preferred: Path) -> Path:
    """`preferred`, or where a socket cannot be in there, a folder that lasts as long as we do."""
    if FITS_SOCKETS.fullmatch(str(preferred)):
        return preferred
    made = Path(tempfile.mkdtemp(prefix="zimage-"))
    if not FITS_SOCKETS.fullmatch(str(made)):
        made.rmdir()
        made = Path(tempfile.mkdtemp(prefix="zimage-", dir="/tmp"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
