"""What every command needs to reach the service: an address and a key."""

import argparse
import sys
from collections.abc import Mapping

from zimage.client import Client
from zimage.credentials import environment, find_key
from zimage.errors import Unauthenticated
from zimage.wiring import BASE_URL


def add_base_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help=f"the service's address; default: $ZIMAGE_BASE_URL, else {BASE_URL}",
    )


def connect(options: argparse.Namespace) -> Client:
    """A client for the address and key that are set. Raises: Unauthenticated, without a key."""
    variables = environment()
    return Client(key_of(variables), base_url_of(options, variables))


def base_url_of(options: argparse.Namespace, variables: Mapping[str, str]) -> str:
    return options.base_url or variables.get("ZIMAGE_BASE_URL") or BASE_URL


def key_of(variables: Mapping[str, str]) -> str:
    """Raises: Unauthenticated."""
    key = find_key(variables)
    if key is None:
        raise no_key()
    return key


def no_key() -> Unauthenticated:
    """The error, after two hints on stderr where a key could be."""
    print("Set ZIMAGE_API_KEY or DASHSCOPE_API_KEY, here or in a file .env,", file=sys.stderr)
    print("or dashscope_api_key in ~/.alibabacloud/credentials.", file=sys.stderr)
    return Unauthenticated("no API key was found")
