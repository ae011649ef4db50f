"""`zimage batch`: the images of a CSV file, N at a time, resumable after Ctrl-C."""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zimage.async_client import AsyncClient
from zimage.batch.journal import Journal
from zimage.batch.results import COMPLETED, Outcome, write_results
from zimage.batch.rows import read_rows, read_styles
from zimage.batch.run import Batch, Plan
from zimage.batch.watermark import read_watermark
from zimage.command import connection
from zimage.credentials import environment
from zimage.errors import InvalidRequest
from zimage.retries import Retries

CONCURRENCY, CONCURRENCY_MAX = 4, 64
WAIT_S = 7200.0
"""For one image: a full queue is waited for."""
RETRIES = Retries(retries_max=8)
"""More than elsewhere: nobody sits in front of it, and a busy service must not cost a row."""
INTERRUPTED = 130


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "batch",
        help="draw the images of a CSV file; the same command goes on after a stop",
        description="Draw the images of a CSV file: column prompt, optionally id, size, seed,"
        " style. The same command goes on after Ctrl-C or a crash; nothing is drawn or paid twice.",
    )
    parser.add_argument("csv", type=Path, metavar="prompts.csv")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--concurrency", type=int, default=CONCURRENCY, help=f"default {CONCURRENCY}"
    )
    parser.add_argument("--styles", metavar="A,B,C", help="draw each row in each of these styles")
    parser.add_argument(
        "--template",
        help="columns in braces; default {prompt}, or {prompt}, {style} style where there is one",
    )
    mark = parser.add_mutually_exclusive_group()
    mark.add_argument("--watermark", metavar="TEXT", help="on copies in DIR/watermarked")
    mark.add_argument("--watermark-image", type=Path, metavar="PNG")
    parser.add_argument("--watermark-font", type=Path, metavar="TTF")
    parser.add_argument("--report", type=Path, metavar="CSV", help="default: DIR/results.csv")
    parser.add_argument(
        "--redraw-lost",
        action="store_true",
        help="draw and pay again what expired before it was downloaded",
    )
    connection.add_base_url(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if not 1 <= options.concurrency <= CONCURRENCY_MAX:
        raise InvalidRequest(f"--concurrency must be 1 to {CONCURRENCY_MAX}")
    variables = environment()
    base_url = connection.base_url_of(options, variables)
    key = connection.key_of(variables)
    plan = Plan(
        rows=read_rows(options.csv, styles=read_styles(options.styles), template=options.template),
        folder=options.output_dir,
        concurrency=options.concurrency,
        wait_s=WAIT_S,
        watermark=read_watermark(
            options.watermark, options.watermark_image, options.watermark_font
        ),
        redraw_lost=options.redraw_lost,
    )
    report = options.report or plan.folder / "results.csv"
    with Journal(plan.folder, base_url) as journal, _progress(len(plan.rows)) as progress:
        client = AsyncClient(key, base_url, retries=RETRIES)
        batch = Batch(plan, client, journal, _teller(progress))
        try:
            asyncio.run(_work(client, batch))
            stopped = False
        except KeyboardInterrupt:
            stopped = True
        write_results(report, batch.outcomes)
    return _conclude(batch.outcomes, report, stopped=stopped)


async def _work(client: AsyncClient, batch: Batch) -> None:
    async with client:
        await batch.run()


def _progress(total: int) -> Progress:
    console = Console(stderr=True)
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    progress.add_task("", total=total)
    return progress


def _teller(progress: Progress) -> Callable[[Outcome], None]:
    def tell(outcome: Outcome) -> None:
        progress.update(progress.task_ids[0], advance=1, description=outcome.row.key)
        if outcome.status != COMPLETED:
            text = f"{outcome.row.key}: {outcome.status}: {outcome.error}"
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    return tell


def _conclude(outcomes: list[Outcome], report: Path, *, stopped: bool) -> int:
    """Say what came of it. Returns the exit code."""
    counts = Counter(outcome.status for outcome in outcomes)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    print(f"{told}; see {report}", file=sys.stderr)
    if stopped:
        print(
            "Stopped. The same command goes on from here: nothing is drawn or paid twice.",
            file=sys.stderr,
        )
        return INTERRUPTED
    return 0 if counts[COMPLETED] == len(outcomes) else 1
