"""Prompts are rewritten by any OpenAI-compatible endpoint."""

import asyncio
import ssl
from collections.abc import Callable
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, Field, ValidationError

from storage.tasks import Rewrite
from worker.prompt_extend.wording import cleaned, failure, messages, readable, split

ANSWER_MAX_BYTES = 1_000_000
"""Of an endpoint."""
LOOK_S = 0.5
"""How often `check` is called while there is nothing to do but wait."""

Count = Annotated[int, Field(ge=0, lt=2**31)]


class _Details(BaseModel):
    reasoning_tokens: Count | None = None


class _Usage(BaseModel):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    completion_tokens_details: _Details | None = None


class _Message(BaseModel):
    content: str
    reasoning_content: object = None
    """What vLLM, DeepSeek and Alibaba call it."""
    reasoning: object = None
    """What OpenRouter, Ollama and newer vLLM call it."""


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class EndpointRewriter:
    """Asks the model `model` at `url`, an OpenAI-compatible endpoint up to and with `/v1`.

    How a model is best sampled is left to its server. `max_tokens` is what all of them know, and
    it counts the reasoning as well. Any number of threads may call it at once.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: str | None,
        reasoning_tokens_max: int,
        tokens_max: int,
        timeout_s: float,
    ) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model = model
        self._headers = {"Accept-Encoding": "identity"}  # so that its size is what was sent
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._tokens_max = reasoning_tokens_max + tokens_max
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context()

    def __call__(self, prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        """As `Rewriter` says. Whatever the endpoint does wrong is a RewriteFailed."""
        asked = {
            "model": self._model,
            "messages": messages(prompt),
            "max_tokens": self._tokens_max,
            "seed": seed,
            "stream": False,
        }
        body = asyncio.run(self._ask(asked, check))
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, fault["loc"]))
            raise failure(f"malformed answer: {where} {fault['type']}") from None
        choice = completion.choices[0]
        usage = completion.usage or _Usage()
        thought, answer = split(choice.message.content)
        said = (choice.message.reasoning_content, choice.message.reasoning, thought)
        return Rewrite(
            text=cleaned(answer, whole=choice.finish_reason != "length"),
            reasoning=readable(next((text for text in said if isinstance(text, str) and text), "")),
            input_tokens=usage.prompt_tokens or 0,
            output_tokens=usage.completion_tokens or 0,
            reasoning_tokens=(usage.completion_tokens_details or _Details()).reasoning_tokens or 0,
        )

    async def _ask(self, asked: dict[str, Any], check: Callable[[], None]) -> bytes:
        """The body of the answer. What `check` raises ends the request at once."""
        check()
        answer = asyncio.create_task(self._post(asked))
        try:
            async with asyncio.timeout(self._timeout_s):
                while not answer.done():
                    await asyncio.wait({answer}, timeout=LOOK_S)
                    check()
            return answer.result()
        except TimeoutError:
            raise failure("no answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # Only these are sure not to quote the key that was sent.
            words = f": {error}" if isinstance(error, httpx.ConnectError) else ""
            raise failure(f"{type(error).__name__}{words}") from None
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    async def _post(self, asked: dict[str, Any]) -> bytes:
        body = bytearray()
        async with (
            httpx.AsyncClient(verify=self._tls, timeout=None) as client,  # noqa: S113 - _ask's
            client.stream("POST", self._url, json=asked, headers=self._headers) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                raise failure(f"status {answer.status_code}")
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > ANSWER_MAX_BYTES:
                    raise failure(f"an answer longer than {ANSWER_MAX_BYTES} bytes")
        return bytes(body)
