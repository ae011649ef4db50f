"""The doctor says what there is, what it costs and how fast it is, and needs no servers for it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests import random_model
from worker import doctor
from worker.doctor import advice, chosen
from worker.footprint import MB, Footprint, footprint
from worker.settings import WorkerSettings
from worker.switches import SAFE, Switches

if TYPE_CHECKING:
    from tests.warm import Warm

REAL = "Tongyi-MAI/Z-Image-Turbo"
COST = Footprint(
    parts={"text_encoder": 7_700, "transformer": 11_700, "vae": 160},
    largest_tensor=750,
    activations=2_100,
)
"""About the real model's."""


def advised(
    gpu_mb: int,
    *,
    model: str = REAL,
    device: str = "cuda:0",
    switches: Switches = SAFE,
    gpus: int = 1,
) -> str:
    return " ".join(
        advice(
            model,
            device,
            switches,
            COST,
            gpus=gpus,
            processes=1,
            memory_mb={"used": 0, "peak": 0, "total": gpu_mb},
        )
    )


# --- The whole ----------------------------------------------------------------------------------


def test_without_any_server_it_tells_everything_and_draws(warm_model: Warm) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")}
    sizes = {"ZIMAGE_WARMUP_SIZES": '["64x64"]'}
    told = warm_model.run("-m", "worker", "doctor", env=bare | sizes)
    titles = [line for line in told.stdout.splitlines() if line and not line.startswith(" ")]

    assert told.returncode == 0, told.stderr
    assert titles[:7] == [
        "Machine",
        "Devices",
        "Versions",
        "Settings",
        "Attention",
        "Memory, estimated",
        "One image",
    ]
    assert titles[7].startswith("Advice: the demo model draws coloured shapes")
    assert f"torch         {torch.__version__}" in told.stdout
    assert "_native_flash, _native_math" in told.stdout
    assert "  64x64  " in told.stdout
    assert told.stderr == ""


def test_what_cannot_be_loaded_is_one_sentence_and_a_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unfit = WorkerSettings(device="cpu", offload="model")

    assert doctor.examine("demo", unfit) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("The model 'demo' could not be loaded from")
    assert "ZIMAGE_OFFLOAD=model needs a GPU" in last


def test_a_folder_that_is_no_model_is_one_sentence_and_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.examine(str(tmp_path), WorkerSettings(device="cpu")) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("The model ")


# --- What will be used --------------------------------------------------------------------------


def test_settings_are_told_as_they_will_be_used_and_where_they_are_not_the_default() -> None:
    told = dict(chosen("demo", WorkerSettings(offload="model", dtype="float32"), "cuda", "float32"))

    assert told["ZIMAGE_DEVICE"] == "cuda  (auto)"
    assert told["ZIMAGE_DTYPE"] == "float32  (default: auto)"
    assert told["ZIMAGE_OFFLOAD"] == "model  (default: none)"
    assert told["ZIMAGE_COMPILE"] == "false"
    assert told["ZIMAGE_WARMUP_SIZES"] == "by the device"


# --- What it costs ------------------------------------------------------------------------------


def cost(folder: Path, switches: Switches = SAFE, bytes_per_number: int = 4) -> Footprint:
    return footprint(
        folder, bytes_per_number=bytes_per_number, switches=switches, sizes=[(64, 64), (1024, 512)]
    )


def test_the_headers_of_the_files_say_what_the_weights_will_take(tmp_path: Path) -> None:
    folder = random_model.build(tmp_path / "model")
    assembled = random_model.assemble(0)

    def mb(part: str, bytes_per_number: int) -> float:
        numbers: int = sum(w.numel() for w in getattr(assembled, part).parameters())
        return numbers * bytes_per_number / MB

    for bytes_per_number in (2, 4):
        found = cost(folder, bytes_per_number=bytes_per_number)
        assert set(found.parts) == {"text_encoder", "transformer", "vae"}
        for part, part_mb in found.parts.items():
            assert part_mb - 1 < mb(part, bytes_per_number) <= part_mb


def test_the_largest_size_counts_at_the_width_of_the_decoders_end(tmp_path: Path) -> None:
    folder = random_model.build(tmp_path / "model")

    assert cost(folder).activations == 4 * 16 * 1024 * 512 * 4 // MB


def test_quantised_layers_take_a_byte_and_a_model_in_shards_is_read_whole(tmp_path: Path) -> None:
    part = tmp_path / "transformer"
    part.mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [8, 16]}')
    names = ["layers.0.attention.to_q.weight", "t_embedder.mlp.0.weight"]
    for number, name in enumerate(names):
        header = json.dumps({"__metadata__": {}, name: {"shape": [1024, 1024]}}).encode()
        (part / f"{number}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    shards = {name: f"{number}.safetensors" for number, name in enumerate(names)}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    assert cost(tmp_path).parts == {"transformer": 8}
    assert cost(tmp_path, Switches(quantization="int8")).parts == {"transformer": 5}


# --- What it advises ----------------------------------------------------------------------------


def test_a_gpu_that_is_too_small_is_told_what_would_fit() -> None:
    assert "ZIMAGE_OFFLOAD" not in advised(24 * 1024)
    assert "16.0 GiB, which is too little: set ZIMAGE_OFFLOAD=model" in advised(16 * 1024)
    assert "set ZIMAGE_OFFLOAD=sequential" in advised(8 * 1024)
    assert "too little for the model in any mode" in advised(2 * 1024)


def test_offload_is_advised_against_where_all_fits() -> None:
    assert "ZIMAGE_OFFLOAD=none is faster" in advised(80 * 1024, switches=Switches(offload="model"))
    assert "ZIMAGE_OFFLOAD" not in advised(16 * 1024, switches=Switches(offload="model"))


def test_gpus_that_are_idle_a_cpu_and_the_demo_are_pointed_out() -> None:
    assert "4 GPUs and uses 1: set ZIMAGE_DEVICE=all" in advised(80 * 1024, gpus=4)
    assert "takes minutes" in advised(80 * 1024, device="cpu")
    assert "ZIMAGE_MODEL=" in advised(80 * 1024, model="demo")
