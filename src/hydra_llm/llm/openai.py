"""Any OpenAI-compatible endpoint through the official SDK: hosted models, vLLM, llama.cpp's server,
a LiteLLM proxy (DESIGN 6).

Retries live in the SDK and nowhere else: it waits as long as `Retry-After` says, up to two minutes.
What endpoints differ in is learnt from their answers and remembered for this client: whether they
draw `n` texts at once, and which parameters they refuse. Knows no cache and no budget.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import openai
from openai.types.chat import ChatCompletion

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import PartlyFailed, Sampling
from hydra_llm.llm.registry import endpoint_of
from hydra_llm.types import Generation, Message, Usage

REFUSED = (400, 401, 403, 404, 405, 413, 422)
"""Statuses at which the same call would fail again."""
NAMES_N = re.compile(
    r"""['"`]n['"`]|\bn\b\s*(?:=|>|<|!|must|is|should|has|cannot|parameter|other)"""
    r"""|parameter:? n\b|multiple (?:choices|completions)"""
)
TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|(?:prompt|input|message)s? (?:is|are) too long",
    re.IGNORECASE,
)
"""How endpoints say that a prompt is beyond the window: OpenAI, vLLM, llama.cpp
(`exceed_context_size_error`) and proxies.
"""
WINDOW = re.compile(
    r"context (?:length|size|window)\D{1,20}(\d+)|(\d+) max|n_ctx\D+(\d+)", re.IGNORECASE
)
ASKED = re.compile(r"(\d+) (?:\w+ )?tokens|n_prompt_tokens\D+(\d+)")
"""Numbers of tokens in such a message; the largest is what was asked for."""
FITS = 0.6
"""Share of a prompt that is taken to fit where the endpoint does not tell."""
UNSUPPORTED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|not permitted|deprecated",
    re.IGNORECASE,
)


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
        http_client: Any = None,
    ):
        self.model = model
        self._build = partial(_client, base_url, api_key, timeout, retries, http_client)
        try:
            self._client = self._build()
        except openai.OpenAIError:
            raise SettingsError(
                f"openai:{model} needs a key: set OPENAI_API_KEY (any text for an endpoint without"
                " keys)"
            ) from None
        self.native_n: bool | None = None
        """Whether the endpoint draws n texts in one call; None until it was asked for more than
        one.
        """
        self._slots = anyio.Semaphore(
            concurrency
        )  # of requests: where the endpoint draws one text each, a call is many
        self._loop: object = None
        self._without: set[str] = set()
        self._limit_name = "max_tokens"

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
            LLMRefused: key, model or request are wrong, or the prompt is too long. PartlyFailed:
                one of n requests failed. LLMError: the endpoint failed, hung, hung up or answered
                nonsense, after the SDK's retries.
        """
        body: dict[str, Any] = {
            "messages": [dict(message) for message in messages],
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        n, seed = sampling.n, sampling.seed
        made = await self._first(body, n, seed)
        if len(made.texts) >= n:
            return Generation(made.texts[:n], made.usage)
        return await self._rest(body, n, seed, made)

    async def aclose(self) -> None:
        await self._client.close()

    async def _first(self, body: Mapping[str, Any], n: int, seed: int | None) -> Generation:
        """One request for all n texts; where `n` is refused, or known not to work, for one."""
        if n == 1 or self.native_n is False:
            return await self._send({**body, **_seeded(seed)})
        try:
            made = await self._send({**body, **_seeded(seed), "n": n})
        except _Refusal as refusal:
            if not refusal.names_n:
                raise
            made = await self._send({**body, **_seeded(seed)})
        self.native_n = len(made.texts) >= n
        return made

    async def _rest(
        self, body: Mapping[str, Any], n: int, seed: int | None, made: Generation
    ) -> Generation:
        """The texts that are missing, one request each, at the same time and each with a seed of
        its own.
        """
        singles: dict[int, Generation] = {}
        failures: list[LLMError] = []

        async def single(index: int) -> None:
            try:
                singles[index] = await self._send({**body, **_seeded(seed, index)})
            except LLMError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            for index in range(len(made.texts), n):
                group.start_soon(single, index)
        rest = [
            singles[index] for index in takewhile(singles.__contains__, range(len(made.texts), n))
        ]
        made = Generation(
            (*made.texts, *(one.texts[0] for one in rest)),
            sum((one.usage for one in singles.values()), made.usage),
        )
        if failures:
            failed = Usage(calls=len(failures), failed=len(failures))
            raise PartlyFailed(str(failures[0]), Generation(made.texts, made.usage + failed))
        return made

    async def _send(self, body: dict[str, Any]) -> Generation:
        """One request; a second one where the endpoint names a parameter that it does not know."""
        try:
            return await self._request(body)
        except _Refusal as refusal:
            if not self._learn(refusal):
                raise
        return await self._send(body)

    async def _request(self, body: Mapping[str, Any]) -> Generation:
        sent = {name: value for name, value in body.items() if name not in self._without}
        sent[self._limit_name] = sent.pop("max_tokens")
        try:
            async with self._slots:
                answer = await self._client_here().chat.completions.create(model=self.model, **sent)
        except openai.APIStatusError as error:
            text = self._line(f"HTTP {error.status_code}: {error.message}")
            raise (
                _Refusal(text, error) if error.status_code in REFUSED else LLMError(text)
            ) from None
        except openai.APITimeoutError:
            raise LLMError(
                self._line(f"no answer within {_seconds(self._client.timeout)}")
            ) from None
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
            self._client = self._build()
        self._loop = loop
        return self._client

    def _read(self, answer: ChatCompletion) -> Generation:
        try:  # the SDK checks nothing: an endpoint's nonsense arrives as it is
            texts = tuple(
                _text(choice.message.content)
                for choice in sorted(answer.choices, key=lambda choice: choice.index or 0)
            )
            used = answer.usage
            usage = (
                Usage(1, 0, 0, used.prompt_tokens or 0, used.completion_tokens or 0)
                if used
                else Usage(calls=1)
            )
        except (AttributeError, TypeError) as error:
            raise LLMError(
                self._line(
                    f"an answer without choices: {str(answer)[:80]} ({type(error).__name__})"
                )
            ) from None
        if not texts:
            raise LLMError(self._line("an answer without choices"))
        return Generation(texts, usage)

    def _learn(self, refusal: "_Refusal") -> bool:
        """Remember the parameter that the endpoint does not know; whether there is something new to
        try.
        """
        if refusal.names("max_tokens") and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return True
        new = {name for name in ("temperature", "seed") if refusal.names(name)} - self._without
        self._without |= new
        return bool(new)

    def _line(self, text: str) -> str:
        return f"{self.model} at {self.base_url}: " + " ".join(text.split())[:500].replace(
            self._client.api_key, "***"
        )


class _Refusal(LLMRefused):
    """A refusal with what the endpoint said about a parameter."""

    def __init__(self, text: str, error: openai.APIStatusError):
        super().__init__(text, fits=_fits(error))
        self._said, self._param = str(error.message), error.param
        self._unsupported = bool(UNSUPPORTED.search(f"{error.code} {self._said}"))

    @property
    def names_n(self) -> bool:
        return self._param == "n" or bool(NAMES_N.search(self._said))

    def names(self, parameter: str) -> bool:
        """Whether this parameter is not known at all; a value out of range is the caller's."""
        said = self._param == parameter or re.search(rf"\b{parameter}\b", self._said) is not None
        return self._unsupported and said


def _fits(error: openai.APIStatusError) -> float | None:
    """The share of a prompt that was too long that would fit; None where the refusal is about
    something else.
    """
    said = f"{error.code} {error.message} {error.body}"
    if error.status_code not in (400, 413, 422) or not TOO_LONG.search(said):
        return None
    windows, asked = _numbers(WINDOW, said), _numbers(ASKED, said)
    share = min(windows, default=0) / max(asked, default=1)
    return share if 0 < share < 1 else FITS


def _numbers(pattern: re.Pattern[str], text: str) -> list[int]:
    return [int(number) for found in pattern.findall(text) for number in found if number]


def _client(
    base_url: str | None, api_key: str | None, timeout: float, retries: int, http_client: Any
) -> openai.AsyncOpenAI:
    # The SDK's own HTTP client closes itself in whatever loop is running when it is collected, and
    # fails there; this one does not.
    http_client = http_client or openai.DefaultAsyncHttpxClient(timeout=timeout)
    options: dict[str, Any] = {
        "base_url": base_url,
        "timeout": timeout,
        "max_retries": retries,
        "http_client": http_client,
    }
    try:
        return openai.AsyncOpenAI(api_key=api_key, **options)
    except openai.OpenAIError:
        if base_url is None:
            raise
        return openai.AsyncOpenAI(
            api_key="none", **options
        )  # an endpoint of one's own often knows no keys


def _text(content: object) -> str:
    return content if isinstance(content, str) else ""


def _seeded(seed: int | None, offset: int = 0) -> dict[str, int]:
    return {} if seed is None else {"seed": seed + offset}


def _seconds(timeout: Any) -> str:
    return f"{timeout:g} s" if isinstance(timeout, int | float) else "the timeout"


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
