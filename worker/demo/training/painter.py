"""The transformer learns to paint: from noise and what the text encoder says, to latents.

First it only sketches: it sees noise alone, and is asked what was asked for looks like. That needs
no pictures and no autoencoder, and teaches shapes in a third of the steps. Then it paints.

Flow matching, as Z-Image's scheduler wants it: a noisy picture is `(1 - s) * picture + s * noise`,
the transformer is told `1 - s` and answers `picture - noise`.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Model

from worker.canvas import CELL_PX, enlarge
from worker.demo import architecture
from worker.demo.architecture import GRIDS, LATENT_CHANNELS
from worker.demo.captions import caption
from worker.demo.paint import paint
from worker.demo.scenes import Scene, Shape, is_held_out, jittered
from worker.demo.training.autoencoder import picture, pixels, signed
from worker.demo.training.course import LEARNING_RATE, optimizers
from worker.demo.training.precision import mixed
from worker.demo.training.questions import QUESTIONS, Taught, answers
from worker.demo.training.reader import padded, said_by, strange
from worker.demo.training.tokens import asked

Read = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""Tokens, N x L; how many of each are a caption's; and the answers to the questions about their
scenes, N x patches x numbers."""

SHORT_SHARE = 0.75
"""Of steps with captions of at most 32 tokens, which the transformer pads to."""
TOKENS_SHORT, TOKENS_LONG = 32, 64
STRANGE_STEPS = 25
"""Every so manieth step has words around its captions that mean nothing here."""
BLANK_SHARE = 0.125
"""Of the pictures of a step that are nothing but noise, as every drawing begins."""
HARD_SIZE = 0.3
"""Of the shorter side: a thing of at most this size is a hard one."""
EASY_SHARE = 1 / 3
"""Of the scenes without anything hard, those that the repainter paints."""
EXAMPLES = (
    ("a red star on a blue background", (22, 22)),
    ("三个黄色的圆形", (22, 22)),
    ("a small green heart in the top left corner on a white background", (22, 22)),
    ("a sun over the sea at sunset", (16, 28)),
    ("a house and a tree on a meadow under the moon at night", (16, 28)),
    ("紫色背景上的笑脸", (28, 16)),
    ("a black cross to the left of an orange ring on a pink background", (18, 24)),
    ("a blue diamond", (22, 22)),
)
"""Painted while training, to be looked at."""


class Sketcher:
    """The transformer learns what scenes look like, from noise alone."""

    name = "sketcher"
    decay = 0.4
    average = 0.995
    peak_lr = LEARNING_RATE
    square_share = 0.5
    """Of steps that paint squares; the others paint one of the other shapes each."""

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        encoder: Qwen3Model,
        *,
        seed: int,
        steps: int,
        scenes: int = 32,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Taught(_begun(architecture.transformer())).to(encoder.device)
        self.seed = seed
        self.steps = steps
        self._scenes = scenes
        self._tokenizer = tokenizer
        self._encoder = encoder.eval()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.model, (".attention.to_", ".feed_forward."), lr=self.peak_lr)

    def batch(self, step: int) -> tuple[Any, ...]:
        dice = random.Random(f"{self.seed} {self.name} {step}")
        grid = self._grid(dice)
        return grid, *self._read(*self._asked(dice, step), grid)

    def loss(self, batch: Any, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        (rows, columns), *read = batch
        noise = torch.randn(len(read[0]), LATENT_CHANNELS, rows, columns)
        noise = noise.to(self._encoder.device)
        _, loss, figures = self._answered(noise, torch.ones(len(noise), device=noise.device), *read)
        return loss, figures

    def show(self, folder: Path, step: int) -> None:
        """Write what it would draw, in the sketches' few pixels."""
        sheet = Image.new("RGB", (len(EXAMPLES) * 200, 200), "gray")
        for place, (words, (rows, columns)) in enumerate(EXAMPLES):
            tokens, lengths = padded([asked(self._tokenizer, words)])
            device = self._encoder.device
            with torch.no_grad(), mixed(device):
                noise = torch.randn(1, LATENT_CHANNELS, rows, columns, device=device)
                self._velocity(noise, torch.ones(1, device=device), tokens.to(device), lengths)
            sketched = self.model.sketched(rows // 2, columns // 2)
            tile = picture(sketched).resize((columns * CELL_PX, rows * CELL_PX))
            tile.thumbnail((196, 196))
            sheet.paste(tile, (place * 200, 0))
        sheet.save(folder / f"{self.name}-{step:05}.png")

    def _grid(self, dice: random.Random) -> tuple[int, int]:
        return GRIDS[0] if dice.random() < self.square_share else dice.choice(GRIDS[1:])

    def _asked(self, dice: random.Random, step: int) -> tuple[list[Scene], list[list[int]]]:
        """Return the scenes of one step, none held out, and the tokens that ask for them."""
        longest = TOKENS_LONG if dice.random() >= SHORT_SHARE else TOKENS_SHORT
        scenes: list[Scene] = []
        tokens: list[list[int]] = []
        while len(scenes) < self._scenes:
            scene, words = caption(dice)
            if step % STRANGE_STEPS == 0:
                words = f"{words} {strange(dice)}"[:200]
            read = asked(self._tokenizer, words)
            if not is_held_out(scene) and len(read) <= longest and self._wants(scene, dice):
                scenes.append(scene)
                tokens.append(read)
        return scenes, tokens

    def _wants(self, scene: Scene, dice: random.Random) -> bool:
        return True

    def _read(self, scenes: list[Scene], tokens: list[list[int]], grid: tuple[int, int]) -> Read:
        rows, columns = grid
        right = [answers(scene, rows // 2, columns // 2) for scene in scenes]
        together = {
            name: torch.from_numpy(np.stack([each[name] for each in right])) for name in QUESTIONS
        }
        return *padded(tokens), together

    def _velocity(
        self,
        noisy: torch.Tensor,
        share: torch.Tensor,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the transformer answers, N x C x rows x columns."""
        with torch.no_grad():
            said = said_by(self._encoder, tokens).float()
        captions = [one[:length] for one, length in zip(said, lengths.tolist(), strict=True)]
        frames = list(noisy[:, :, None].unbind(0))
        answer = self.model(frames, 1 - share, captions, return_dict=False)
        return torch.stack(answer[0]).float()[:, :, 0]

    def _answered(
        self,
        noisy: torch.Tensor,
        share: torch.Tensor,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        right: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Return the transformer's answer, what its answers to the questions cost, and each."""
        with mixed(noisy.device):
            velocity = self._velocity(noisy, share, tokens, lengths)
        wrong = self.model.wrong({name: each.to(noisy.device) for name, each in right.items()})
        cost = torch.stack([QUESTIONS[name].weight * each for name, each in wrong.items()]).sum()
        return velocity, cost, {name: float(each.detach()) for name, each in wrong.items()}


class Painter(Sketcher):
    """The transformer goes on to paint what it can sketch."""

    name = "painter"
    decay = 0.7
    average = 0.998
    thing_weight = 1.0
    """Of latents on things and beside them in the loss, where that of all others is 1."""

    def __init__(self, sketcher: Sketcher, vae: AutoencoderKL, *, steps: int) -> None:
        self.model = sketcher.model
        self.seed = sketcher.seed
        self.steps = steps
        self._scenes = sketcher._scenes
        self._tokenizer = sketcher._tokenizer
        self._encoder = sketcher._encoder
        self._vae = vae.eval()

    def batch(self, step: int) -> tuple[Any, ...]:
        dice = random.Random(f"{self.seed} {self.name} {step}")
        grid = self._grid(dice)
        scenes, tokens = self._asked(dice, step)
        rows, columns = grid
        painted = [
            paint(
                jittered(scene, dice), columns * CELL_PX, rows * CELL_PX, tones=dice.getrandbits(32)
            )
            for scene in scenes
        ]
        images = pixels([np.asarray(each) for each in painted])
        return images, *self._read(scenes, tokens, grid)

    def loss(self, batch: Any, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        images, *read = batch
        with torch.no_grad(), mixed(images.device):
            latents = self._vae.encode(signed(images)).latent_dist.mean.float()
        share = noise_shares(len(latents))
        share[: round(BLANK_SHARE * len(share))] = 1.0
        share = share.to(latents.device)
        noise = torch.randn_like(latents)
        at = share[:, None, None, None]
        velocity, cost, figures = self._answered((1 - at) * latents + at * noise, share, *read)
        squares = (velocity - (latents - noise)).pow(2).mean(1)
        weights = torch.where(on_things(read[-1]["covered"], squares), self.thing_weight, 1.0)
        apart = squares.mean((1, 2))
        late, early = share < 0.5, share > 0.85
        return (squares * weights).sum() / weights.sum() + cost, {
            "apart": float(apart.detach().mean()),
            "fine": float(apart.detach()[late].mean()) if late.any() else 0.0,
            "rough": float(apart.detach()[early].mean()) if early.any() else 0.0,
            **figures,
        }

    @torch.no_grad()
    def show(self, folder: Path, step: int) -> None:
        drawing = architecture.pipeline(
            self._tokenizer, self._encoder, self._vae, self.model.transformer
        )
        drawing.set_progress_bar_config(disable=True)
        sheet = Image.new("RGB", (4 * 330, 4 * 330), "gray")
        for place, (words, (rows, columns)) in enumerate(EXAMPLES * 2):
            width, height = columns * CELL_PX, rows * CELL_PX
            said = said_by(
                self._encoder,
                torch.tensor([asked(self._tokenizer, words)], device=self._vae.device),
            )[0]
            latents = drawing(
                prompt_embeds=[said],
                width=width,
                height=height,
                num_inference_steps=8,
                guidance_scale=0.0,
                generator=torch.Generator().manual_seed(place),
                output_type="latent",
            ).images
            drawn = self._vae.decode(enlarge(latents, 2 * width, 2 * height)).sample[0]
            tile = picture(drawn)
            tile.thumbnail((320, 320))
            sheet.paste(tile, (place % 4 * 330, place // 4 * 330))
        sheet.save(folder / f"{self.name}-{step:05}.png")


class Repainter(Painter):
    """And goes on with an eye to things, and to scenes that are hard."""

    name = "repainter"
    decay = 0.9
    peak_lr = LEARNING_RATE / 2  # the whole of it spoils sketches, for 1000 steps
    square_share = 0.25
    thing_weight = 4.0

    def _wants(self, scene: Scene, dice: random.Random) -> bool:
        return is_hard(scene) or dice.random() < EASY_SHARE


def is_hard(scene: Scene) -> bool:
    """Whether anything in a scene is small, or a sun: what the painter fails at most."""
    return any(thing.size <= HARD_SIZE or thing.shape is Shape.SUN for thing in scene.things)


def on_things(covered: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Return which cells, N x rows x columns, lie in a patch that a thing touches, or beside one.

    `covered` is the answer to the question of that name, N x patches x numbers.
    """
    count, rows, columns = cells.shape
    touched = covered.amax(-1).view(count, rows // 2, columns // 2).to(cells.device)
    beside = nn.functional.max_pool2d(touched, 3, stride=1, padding=1)
    near: torch.Tensor = beside.repeat_interleave(2, 1).repeat_interleave(2, 2) > 0
    return near


def noise_shares(count: int) -> torch.Tensor:
    """Return how much of each picture is noise, 0 to 1: logit-normal, shifted as when drawing."""
    shift = architecture.SCHEDULER["shift"]
    share = torch.sigmoid(torch.randn(count))
    shifted: torch.Tensor = shift * share / (1 + (shift - 1) * share)
    return shifted


def _begun(model: Any) -> Any:
    """Let every block begin by passing on what it gets with a little of its own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "adaLN_modulation" in name:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
            if "layers" in name or "refiner" in name:
                _, attention, _, feed_forward = module.bias.data.chunk(4)
                attention.fill_(0.4)
                feed_forward.fill_(0.4)
    last = model.all_final_layer["2-1"].linear
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert last.out_features == 4 * LATENT_CHANNELS
    return model
