"""The command `zimage`: read the arguments, do what they say, and fail in one line."""

import argparse
import sys
from collections.abc import Sequence

from zimage.command import batch, callbacks, generate, tasks
from zimage.errors import ZImageError

FAILED, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for a failure, 2 for wrong arguments, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="zimage", description="Images of Z-Image-Turbo from a service that sells them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (generate, batch, tasks, callbacks):
        module.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
    except ZImageError as error:
        print(f"zimage: {error.line}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"zimage: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code
