"""What the stages of a worker hand to each other: a prompt as it is read, a drawing, a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image

from storage.tasks import Rewrite

SIDE_STEP_PX = 16
"""The model draws sides in multiples of this: the VAE's factor 8, times patches of 2."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the model reads it, with the turns of the chat around it."""

    tokens: tuple[int, ...]
    """Those that are read."""
    given: int
    """How many there were before the model's limit cut the rest off."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One image to draw. Sizes in pixels, `steps` are denoising steps."""

    reading: Reading
    width: int
    height: int
    seed: int
    steps: int
    on_step: Callable[[int], None]
    """Called after each step with the number done, from 1 again if the drawing begins again. What
    it raises ends this drawing within a step, and no other one of its batch."""


Picture = Callable[[], Image]
"""Gives the RGB image, 8 bit, of exactly the size that was asked for.

May wait for the GPU, so that whoever draws need not: it is called in another thread.
"""


class Pipeline(Protocol):
    def read(self, prompt: str) -> Reading:
        """Return `prompt` in tokens. Needs the CPU only; any thread may call it."""
        ...

    def batch_max(self, width: int, height: int, steps: int) -> int:
        """How many images of this size it pays to draw together; 1 where it does not."""
        ...

    def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
        """Draw images of one size and number of steps, together.

        Each gets its picture or what ended it: what its `on_step` raised, or a ServiceError in
        words for the customer. Only one thread calls this at a time. What is raised is a bug.
        """
        ...


class Rewriter(Protocol):
    def __call__(self, prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        """Return a richer prompt, and the reasoning that led to it.

        `check` is called every so often; what it raises ends the rewriting and comes out of here.
        The same prompt and seed give the same text where the model allows it.

        Raises:
            RewriteFailed: there is no usable text.
        """
        ...
