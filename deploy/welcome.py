"""The one block that `make up` prints when the service is ready."""

import json
import shlex
from contextlib import suppress
from pathlib import Path

from deploy.reach import is_wildcard
from deploy.settings import LocalSettings


def welcome(chosen: LocalSettings, data: Path) -> str:
    """All that a person needs for a first image; the last lines can be pasted into a shell."""
    keys = shlex.quote(_near(data / "credentials.env"))
    lines = [
        "",
        f"  Ready at     {chosen.address}",
        f"  Explained    {chosen.address}/docs",
        f"  Keys         {_near(data / 'credentials.env')}",
        f"  Logs         {_near(data / 'logs')}",
        f"  Model        {chosen.model}",
    ]
    if chosen.model == "demo":
        lines += [
            "               It draws coloured shapes and simple scenes, asked for in English or",
            "               Chinese, and nothing else. For images",
            "               set ZIMAGE_MODEL=Tongyi-MAI/Z-Image-Turbo, on a machine with a GPU.",
        ]
    if chosen.local_account_id:
        lines += [
            f"  Without key  {chosen.address}/v1/generate",
            f"               from this machine; {chosen.local_account_id} pays.",
        ]
    if is_wildcard(chosen.host) and not (chosen.s3_endpoint_url or chosen.s3_public_url):
        lines += [
            "  Note         Image URLs lead to this machine only; set ZIMAGE_S3_PUBLIC_URL to",
            f"               http://its-address:{chosen.own_s3_port} for others to fetch images.",
        ]
    prompt = "a red star on a blue background"
    body = json.dumps({"model": "z-image-turbo", "prompt": prompt, "size": "1:1"})
    return "\n".join(
        [
            *lines,
            "  To stop      Ctrl-C",
            "",
            "  Try it, from another terminal:",
            "",
            f"    . {keys}",
            f"    curl {chosen.address}/v1/images/generations \\",
            '      -H "Authorization: Bearer $ZIMAGE_API_KEY" \\',
            f"      -H 'Content-Type: application/json' -d '{body}'",
            "",
        ]
    )


def _near(path: Path) -> str:
    """The path as it is written from here, which `.` in a shell takes only with a slash in it."""
    with suppress(ValueError):
        return f"./{path.relative_to(Path.cwd())}"
    return str(path)
