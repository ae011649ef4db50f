"""What the GPU edge needs to know, read from `ZIMAGE_*` variables."""

from pathlib import Path
from typing import Literal

from pydantic_settings import BaseSettings

from storage.settings import MODEL_CONFIG, load


class WorkerSettings(BaseSettings):
    """Where the model is drawn, and where what it is loaded from is kept."""

    model_config = MODEL_CONFIG

    device: str = "auto"
    """`auto` takes CUDA, else MPS, else the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    data_dir: Path = Path("data")
    """The demo model is made here on first use."""


settings = load(WorkerSettings)
