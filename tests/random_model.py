"""A model of Z-Image-Turbo's classes at a 3,500th of its size, with random weights, for tests.

What it draws is texture, and another one for every prompt, seed and size: what loads, calls and
crops a model is tested with it, in about a second. The classes, the scheduler's shift and the VAE's
scaling are those of Tongyi-MAI/Z-Image-Turbo; the sizes are our choice.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from benchmarks import byte_tokens

TEXT_WIDTH = 64
"""Numbers per token between the text encoder and the transformer."""

LATENT_CHANNELS = 16

TRANSFORMER: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [16, 16, 16],  # their sum is dim / n_heads
    "axes_lens": [1024, 512, 512],  # the real one's: up to 8192 px a side
}

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": byte_tokens.VOCABULARY_SIZE,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,  # the pipeline cuts at 512 tokens
}

VAE: dict[str, Any] = {
    # Four blocks halve the size three times: a factor of 8, and sides in multiples of 16.
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    # The first works at full size, where a channel costs most: hence so few.
    "block_out_channels": [8, 16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    # The real one has it; its cost grows with the square of the pixels.
    "mid_block_add_attention": False,
}


def assemble(seed: int) -> ZImagePipeline:
    """Return the pipeline in memory, its weights drawn from `seed`, on the CPU in float32."""
    # The layers draw their weights from the process's own generator: give it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZImagePipeline(
            transformer=ZImageTransformer2DModel(**TRANSFORMER),
            # Without a language-model head: the pipeline reads hidden states only.
            text_encoder=Qwen3Model(Qwen3Config(**TEXT_ENCODER)),
            vae=AutoencoderKL(**VAE),
            tokenizer=byte_tokens.tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                num_train_timesteps=1000, use_dynamic_shifting=False, shift=3.0
            ),
        )


def build(folder: Path) -> Path:
    """Write what `assemble(0)` returns to `folder` in diffusers' layout, 7 MB, and return it."""
    assemble(0).save_pretrained(folder)
    return folder
