"""Any OpenAI-compatible endpoint through the official SDK: hosted models, vLLM, llama.cpp's server,
a LiteLLM proxy.

Retries are the SDK's alone: it waits as long as `Retry-After` says, up to two minutes. What a model
does not take is learned from its refusals (llm/endpoint.py). Knows no cache and no budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import openai
from openai.types.chat import ChatCompletion

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused
from hydra_llm.llm.base import PartlyFailed, Sampling
from hydra_llm.llm.endpoint import Capabilities, CapabilityCache, Endpoint, Refusal, endpoint_of
from hydra_llm.text import fold, repair
from hydra_llm.types import Generation, Message, Usage

REFUSED = (400, 401, 403, 404, 405, 413, 422)
"""Statuses at which the same call would fail again."""


class OpenAILLM:
    """A model behind an endpoint. Key and URL come from OPENAI_API_KEY and OPENAI_BASE_URL unless
    given.

    Raises:
        SettingsError: no key, and no URL of another endpoint, is known.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        concurrency: int = 8,
    ):
        self.model, self.timeout, self.retries = model, timeout, retries
        self.endpoint = Endpoint.of(f"openai:{model}", base_url, api_key)
        self._capabilities = CapabilityCache()
        self._client = self._open()
        self._loop: object = None
        # Of requests: where the endpoint draws one text each, a call is many.
        self._slots = anyio.Semaphore(concurrency)

    @property
    def capabilities(self) -> Capabilities:
        """What the model takes, as far as its answers have shown."""
        return self._capabilities.of(self.model)

    @property
    def base_url(self) -> str:
        """The endpoint without user names or keys."""
        url = urlsplit(str(self._client.base_url))
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "kind": "openai",
            "model": self.model,
            "base_url": self.base_url,
            "constrains": False,
        }

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts, in one request where the endpoint can and in n where it cannot; `choices`
        are ignored.

        Raises:
            LLMRefused: key, model or request are wrong, or the prompt is too long.
            PartlyFailed: one of n requests failed.
            LLMError: the endpoint failed, timed out, hung up or answered nonsense, after the SDK's
                retries.
        """
        n, seed = sampling.n, sampling.seed
        body = {
            # JSON in UTF-8 cannot hold half of a surrogate pair.
            "messages": [{name: repair(text) for name, text in each.items()} for each in messages],
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
        }
        made = await self._send({**body, **_seeded(seed), **({"n": n} if n > 1 else {})})
        if len(made.texts) >= n:
            return Generation(made.texts[:n], made.usage)
        return await self._rest(body, n, seed, made)

    async def aclose(self) -> None:
        await self._client.close()

    async def _rest(
        self, body: Mapping[str, Any], n: int, seed: int | None, made: Generation
    ) -> Generation:
        """The texts that are missing, one request each, all at the same time and each with a seed
        of its own.
        """
        missing = range(len(made.texts), n)
        singles: dict[int, Generation] = {}
        failures: list[LLMError] = []

        async def single(index: int) -> None:
            try:
                singles[index] = await self._send({**body, **_seeded(seed, index)})
            except LLMError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            for index in missing:
                group.start_soon(single, index)
        before_gap = [singles[index].texts[0] for index in takewhile(singles.__contains__, missing)]
        usage = sum((one.usage for one in singles.values()), made.usage)
        texts = (*made.texts, *before_gap)
        if failures:
            failed = Usage(calls=len(failures), failed=len(failures))
            raise PartlyFailed(str(failures[0]), Generation(texts, usage + failed))
        return Generation(texts, usage)

    async def _send(self, body: Mapping[str, Any]) -> Generation:
        """One request; another one where the endpoint names a parameter that it does not take."""
        known = self.capabilities
        sent = known.applied(body)
        try:
            made = await self._request(sent)
        except _Refused as error:
            if not self._capabilities.learn(self.model, known.after(error.refusal, sent)):
                raise
            return await self._send(body)
        if len(made.texts) < sent.get("n", 1):
            self._capabilities.learn(self.model, replace(self.capabilities, native_n=False))
        return made

    async def _request(self, sent: Mapping[str, Any]) -> Generation:
        create: Any = self._client_here().chat.completions.create
        try:
            async with self._slots:
                answer = await create(model=self.model, **sent)
        except openai.APIStatusError as error:
            text = self._line(f"HTTP {error.status_code}: {error.message}")
            raise (
                _Refused(text, error) if error.status_code in REFUSED else LLMError(text)
            ) from None
        except openai.APITimeoutError:
            raise LLMError(self._line(f"no answer within {self.timeout:g} s")) from None
        except openai.APIConnectionError as error:
            raise LLMError(self._line(f"no connection: {error.__cause__ or error}")) from None
        except (openai.OpenAIError, ValueError) as error:
            raise LLMError(self._line(f"an answer that cannot be read: {error}")) from None
        return self._read(answer)

    def _client_here(self) -> openai.AsyncOpenAI:
        """The client of this event loop: open connections cannot follow to another one, and sync
        callers start one per call.
        """
        loop = anyio.lowlevel.current_token()
        if self._loop not in (None, loop):
            self._client = self._open()
        self._loop = loop
        return self._client

    def _open(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=self.endpoint.key or "none",
            base_url=self.endpoint.url,
            timeout=self.timeout,
            max_retries=self.retries,
            # The SDK's usual one closes itself in whatever loop is running when it is collected,
            # and fails there.
            http_client=openai.DefaultAsyncHttpxClient(timeout=self.timeout),
        )

    def _read(self, answer: ChatCompletion) -> Generation:
        try:  # the SDK checks nothing: an endpoint's nonsense arrives as it is
            choices = sorted(answer.choices, key=lambda choice: choice.index or 0)
            texts = tuple(_text(choice.message.content) for choice in choices)
            used = answer.usage
            tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        except (AttributeError, TypeError) as error:
            said = f"an answer without choices: {str(answer)[:80]} ({type(error).__name__})"
            raise LLMError(self._line(said)) from None
        if not texts:
            raise LLMError(self._line("an answer without choices"))
        return Generation(texts, Usage(1, 0, 0, *tokens))

    def _line(self, text: str) -> str:
        """One line of an error, without the key."""
        line = f"{self.model} at {self.base_url}: {fold(text)[:500]}"
        return line.replace(self.endpoint.key, "***") if self.endpoint.key else line


class _Refused(LLMRefused):
    """A refusal with what the endpoint said."""

    def __init__(self, text: str, error: openai.APIStatusError):
        self.refusal = Refusal(
            error.status_code, str(error.message), str(error.code or ""), str(error.param or "")
        )
        super().__init__(text, fits=self.refusal.fits(error.body))


def _text(content: object) -> str:
    return content if isinstance(content, str) else ""


def _seeded(seed: int | None, offset: int = 0) -> dict[str, int]:
    return {} if seed is None else {"seed": seed + offset}


def from_spec(rest: str, settings: Settings) -> OpenAILLM:
    """`openai:MODEL[@URL]`."""
    model, url = endpoint_of(rest)
    return OpenAILLM(
        model,
        base_url=url,
        timeout=settings.timeout,
        retries=settings.retries,
        concurrency=settings.concurrency,
    )
