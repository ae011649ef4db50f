"""What the demo learns in: bfloat16 where the processor multiplies in it, float32 elsewhere."""

import torch

CPU_ABILITIES = ("amx_bf16", "avx512_bf16", "bf16")
"""As torch calls what multiplies bfloat16 on processors of Intel, AMD and ARM."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for it: emulated, a step takes twenty times as long."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    abilities = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(abilities.get(name, False) for name in CPU_ABILITIES)


def fast(device: torch.device) -> torch.dtype:
    """Return what matrices are multiplied in on `device`."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def mixed(device: torch.device) -> torch.autocast:
    """Return a context in which layers multiply in what is fast on `device`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=multiplies_bfloat16(device))
