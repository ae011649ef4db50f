"""What this machine has, in words: for a person who reads what the doctor says."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

MB = 2**20


def machine() -> Iterable[tuple[str, str]]:
    yield "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    yield "processor", _processor()
    yield "cores", str(os.cpu_count())
    if hasattr(os, "sysconf"):
        pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        yield "memory", size(pages * page / MB)


def devices() -> Iterable[tuple[str, str]]:
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{size(found.total_memory / MB)}",
        )
    if torch.cuda.is_available():
        yield "CUDA", f"{torch.version.cuda or torch.version.hip}, driver {_driver()}"
    if torch.backends.mps.is_available():
        yield "mps", "Apple's GPU, which shares the machine's memory"
    yield "cpu", f"{torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    asked = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True)  # noqa: S603  the command is our own
    return answer.stdout.partition("\n")[0] or "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def size(mb: float) -> str:
    return f"{mb / 1024:.1f} GiB" if mb >= 100 else f"{mb:.0f} MiB"
