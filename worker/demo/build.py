"""The demo model: the classes of Z-Image-Turbo at a 3,500th of its size, with random weights.

It draws coloured texture, no picture of anything, on two cores in about a second. What loads, calls
and crops the real weights is thereby the code that runs on every machine and in every test.

The classes, the scheduler's shift and the VAE's scaling are those of Tongyi-MAI/Z-Image-Turbo; the
sizes are our choice.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

RECIPE = 1
"""Counts up when anything below changes what is built, so that no older folder is taken for it."""

TEXT_WIDTH = 64
"""Numbers per token between the text encoder and the transformer."""

LATENT_CHANNELS = 16

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)
"""One token per byte of UTF-8: every language and every emoji, and nothing to learn."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's turns. The pipeline passes `enable_thinking=True`, which adds nothing in Qwen's either."""

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
    "vocab_size": VOCABULARY_SIZE,
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

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift": 3.0,
}


def ensure(folder: Path) -> Path:
    """Return the demo model's own folder inside `folder`, built first where it is missing.

    Folders of other recipes stay: another version of the service may be drawing with them.
    """
    model = folder / f"zimage-demo-{RECIPE}"
    if not _is_built(model):
        build(model)
    return model


def build(folder: Path, *, seed: int = 0) -> None:
    """Write the demo model to `folder` in diffusers' layout: 1.7 M float32 weights, 7 MB.

    The same seed gives the same bytes. The folder appears whole or not at all. One that is built
    already, by another process that was faster say, is left as it is.

    Raises:
        OSError: the folder cannot be written, or holds something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, because a rename is atomic only within one file system.
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        model = Path(unfinished) / folder.name
        assemble(seed).save_pretrained(model)
        _share(model)
        try:
            model.rename(folder)
        except OSError:
            if not _is_built(folder):
                raise


def assemble(seed: int) -> ZImagePipeline:
    """Return the demo pipeline in memory, its weights drawn from `seed`, on the CPU in float32."""
    # The layers draw their weights from the process's own generator: give it back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZImagePipeline(
            transformer=ZImageTransformer2DModel(**TRANSFORMER),
            # Without a language-model head: the pipeline reads hidden states only.
            text_encoder=Qwen3Model(Qwen3Config(**TEXT_ENCODER)),
            vae=AutoencoderKL(**VAE),
            tokenizer=_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        )


def _tokenizer() -> Qwen2Tokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab={character: token for token, character in enumerate(alphabet)},
        merges=[],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
    )


def _is_built(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _share(folder: Path) -> None:
    """Let whoever may read the configuration read the weights too.

    safetensors writes files that only their owner can read; a model that root built into an image
    could then not be loaded by the user that the image runs as.
    """
    mode = (folder / "model_index.json").stat().st_mode
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(mode)
