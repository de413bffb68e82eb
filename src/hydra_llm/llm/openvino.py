"""Embedded models by OpenVINO GenAI, from the same GGUF files, or folders of OpenVINO models: on
processors without a GPU it reads prompts 1.5 to 2 times as fast as llama.cpp (docs/lab.md).

A prompt's memory is kept (prefix caching): samples of a prompt, scores of its choices and prompts
that begin alike are read once. With `batch=N` up to N calls are written together, which took
a third off the time of texts (docs/lab.md); samples then depend on the calls written beside them.
"""

import hashlib
import math
import random
import re
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from anyio import to_thread

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.extras import require
from hydra_llm.llm.base import Sampling
from hydra_llm.types import Generation, Message, Usage

ROLES = ("system", "user", "assistant")
CONTEXT = 2048  # default context window of one conversation, in tokens
CACHE_GIB = 1  # memory for prompts
GATHERING = 0.05  # seconds in which calls gather for a batch
SAMPLER = {"top_k": 40, "top_p": 0.95}  # small models write noise without them
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>")


@dataclass(eq=False)
class Writing:
    """A call that waits for its texts."""

    prompt: str
    sampling: Sampling
    limit: int  # tokens of a text
    texts: Future[tuple[tuple[str, ...], int, float]] = field(default_factory=Future)


class OpenVinoLLM:
    """An embedded model; `context` limits a prompt and its answer, in tokens. Calls queue; at most
    `batch` of those that wait for texts are written together.

    With `choices` each one's probability is computed, and texts are drawn from these: the answer at
    temperature 0 is the most probable choice. Other texts come from the engine's own sampler.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        context: int = CONTEXT,
        model_name: str = "",
        threads: int = 0,
        batch: int = 1,
    ):
        self.path, self.window, self.threads = Path(path), context, threads
        self.parallel = batch  # calls at once
        self._waiting: deque[Writing] = deque()
        self.model = model_name or self.path.stem
        if not self.path.exists():
            fix = "give the path of a .gguf file or of a folder with an OpenVINO model"
            raise SettingsError(f"openvino:{self.path}: is not there: {fix}")
        require("openvino", "an OpenVINO model")
        self._one_at_a_time = Lock()

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        file = self.path if self.path.is_file() else self.path / "openvino_model.bin"
        try:
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise SettingsError(f"openvino:{self.path}: {problem}") from None
        model = {"kind": "openvino", "model": self.model, "sha256": digest}
        engine = {"engine": f"openvino-genai {version('openvino-genai')}", "sampler": SAMPLER}
        return {**model, **engine, "constrains": True, "context": self.window}

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts. Raises LLMError: `LLMRefused` where the prompt is too long or a role is
        unknown.
        """
        return await to_thread.run_sync(self._answer, messages, sampling)

    async def aclose(self) -> None:
        def close() -> None:
            with self._one_at_a_time:
                vars(self).pop("engine", None)

        await to_thread.run_sync(close)

    @cached_property
    def engine(self) -> "Engine":
        """The engine, started at the first call."""
        return Engine(self.path, self.threads)

    def _answer(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        with self._one_at_a_time:
            started, engine = time.perf_counter(), self.engine
            prompt, tokens = engine.prompt(messages)
            room = self.window - tokens
            needed = min(sampling.max_tokens, self.window // 4)
            if sampling.choices:
                needed = max(len(choice.encode()) for choice in sampling.choices) + 1
            if room < needed:
                sizes = f"{tokens} tokens, the context {self.window}, the answer needs {needed}"
                line = f"the prompt has {sizes}: shorten it (max_prompt_tokens)"
                fits = max(0, self.window - needed) / tokens
                raise LLMRefused(f"{self.model}: {line}", fits=fits)
            if sampling.choices:
                texts, probabilities = engine.choose(prompt, sampling)
                usage = Usage(1, 0, 0, tokens, len(texts), seconds=time.perf_counter() - started)
                return Generation(texts, usage, probabilities=probabilities)
        call = Writing(prompt, sampling, min(sampling.max_tokens, room))
        self._waiting.append(call)
        self._write_waiting(call)
        texts, written, seconds = call.texts.result()
        return Generation(texts, Usage(1, 0, 0, tokens, written, seconds=seconds))

    def _write_waiting(self, call: Writing) -> None:
        """Write the calls that wait until this one is written, by this thread or by another."""
        if self.parallel > 1:
            time.sleep(GATHERING)
        with self._one_at_a_time:
            while not call.texts.done():
                count = min(self.parallel, len(self._waiting))
                taken = [self._waiting.popleft() for _ in range(count)]
                started = time.perf_counter()
                try:
                    written = self.engine.write(taken)
                except Exception as error:  # whatever it is, nobody waits for ever
                    for other in taken:
                        other.texts.set_exception(error)
                    continue
                seconds = (time.perf_counter() - started) / count
                for other, (texts, tokens) in zip(taken, written, strict=True):
                    other.texts.set_result((texts, tokens, seconds))


class Engine:
    """A started pipeline of OpenVINO GenAI; not for several threads at once."""

    def __init__(self, path: Path, threads: int):
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_batched_tokens = 1024
        # The default may be bfloat16, whose steps are too coarse for probabilities.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        try:
            pipeline = openvino_genai.ContinuousBatchingPipeline
            self._pipeline = pipeline(str(path), scheduler, "CPU", options)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1]
            raise LLMRefused(f"{path}: OpenVINO cannot load this model ({first})") from None
        self._tokenizer = self._pipeline.get_tokenizer()
        self._scored: tuple[str, tuple[str, ...], list[float]] = ("", (), [])  # the latest choices

    def prompt(self, messages: Sequence[Message]) -> tuple[str, int]:
        """The conversation in the model's template, and its length in tokens. Control tokens in a
        text stay text. Raises LLMRefused for an unknown role.
        """
        for message in messages:
            if message["role"] not in ROLES:
                roles = ", ".join(ROLES)
                raise LLMRefused(f"unknown role '{message['role']}' in a message: take {roles}")
        safe = [{"role": m["role"], "content": _without_controls(m["content"])} for m in messages]
        text = self._tokenizer.apply_chat_template(safe, add_generation_prompt=True)
        return text, int(self._tokenizer.encode(text).input_ids.shape[-1])

    def write(self, calls: Sequence[Writing]) -> list[tuple[tuple[str, ...], int]]:
        """Of each call n texts by the engine's own sampler, and their tokens; greedy ones are
        equal.
        """
        prompts = [call.prompt for call in calls]
        if repeated := [prompt for prompt, times in Counter(prompts).items() if times > 1]:
            self._generated(repeated, [self._config(max_new_tokens=1)] * len(repeated))  # read once
        results = self._generated(prompts, [self._writing(call) for call in calls])
        texts = [tuple(result.m_generation_ids) for result in results]
        lengths = [
            sum(int(self._tokenizer.encode(text).input_ids.shape[-1]) for text in own)
            for own in texts
        ]
        copied = [
            own * (call.sampling.n // len(own)) for call, own in zip(calls, texts, strict=True)
        ]
        return list(zip(copied, lengths, strict=True))

    def _writing(self, call: Writing) -> Any:
        sampling = call.sampling
        config = self._config(max_new_tokens=call.limit, stop_strings=set(sampling.stop))
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "num_return_sequences": sampling.n, **SAMPLER}
            seed = {} if sampling.seed is None else {"rng_seed": sampling.seed}
            _set(config, temperature=sampling.temperature, **drawn, **seed)
        return config

    def choose(
        self, prompt: str, sampling: Sampling
    ) -> tuple[tuple[str, ...], Mapping[str, float]]:
        """n of the choices, and the probability of each, given that one of them is the answer; a
        greedy one, whose probability nobody wants, is written under a grammar of all.
        """
        if sampling.temperature <= 0 and not sampling.probabilities:
            (result,) = self._generated([prompt], [self._exactly(*sampling.choices)])
            if (text := result.m_generation_ids[0]) in sampling.choices:
                return (text,) * sampling.n, {}
        choices, logs = sampling.choices, self._log_probabilities(prompt, sampling.choices)
        shares = _softmax(logs)
        probabilities = dict(zip(choices, shares, strict=True))
        if sampling.temperature <= 0:
            best = max(choices, key=probabilities.__getitem__)
            return (best,) * sampling.n, probabilities
        heated = _softmax([log / sampling.temperature for log in logs])
        draw = random.Random(sampling.seed)
        return tuple(draw.choices(choices, heated, k=sampling.n)), probabilities

    def _log_probabilities(self, prompt: str, choices: tuple[str, ...]) -> list[float]:
        if self._scored[:2] != (prompt, choices):
            self._generated([prompt], [self._config(max_new_tokens=1)])  # it is read once
            configs = [self._exactly(choice) for choice in choices]
            results = self._generated([prompt] * len(choices), configs)
            self._scored = (prompt, choices, [float(result.m_scores[0]) for result in results])
        return self._scored[2]

    def _exactly(self, *choices: str) -> Any:
        """Writes nothing but one of the choices, with its log-probability."""
        form = self._genai.StructuredOutputConfig(regex=f"({'|'.join(map(_pattern, choices))})")
        most = max(len(choice.encode()) for choice in choices) + 1
        return self._config(max_new_tokens=most, logprobs=1, structured_output_config=form)

    def _config(self, **values: Any) -> Any:
        config = self._genai.GenerationConfig()
        _set(config, apply_chat_template=False, do_sample=False, **values)
        return config

    def _generated(self, prompts: Sequence[str], configs: Sequence[Any]) -> list[Any]:
        try:
            return list(self._pipeline.generate(list(prompts), list(configs)))
        except RuntimeError as error:
            first = str(error).strip().splitlines()[-1]
            raise LLMError(f"the embedded engine failed: {first}") from None


def _set(config: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _pattern(text: str) -> str:
    """A regular expression that only the text fits; the engine knows no needless escapes."""
    return re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\1", text)


def _softmax(logs: Sequence[float]) -> list[float]:
    # A text that the model rules out has −inf, or no number.
    known = [log if log > -math.inf else -math.inf for log in logs]
    if (top := max(known)) == -math.inf:
        return [1 / len(known)] * len(known)
    weights = [math.exp(log - top) for log in known]
    total = sum(weights)
    return [weight / total for weight in weights]


def _without_controls(text: str) -> str:
    """The text with a space in each control token, such as `< |im_end|>`."""
    repaired = text.encode("utf-8", "replace").decode()
    return CONTROL.sub(lambda found: f"{found[0][0]} {found[0][1:]}", repaired)


def from_path(rest: str, settings: Settings) -> OpenVinoLLM:
    """`openvino:PATH`, or with `,threads=N` and `,batch=N` behind it."""
    path, *options = rest.split(",")
    given = dict(option.partition("=")[::2] for option in options)
    wrong = any(not number.isdecimal() or int(number) < 1 for number in given.values())
    if not path or wrong or not set(given) <= {"threads", "batch"}:
        form = "openvino:PATH[,threads=N][,batch=N]"
        raise SettingsError(f"openvino: needs the path of a model: {form}")
    threads, batch = int(given.get("threads", 0)), int(given.get("batch", 1))
    return OpenVinoLLM(Path(path).expanduser(), threads=threads, batch=batch)
