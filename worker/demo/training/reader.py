"""The text encoder learns to read: captions in, the numbers of their scenes out."""

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from worker.demo import architecture
from worker.demo.architecture import TEXT_WIDTH
from worker.demo.captions import caption
from worker.demo.meaning import HEARD, LOUD, SILENT, meaning, scene_in
from worker.demo.scenes import Scene
from worker.demo.training.course import optimizers
from worker.demo.training.precision import mixed
from worker.demo.training.tokens import asked

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens, N x L; how many of each row are of the caption, N; and meanings, N x 4 x width."""

STRANGE_STEPS = 12
"""Every so manieth step has words around its captions that mean nothing here, as people write."""
STRANGE_WORDS_MAX = 24
SILENCE_WEIGHT = 0.1


class Reader:
    name = "reader"
    decay = 0.7
    average = 0.995

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        *,
        seed: int,
        steps: int,
        device: str = "cpu",
        rows: int = 64,
    ) -> None:
        torch.manual_seed(seed)
        self.model = architecture.text_encoder(len(tokenizer)).to(device)
        self.seed = seed
        self.steps = steps
        self.rows = rows
        self._tokenizer = tokenizer

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.model, (".self_attn.", ".mlp."))

    def batch(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed} reader {step}")
        examples = []
        long = step % STRANGE_STEPS == 0
        for _ in range(self.rows // 4 if long else self.rows):
            scene, words = caption(dice)
            if long:
                words = (
                    f"{strange(dice)} {words}"
                    if dice.random() < 0.5
                    else f"{words} {strange(dice)}"
                )
            examples.append((asked(self._tokenizer, words), meaning(scene)))
        tokens, lengths = padded([tokens for tokens, _ in examples])
        return tokens, lengths, torch.from_numpy(np.stack([said for _, said in examples]))

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        tokens, lengths, meanings = batch
        with mixed(tokens.device):
            said = said_by(self.model, tokens).float()
        heard, others = split(said, lengths)
        wrong = (heard - meanings).pow(2).sum(-1).mean()
        silence = torch.zeros(TEXT_WIDTH, device=said.device)
        silence[SILENT] = LOUD
        noise = (others - silence).pow(2).sum(-1).mean()
        return wrong + SILENCE_WEIGHT * noise, {
            "wrong": float(wrong.detach()),
            "noise": float(noise.detach()),
        }

    @torch.no_grad()
    def show(self, folder: Path, step: int) -> None:
        """How many of 500 new captions are understood, as a line of `reader.txt`."""
        dice = random.Random("new captions")
        captions = [caption(dice) for _ in range(500)]
        understood = 0
        lines = []
        for scene, words in captions:
            tokens = torch.tensor([asked(self._tokenizer, words)], device=self.model.device)
            heard = scene_in(said_by(self.model, tokens)[0, -len(HEARD) :].cpu().numpy())
            if alike(scene, heard):
                understood += 1
            else:
                lines.append(f"{words}\n  {scene}\n  {heard}")
        with (folder / "reader.txt").open("a") as report:
            report.write("\n".join(lines[:12]) + f"\n{step}\t{understood / len(captions):.3f}\n")


def said_by(encoder: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the pipeline hears of the encoder: N x L x width, of the last layer but one."""
    read = encoder(input_ids=tokens, output_hidden_states=True, use_cache=False)
    said: torch.Tensor = read.hidden_states[-2]
    return said


def padded(tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as one tensor, N x L, and their lengths, N.

    What is added on the right a causal model's tokens cannot see.
    """
    longest = max(map(len, tokens))
    rows = [row + [0] * (longest - len(row)) for row in tokens]
    return torch.tensor(rows), torch.tensor([len(row) for row in tokens])


def split(said: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is said at the last four tokens, N x 4 x width, and at all before, M x width."""
    place = torch.arange(said.shape[1], device=said.device)[None]
    ends = lengths[:, None]
    heard = said[(place >= ends - len(HEARD)) & (place < ends)]
    return heard.view(len(said), len(HEARD), -1), said[place < ends - len(HEARD)]


def alike(scene: Scene, heard: Scene) -> bool:
    """Whether two scenes look the same: places and sizes may be off a little."""
    if len(scene.things) != len(heard.things) or scene.background.ground != heard.background.ground:
        return False
    if meaning_differs(scene, heard):
        return False
    return all(
        one.shape is other.shape
        and one.colour is other.colour
        and abs(one.x - other.x) < 0.08
        and abs(one.y - other.y) < 0.08
        and abs(one.size - other.size) < 0.08
        for one, other in zip(scene.things, heard.things, strict=True)
    )


def meaning_differs(scene: Scene, heard: Scene) -> bool:
    """Whether the backgrounds say different things; what a background does not say is no matter."""
    return bool(np.abs(meaning(scene)[0] - meaning(heard)[0]).max() > LOUD / 2)


def strange(dice: random.Random) -> str:
    """Return words that mean nothing to the model."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        "".join(dice.choice(letters) for _ in range(dice.randint(2, 8)))
        for _ in range(dice.randint(1, STRANGE_WORDS_MAX))
    ]
    return " ".join(words)
