"""This machine's clock against the database's, which all others go by.

Image URLs are signed by this machine's clock: one that is wrong makes URLs that have ended before
they begin, and an image store that looks at the time takes nothing from it.
"""

from datetime import UTC, datetime

OFF_MAX_S = 30
"""Less than an image outlives its URL by, and than any S3 server minds."""
LOOK_AGAIN_S = 10
"""How often a worker whose clock is wrong looks whether it still is."""


class ClockWrong(Exception):
    """This machine's clock is too far from the database's."""

    def __init__(self, off_s: float) -> None:
        super().__init__(f"the clock of this machine is {off_s:+.0f} s off the database's")


def check(moment: datetime) -> None:
    """Compare with a moment that the database has just named. Raises: ClockWrong."""
    off_s = (datetime.now(UTC) - moment).total_seconds()
    if abs(off_s) > OFF_MAX_S:
        raise ClockWrong(off_s)
