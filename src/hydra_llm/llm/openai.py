"""Any OpenAI-compatible endpoint (hosted, vLLM, llama.cpp's server, LiteLLM) by the official SDK.
The SDK retries, and honours `Retry-After` up to two minutes; below it, where each of its attempts
passes, the endpoint's limiter decides how many requests are on their way (`limiter.py`).
"""

from hydra_llm.extras import require

require("openai", "an OpenAI-compatible endpoint")

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import takewhile
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import httpx2
import openai

from hydra_llm.config import Settings
from hydra_llm.environment import http_client_faults
from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused
from hydra_llm.llm import first_token
from hydra_llm.llm.base import PartlyFailed, Sampling
from hydra_llm.llm.endpoint import (
    SHORT,
    Capabilities,
    CapabilityCache,
    Endpoint,
    Refusal,
    endpoint_of,
)
from hydra_llm.llm.limiter import Concurrency, Gate, Limiter, limiter_of
from hydra_llm.llm.wire import WireError, answer_of, failure, json_of, place_of, tokens_of
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
        concurrency: Concurrency = "auto",
    ):
        self.model, self.timeout = model, timeout
        self._endpoint = endpoint = Endpoint.of(f"openai:{model}", base_url, api_key)
        self._limiter, self._most = limiter_of(endpoint), concurrency
        self._slots = Gate(lambda: self.parallel)  # of requests: a call may be several
        options: dict[str, Any] = {"base_url": endpoint.url, "timeout": timeout}
        options["http_client"] = self._connections()
        api_key = endpoint.key or "none"
        self._client = openai.AsyncOpenAI(api_key=api_key, max_retries=retries, **options)
        self._loop: object = None
        url = urlsplit(str(self._client.base_url))
        self.base_url = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"  # without key
        place = {"model": model, "base_url": self.base_url}
        self.identity = {"kind": "openai", **place, "constrains": False}
        if endpoint.query:  # which may hold a key
            self.identity["query"] = sha256(endpoint.query.encode()).hexdigest()[:16]
        self._capabilities = CapabilityCache()

    @property
    def parallel(self) -> int:
        """Calls at once, as of now."""
        found = self._limiter.limit
        return found if self._most == "auto" else min(found, self._most)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities.of(self.model)

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts, in one request where the endpoint can; each missing one by a request of
        its own, all at once, with a seed of its own. Of `choices` it tells probabilities alone, by
        `logprobs`. Raises LLMRefused for a wrong key, model or request or too long a prompt, else
        as the interface says.
        """
        # JSON in UTF-8 cannot hold half of a surrogate pair.
        repaired = [{name: repair(text) for name, text in message.items()} for message in messages]
        stop = {"stop": list(sampling.stop)} if sampling.stop else {}
        seed = {} if sampling.seed is None else {"seed": sampling.seed}
        limits = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        body = {"messages": repaired, **limits, **stop, **seed}
        told = (
            {"logprobs": True, "top_logprobs": first_token.MOST} if sampling.probabilities else {}
        )
        several = {"n": sampling.n} if sampling.n > 1 else {}
        first = await self._send(body | told | several, sampling.choices if told else ())
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
        for error in failures:
            if isinstance(error, BudgetExceeded):
                raise error
        if failures:
            failed = Usage(calls=len(failures), failed=len(failures))
            raise PartlyFailed(str(failures[0]), Generation(texts, usage + failed))
        return Generation(texts, usage, probabilities=first.probabilities)

    async def aclose(self) -> None:
        await self._client.close()

    async def _send(self, body: Mapping[str, Any], choices: Sequence[str] = ()) -> Generation:
        """One request; another one where the endpoint names a parameter that it does not take. With
        `choices`, their probabilities too, where it tells them.
        """
        known = self.capabilities
        sent = known.applied(body)
        status, content = await self._post(sent)
        if status >= 300:
            told = failure(status, content) or WireError("an answer that is an error")
            refusal = Refusal(status, told.message, told.code, told.param)
            refused = refusal.status in REFUSED
            # A call at the same time may have learned the same: what counts is what this one sent.
            if refused and (after := known.after(refusal, sent)) != known:
                self._capabilities.learn(self.model, after)
                return await self._send(body, choices)
            line = self._line(f"HTTP {refusal.status}: {refusal.message}")
            if refused:
                raise LLMRefused(line, fits=refusal.fits(json_of(content)))
            raise LLMError(line)
        generation = self._read(json_of(content), choices)
        if len(generation.texts) < sent.get("n", 1):
            self._capabilities.learn(self.model, replace(self.capabilities, native_n=False))
        return generation

    async def _post(self, sent: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and content of the answer to a request's body. LLMError: there is none."""
        create: Any = self._connected().chat.completions.with_raw_response.create
        try:
            answer = await create(model=self.model, **sent)
        except openai.APIStatusError as error:
            return error.status_code, error.response.content
        except openai.APITimeoutError:
            raise LLMError(self._line(f"no answer within {self.timeout:g} s")) from None
        except openai.APIConnectionError as error:
            raise LLMError(self._line(f"no connection: {error.__cause__ or error}")) from None
        except (openai.OpenAIError, ValueError) as error:
            raise LLMError(self._line(f"an answer that cannot be read: {error}")) from None
        return 200, answer.http_response.content

    def _connected(self) -> openai.AsyncOpenAI:
        """The SDK's client; connections belong to one loop, and `run_sync` starts many."""
        loop = anyio.lowlevel.current_token()
        if self._loop not in (None, loop):
            self._client = self._client.copy(http_client=self._connections())
        self._loop = loop
        return self._client

    def _connections(self) -> Any:
        """The SDK's own one would close itself in whatever loop runs when it is collected."""
        hooks = {"response": [_tell_errors]}
        query = self._endpoint.query or None
        options: dict[str, Any] = {"params": query, "event_hooks": hooks}
        with http_client_faults():
            return _LimitedClient(self._slots, self._limiter, timeout=self.timeout, **options)

    def _read(self, answer: Mapping[str, Any], wanted: Sequence[str]) -> Generation:
        """The texts of an answer in which `failure` found nothing wrong."""
        choices = sorted(answer["choices"], key=place_of)
        # A key as short as a word, such as "none", may be a label.
        redact = str if 0 < len(self._endpoint.key) < SHORT else self._endpoint.redact
        texts = tuple(redact(answer_of(choice["message"])) for choice in choices)
        tokens = tokens_of(answer.get("usage"))
        usage = Usage(1, 0, 0, *(tokens or (0, 0)), untold=int(tokens is None))
        shares = first_token.probabilities(first_token.told_tokens(choices[0]), wanted)
        return Generation(texts, usage, probabilities=shares)

    def _line(self, text: str) -> str:
        """An error's one line: where, and what, without the key."""
        return f"{self.model} at {self.base_url}: {fold(self._endpoint.redact(text))[:500]}"


class _LimitedClient(openai.DefaultAsyncHttpxClient):
    """Sends requests as the limiter lets it; the SDK calls it for each of its attempts."""

    def __init__(self, slots: Gate, limiter: Limiter, **options: Any):
        super().__init__(**options)
        self._own_slots, self._limiter = slots, limiter

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        again = False
        async with self._own_slots:
            while True:
                async with self._limiter.request(again=again) as sent:
                    try:
                        response = await super().send(request, **options)
                    except httpx2.TimeoutException:
                        self._limiter.timed_out(sent)
                        raise
                again = self._limiter.saw(sent, response.status_code, response.headers)
                if not again or spent_quota(response):
                    return response


def spent_quota(response: httpx2.Response) -> bool:
    """Whether an error says that nothing is left of what was paid for: it will not pass."""
    told = failure(response.status_code, response.content)
    return told is not None and "insufficient_quota" in (told.code, told.kind)


async def _tell_errors(response: httpx2.Response) -> None:
    """Give an error that came as 200, and nonsense, the status that the SDK acts on."""
    if not response.request.url.path.endswith("/chat/completions"):
        return  # files and batches
    if response.status_code < 300 and (error := failure(200, await response.aread())):
        response.status_code = error.status or 502


def from_spec(rest: str, settings: Settings) -> OpenAILLM:
    """`openai:MODEL[@URL]`."""
    model, url = endpoint_of(rest)
    options = settings.model_dump(include={"timeout", "retries", "concurrency"})
    return OpenAILLM(model, base_url=url, **options)
