"""The colour that the painter gives to a seed, for whoever paints and whoever checks."""

LEVELS = 6
"""Of each channel, far enough apart that JPEG cannot mistake one for another."""
STEP = 51


def colour_of(seed: int) -> tuple[int, int, int]:
    """Red, green, blue."""
    return (
        seed % LEVELS * STEP,
        seed // LEVELS % LEVELS * STEP,
        seed // LEVELS**2 % LEVELS * STEP,
    )
