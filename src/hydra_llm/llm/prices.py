"""Prices of models by name: the list that is shipped (`data/prices.toml`, with sources and dates),
and a file of one's own that stands above it. A model that is in neither has no price: None, not 0.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra_llm.config import Settings
from hydra_llm.environment import expanded
from hydra_llm.errors import SettingsError
from hydra_llm.llm.meter import FREE, Prices

SHIPPED = Path(__file__).parents[1] / "data" / "prices.toml"
ANY = "*"  # a model of one's own file: all that the file does not name
KEYS = {"input", "cached", "output", "batch", "noted", "source"}
DATE = re.compile(r"-(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|latest)$")
"""What a name may end with: the same model as of a day."""


@dataclass(frozen=True, slots=True)
class Price:
    """Money per million tokens."""

    input: float
    output: float
    cached: float  # of those tokens of the prompt that the vendor reads from its cache
    batch: float = 1.0  # what a batch costs, as a share of it
    source: str = ""
    noted: str = ""  # ISO date

    def nanos(self, prompt: int, completion: int, cached: int = 0) -> int:
        """What tokens cost, in 1e-9 of money; `cached` are some of the prompt's."""
        cached = min(cached, prompt)
        money = (prompt - cached) * self.input + cached * self.cached + completion * self.output
        return round(money * 1000)


@dataclass(frozen=True)
class PriceList:
    """Prices by the models' names."""

    models: Mapping[str, Price]
    own: Mapping[str, Price]  # these stand above

    def of(self, model: str) -> Price | None:
        """The price of a model; None where none is known. A date at its end, `-latest` and what
        stands before a slash are left out where the whole name has no price.
        """
        for prices in (self.own, self.models):
            for name in _names(model):
                if name in prices:
                    return prices[name]
        return self.own.get(ANY)


def load_prices(file: Path | None = None) -> PriceList:
    """The shipped prices, and those of a file. Raises SettingsError: it is not there, or broken."""
    return PriceList(_shipped(), {} if file is None else _read(expanded(file)))


def prices_of(
    identity: Mapping[str, Any], settings: Settings, *, batch: bool = False
) -> Prices | None:
    """What an LLM's tokens cost: by the settings `price_prompt` and `price_completion`, else by the
    list, there also in a batch; None where no price is known.
    """
    given = Prices(settings.price_prompt, settings.price_completion)
    if given != FREE:
        return given
    price = load_prices(settings.prices).of(str(identity.get("model", "")))
    if price is None:
        return None
    share = price.batch if batch else 1.0
    return Prices(price.input * share, price.output * share)


@cache
def _shipped() -> Mapping[str, Price]:
    return _read(SHIPPED)


def _names(model: str) -> Iterator[str]:
    """A model's name, and shorter ones of the same model."""
    model = model.lower()
    for name in dict.fromkeys((model, model.rpartition("/")[2])):
        yield name
        if (short := DATE.sub("", name)) != name:
            yield short


def _read(file: Path) -> dict[str, Price]:
    """The models of all tables `[models]` and `[VENDOR.models]`."""
    try:
        tables: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"prices: {file}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"prices: {file}: not TOML: {error}") from None
    groups = [tables, *(table for table in tables.values() if isinstance(table, dict))]
    prices = {}
    for group in groups:
        models = group.get("models", {})
        for model, row in models.items() if isinstance(models, dict) else ():
            default = {name: group[name] for name in ("source", "batch") if name in group}
            prices[model.lower()] = _price(f"{file}: {model}", row, default)
    if not prices:
        raise SettingsError(f"prices: {file}: has no table [models]")
    return prices


def _price(where: str, row: Any, default: Mapping[str, Any]) -> Price:
    form = "write { input = 2.5, output = 10 }, money per million tokens; cached = 1.25 is optional"
    form += ", batch = 0.5 too"
    if not isinstance(row, dict) or not {"input", "output"} <= row.keys() <= KEYS:
        raise SettingsError(f"prices: {where}: {form}")
    row = {"cached": row["input"], "batch": 1.0, **default, **row}
    names = ("input", "output", "cached", "batch")
    amounts = [row[name] for name in names]
    if any(type(amount) not in (int, float) or not 0 <= amount < 1e9 for amount in amounts):
        raise SettingsError(f"prices: {where}: {form}")
    told: dict[str, Any] = {name: str(row.get(name, "")) for name in ("source", "noted")}
    prices = dict(zip(names, amounts, strict=True))
    return Price(**prices, **told)
