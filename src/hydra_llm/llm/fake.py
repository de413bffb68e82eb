"""LLMs without a model, for tests, dry runs and demonstrations: a rule makes up every text.

Reports name them as fake. Deterministic in messages, index and seed (at temperature 0 in the
messages alone). Tokens are words.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import ChatLLM, Sampling
from hydra_llm.types import Generation, Message, Usage

COUNTED = 100_000  # characters
Rule = Callable[[Sequence[Message], int, random.Random], str]
"""(messages, index of the sample, random generator) -> text; `Choose` takes choices too."""
Choose = Callable[[Sequence[Message], int, random.Random, Sequence[str]], str]


class RuleLLM:
    """A fake that answers by `rule`, or by `choose` where choices are given."""

    def __init__(
        self,
        rule: Rule,
        *,
        name: str = "rule",
        choose: Choose | None = None,
        keep: bool = True,
        needs_choices: bool = False,
    ):
        """`needs_choices`: it is told the task's labels always, as it finds none in a prompt."""
        self._rule, self._choose, self.name, self._keep = rule, choose, name, keep
        self._needs = {"needs_choices": True} if needs_choices else {}
        self.calls: list[tuple[Message, ...]] = []  # the messages of each call, unless not `keep`

    @property
    def identity(self) -> Mapping[str, Any]:
        constrains = self._choose is not None
        about = {"kind": "fake", "model": f"fake:{self.name}", "constrains": constrains}
        return about | self._needs

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        """Return n texts by the rule, cut at `stop` and at `max_tokens` words."""
        if self._keep:
            self.calls.append(tuple(messages))
        # The messages are read once for all samples: a server is asked megabytes too.
        begun = hashlib.sha256(f"[{_json(list(map(dict, messages)))}, ".encode())
        texts = tuple(self._text(messages, sampling, index, begun) for index in range(sampling.n))
        prompt = sum(_words(message["content"]) for message in messages)
        return Generation(texts, Usage(1, 0, 0, prompt, sum(map(_words, texts))))

    async def aclose(self) -> None:
        """Nothing to release."""

    def _text(self, messages: Sequence[Message], sampling: Sampling, index: int, begun: Any) -> str:
        sample, salt = (index, (sampling.seed or 0) + index) if sampling.temperature else (0, 0)
        digest = begun.copy()
        digest.update(f"{salt}]".encode())
        rng = random.Random(digest.hexdigest())
        if sampling.choices and self._choose:
            return self._choose(messages, sample, rng, sampling.choices)
        text = self._rule(messages, sample, rng)
        for mark in filter(None, sampling.stop):
            text = text.split(mark, 1)[0]
        most = sampling.max_tokens
        words = text.split(maxsplit=most)
        return text if len(words) <= most else " ".join(words[:most])


class FailingLLM:
    """A fake whose every `every`-th call fails, or hangs `timeout` seconds before."""

    def __init__(self, inner: ChatLLM, kind: str = "error", every: int = 1, timeout: float = 120.0):
        self.inner, self.kind, self.every, self.timeout = inner, kind, every, timeout
        self.identity = {**inner.identity, "fails": f"{kind}, every {every}"}
        self.calls = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        self.calls += 1
        if self.calls % self.every:
            return await self.inner.generate(messages, sampling)
        if self.kind == "hang":
            await anyio.sleep(self.timeout)
        error = LLMRefused if self.kind == "refused" else LLMError
        raise error(f"fake:fail={self.kind}: call {self.calls} failed as wished")

    async def aclose(self) -> None:
        await self.inner.aclose()


def label_rule() -> RuleLLM:
    """A random label of the task, whatever the prompt; else the last message's first 8 words."""

    def words(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        user = [message["content"] for message in messages if message["role"] == "user"]
        return " ".join(user[-1].split(maxsplit=8)[:8]) if user else ""

    choose: Choose = lambda _, index, rng, labels: rng.choice(labels)  # noqa: E731
    return RuleLLM(words, name="rule=labels", choose=choose, keep=False, needs_choices=True)


def scripted(path: Path) -> RuleLLM:
    """Answers from a JSON file: the texts of a list in order, or of a map by a key in the message.
    Raises SettingsError: the file is neither. A call raises LLMError when no text is left or fits.
    """
    try:
        script = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"fake:script={path}: cannot be read as JSON ({error})") from None
    if not isinstance(script, list | dict):
        wanted = "a list of texts, or a map from a part of the message to a text"
        raise SettingsError(f"fake:script={path}: must be {wanted}")
    left = iter(script)

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        texts, problem = left, "every text of the list is used up"
        if isinstance(script, dict):
            texts = (text for part, text in script.items() if part in messages[-1]["content"])
            problem = "no key is part of the last message"
        for text in texts:
            return str(text)
        raise LLMError(f"fake:script={path}: {problem}")

    digest = hashlib.sha256(_json([script, 0]).encode()).hexdigest()
    return RuleLLM(rule, name=f"script={digest[:12]}", keep=False)


def from_spec(rest: str, settings: Settings) -> ChatLLM:
    """The fake of `echo`, `rule=labels` (the default), `script=PATH`, `fail=KIND[,every=N]`."""
    kind, _, value = rest.partition("=")
    if rest == "echo":
        last: Rule = lambda messages, index, rng: messages[-1]["content"]  # noqa: E731
        return RuleLLM(last, name="echo", keep=False)
    if rest in ("", "rule=labels"):
        return label_rule()
    if kind == "script" and value:
        return scripted(Path(value).expanduser())
    if kind == "fail":
        failure, _, every = value.partition(",every=")
        failures, every = ("error", "refused", "hang"), every or "1"
        if failure not in failures or not every.isdigit() or int(every) < 1:
            wanted = f"KIND one of {', '.join(failures)} and N at least 1"
            raise SettingsError(f"fake:fail={value}: take fake:fail=KIND[,every=N] with {wanted}")
        return FailingLLM(label_rule(), failure, every=int(every), timeout=settings.timeout)
    forms = "fake:echo, fake:rule=labels, fake:script=PATH or fake:fail=KIND[,every=N]"
    raise SettingsError(f"unknown LLM 'fake:{rest}': take {forms}")


def _words(text: str) -> int:
    """How many there are; in a very long text an estimate by its beginning."""
    part = text[:COUNTED]
    return len(part.split()) * len(text) // max(1, len(part))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
