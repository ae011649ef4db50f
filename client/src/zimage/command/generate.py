"""`zimage generate`: one image, called as the published skill's script is.

Sources: the page of the skill `aliyun-zimage-turbo` and its script, for flags, paths and the
credentials. Our choice: without any address of an endpoint it is this service's; a timeout;
retries that cannot draw twice; and an error is one line with the service's own words.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

from rich.console import Console

from zimage import skill
from zimage.client import Client
from zimage.command import connection
from zimage.credentials import environment, find_key
from zimage.errors import InvalidRequest
from zimage.files import write_whole
from zimage.retries import Retries
from zimage.wiring import BASE_URL

FOLDER = Path("ai-image-zimage-turbo", "images")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "generate",
        help="draw one image and save it",
        description="Draw one image and save it. The request is JSON: prompt, and where wanted"
        " size (such as 1024*1024), seed, prompt_extend (true or false, without quotes),"
        " base_url (the complete address of the endpoint).",
    )
    parser.add_argument("--request", metavar="JSON", help="the request; wins over --file")
    parser.add_argument("--file", metavar="PATH", help="a file with the request")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help=f"default: {Path('$OUTPUT_DIR', FOLDER, 'output.png')}, OUTPUT_DIR being output",
    )
    parser.add_argument(
        "--print-response", action="store_true", help="print the answer as one line of JSON"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    variables = environment()
    request = _read_request(options)
    base_url = variables.get("ZIMAGE_BASE_URL") or BASE_URL
    endpoint = variables.get("DASHSCOPE_BASE_URL") or base_url.rstrip("/") + skill.PATH
    # ZIMAGE_API_KEY comes last: the skill does not know it.
    key = find_key(variables, ("DASHSCOPE_API_KEY",)) or variables.get("ZIMAGE_API_KEY")
    if not key:
        raise connection.no_key()
    # The skill reads this one before the .env files.
    folder = Path(os.environ.get("OUTPUT_DIR") or "output")
    output = Path(options.output) if options.output else folder / FOLDER / "output.png"
    with Client(key) as client, Console(stderr=True).status("Drawing …"):
        response, data = client.run(skill.generate(request, endpoint, Retries()))
    write_whole(output, data)
    if options.print_response:
        print(json.dumps(dataclasses.asdict(response), default=str))
    return 0


def _read_request(options: argparse.Namespace) -> skill.ImageRequest:
    if options.request:
        text = options.request
    elif options.file:
        try:
            text = Path(options.file).read_text("utf-8")
        except UnicodeError as error:
            raise InvalidRequest(f"{options.file} is not UTF-8: {error}") from None
    else:
        raise InvalidRequest("Either --request or --file must be provided")
    try:
        said = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"The request is not JSON: {error}") from None
    return skill.read_request(said)
