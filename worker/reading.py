"""A prompt as the model reads it: tokens, and embeddings, kept for when it comes again."""

import torch
from cachetools import LRUCache
from diffusers import ZImagePipeline
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF

from worker.drawing import Reading

MB = 2**20


class Reader:
    """The pipeline's tokenizer and text encoder, used as `ZImagePipeline` uses them.

    `read` may be called by any thread, the rest by one at a time.
    """

    def __init__(
        self, pipeline: ZImagePipeline, *, device: str, tokens_max: int, cache_mb: int
    ) -> None:
        bearable = _tokens_bearable(pipeline)
        if tokens_max > bearable:
            raise ValueError(
                f"prompt_tokens_max is {tokens_max}, but this model bears {bearable} tokens at most"
            )
        self._pipeline = pipeline
        self._device = device
        self._tokens_max = tokens_max
        self._kept: LRUCache[tuple[int, ...], torch.Tensor] = LRUCache(
            cache_mb * MB, getsizeof=lambda embeddings: embeddings.nbytes
        )
        # Takes off whatever truncation or padding the tokenizer's file set. From here on nobody
        # changes them, and many threads may use it: a change under way makes the others fail.
        self.read("")

    def read(self, prompt: str) -> Reading:
        tokenizer = self._pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,  # as the pipeline does; in Qwen's template it adds nothing
        )
        tokens = tokenizer(text, verbose=False).input_ids
        return Reading(tokens=tuple(tokens[: self._tokens_max]), given=len(tokens))

    def embed(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Return what the transformer is given for a prompt: tokens x width, on the device.

        Each prompt is encoded alone and without padding. The pipeline pads to 512 on the right,
        which a causal model's tokens cannot see: the same numbers for a fraction of the work.
        """
        embeddings = self._kept.get(tokens)
        if embeddings is None:
            embeddings = self._encode(tokens)
            if embeddings.nbytes <= self._kept.maxsize:
                self._kept[tokens] = embeddings
        return embeddings

    def forget(self) -> None:
        """Give back the memory of all embeddings."""
        self._kept.clear()

    def _encode(self, tokens: tuple[int, ...]) -> torch.Tensor:
        encoder = self._pipeline.text_encoder
        # What brings offloaded weights back hangs on the whole model, and we call a part of it: the
        # head of a Qwen3ForCausalLM would compute 150 000 logits a token, for nobody.
        hook = getattr(encoder, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(encoder)
        read = encoder.base_model(
            input_ids=torch.tensor([tokens], device=self._device),
            output_hidden_states=True,
            use_cache=False,
        )
        embeddings: torch.Tensor = read.hidden_states[-2][0]
        return embeddings


def _tokens_bearable(pipeline: ZImagePipeline) -> int:
    """How many tokens have a place in the model.

    The transformer pads them to a multiple of 32, puts them at positions from 1 on, and the image
    at the position after them. Source: `patchify_and_embed` of diffusers 0.42.
    """
    positions = pipeline.transformer.config.axes_lens[0]
    padded = (positions - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
    return int(min(padded, pipeline.text_encoder.config.max_position_embeddings))
