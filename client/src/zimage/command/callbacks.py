"""`zimage callbacks`: list deliveries, have one made again, and check what arrives here."""

import argparse
from datetime import UTC, datetime

from zimage.callbacks import Callback
from zimage.command import connection
from zimage.command.printing import print_fields, print_json, print_table
from zimage.command.receiver import receive
from zimage.credentials import environment
from zimage.errors import InvalidRequest

SECRET = "ZIMAGE_CALLBACK_SECRET"  # noqa: S105 (the variable's name)


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "list callbacks, have one made again, check what arrives"
    callbacks = commands.add_parser("callbacks", help=text, description=text)
    verbs = callbacks.add_subparsers(metavar="VERB", required=True)

    text = "list deliveries, newest first"
    parser = verbs.add_parser("list", help=text, description=text)
    connection.add_base_url(parser)
    parser.add_argument("--task", metavar="ID")
    moment = "such as 2026-11-21T10:00:00Z; without a time zone it is local time"
    parser.add_argument("--since", metavar="TIME", type=_moment, help=moment)
    parser.add_argument("--until", metavar="TIME", type=_moment, help=moment)
    parser.add_argument("--limit", type=int, default=100, help="how many at most; default 100")
    parser.add_argument("--json", action="store_true", help="print the service's own answers")
    parser.set_defaults(run=_list)

    text = "have a delivery made again, under its old id"
    parser = verbs.add_parser("redeliver", help=text, description=text)
    connection.add_base_url(parser)
    parser.add_argument("callback_id")
    parser.set_defaults(run=_redeliver)

    text = "receive callbacks here and check their signatures, until Ctrl-C"
    parser = verbs.add_parser("verify", help=text, description=text)
    parser.add_argument("--port", type=int, default=8900, help="default 8900; 0: any free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--secret", metavar="whsec_…", help=f"default: ${SECRET}")
    parser.add_argument("--cert", metavar="PEM", help="with --key: answer HTTPS")
    parser.add_argument("--key", metavar="PEM")
    parser.set_defaults(run=_verify)


def _list(options: argparse.Namespace) -> int:
    with connection.connect(options) as client:
        found = client.callbacks(
            task_id=options.task, since=options.since, until=options.until, limit=options.limit
        )
    if options.json:
        print_json([callback.raw for callback in found])
        return 0
    print_table(
        ("callback", "task", "state", "attempts", "created", "last", "url"),
        (
            (
                callback.id,
                callback.task_id,
                callback.state,
                len(callback.attempts),
                callback.created_at and callback.created_at.isoformat(timespec="seconds"),
                _last(callback),
                callback.url,
            )
            for callback in found
        ),
    )
    return 0


def _redeliver(options: argparse.Namespace) -> int:
    with connection.connect(options) as client:
        callback = client.redeliver(options.callback_id)
    print_fields({"callback": callback.id, "task": callback.task_id, "state": callback.state})
    return 0


def _verify(options: argparse.Namespace) -> int:
    secret = options.secret or environment().get(SECRET)
    if not secret:
        raise InvalidRequest(f"Give --secret, or set {SECRET}")
    if (options.cert is None) != (options.key is None):
        raise InvalidRequest("--cert and --key belong together")
    receive(options.host, options.port, secret, options.cert, options.key)
    return 0


def _last(callback: Callback) -> str:
    if not callback.attempts:
        return ""
    last = callback.attempts[-1]
    return last.error or str(last.status)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment.astimezone() if moment.tzinfo is None else moment.astimezone(UTC)
