"""Who pays for calls of LLMs, and what they cost: a request has a bill, and a ledger adds bills up
for the store. Knows no limits.

Where a bill must be right at once (somebody has a limit), it is written before its answer ends. All
others are written together each second: no answer waits for it.
"""

import json
import math
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hydra_llm.config import Settings
from hydra_llm.errors import HydraError
from hydra_llm.gateway.telemetry import Telemetry, note
from hydra_llm.llm.base import ChatLLM, PartlyFailed, Sampling
from hydra_llm.llm.cache import CachedLLM
from hydra_llm.llm.meter import Meter
from hydra_llm.llm.prices import Price, PriceList, load_prices
from hydra_llm.llm.wire import text_of, tokens_of
from hydra_llm.prompt import PER_MESSAGE, estimate, message_tokens
from hydra_llm.store.schema import key_of
from hydra_llm.store.store import Store
from hydra_llm.store.values import Spend, Spender, Total
from hydra_llm.types import Generation, Message, Usage

FLUSH_SECONDS = 1.0
BYTES_PER_TOKEN = 3.5  # as prompts are estimated
MOST_WAITING = 10_000  # sums that wait for a store that is down; then users are left out


@dataclass(eq=False)
class Bill:
    """What one request spends, and who pays."""

    key: str = ""  # public id of the API key
    user: str = ""
    user_key: int | None = None  # of the user's row in the store; None: there is none
    minutes: frozenset[str] = frozenset()  # whose tokens per minute are counted: key, user
    limited: bool = False  # a limit needs it at once
    closed: bool = False  # its request has ended: what comes yet is taken over at once
    spent: dict[tuple[str, str], Spend] = field(default_factory=dict)  # model, kind → spend

    def known(self, version: int | None) -> None:
        """The user's version in the store, before the upstream is asked."""
        self.user_key = None if version is None else key_of(version)


paying: ContextVar[Bill | None] = ContextVar("paying", default=None)
"""The bill of the request that is being answered."""
drawing: ContextVar[str] = ContextVar("drawing", default="request")
"""What the next call of the upstream is: the caller's own request, or samples."""


class Ledger:
    """Adds up what this process spends; any thread may use it."""

    def __init__(self, store: Store, prices: PriceList, telemetry: Telemetry):
        self._store, self.prices, self._telemetry = store, prices, telemetry
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._spent = defaultdict[Spender, Spend](Spend)
        self._totals = defaultdict[Total, Spend](Spend)

    def charge(
        self, bill: Bill | None, kind: str, spend: Spend, models: Sequence[str], cached: int = 0
    ) -> Spend:
        """Add one call to a bill, priced by the first of the model's names that has a price;
        `cached`: tokens of the prompt that the vendor read from its cache.
        """
        label = self._telemetry.models.label(models[0], answered=True)
        price = next(filter(None, map(self.prices.of, models)), None)
        known = _priced(spend, price, cached)
        self._telemetry.spent(label, kind, known)
        if bill is not None:
            bill.spent[label, kind] = bill.spent.get((label, kind), Spend()) + known
            if (money := _sum(bill).money) is not None:
                note(cost=round(money, 9))
            if bill.closed:
                self.take(bill)
        return known

    def take(self, bill: Bill) -> None:
        """Take over what a bill holds; it is empty then."""
        now = datetime.now(UTC)
        with self._lock:
            whole = _sum(bill)
            for (model, kind), spend in bill.spent.items():
                user, user_key = bill.user, bill.user_key
                if len(self._spent) >= MOST_WAITING:
                    user, user_key = "", None
                day = now.date().isoformat()
                self._spent[Spender(day, bill.key, user, model, kind, user_key)] += spend
            for total in totals_of(bill.key, bill.user, bill.minutes, now) if whole.calls else ():
                self._totals[total] += whole
            bill.spent = {}

    def flush(self) -> None:
        """Write what was taken over; what the store does not take stays here. Returns when all that
        was taken over before is written, by whichever thread.
        """
        with self._writing:
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            spent, self._spent = self._spent, defaultdict(Spend)
            totals, self._totals = self._totals, defaultdict(Spend)
        if not spent:
            return
        try:
            self._store.add_spend(spent, totals)
        except HydraError as error:
            self._telemetry.failed("spend", error)
            with self._lock:
                for spender, spend in spent.items():
                    self._spent[spender] += spend
                for total, spend in totals.items():
                    self._totals[total] += spend


def totals_of(key: str, user: str, minutes: frozenset[str], now: datetime) -> list[Total]:
    """The totals to which what is spent now belongs."""
    periods = [f"{now:%Y-%m-%d}", f"{now:%Y-%m}"]
    names = [(kind, name) for kind, name in (("key", key), ("user", user)) if name]
    totals = [Total(kind, name, period) for kind, name in names for period in periods]
    return totals + [Total(*who, minute_of(now)) for who in names if who[0] in minutes]


def minute_of(now: datetime, back: int = 0) -> str:
    """The name of a minute, as totals have it, or of one before it."""
    return f"m{int(now.timestamp()) // 60 - back:012d}"


def _sum(bill: Bill) -> Spend:
    return sum(bill.spent.values(), Spend())


def _priced(spend: Spend, price: Price | None, cached: int) -> Spend:
    if price is None:
        return spend + Spend(unpriced_tokens=spend.tokens)
    return spend + Spend(cost=price.nanos(spend.prompt_tokens, spend.completion_tokens, cached))


# ---- what a call has used


def told_spend(usage: object) -> tuple[Spend, int] | None:
    """One call as the upstream tells its tokens, and how many of the prompt's it has read from its
    cache; None where it does not tell.
    """
    tokens = tokens_of(usage)
    if tokens is None or not isinstance(usage, Mapping):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return Spend(1, *tokens), cached if type(cached) is int and cached > 0 else 0


def estimated_spend(body: Mapping[str, Any], answered: int) -> Spend:
    """One call whose tokens are not told, by rule of thumb: of a request's texts, pictures, files
    and tools, and of an answer of so many bytes.
    """
    given: list[Any] = [body.get("prompt"), body.get("input")]
    asked = [text for part in given for text in (part if isinstance(part, list) else [part])]
    texts = [text for text in asked if isinstance(text, str)]
    messages, tools = body.get("messages"), body.get("tools")
    chat = messages if isinstance(messages, list) else []
    prompt = sum(message_tokens(message) for message in chat if isinstance(message, Mapping))
    prompt += sum(estimate(text) + PER_MESSAGE for text in texts)
    prompt += estimate(json.dumps(tools)) if tools else 0
    answer = math.ceil(answered / BYTES_PER_TOKEN)
    return Spend(1, prompt, answer, prompt + answer)


def bytes_of(choices: object, part: str) -> int:
    """How long the texts of choices are; `part`: message, or delta of a stream's chunk."""
    listed = choices if isinstance(choices, list) else []
    said = [choice.get(part) for choice in listed if isinstance(choice, Mapping)]
    return sum(_length(message) for message in said if isinstance(message, Mapping))


def _length(message: Mapping[str, Any]) -> int:
    calls = message.get("tool_calls")
    others = [message.get("reasoning_content"), calls and json.dumps(calls)]
    texts = [text_of(message), *(text for text in others if isinstance(text, str))]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def count_learning(store: Store, llm: CachedLLM, settings: Settings) -> None:
    """Add what learning from a store has asked its LLM: nobody's, of the kind `learn`."""
    usage = llm.inner.usage if isinstance(llm.inner, Meter) else Usage()
    if not usage.calls:
        return
    model = str(llm.identity.get("model", "llm"))
    spend = Spend(usage.calls, usage.prompt_tokens, usage.completion_tokens)
    spend = _priced(spend, load_prices(settings.prices).of(model), 0)
    day = datetime.now(UTC).date().isoformat()
    store.add_spend({Spender(day, model=model, kind="learn"): spend})


class PaidLLM:
    """An LLM whose calls are charged to a bill: what jobs ask."""

    def __init__(self, inner: ChatLLM, bill: Bill, ledger: Ledger, kind: str = "job"):
        self._inner, self._bill, self._ledger, self._kind = inner, bill, ledger, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._inner.identity

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        try:
            generation = await self._inner.generate(messages, sampling)
        except PartlyFailed as error:
            self._charge(error.partial, messages)
            raise
        self._charge(generation, messages)
        return generation

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _charge(self, generation: Generation, messages: Sequence[Message]) -> None:
        usage: Usage = generation.usage
        spend = Spend(usage.calls or 1, usage.prompt_tokens, usage.completion_tokens)
        if usage.untold:
            answered = sum(len(text.encode("utf-8", "replace")) for text in generation.texts)
            spend = estimated_spend({"messages": list(messages)}, answered)
        model = str(self.identity.get("model", "llm"))
        self._ledger.charge(self._bill, self._kind, spend, [model])
