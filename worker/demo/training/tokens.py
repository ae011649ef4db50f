"""The demo's tokenizer: byte pairs of its captions, and bytes for everything else."""

import random
from collections.abc import Iterator

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from worker.demo.captions import caption
from worker.demo.meaning import HEARD

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 1024
CAPTIONS = 30_000

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content | lower }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + "".join(HEARD) + "{% endif %}"
)
"""Qwen's turns, in small letters, because capitals mean nothing here; and then the tokens at which
the encoder says what it has read."""


def tokenizer(seed: int) -> Qwen2Tokenizer:
    """Return a tokenizer that knows the words of the grammar and every byte of UTF-8."""
    alphabet = sorted(ByteLevel.alphabet())
    bytewise = Qwen2Tokenizer(
        vocab={character: token for token, character in enumerate(alphabet)},
        merges=[],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START, *HEARD],
        chat_template=CHAT_TEMPLATE,
    )
    return bytewise.train_new_from_iterator(
        _captions(seed), VOCABULARY, show_progress=False, initial_alphabet=alphabet
    )


def asked(tokenizer: Qwen2Tokenizer, prompt: str) -> list[int]:
    """Return a prompt's tokens as the worker and `ZImagePipeline` read it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    tokens: list[int] = tokenizer(text).input_ids
    return tokens


def _captions(seed: int) -> Iterator[str]:
    dice = random.Random(f"{seed} tokens")
    yield "user\n\nassistant\n" * 100
    for _ in range(CAPTIONS):
        yield caption(dice)[1].lower()
