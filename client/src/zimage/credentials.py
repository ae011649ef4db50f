"""Where a customer's key and addresses are kept: environment, `.env`, credentials file.

Sources: the published skill's page for the variables and `~/.alibabacloud/credentials`, its script
for the `.env` files, the profile's name and the order.
"""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

CREDENTIALS_FILE = Path(".alibabacloud", "credentials")
"""Under the home folder; an INI file."""
CREDENTIALS_OPTION = "dashscope_api_key"  # option names know no case, so DASHSCOPE_API_KEY too
PROFILES = ("ALIBABA_CLOUD_PROFILE", "ALICLOUD_PROFILE")
KEYS = ("ZIMAGE_API_KEY", "DASHSCOPE_API_KEY")


def environment(folder: Path | None = None) -> dict[str, str]:
    """The variables, and those that they leave unset from `.env`: here, then at the root.

    Here is `folder`, or the current one; the root is that of the Git repository around it.
    """
    here = (folder or Path.cwd()).resolve()
    root = next((above for above in (here, *here.parents) if (above / ".git").exists()), here)
    return {**_read_env(root / ".env"), **_read_env(here / ".env"), **os.environ}


def find_key(variables: Mapping[str, str], names: tuple[str, ...] = KEYS) -> str | None:
    """The first of `names` that is set and not empty, else the key of the credentials file."""
    for name in names:
        if key := variables.get(name, "").strip():
            return key
    return _key_of_profile(variables)


def _key_of_profile(variables: Mapping[str, str]) -> str | None:
    # The file of the command line tools of Alibaba Cloud may hold % signs of its own.
    file = configparser.ConfigParser(interpolation=None)
    profile = next(filter(None, (variables.get(name) for name in PROFILES)), "default")
    try:
        file.read_string((Path.home() / CREDENTIALS_FILE).read_text("utf-8"))
        return file.get(profile, CREDENTIALS_OPTION).strip() or None
    except (OSError, UnicodeError, RuntimeError, configparser.Error):
        return None  # an unreadable file or a missing section counts as "no key"


def _read_env(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeError):
        return {}
    found = {}
    for line in lines:
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            found[name.strip()] = _unquoted(value.strip())
    return found


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value.partition(" #")[0].rstrip()
