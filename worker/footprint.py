"""What a model will cost in memory, from its files: their headers say what they hold."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.switches import QUANTISED, Switches

MB = 2**20
DECODER_TENSORS = 4
"""How many of the decoder's largest tensors are there at once (our estimate): what a layer reads,
writes and adds, and room for its convolution."""


@dataclass(frozen=True)
class Footprint:
    """In MiB."""

    parts: dict[str, int]
    """The weights of each part of the pipeline, once they are loaded and quantised."""
    largest_tensor: int
    activations: int
    """At the largest size that is drawn, where most is needed: at the end of the decoder."""

    @property
    def weights(self) -> int:
        return sum(self.parts.values())

    def peak(self, offload: str) -> int:
        """An estimate of what the device must hold at once."""
        resident = {
            "none": self.weights,
            "model": max(self.parts.values()),
            "sequential": self.largest_tensor,
        }
        return resident[offload] + self.activations


def footprint(
    folder: Path, *, bytes_per_number: int, switches: Switches, sizes: list[tuple[int, int]]
) -> Footprint:
    """Read what the model in `folder` will cost at one image of the largest of `sizes`, in pixels.

    Raises:
        OSError, ValueError, KeyError: the folder is not a model in diffusers' layout.
    """
    parts: dict[str, int] = {}
    largest = 0
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        tensors = [
            _bytes(name, numbers, bytes_per_number, quantised=switches.quantization != "none")
            for file in _weight_files(part)
            for name, numbers in _tensors(file).items()
        ]
        if tensors:
            parts[part.name] = math.ceil(sum(tensors) / MB)
            largest = max(largest, *tensors)
    vae = json.loads((folder / "vae" / "config.json").read_text())
    # Channels fall from right to left; the second from the left is the widest at full size.
    channels = vae["block_out_channels"][:2][-1]
    pixels = max(width * height for width, height in sizes)
    return Footprint(
        parts=parts,
        largest_tensor=math.ceil(largest / MB),
        activations=math.ceil(DECODER_TENSORS * channels * pixels * bytes_per_number / MB),
    )


def _bytes(name: str, numbers: int, bytes_per_number: int, *, quantised: bool) -> int:
    if quantised and any(part in name for part in QUANTISED):
        return numbers
    return numbers * bytes_per_number


def _weight_files(part: Path) -> list[Path]:
    for index in sorted(part.glob("*.safetensors.index.json")):
        return [
            part / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})
        ]
    return sorted(part.glob("*.safetensors"))[:1]


def _tensors(file: Path) -> dict[str, int]:
    """Numbers by the name of their tensor. Source: the format of safetensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: math.prod(tensor["shape"]) for name, tensor in header.items()}
