"""`zimage status`, `cancel`, `tasks` and `credits`: look at tasks and at what is left to spend."""

import argparse
from collections.abc import Callable

from zimage.answers import Task
from zimage.client import Client
from zimage.command import connection
from zimage.command.printing import print_fields, print_json, print_table


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    def add(
        name: str, text: str, do: Callable[[Client, argparse.Namespace], None]
    ) -> argparse.ArgumentParser:
        def run(options: argparse.Namespace) -> int:
            with connection.connect(options) as client:
                do(client, options)
            return 0

        parser = commands.add_parser(name, help=text, description=text)
        connection.add_base_url(parser)
        parser.add_argument("--json", action="store_true", help="print the service's own answer")
        parser.set_defaults(run=run)
        return parser

    add("status", "show how a task stands", _status).add_argument("task_id")
    add("cancel", "end a task that goes on, without a charge", _cancel).add_argument("task_id")
    add("credits", "show what is left to spend", _credits)
    listed = add("tasks", "list the newest tasks", _tasks)
    listed.add_argument("--status", help="pending, processing, completed or failed")
    listed.add_argument("--limit", type=int, default=20, help="at most 100; default 20")


def _status(client: Client, options: argparse.Namespace) -> None:
    _print_task(client.get(options.task_id), options)


def _cancel(client: Client, options: argparse.Namespace) -> None:
    _print_task(client.cancel(options.task_id), options)


def _print_task(task: Task, options: argparse.Namespace) -> None:
    if options.json:
        print_json(task.raw)
        return
    print_fields(
        {
            "task": task.id,
            "status": "cancelled" if task.cancelled else task.status,
            "progress": f"{task.progress} %",
            "created": task.created_at.isoformat(),
            "queue position": task.queue_position,
            "estimated": None if task.estimated_s is None else f"{task.estimated_s} s",
            "seed": task.seed,
            "credits": task.credits_used,
            "image": "expired" if task.expired else task.image_url,
            "error": task.error and f"{task.error.code}: {task.error.message}",
        }
    )


def _credits(client: Client, options: argparse.Namespace) -> None:
    found = client.credits()
    if options.json:
        print_json(found.raw)
        return
    print_fields(
        {
            "remaining": found.remaining,
            "used": found.used,
            "of this key": "no limit" if found.key_remaining is None else found.key_remaining,
            "used by it": found.key_used,
        }
    )


def _tasks(client: Client, options: argparse.Namespace) -> None:
    page = client.list(status=options.status, page_size=options.limit)
    if options.json:
        print_json(page.raw)
        return
    print_table(
        ("task", "status", "progress", "created", "seconds", "credits"),
        (
            (
                task.id,
                task.status,
                task.progress,
                task.created_at.isoformat(),
                task.duration_s,
                task.credits_used,
            )
            for task in page.tasks
        ),
    )
