"""The demo model's shape: the classes of Z-Image-Turbo at a thousandth of its size.

The classes, the scheduler's shift and the latent channels are those of Tongyi-MAI/Z-Image-Turbo;
the sizes are our choice, for two cores. The card beside the weights says what came of it.
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
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

LATENT_CHANNELS = 16

LYING = ((20, 24), (18, 24), (18, 28), (16, 28), (16, 32), (14, 34), (12, 38))
GRIDS = ((22, 22), *LYING, *((columns, rows) for rows, columns in LYING))
"""The canvases, in latent cells, rows and columns: 1:1, 6:5, 4:3, 14:9, 7:4, 2:1, 17:7 and 19:6.

Even numbers, because the transformer reads patches of 2 x 2 cells; at most 128 patches, which it
pads to, so that an image and a prompt of 32 tokens are 160.
"""

TEXT_WIDTH = 128
"""Numbers per token between the text encoder and the transformer."""

TRANSFORMER: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "dim": 192,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [8, 20, 20],  # their sum is dim / n_heads
    "axes_lens": [1024, 512, 512],  # the real one's
}

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 5,  # the last is not heard: the pipeline reads what the one before it says
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}

VAE: dict[str, Any] = {
    # Four blocks halve the size three times: a factor of 8, and sides in multiples of 16.
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    # The first works at full size, where a channel costs most: hence so few.
    "block_out_channels": [8, 16, 48, 96],
    "layers_per_block": 1,
    # One group: with few channels in each, norms would take a plain picture's colour away.
    "norm_num_groups": 1,
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 1.0,  # training leaves the latents with this variance
    "shift_factor": 0.0,
    "sample_size": 512,  # of a tile, where memory is short
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    # The real one has it; its cost grows with the square of the pixels.
    "mid_block_add_attention": False,
}

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift": 3.0,
}


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(**VAE)


def text_encoder(vocabulary: int) -> Qwen3Model:
    """Without a language-model head: the pipeline reads hidden states only."""
    return Qwen3Model(Qwen3Config(**TEXT_ENCODER, vocab_size=vocabulary))


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(**TRANSFORMER)


def parts(model: Path, device: str) -> tuple[Qwen2Tokenizer, Qwen3Model, AutoencoderKL]:
    """Return what a saved model has besides its transformer, in single precision."""
    saved = ZImagePipeline.from_pretrained(
        model,
        transformer=None,
        dtype=torch.float32,
        use_safetensors=True,  # never a pickle, which can run code
    )
    saved.to(device)
    return saved.tokenizer, saved.text_encoder, saved.vae


def pipeline(
    tokenizer: Qwen2Tokenizer,
    encoder: Qwen3Model,
    vae: AutoencoderKL,
    painter: ZImageTransformer2DModel,
) -> ZImagePipeline:
    """Return the parts as what `save_pretrained` writes and the worker draws with."""
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=painter,
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    )
