"""`hydra-llm spend`: what the calls of LLMs cost, prices, and limits, in the gateway's database."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import DEFAULT_STORE, AsJson, StoreURL, open_store
from hydra_llm.errors import SettingsError, did_you_mean

DAYS = 30
app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def show(
    by: Annotated[str, Option(help="Some of day, user, key, model, kind, with commas.")] = "model",
    since: Annotated[str | None, Option(help="First day (UTC); default: 30 days ago.")] = None,
    until: Annotated[str | None, Option(help="Last day.")] = None,
    user: Annotated[str | None, Option(help="Of this user.")] = None,
    key: Annotated[str | None, Option(help="Of this key, by its id.")] = None,
    limit: Annotated[int, Option(min=1, help="Max rows.")] = 100,
    store: StoreURL = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Show calls, tokens and money, the dearest first, and the total."""
    from hydra_llm.gateway.spend_routes import spend_json
    from hydra_llm.store.spend import COLUMNS

    names = [name.strip() for name in by.split(",") if name.strip()]
    for name in names:
        if name not in COLUMNS:
            near = did_you_mean(name, COLUMNS)
            raise SettingsError(f"--by {name}{near}: take some of {', '.join(COLUMNS)}")
    first = since or (datetime.now(UTC).date() - timedelta(days=DAYS - 1)).isoformat()
    where: dict[str, Any] = {"since": _day("--since", first), "key": key}
    where |= {"until": _day("--until", until)} if until else {}
    where["users"] = None if user is None else [user]
    with open_store(store) as opened:
        groups = opened.spend(*dict.fromkeys(names), **where, limit=limit) if names else []
        total = opened.spend(**where)[0].spend
    rows = [{**group.by, **spend_json(group.spend)} for group in groups]
    rows.append({name: "total" if place == 0 else "" for place, name in enumerate(names)})
    rows[-1] |= spend_json(total)
    if not as_json:
        rows = [row | {"cost": "no price" if row["cost"] is None else row["cost"]} for row in rows]
    console.emit(rows, as_json)


@app.command()
def limit(
    limits: Annotated[str, Argument(help="'5/day, 20000 tokens/minute', none, or default.")],
    user: Annotated[str | None, Option(help="Of this user.")] = None,
    key: Annotated[str | None, Option(help="Of this key, by its id.")] = None,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Set what a key or a user may spend; `default` is what the gateway's settings say."""
    from hydra_llm.gateway.spend_limits import parse_limits

    if (user is None) == (key is None):
        raise SettingsError("name one of --user and --key")
    value = None if limits.strip() == "default" else limits
    try:
        parse_limits(value or "")
    except ValueError as error:
        raise SettingsError(str(error)) from None
    with open_store(store) as opened:
        if key is not None and opened.key(key) is None:
            raise SettingsError(f"no key '{key}': see `hydra-llm keys list`")
        kind, name = ("user", user) if key is None else ("key", key)
        opened.set_limit(kind, str(name), value)
    console.say(f"{kind} {name}: {limits}; servers of this store see it within two seconds")


@app.command(name="limits")
def list_limits(store: StoreURL = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the limits of single keys and users."""
    with open_store(store) as opened:
        own = opened.limits()
    rows = [{"of": one.kind, "name": one.name, "limits": one.value} for one in own]
    console.emit(rows, as_json)


@app.command()
def prices(
    model: Annotated[str | None, Argument(help="Default: all models.")] = None,
    file: Annotated[Path | None, Option(help="Prices above the shipped ones.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show prices per million tokens, with their sources and the days when they were noted."""
    from hydra_llm.config import load_settings
    from hydra_llm.llm.prices import load_prices

    known = load_prices(file or load_settings().prices)
    models = [model] if model is not None else [*{**known.models, **known.own}]
    rows = []
    for name in models:
        price = known.of(name)
        if price is None:
            raise SettingsError(f"{name}: no price is known: write it into a file (docs/spend.md)")
        about = {"batch": price.batch, "noted": price.noted, "source": price.source}
        amounts = {"input": price.input, "cached": price.cached, "output": price.output}
        rows.append({"model": name, **amounts, **about})
    console.emit(rows, as_json)


def _day(option: str, day: str) -> str:
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError:
        raise SettingsError(f"{option} {day}: write a day as 2026-11-30") from None
