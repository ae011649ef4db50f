"""A batch of images from a file: stopped, killed and gone on with, and never paid for twice."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from sqlalchemy import func, select, update
from zimage.command import main

from storage.database import transaction
from storage.errors import GenerationFailed
from storage.models import Task
from tests.test_client_service import environ, while_working

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

__all__ = ["environ"]  # a fixture

SMALL = "376x376"


COMMAND = ("batch", "in.csv", "--output-dir", "out")


class Batch:
    """`zimage batch` with a worker at its side, in this process or in one that can be stopped."""

    def __init__(
        self,
        folder: Path,
        environ: dict[str, str],
        work: Work,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.folder, self.out = folder, folder / "out"
        self.environ, self.work, self.capsys = environ, work, capsys
        monkeypatch.chdir(folder)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

    def write(self, *lines: str) -> None:
        (self.folder / "in.csv").write_text("\n".join(lines) + "\n", "utf-8")

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "zimage", *COMMAND, *more],
            cwd=self.folder,
            env=self.environ,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *more: str, pipeline: Any = None) -> tuple[int, str]:
        """The exit code, and what it said."""
        self.capsys.readouterr()
        code = while_working(lambda: self.work(pipeline), lambda: main([*COMMAND, *more]))
        return code, self.capsys.readouterr().err

    def stop_after(self, images: int, number: int, *more: str) -> tuple[int, str]:
        """Send the signal as soon as so many images are saved."""
        with self.start(*more) as process:
            while len(self.noted("saved")) < images:
                assert process.poll() is None
                self.work(max_jobs=1)
            process.send_signal(number)
            assert process.stderr is not None
            said = process.stderr.read()
            return process.wait(), said

    def noted(self, event: str) -> list[dict[str, Any]]:
        journal = self.out / "zimage-journal.jsonl"
        if not journal.exists():
            return []
        whole = [line for line in journal.read_text().splitlines(True) if line.endswith("\n")]
        return [line for line in map(json.loads, whole) if line["event"] == event]

    def results(self) -> list[dict[str, str]]:
        with (self.out / "results.csv").open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))

    def images(self) -> list[Path]:
        return sorted(self.out.glob("*.png"))


@pytest.fixture
def batch(
    tmp_path: Path,
    environ: dict[str, str],
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Batch:
    return Batch(tmp_path, environ, work, monkeypatch, capsys)


def tasks_made() -> int:
    with transaction() as session:
        return session.scalar(select(func.count()).select_from(Task)) or 0


def test_thirty_images_stopped_twice_and_killed_once_are_drawn_and_paid_once(
    batch: Batch, customer: Customer
) -> None:
    batch.write("id,prompt,size", *(f"p{n:02},a cat {n},{SMALL}" for n in range(30)))
    code, said = batch.stop_after(5, signal.SIGINT)
    assert code == 130
    assert "The same command goes on" in said
    assert "Traceback" not in said
    assert {row["status"] for row in batch.results()} == {"completed", "unfinished"}
    code, _ = batch.stop_after(12, signal.SIGINT)
    assert code == 130
    code, _ = batch.stop_after(18, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, said = batch.run()
    assert (code, said) == (0, "30 completed; see out/results.csv\n")
    assert len(batch.images()) == 30
    assert tasks_made() == 30
    assert customer.books() == (1500 - 30 * 15, 0)
    assert len({row["task_id"] for row in batch.results()}) == 30
    assert {row["status"] for row in batch.results()} == {"completed"}


def test_a_batch_that_was_killed_before_it_noted_a_task_finds_it_again(
    batch: Batch, customer: Customer
) -> None:
    batch.write("id,prompt,size", *(f"p{n},a cat {n},{SMALL}" for n in range(4)))
    assert batch.stop_after(1, signal.SIGKILL)[0] == -signal.SIGKILL
    journal = batch.out / "zimage-journal.jsonl"
    head, *_ = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(head + b'{"event": "created", "key": "p0", "conte')
    for _ in range(2):  # what was half written does not spoil what is written after it
        assert batch.run()[0] == 0
    assert tasks_made() == 4
    assert customer.books() == (1500 - 4 * 15, 0)


def test_a_finished_batch_asks_for_nothing_and_mends_what_was_damaged(
    batch: Batch, customer: Customer
) -> None:
    batch.write("id,prompt,size", *(f"p{n},a cat {n},{SMALL}" for n in range(3)))
    assert batch.run()[0] == 0
    missing, damaged, sound = batch.images()
    before = [path.read_bytes() for path in batch.images()]
    missing.unlink()
    damaged.write_bytes(b"damaged")
    age = sound.stat().st_mtime_ns
    assert batch.run()[0] == 0
    assert [path.read_bytes() for path in batch.images()] == before
    assert sound.stat().st_mtime_ns == age
    assert tasks_made() == 3
    assert customer.books() == (1500 - 3 * 15, 0)


def test_a_failed_row_stops_no_other_and_is_drawn_again_by_the_next_run(
    batch: Batch, customer: Customer
) -> None:
    def clumsy(prompt: str, *, width: int, height: int, **_: object) -> Image.Image:
        if prompt == "a dog":
            raise GenerationFailed
        return Image.new("RGB", (width, height))

    batch.write("name,prompt,size", f"cat,a cat,{SMALL}", f"dog,a dog,{SMALL}", "fox,a fox,200x200")
    code, said = batch.run(pipeline=clumsy)
    assert code == 1
    assert "dog: failed: service_error" in said
    cat, dog, fox = batch.results()
    assert [row["status"] for row in (cat, dog, fox)] == ["completed", "failed", "failed"]
    assert (cat["credits"], cat["file"], cat["error"]) == ("15", "out/cat.png", "")
    assert float(cat["seconds"]) >= 0
    assert int(cat["seed"]) > 0
    assert "width and height" in fox["error"]
    assert tasks_made() == 2

    batch.write("name,prompt,size", *(f"{n},a {n},{SMALL}" for n in ("cat", "dog", "fox")))
    assert batch.run()[0] == 0
    assert tasks_made() == 4
    assert batch.results()[1]["task_id"] != dog["task_id"]
    assert batch.results()[0]["task_id"] == cat["task_id"]
    assert customer.books() == (1500 - 3 * 15, 0)


def test_an_image_that_expired_is_drawn_again_only_when_asked(
    batch: Batch, customer: Customer
) -> None:
    batch.write("prompt,size", f"a cat,{SMALL}")
    assert batch.run()[0] == 0
    batch.images()[0].unlink()
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=func.now()))
    for _ in range(2):
        code, said = batch.run()
        assert code == 1
        assert "24 hours" in said
        assert "--redraw-lost" in said
        assert batch.results()[0]["status"] == "lost"
    assert tasks_made() == 1
    assert batch.run("--redraw-lost")[0] == 0
    assert tasks_made() == 2
    assert customer.books() == (1500 - 2 * 15, 0)


def test_when_credits_run_out_the_rest_is_not_even_sent(
    batch: Batch, new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = new_customer(30)
    monkeypatch.setenv("ZIMAGE_API_KEY", customer.key)
    batch.write("id,prompt,size", *(f"p{n},a cat {n},{SMALL}" for n in range(6)))
    assert batch.run("--concurrency", "1")[0] == 1
    assert [row["status"] for row in batch.results()] == ["completed"] * 2 + ["failed"] * 4
    assert all("insufficient_quota" in row["error"] for row in batch.results()[2:])
    assert len({row["error"] for row in batch.results()[2:]}) == 1  # with one request id
    assert customer.books() == (0, 0)


def test_products_times_styles_are_posters_with_a_watermark_on_a_copy(batch: Batch) -> None:
    batch.write("id,prompt,colour,size", *(f"{n},茶壶,red,{SMALL}" for n in ("tea", "pot")))
    more = ("--styles", "main,detail,social", "--template", "{colour} {prompt}, {style} view")
    assert batch.run(*more)[0] == 0
    names = [f"{n}-{style}" for n in ("tea", "pot") for style in ("main", "detail", "social")]
    assert [row["row"] for row in batch.results()] == names
    assert batch.results()[1]["prompt"] == "red 茶壶, detail view"
    drawn = {path.name: path.read_bytes() for path in batch.images()}

    assert batch.run(*more, "--watermark", "ACME", "--report", "told.csv")[0] == 0
    assert (batch.folder / "told.csv").exists()
    assert {path.name: path.read_bytes() for path in batch.images()} == drawn
    for name, data in drawn.items():
        marked = (batch.out / "watermarked" / name).read_bytes()
        assert marked != data
        with Image.open(io.BytesIO(marked)) as image:
            assert image.size == (376, 376)
    assert tasks_made() == 6


def test_a_batch_belongs_to_one_service_and_one_process(batch: Batch) -> None:
    batch.write("prompt,size", f"a cat,{SMALL}")
    with batch.start() as process:
        while not batch.noted("created"):
            assert process.poll() is None
        code, said = batch.run()
        assert code == 1
        assert "Another batch is at work in out" in said
        process.send_signal(signal.SIGINT)
    code, said = batch.run("--base-url", "http://127.0.0.1:9")
    assert code == 1
    assert "belongs to a batch at" in said
