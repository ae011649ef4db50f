"""What devices multiply in."""

import torch

CPU_ABILITIES = ("amx_bf16", "avx512_bf16", "bf16")
"""As torch calls what multiplies bfloat16 on processors of Intel, AMD and ARM."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for it: emulated, float32 is many times as fast.

    NVIDIA's GPUs have them from Ampere on; on Apple's torch has the type from macOS 14 on.
    """
    match device.type:
        case "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        case "mps":
            return torch.backends.mps.is_macos_or_newer(14, 0)
        case "cpu":
            abilities = torch.cpu.get_capabilities()
            return any(abilities.get(name, False) for name in CPU_ABILITIES)
        case _:
            return False
