"""What the demo learns in: bfloat16 where the device multiplies in it, float32 elsewhere.

It was seen to learn so on processors, and on no GPU yet.
"""

import torch

from worker.precision import multiplies_bfloat16


def fast(device: torch.device) -> torch.dtype:
    """Return what matrices are multiplied in on `device`."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def mixed(device: torch.device) -> torch.autocast:
    """Return a context in which layers multiply in what is fast on `device`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=multiplies_bfloat16(device))
