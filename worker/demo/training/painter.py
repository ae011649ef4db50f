"""The transformer learns to paint: from noise and what the text encoder says, to latents.

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
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Model

from worker.canvas import CELL_PX
from worker.demo import architecture
from worker.demo.architecture import GRIDS, LATENT_CHANNELS
from worker.demo.captions import caption
from worker.demo.meaning import THINGS_MAX
from worker.demo.paint import kept_inside, paint
from worker.demo.scenes import Scene, is_held_out, jittered
from worker.demo.training.autoencoder import enlarged, picture, pixels, signed
from worker.demo.training.course import optimizers
from worker.demo.training.reader import padded, said_by, strange
from worker.demo.training.tokens import asked

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Pictures, N x 3 x rows x columns, 8 bit; tokens, N x L; how many of each are a caption's; where
each patch is as seen from each thing, N x patches x 9 (`around`); and sketches, N x patches x 48.
"""

SQUARE_SHARE = 0.5
"""Of steps that paint squares; the others paint one of the other shapes each."""
SHORT_SHARE = 0.75
"""Of steps with captions of at most 32 tokens, which the transformer pads to."""
TOKENS_SHORT, TOKENS_LONG = 32, 64
LOOKS = 2
"""How often a step looks at each of its pictures, with other noise."""
STRANGE_STEPS = 25
"""Every so manieth step has words around its captions that mean nothing here."""
QUESTIONS = {"where": 0, "around": 2, "sketch": 4}
"""After which layers the transformer is asked where a patch is in the picture, where it is as seen
from the things, and what is to be seen there."""
PLACE_WAVES = 3
SKETCH_PX = 4
"""A patch's side in sketches."""
LOST_WEIGHT, VAGUE_WEIGHT = 0.5, 1.0
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


class Painter:
    name = "painter"
    decay = 0.6
    average = 0.998

    def __init__(
        self,
        tokenizer: Qwen2Tokenizer,
        encoder: Qwen3Model,
        vae: AutoencoderKL,
        *,
        seed: int,
        steps: int,
        pictures: int = 16,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Taught(_begun(architecture.transformer())).to(vae.device)
        self.seed = seed
        self.steps = steps
        self.pictures = pictures
        self._tokenizer = tokenizer
        self._encoder = encoder.eval()
        self._vae = vae.eval()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.model, (".attention.to_", ".feed_forward."))

    def batch(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed} painter {step}")
        rows, columns = GRIDS[0] if dice.random() < SQUARE_SHARE else dice.choice(GRIDS[1:])
        long = dice.random() >= SHORT_SHARE
        images: list[NDArray[np.uint8]] = []
        views: list[NDArray[np.float32]] = []
        sketches: list[NDArray[np.float32]] = []
        tokens: list[list[int]] = []
        while len(images) < self.pictures:
            scene, words = caption(dice)
            if step % STRANGE_STEPS == 0:
                words = f"{words} {strange(dice)}"[:200]
            read = asked(self._tokenizer, words)
            if is_held_out(scene) or len(read) > (TOKENS_LONG if long else TOKENS_SHORT):
                continue
            painted = paint(
                jittered(scene, dice), columns * CELL_PX, rows * CELL_PX, tones=dice.getrandbits(32)
            )
            images.append(np.asarray(painted))
            views.append(around(scene, rows // 2, columns // 2))
            sketches.append(sketch(scene, rows // 2, columns // 2))
            tokens.append(read)
        together, lengths = padded(tokens)
        seen, drawn = (torch.from_numpy(np.stack(each)) for each in (views, sketches))
        return pixels(images), together, lengths, seen, drawn

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        images, tokens, lengths, views, sketches = batch
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            with torch.no_grad():
                latents = self._vae.encode(signed(images)).latent_dist.mean.float()
                said = said_by(self._encoder, tokens).float()
            # To encode a picture costs a quarter of a step: each is looked at more than once.
            latents, said, lengths, views, sketches = (
                each.repeat(LOOKS, *[1] * (each.ndim - 1))
                for each in (latents, said, lengths, views, sketches)
            )
            share = noise_shares(len(latents)).to(latents.device)
            noise = torch.randn_like(latents)
            at = share[:, None, None, None]
            noisy = (1 - at) * latents + at * noise
            captions = [one[:length] for one, length in zip(said, lengths.tolist(), strict=True)]
            answer = torch.stack(
                self.model(
                    list(noisy[:, :, None].unbind(0)), 1 - share, captions, return_dict=False
                )[0]
            ).float()[:, :, 0]
        apart = (answer - (latents - noise)).pow(2).mean((1, 2, 3))
        spots = places(*latents.shape[-2:]).to(latents.device)
        lost, vague = self.model.asked(spots, views, sketches)
        late, early = share < 0.5, share > 0.85
        return apart.mean() + LOST_WEIGHT * lost + VAGUE_WEIGHT * vague, {
            "apart": float(apart.detach().mean()),
            "lost": float(lost.detach()),
            "vague": float(vague.detach()),
            "fine": float(apart.detach()[late].mean()) if late.any() else 0.0,
            "rough": float(apart.detach()[early].mean()) if early.any() else 0.0,
        }

    @torch.no_grad()
    def show(self, folder: Path, step: int) -> None:
        drawing = architecture.pipeline(
            self._tokenizer, self._encoder, self._vae, self.model.transformer
        )
        drawing.set_progress_bar_config(disable=True)
        sheet = Image.new("RGB", (4 * 330, 4 * 330), "gray")
        for place, (words, (rows, columns)) in enumerate(EXAMPLES * 2):
            said = said_by(
                self._encoder,
                torch.tensor([asked(self._tokenizer, words)], device=self._vae.device),
            )[0]
            latents = drawing(
                prompt_embeds=[said],
                width=columns * CELL_PX,
                height=rows * CELL_PX,
                num_inference_steps=8,
                guidance_scale=0.0,
                generator=torch.Generator().manual_seed(place),
                output_type="latent",
            ).images
            drawn = self._vae.decode(enlarged(latents, rows * 2, columns * 2)).sample[0]
            tile = picture(drawn)
            tile.thumbnail((320, 320))
            sheet.paste(tile, (place % 4 * 330, place // 4 * 330))
        sheet.save(folder / f"painter-{step:05}.png")


class Taught(nn.Module):
    """The transformer while it learns: it is also asked where each patch is, and for a sketch.

    However much noise there is, it then learns from every picture what was asked for looks like:
    from noisy latents alone, shapes were blobs for a thousand steps. What answers is thrown away.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        width = architecture.TRANSFORMER["dim"]
        self.where = nn.Linear(width, 2 * PLACE_WAVES)
        self.around = nn.Linear(width, 3 * THINGS_MAX)
        self.sketch = nn.Linear(width, 3 * SKETCH_PX**2)
        self._heard: dict[str, torch.Tensor] = {}
        for name, layer in QUESTIONS.items():
            transformer.layers[layer].register_forward_hook(self._hear(name))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.transformer(*inputs, **options)

    def asked(
        self, places: torch.Tensor, views: torch.Tensor, sketches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how wrong the last forward pass was about where patches are, and in its sketch."""
        patches = len(places)
        where, around, sketch = (
            getattr(self, name)(self._heard[name][:, :patches].float()) for name in QUESTIONS
        )
        lost = (where - places).pow(2).mean() + (around - views).pow(2).mean()
        return lost, (sketch - sketches).pow(2).mean()

    def _hear(self, name: str) -> Any:
        def hear(_: nn.Module, __: Any, said: torch.Tensor) -> None:
            self._heard[name] = said

        return hear


def places(rows: int, columns: int) -> torch.Tensor:
    """Return where each patch of a grid of cells is in the whole, as waves: patches x 2 waves."""
    down = (torch.arange(rows // 2) + 0.5) / (rows // 2)
    across = (torch.arange(columns // 2) + 0.5) / (columns // 2)
    spots = torch.cartesian_prod(down, across)
    waves = torch.pi * torch.arange(1, PLACE_WAVES + 1)
    return torch.cos(spots[:, :, None] * waves).flatten(1)


def around(scene: Scene, rows: int, columns: int) -> NDArray[np.float32]:
    """Return how each patch lies to each thing that was asked for, patches x 9.

    Of each thing: how near its middle is, and how far to the right of it and below it the patch is,
    in sizes of the thing, from -1 to 1. Of a thing that is not there: zeros.
    """
    seen = np.zeros((rows, columns, THINGS_MAX, 3), np.float32)
    for place, thing in enumerate(scene.things):
        x, y = kept_inside(thing, columns, rows)
        half = thing.size / 2 * min(rows, columns)
        right = ((np.arange(columns) + 0.5) - x * columns)[None, :] / half
        below = ((np.arange(rows) + 0.5) - y * rows)[:, None] / half
        seen[:, :, place, 0] = np.exp(-(right**2 + below**2))
        seen[:, :, place, 1] = np.tanh(right)
        seen[:, :, place, 2] = np.tanh(below)
    return seen.reshape(rows * columns, -1)


def sketch(scene: Scene, rows: int, columns: int) -> NDArray[np.float32]:
    """Return what is to be seen in each patch, patches x 48: 4 x 4 pixels of RGB from -1 to 1."""
    painted = np.asarray(paint(scene, columns * SKETCH_PX, rows * SKETCH_PX), np.float32)
    tiles = painted.reshape(rows, SKETCH_PX, columns, SKETCH_PX, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, -1) / 127.5 - 1


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
