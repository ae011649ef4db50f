"""The autoencoder learns to keep a picture in latents, and to draw it from them at any size.

Latents are enlarged before they are decoded, so the decoder is shown enlarged latents and the
picture as it is at that size: it learns where edges are, not how blurred they were. Noise on the
latents teaches it to forgive the transformer's small errors.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from worker.canvas import CELL_PX, enlarge
from worker.demo import architecture
from worker.demo.paint import Window, kept_inside, paint
from worker.demo.scenes import Background, Colour, Ground, Scene, Shape, Sky, Thing
from worker.demo.training.course import optimizers
from worker.demo.training.precision import mixed

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""Whole pictures, N x 3 x S x S, and of each a crop at a larger size, N x 3 x K x K, both 8
bit; the crops' first row and column in enlarged cells, N x 2; and how much they are enlarged."""

KERNELS = ("conv_in", "conv1", "conv2", "conv_shortcut", "samplers")
NOISE_MAX = 0.3
"""On latents of variance 1."""
SUN_SIZES = (0.2, 0.45)
"""As captions ask for, of the picture's shorter side."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What a stretch of the training looks at."""

    until: float
    """The share of all steps at which it ends."""
    images: int
    side_cells: int
    """Of the canvas."""
    crop_cells: int
    scales: tuple[float, ...]
    """How much latents are enlarged."""
    aimed: float = 0.0
    """The share of crops that lie on a thing: of large pictures, most show nothing else."""
    suns: float = 0.0
    """The share of things that are made suns."""


PHASES = (
    Phase(0.42, 24, 8, 8, (1.0,)),  # small and many: what a picture is at all
    Phase(0.88, 12, 16, 16, (1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)),
    Phase(1.0, 5, 16, 32, (2.0, 2.0, 4.0, 8.0)),  # large crops, as the worker's pictures are large
)
FINER_PHASES: tuple[Phase, ...] = (
    Phase(1.0, 10, 22, 16, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),  # the canvas that will be painted on
)
FINEST_PHASES: tuple[Phase, ...] = (
    Phase(1.0, 12, 16, 16, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), aimed=0.8),
    Phase(1.0, 8, 22, 16, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), aimed=0.8),
)
"""One or the other, by chance."""


class Autoencoder:
    name = "autoencoder"
    phases: tuple[Phase, ...] = PHASES
    decay = 0.6
    average = 0.995

    def __init__(self, *, seed: int, steps: int, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.model = architecture.autoencoder().to(device)
        # torch's own first weights let signals fade: with them nothing was learned in 250 steps.
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.seed = seed
        self.steps = steps

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers(self.model, KERNELS)

    def batch(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed} {self.name} {step}")
        return crops(dice, self.phase(step, dice))

    def phase(self, step: int, dice: random.Random) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.steps)

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        wholes, pieces, _, _ = batch
        with mixed(wholes.device):
            latents = self.model.encode(signed(wholes)).latent_dist.mean.float()
            drawn = drawn_from(self.model, latents, batch)
        apart, edges = differences(drawn, signed(pieces))
        # Every channel with mean 0 and variance 1: what the noise and the transformer expect.
        spread = latents.pow(2).mean((0, 2, 3)).sub(1).pow(2).mean()
        middle = latents.mean((0, 2, 3)).pow(2).mean()
        loss = apart + edges + 0.1 * (spread + middle)
        return loss, {"apart": float(apart.detach()), "spread": float(spread.detach())}

    @torch.no_grad()
    def show(self, folder: Path, step: int) -> None:
        show(self.model, folder / f"{self.name}-{step:05}.png")


class Finer(Autoencoder):
    """The autoencoder once more, on the canvas that the transformer will paint on."""

    name = "finer"
    phases: tuple[Phase, ...] = FINER_PHASES
    decay = 0.9

    def __init__(self, vae: AutoencoderKL, *, seed: int, steps: int) -> None:
        self.model = vae
        self.seed = seed
        self.steps = steps


class Finest(Finer):
    """And once more, where things are: what is left to learn are their corners."""

    name = "finest"
    phases = FINEST_PHASES
    decay = 0.5

    def phase(self, step: int, dice: random.Random) -> Phase:
        return dice.choice(self.phases)


class Suns(Finest):
    """And suns, whose rays are the smallest that anything has: they were drawn as discs."""

    name = "suns"
    phases = tuple(replace(phase, suns=0.6) for phase in FINEST_PHASES)
    decay = 0.9


@torch.no_grad()
def show(vae: AutoencoderKL, file: Path) -> None:
    """Write scenes as painted at 512 x 512, and below each what is drawn from its latents."""
    dice = random.Random(1)
    sheet = Image.new("RGB", (6 * 512, 2 * 512))
    for place in range(6):
        scene, tones = anything(dice), dice.getrandbits(32)
        whole = pixels([np.asarray(paint(scene, 176, 176, tones=tones))])
        latents = vae.encode(signed(whole).to(vae.device)).latent_dist.mean
        drawn = vae.decode(enlarge(latents, 512, 512)).sample[0]
        sheet.paste(paint(scene, 512, 512, tones=tones), (place * 512, 0))
        sheet.paste(picture(drawn), (place * 512, 512))
    sheet.save(file)


def drawn_from(vae: AutoencoderKL, latents: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the batch's crops as drawn from noisy, enlarged latents, -1 to 1."""
    wholes, pieces, corners, scale = batch
    side_px = int(wholes.shape[-1] // CELL_PX * scale) * CELL_PX
    span = pieces.shape[-1] // CELL_PX
    noise = torch.rand(len(latents), 1, 1, 1, device=latents.device) * NOISE_MAX
    noisy = enlarge(latents + noise * torch.randn_like(latents), side_px, side_px)
    seen = torch.stack(
        [
            one[:, row : row + span, column : column + span]
            for one, (row, column) in zip(noisy, corners.tolist(), strict=True)
        ]
    )
    drawn: torch.Tensor = vae.decode(seen.to(memory_format=torch.channels_last)).sample.float()
    return drawn


def differences(drawn: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far values are apart in the mean, and their changes from pixel to pixel."""
    across, down = (
        (drawn.diff(dim=axis) - wanted.diff(dim=axis)).abs().mean() for axis in (-1, -2)
    )
    return (drawn - wanted).abs().mean(), across + down


def crops(dice: random.Random, phase: Phase) -> Batch:
    """Paint what one step looks at."""
    scale = dice.choice(phase.scales)
    canvas, side = phase.side_cells * CELL_PX, int(phase.side_cells * scale)
    last = side - phase.crop_cells
    crop_px = phase.crop_cells * CELL_PX
    wholes, pieces, corners = [], [], []
    for _ in range(phase.images):
        scene, tones = anything(dice), dice.getrandbits(32)
        # Where nothing is asked of chance no dice are thrown, so that a course stays as it was.
        if phase.suns:
            scene = _with_suns(scene, phase.suns, dice)
        if phase.aimed and dice.random() < phase.aimed:
            row, column = (
                min(last, max(0, round(cell - phase.crop_cells / 2)))
                for cell in _somewhere_on(dice.choice(scene.things), side, dice)
            )
        else:
            row, column = dice.randint(0, last), dice.randint(0, last)
        crop = Window(column * CELL_PX, row * CELL_PX, crop_px, crop_px)
        wholes.append(np.asarray(paint(scene, canvas, canvas, tones=tones)))
        enlarged = side * CELL_PX
        pieces.append(np.asarray(paint(scene, enlarged, enlarged, tones=tones, window=crop)))
        corners.append((row, column))
    return pixels(wholes), pixels(pieces), torch.tensor(corners), scale


def _somewhere_on(thing: Thing, side: int, dice: random.Random) -> tuple[float, float]:
    """Return a row and a column in a thing's box, of a picture of `side` x `side`."""
    x, y = kept_inside(thing, side, side)
    half = thing.size / 2
    return (y + dice.uniform(-half, half)) * side, (x + dice.uniform(-half, half)) * side


def _with_suns(scene: Scene, share: float, dice: random.Random) -> Scene:
    things = [
        replace(thing, shape=Shape.SUN, size=dice.uniform(*SUN_SIZES))
        if dice.random() < share
        else thing
        for thing in scene.things
    ]
    return replace(scene, things=tuple(things))


def anything(dice: random.Random) -> Scene:
    """Return a scene of up to four things anywhere: more than captions say."""
    things = tuple(
        Thing(
            dice.choice(list(Shape)),
            dice.choice(list(Colour)),
            dice.uniform(0.12, 0.65),
            dice.random(),
            dice.random(),
            dice.uniform(-12, 12),
        )
        for _ in range(dice.choice((1, 1, 2, 3, 4)))
    )
    first, last = dice.choice(list(Colour)), dice.choice(list(Colour))
    ground = dice.choice([Ground.PLAIN] * 4 + list(Ground))
    return Scene(Background(ground, first, last, dice.choice(list(Sky))), things)


def pixels(images: list[np.ndarray]) -> torch.Tensor:
    """Return images, rows x columns x 3, as one tensor, N x 3 x rows x columns, 8 bit."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def signed(images: torch.Tensor) -> torch.Tensor:
    """Return 8-bit pixels as the autoencoder knows them: -1 to 1."""
    return (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def picture(values: torch.Tensor) -> Image.Image:
    """Return decoded values, 3 x rows x columns from -1 to 1, as an image."""
    eight_bit = ((values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(eight_bit.permute(1, 2, 0).cpu().numpy())
