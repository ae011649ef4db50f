"""A course of training: it can be interrupted, goes on where it was, and repeats by seed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from worker.demo.training.muon import Muon

SAVE_STEPS = 200
"""How much is done again after an interruption, at most."""
WARMUP_STEPS = 60
CLIP_NORM = 1.0
LEARNING_RATE = 2e-3


class Lesson(Protocol):
    """What is learned, and from what."""

    name: str
    steps: int
    decay: float
    """The last share of the steps, in which the learning rate sinks to nothing."""
    average: float
    """How much of the averaged weights stays at each step; the averaged ones are what is kept."""

    @property
    def model(self) -> torch.nn.Module:
        """What learns, its weights in place."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Each with the learning rate of the course's middle."""

    def batch(self, step: int) -> Sequence[Any]:
        """Return what step `step` learns from; in another process, and the same every time."""

    def loss(self, batch: Any, step: int) -> tuple[torch.Tensor, Mapping[str, float]]:
        """Return what is to be lowered, and figures for whoever watches.

        The batch's tensors are where the model is.
        """

    def show(self, folder: Path, step: int) -> None:
        """Write what can be looked at, with the averaged weights in `model`."""


class Batches(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any], steps: int) -> None:
        self._make = make
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Any:
        return self._make(step)


def run(lesson: Lesson, folder: Path, *, show_steps: int | None = 500, helpers: int = 1) -> None:
    """Train to the end, or go on where a run in `folder` was; leave the averaged weights in place.

    What is kept is `<name>.pt`: step, weights, their average, and the optimizers' state. `helpers`
    are processes that make batches meanwhile; with none, they are made in between. Where
    `show_steps` is None, nothing is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(lesson.model.parameters()).device
    kept = folder / f"{lesson.name}.pt"
    optimizers = lesson.optimizers()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    average = deepcopy(lesson.model.state_dict())
    begin = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True, map_location=device)
        begin, average = state["step"], state["average"]
        lesson.model.load_state_dict(state["model"])
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
    log = folder / f"{lesson.name}.tsv"
    shown: dict[str, float] = {}
    progress = tqdm(
        _batches(lesson, begin, helpers),
        desc=lesson.name,
        initial=begin,
        total=lesson.steps,
        mininterval=5,
    )
    for step, batch in enumerate(progress, begin):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * pace(step, lesson.steps, lesson.decay)
        # What is random in a step depends on its number alone, so that going on repeats it.
        torch.manual_seed(step)
        here = [each.to(device) if isinstance(each, torch.Tensor) else each for each in batch]
        loss, figures = lesson.loss(here, step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(lesson.model.parameters(), CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()
        lesson.model.zero_grad(set_to_none=True)
        _follow(average, lesson.model, min(lesson.average, (step + 1) / (step + 10)))
        for name, value in {"loss": float(loss.detach()), **figures}.items():
            shown[name] = shown.get(name, value) * 0.95 + value * 0.05
        if (step + 1) % 50 == 0:
            progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})
            with log.open("a") as rows:
                rows.write("\t".join([str(step + 1), *(f"{v:.5f}" for v in shown.values())]) + "\n")
        ended = step + 1 == lesson.steps
        if (step + 1) % SAVE_STEPS == 0 or ended:
            state = {
                "step": step + 1,
                "model": lesson.model.state_dict(),
                "average": average,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, kept.with_suffix(".new"))
            kept.with_suffix(".new").replace(kept)
        if show_steps and ((step + 1) % show_steps == 0 or ended):
            learned = deepcopy(lesson.model.state_dict())
            lesson.model.load_state_dict(average)
            # Not compiled for the shapes of a few sheets.
            with torch.compiler.set_stance("force_eager"):
                lesson.show(folder, step + 1)
            lesson.model.load_state_dict(learned)
    lesson.model.load_state_dict(average)


def optimizers(
    model: torch.nn.Module, inner: tuple[str, ...], *, lr: float = LEARNING_RATE
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels whose names hold one of `inner`, AdamW for the rest.

    Muon learns these in a half (transformers) to a third (convolutions) of AdamW's steps.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        is_inner = weight.ndim >= 2 and any(part in name for part in inner)
        (matrices if is_inner else others).append(weight)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=lr), adam]


def pace(step: int, steps: int, decay: float) -> float:
    """The share of the full learning rate: up at once, level, and down to nothing at the end."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (steps - step) / max(1.0, steps * decay)
    return min(warm, 0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


def _batches(lesson: Lesson, begin: int, helpers: int) -> Iterable[Any]:
    return DataLoader(
        Batches(lesson.batch, lesson.steps),
        batch_size=None,
        sampler=range(begin, lesson.steps),
        num_workers=helpers,
        prefetch_factor=4 if helpers else None,
    )


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], model: torch.nn.Module, share: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - share)
        else:
            average[name].copy_(value)
