"""Prices of models: the shipped list, and a file of one's own."""

from datetime import date
from pathlib import Path

import pytest

from hydra_llm.config import Settings, load_settings
from hydra_llm.errors import SettingsError
from hydra_llm.llm.meter import Prices
from hydra_llm.llm.prices import Price, load_prices, prices_of


def test_each_shipped_price_has_a_source_and_a_date() -> None:
    models = load_prices().models
    assert len(models) > 80
    for model, price in models.items():
        assert model == model.lower()
        assert price.source.startswith("https://")
        assert date(2025, 1, 1) <= date.fromisoformat(price.noted) <= date(2026, 12, 1), model
        assert 0 < price.cached <= price.input <= 200, model
        assert price.output >= price.input or "embed" in model, model


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("GPT-4o", "gpt-4o"),
        ("openai/gpt-4o-mini", "gpt-4o-mini"),
        ("models/gemini-2.5-flash", "gemini-2.5-flash"),
        ("claude-sonnet-4-20250514", "claude-sonnet-4"),
        ("claude-3-5-haiku-latest", "claude-3-5-haiku"),
        ("anthropic/claude-haiku-4-5-20251001", "claude-haiku-4-5"),
    ],
)
def test_names_of_the_same_model(name: str, same: str) -> None:
    prices = load_prices()
    assert prices.of(name) == prices.models[same]


@pytest.mark.parametrize("name", ["", "llama3.2", "gpt-4o-mine", "gpt-4", "my/gpt", "-latest"])
def test_an_unknown_model_has_no_price(name: str) -> None:
    known = name == "gpt-4"
    assert (load_prices().of(name) is not None) == known


def test_what_tokens_cost() -> None:
    price = Price(2.5, 10, 1.25)
    assert price.nanos(1_000_000, 0) == 2_500_000_000
    assert price.nanos(1000, 10, 800) == 200 * 2500 + 800 * 1250 + 10 * 10_000
    assert price.nanos(10, 0, 99) == 10 * 1250, "no more than the prompt is from a cache"


def test_a_file_stands_above_the_list(tmp_path: Path) -> None:
    file = tmp_path / "prices.toml"
    file.write_text('[mine.models]\n"gpt-4o" = {input=1, output=2}\n"*" = {input=0, output=0}\n')
    prices = load_prices(file)
    assert prices.of("gpt-4o-2024-08-06") == Price(1, 2, 1)
    assert prices.of("gpt-4o-mini") == load_prices().of("gpt-4o-mini")
    assert prices.of("llama3.2") == Price(0, 0, 0)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x", "not TOML"),
        ("[models]", r"no table \[models\]"),
        ("[models]\nm = 1", "m: write"),
        ("[models]\nm = {input=1}", "m: write"),
        ("[models]\nm = {input=1, output=-2}", "m: write"),
        ("[models]\nm = {input=1, output=true}", "m: write"),
        ("[models]\nm = {input=1, output=2, per=3}", "m: write"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=fault) as error:
        load_prices(file)
    assert "\n" not in str(error.value)
    with pytest.raises(SettingsError, match="No such file"):
        load_prices(tmp_path / "none.toml")


def test_prices_of_settings_come_first(tmp_path: Path) -> None:
    model = {"kind": "openai", "model": "gpt-4o"}
    assert prices_of(model, Settings()) == Prices(2.5, 10)
    assert prices_of(model, Settings(price_prompt=1.0)) == Prices(1.0, 0.0)
    assert prices_of({"kind": "fake"}, Settings()) is None
    assert load_settings(prices="~/p.toml").prices == Path("~/p.toml").expanduser()
