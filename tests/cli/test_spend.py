"""`hydra-llm spend` on a database."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hydra_llm.cli.main import run
from hydra_llm.store.store import Store
from hydra_llm.store.values import Key, Limited, Spend, Spender


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 's.db'}"
    store = Store(url)
    day = datetime.now(UTC).date().isoformat()
    store.add_spend(
        {
            Spender(day, "k1", "ada", "gpt-4o"): Spend(1, 100, 10, cost=350_000),
            Spender("2020-01-01", "k1", "bob", "own"): Spend(2, 5, 5, 0, 10),
        }
    )
    store.add_key(Key("k1", "hash", "", True, (), 1.0, None))
    store.close()
    return url


def test_what_was_spent(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["spend", "show", "--store", url, "--by", "user,model", "--json"]) == 0
    row, total = json.loads(capsys.readouterr().out)
    assert (row["user"], row["model"], row["cost"]) == ("ada", "gpt-4o", 0.00035)
    assert (total["user"], total["calls"]) == ("total", 1)
    since = ["--since", "2020-01-01", "--until", "2020-12-31"]
    assert run(["spend", "show", "--store", url, *since]) == 0
    assert "no price" in capsys.readouterr().out
    for wrong in (["--by", "model,users"], ["--since", "yesterday"]):
        assert run(["spend", "show", "--store", url, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_limits(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["spend", "limit", "5/day", "--user", "ada", "--store", url]) == 0
    assert run(["spend", "limit", "none", "--key", "k1", "--store", url]) == 0
    store = Store(url)
    assert store.limits() == [Limited("key", "k1", "none"), Limited("user", "ada", "5/day")]
    assert run(["spend", "limits", "--store", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"of": "key", "name": "k1", "limits": "none"}
    assert run(["spend", "limit", "default", "--user", "ada", "--store", url]) == 0
    assert store.limits() == [Limited("key", "k1", "none")]
    store.close()
    wrong = (["much", "--user", "a"], ["5/day"], ["5/day", "--key", "k2"])
    for arguments in wrong:
        capsys.readouterr()
        assert run(["spend", "limit", *arguments, "--store", url]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_prices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["spend", "prices", "gpt-4o", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["input"], row["cached"], row["output"]) == (2.5, 1.25, 10)
    assert row["source"].startswith("https://")
    assert run(["spend", "prices", "nothing-known"]) == 2
    assert "no price is known" in capsys.readouterr().err
