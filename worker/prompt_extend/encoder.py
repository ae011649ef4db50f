"""Prompts are rewritten by the pipeline's own text encoder, as the language model that it is."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from transformers import GenerationConfig, Qwen3ForCausalLM, Qwen3Model

from storage.errors import RewriteFailed
from storage.tasks import Rewrite
from worker.prompt_extend.wording import (
    END_OF_THINKING,
    THINK,
    cleaned,
    failure,
    messages,
    readable,
    split,
)

TEMPERATURE, TOP_P, TOP_K = 0.6, 0.95, 20
"""As Qwen3's model card has them for thinking; it warns of endless repetition without dice."""
LOOK_S = 0.5
"""How often `check` is called while there is nothing to do but wait."""
CONCLUSION = f"\n{END_OF_THINKING}\n\n"
"""As Qwen3 itself goes over from thinking to its answer."""
NO_THINKING = f"{THINK}\n{CONCLUSION}"
"""As Qwen3's chat template has it where thinking is switched off."""


Lock: TypeAlias = "threading.Lock | threading.RLock"


class EncoderRewriter:
    """Writes with the pipeline's text encoder, in one thread while others draw.

    `lock` is held meanwhile: whoever moves the weights to another device takes it first. The times
    and tokens are those of one prompt; `timeout_s` counts from the call.
    """

    def __init__(
        self,
        text_encoder: Any,
        tokenizer: Any,
        *,
        lock: Lock,
        reasoning_tokens_max: int,
        tokens_max: int,
        timeout_s: float,
    ) -> None:
        self._model = language_model(text_encoder)
        self._tokenizer = tokenizer
        self._lock = lock
        self._reasoning_tokens_max = reasoning_tokens_max
        self._tokens_max = tokens_max
        self._timeout_s = timeout_s

    def __call__(self, prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        """As `Rewriter` says: the same text for the same prompt and seed on the same machine."""
        # Offloaded layer by layer, the weights are nowhere between two uses of a layer.
        if self._model is None or self._model.get_output_embeddings().weight.is_meta:
            raise RewriteFailed(
                "This server's model cannot rewrite prompts. You were not charged; please send it "
                "without prompt_extend."
            )
        deadline = time.monotonic() + self._timeout_s

        def look() -> None:
            check()
            if time.monotonic() > deadline:
                raise failure("no answer in time")

        asked = self._tokenizer.apply_chat_template(
            messages(prompt), tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        read: list[int] = self._tokenizer(asked).input_ids
        pen = _Pen(
            self._tokenizer,
            # As Qwen3 ends a turn, and a text.
            ends=[self._tokenizer.eos_token_id, self._tokenizer.pad_token_id],
            seed=seed,
            reasoning_tokens_max=self._reasoning_tokens_max,
            tokens_max=self._tokens_max,
            look=look,
        )
        look()
        while not self._lock.acquire(timeout=LOOK_S):
            look()
        try:
            self._write(read, pen)
        except torch.OutOfMemoryError as error:
            raise failure("out of memory") from error
        finally:
            self._lock.release()
        text = self._tokenizer.decode(pen.written[:-1])
        reasoning, answer = split(text)
        return Rewrite(
            text=cleaned(answer, whole=not pen.cut),
            reasoning=readable(reasoning),
            input_tokens=len(read),
            output_tokens=len(pen.written),
            reasoning_tokens=pen.reasoning_tokens or 0,
        )

    @torch.inference_mode()
    def _write(self, read: list[int], pen: "_Pen") -> None:
        device = self._model.device
        with _queue_of_its_own(device):
            tokens = torch.tensor([read], device=device)
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=GenerationConfig(
                    do_sample=False,  # the pen has chosen
                    max_new_tokens=pen.tokens_max,
                    eos_token_id=pen.ends,
                    pad_token_id=pen.ends[0],
                ),
                logits_processor=[pen],
            )


def _queue_of_its_own(device: torch.device) -> AbstractContextManager[Any]:
    """Beside the one that draws, and before it: there, every token would wait for a whole step."""
    if device.type != "cuda":
        return nullcontext()
    own = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(own)


def language_model(text_encoder: Any) -> Any:
    """`text_encoder` as a model that can write, without a weight more; None: it has no head.

    Z-Image's is Qwen3-4B, whose head is its input embedding.
    """
    if isinstance(text_encoder, Qwen3ForCausalLM):
        return text_encoder
    if not (isinstance(text_encoder, Qwen3Model) and text_encoder.config.tie_word_embeddings):
        return None
    with torch.device("meta"):
        model = Qwen3ForCausalLM(text_encoder.config)
    model.model = text_encoder
    model.lm_head.weight = text_encoder.get_input_embeddings().weight
    return model


class _Pen:
    """Chooses each next token, and with `</think>` when to stop thinking.

    For `generate` it is a logits processor that leaves nothing to choose. Its dice are its own and
    the CPU's: other threads cannot shift them, and a seed means the same on every device.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        ends: list[int],
        seed: int,
        reasoning_tokens_max: int,
        tokens_max: int,
        look: Callable[[], None],
    ) -> None:
        self.written: list[int] = []
        self.reasoning_tokens: int | None = None
        """With `</think>`; None while it thinks."""
        self.cut = False
        """Whether the answer was longer than `tokens_max`."""
        self.ends = ends
        self._tokenizer = tokenizer
        self._dice = torch.Generator().manual_seed(seed)
        self._reasoning_tokens_max = reasoning_tokens_max
        self._answer_tokens_max = tokens_max
        self._look = look
        conclusion = CONCLUSION if reasoning_tokens_max else NO_THINKING
        self._conclusion: list[int] = tokenizer(conclusion, add_special_tokens=False).input_ids
        self._forced: list[int] = []

    @property
    def tokens_max(self) -> int:
        """More than will be written."""
        return self._reasoning_tokens_max + len(self._conclusion) + self._answer_tokens_max + 1

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._look()
        token = self._next(scores[0])
        self.written.append(token)
        if self.reasoning_tokens is None:
            # As text, because it may be one token or several: at most one a letter.
            tail = self._tokenizer.decode(self.written[-len(END_OF_THINKING) :])
            if END_OF_THINKING in tail:
                self.reasoning_tokens = len(self.written)
        chosen = torch.full_like(scores, -torch.inf)
        chosen[0, token] = 0
        return chosen

    def _next(self, scores: torch.Tensor) -> int:
        if self._forced:
            return self._forced.pop(0)
        if self.reasoning_tokens is None:
            token = None
            if len(self.written) < self._reasoning_tokens_max:
                token = self._choose(scores)
            if token is None or token in self.ends:
                token, *self._forced = self._conclusion
            return token
        if len(self.written) - self.reasoning_tokens < self._answer_tokens_max:
            return self._choose(scores)
        self.cut = True
        return self.ends[0]

    def _choose(self, scores: torch.Tensor) -> int:
        best = scores.topk(min(TOP_K, len(scores)))
        chances = (best.values.float() / TEMPERATURE).softmax(0).cpu()
        chances[chances.cumsum(0) - chances >= TOP_P] = 0
        return int(best.indices[torch.multinomial(chances, 1, generator=self._dice)])
