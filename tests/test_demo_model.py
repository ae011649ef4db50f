"""The demo model is small, the same everywhere, and there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from worker import loading
from worker.demo import build as demo

if TYPE_CHECKING:
    from tests.warm import Warm

DRAW = """
import sys
from pathlib import Path
from worker import loading
from worker.drawing import Drawing

pipeline = loading.load("demo", device="cpu", dtype="auto", cache_dir=Path(sys.argv[1]))
drawing = Drawing(pipeline.read("a cat"), 32, 32, 1, 8, lambda done: None)
print(pipeline.draw([drawing])[0]().size)
"""

DIES_HALFWAY = """
import os, sys

def die(event, args):
    if event == "open" and str(args[0]).endswith("model_index.json"):
        os._exit(9)

sys.addaudithook(die)
"""


def files(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_seed_builds_the_same_files_and_leaves_the_process_its_own_dice(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        demo.build(tmp_path / name, seed=seed)

    assert files(tmp_path / "one") == files(tmp_path / "same")
    assert files(tmp_path / "one") != files(tmp_path / "other")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_is_small_and_its_size_rule_is_the_real_one(tmp_path: Path) -> None:
    assembled = demo.assemble(0)
    modules = (assembled.transformer, assembled.text_encoder, assembled.vae)
    parameters = sum(weight.numel() for module in modules for weight in module.parameters())
    demo.build(tmp_path / "demo")

    assert 1e6 < parameters < 2e6
    assert sum(map(len, files(tmp_path / "demo").values())) < 10e6
    assert assembled.vae_scale_factor == 8


@pytest.mark.parametrize("prompt", ["a cat", "月亮上的红猫 🐈", "Ünïcode\t\n  two spaces", ""])
def test_every_prompt_is_read_byte_for_byte(prompt: str) -> None:
    tokenizer = demo.assemble(0).tokenizer
    messages = [{"role": "user", "content": prompt}]
    turns = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    tokens = tokenizer(turns).input_ids

    assert tokenizer.decode(tokens) == turns
    assert turns == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    # Three special tokens stand for 12 + 10 + 12 bytes.
    assert len(tokens) == len(turns.encode()) - 34 + 3
    assert max(tokens) < demo.VOCABULARY_SIZE


def test_whoever_may_read_one_file_of_it_may_read_all(tmp_path: Path) -> None:
    model = demo.ensure(tmp_path)

    assert len({path.stat().st_mode for path in model.rglob("*") if path.is_file()}) == 1


def test_it_is_built_once(tmp_path: Path) -> None:
    model = demo.ensure(tmp_path)
    written_at = tmp_path.stat().st_mtime_ns  # a build would make a folder of its own in here

    assert demo.ensure(tmp_path) == model
    assert tmp_path.stat().st_mtime_ns == written_at


def test_two_processes_build_and_draw_at_once_in_silence_and_without_a_network(
    tmp_path: Path, warm_model: Warm
) -> None:
    both = [warm_model.start("-c", DRAW, str(tmp_path)) for _ in range(2)]

    assert [process.communicate() for process in both] == [("(32, 32)\n", "")] * 2
    assert [process.wait() for process in both] == [0, 0]  # as nobody's does who goes online
    assert warm_model.said == ""  # nor does the import say anything
    assert [path.name for path in tmp_path.iterdir()] == [f"zimage-demo-{demo.RECIPE}"]


def test_a_build_that_is_killed_leaves_nothing_that_could_be_taken_for_the_model(
    tmp_path: Path, warm_model: Warm
) -> None:
    killed = warm_model.run("-c", DIES_HALFWAY + DRAW, str(tmp_path))

    assert killed.returncode == 9
    assert not (tmp_path / f"zimage-demo-{demo.RECIPE}").exists()

    pipeline = loading.load("demo", device="cpu", dtype="auto", cache_dir=tmp_path)
    assert pipeline.model == loading.DEMO


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(OSError, match="empty"):
        demo.build(tmp_path)

    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]
