"""Any OpenAI-compatible endpoint (hosted, vLLM, llama.cpp's server, LiteLLM) by the official SDK,
which alone retries: it honours `Retry-After` up to two minutes.
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
from hydra_llm.environment import http_client_faults
from hydra_llm.errors import LLMError, LLMRefused
from hydra_llm.llm.base import PartlyFailed, Sampling
from hydra_llm.llm.endpoint import Capabilities, CapabilityCache, Endpoint, Refusal, endpoint_of
from hydra_llm.text import fold, repair
from hydra_llm.types import Generation, Message, Usage

REFUSED = (400, 401, 403, 404, 405, 413, 422)  # the same call would fail again


class OpenAILLM:
    """A model behind an endpoint; URL and key default to OPENAI_BASE_URL and OPENAI_API_KEY.
    Raises SettingsError: no key, and no URL of another endpoint, is known.
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
        self.model, self.timeout = model, timeout
        endpoint = Endpoint.of(f"openai:{model}", base_url, api_key)
        self._key = endpoint.key
        options: dict[str, Any] = {"base_url": endpoint.url, "timeout": timeout}
        # The SDK's own one closes itself in whatever loop runs when it is collected, and fails.
        with http_client_faults():
            options["http_client"] = openai.DefaultAsyncHttpxClient(timeout=timeout)
        api_key = self._key or "none"
        self._client = openai.AsyncOpenAI(api_key=api_key, max_retries=retries, **options)
        self._loop: object = None
        url = urlsplit(str(self._client.base_url))
        self.base_url = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"  # without key
        place = {"model": model, "base_url": self.base_url}
        self.identity = {"kind": "openai", **place, "constrains": False}
        self._capabilities = CapabilityCache()
        self._slots = anyio.Semaphore(concurrency)  # of requests: a call may be several

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities.of(self.model)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts, in one request where the endpoint can; each missing one by a request of
        its own, all at once, with a seed of its own. Ignores `choices`. Raises LLMRefused for a
        wrong key, model or request or too long a prompt, else as the interface says.
        """
        # JSON in UTF-8 cannot hold half of a surrogate pair.
        repaired = [{name: repair(text) for name, text in message.items()} for message in messages]
        stop = {"stop": list(sampling.stop)} if sampling.stop else {}
        seed = {} if sampling.seed is None else {"seed": sampling.seed}
        limits = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        body = {"messages": repaired, **limits, **stop, **seed}
        first = await self._send(body | ({"n": sampling.n} if sampling.n > 1 else {}))
        missing = range(len(first.texts), sampling.n)
        singles, failures = dict[int, Generation](), list[LLMError]()

        async def single(index: int) -> None:
            own = {name: value + index for name, value in seed.items()}
            try:
                singles[index] = await self._send(body | own)
            except LLMError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            for index in missing:
                group.start_soon(single, index)
        before_gap = [singles[index].texts[0] for index in takewhile(singles.__contains__, missing)]
        usage = sum((one.usage for one in singles.values()), first.usage)
        texts = (*first.texts[: sampling.n], *before_gap)
        if failures:
            failed = Usage(calls=len(failures), failed=len(failures))
            raise PartlyFailed(str(failures[0]), Generation(texts, usage + failed))
        return Generation(texts, usage)

    async def aclose(self) -> None:
        await self._client.close()

    async def _send(self, body: Mapping[str, Any]) -> Generation:
        """One request; another one where the endpoint names a parameter that it does not take."""
        known = self.capabilities
        sent = known.applied(body)
        loop = anyio.lowlevel.current_token()
        if self._loop not in (None, loop):  # connections belong to one, and `run_sync` starts many
            connections = openai.DefaultAsyncHttpxClient(timeout=self.timeout)
            self._client = self._client.copy(http_client=connections)
        self._loop = loop
        create: Any = self._client.chat.completions.create
        try:
            async with self._slots:
                answer = await create(model=self.model, **sent)
        except openai.APIStatusError as error:
            code, param = str(error.code or ""), str(error.param or "")
            refusal = Refusal(error.status_code, str(error.message), code, param)
            refused = refusal.status in REFUSED
            if refused and self._capabilities.learn(self.model, known.after(refusal, sent)):
                return await self._send(body)
            line = self._line(f"HTTP {error.status_code}: {error.message}")
            if refused:
                raise LLMRefused(line, fits=refusal.fits(error.body)) from None
            raise LLMError(line) from None
        except openai.APITimeoutError:
            raise LLMError(self._line(f"no answer within {self.timeout:g} s")) from None
        except openai.APIConnectionError as error:
            raise LLMError(self._line(f"no connection: {error.__cause__ or error}")) from None
        except (openai.OpenAIError, ValueError) as error:
            raise LLMError(self._line(f"an answer that cannot be read: {error}")) from None
        generation = self._read(answer)
        if len(generation.texts) < sent.get("n", 1):
            self._capabilities.learn(self.model, replace(self.capabilities, native_n=False))
        return generation

    def _read(self, answer: ChatCompletion) -> Generation:
        try:  # the SDK checks nothing: an endpoint's nonsense arrives as it is
            choices = sorted(answer.choices, key=lambda choice: choice.index or 0)
            contents = [choice.message.content for choice in choices]
            used = answer.usage
            tokens = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        except (AttributeError, TypeError) as error:
            text = f"an answer without choices: {str(answer)[:80]} ({type(error).__name__})"
            raise LLMError(self._line(text)) from None
        if not contents:
            raise LLMError(self._line("an answer without choices"))
        texts = tuple(text if isinstance(text, str) else "" for text in contents)
        return Generation(texts, Usage(1, 0, 0, *tokens))

    def _line(self, text: str) -> str:
        """An error's one line: where, and what, without the key."""
        line = f"{self.model} at {self.base_url}: {fold(text)[:500]}"
        return line.replace(self._key, "***") if self._key else line


def from_spec(rest: str, settings: Settings) -> OpenAILLM:
    """`openai:MODEL[@URL]`."""
    model, url = endpoint_of(rest)
    options = settings.model_dump(include={"timeout", "retries", "concurrency"})
    return OpenAILLM(model, base_url=url, **options)
