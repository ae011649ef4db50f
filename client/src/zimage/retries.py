"""When a request is worth sending again, and after which pause."""

import random
from dataclasses import dataclass

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
RETRY_AFTER_MAX_S = 120.0
"""A service that asks for a longer pause is not waited for: the caller should know instead."""


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how patiently; pauses grow from `pause_min_s` to `pause_max_s`."""

    retries_max: int = 4
    pause_min_s: float = 0.5
    pause_max_s: float = 8.0
    retry_after_max_s: float = RETRY_AFTER_MAX_S

    def pause_s(self, retries_done: int, retry_after_s: float | None) -> float | None:
        """Seconds to wait before the next retry; None: give up.

        Drawn at random up to a bound that doubles, and added to what the service asked for, so
        that clients refused together do not come back together.
        """
        asked_s = retry_after_s or 0.0
        if retries_done >= self.retries_max or asked_s > self.retry_after_max_s:
            return None
        bound_s = min(self.pause_max_s, self.pause_min_s * 2 ** (retries_done + 1))
        return asked_s + random.uniform(self.pause_min_s, bound_s)  # noqa: S311 (no secret)
