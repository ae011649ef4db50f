"""The small model that `demo` names, so that the service draws on any machine."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""A folder in diffusers' layout, with a canvas: the classes of Z-Image-Turbo at a thousandth of its
size, about eight million parameters, trained on drawn shapes.

It draws coloured shapes and simple scenes, asked for in English or Chinese, such as "a red star on
a blue background", and nothing else. What loads it, draws with it and crops its images is what
does so with the real weights.
"""
