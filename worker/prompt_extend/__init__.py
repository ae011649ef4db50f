"""Prompt extension: a language model thinks about a prompt and writes a richer one to be drawn.

encoder   the pipeline's own text encoder, a whole language model: it costs no more memory
endpoint  any OpenAI-compatible endpoint: it costs the GPU nothing
"""

from typing import Any

from worker.drawing import Rewriter
from worker.prompt_extend.encoder import EncoderRewriter, Lock
from worker.prompt_extend.endpoint import EndpointRewriter
from worker.settings import WorkerSettings

__all__ = ["EncoderRewriter", "EndpointRewriter", "concurrency", "of_settings"]

ENDPOINT_CONCURRENCY = 4


def of_settings(
    settings: WorkerSettings, text_encoder: Any, tokenizer: Any, lock: Lock
) -> Rewriter:
    """The rewriter that `settings` ask for; the rest is the pipeline's, for `EncoderRewriter`."""
    if settings.rewrite_url is None:
        return EncoderRewriter(
            text_encoder,
            tokenizer,
            lock=lock,
            reasoning_tokens_max=settings.rewrite_reasoning_tokens_max,
            tokens_max=settings.rewrite_tokens_max,
            timeout_s=settings.rewrite_timeout_s,
        )
    key = settings.rewrite_api_key
    return EndpointRewriter(
        str(settings.rewrite_url),
        model=settings.rewrite_model,
        api_key=None if key is None else key.get_secret_value(),
        reasoning_tokens_max=settings.rewrite_reasoning_tokens_max,
        tokens_max=settings.rewrite_tokens_max,
        timeout_s=settings.rewrite_timeout_s,
    )


def concurrency(settings: WorkerSettings) -> int:
    """How many prompts it pays to rewrite at a time."""
    return 1 if settings.rewrite_url is None else ENDPOINT_CONCURRENCY
