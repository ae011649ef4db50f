"""A tokenizer that needs no file: one token per byte of UTF-8, and Qwen's turns around a prompt.

For models with random weights: every language and every emoji, and nothing to learn.
"""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

VOCABULARY_SIZE = 256 + 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The pipeline passes `enable_thinking=True`, which adds nothing in Qwen's own either."""


def tokenizer(*special: str) -> Qwen2Tokenizer:
    """The words in `special` are one token each, after those of the bytes and the turns."""
    return Qwen2Tokenizer(
        vocab={character: token for token, character in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START, *special],
        chat_template=CHAT_TEMPLATE,
    )
