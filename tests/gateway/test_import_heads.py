"""`users import --bundle`: learned users have their own heads at the gateway from the start."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import save
from hydra_llm.gateway.deployment import named
from hydra_llm.gateway.feedback import FITTED
from hydra_llm.store.store import Store
from hydra_llm.types import Query, Record

from .conftest import TAGS, TITLES, records_of, running

Import = Callable[..., tuple[int, dict[str, int], str]]
USERS = ("train0", "train1", "new")  # the last one is in no bundle
COUNTS = ("heads", "heads_kept", "heads_left_out")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [record for user in USERS for record in records_of(user)]
    data = DataSet.from_records(TAGS, dict.fromkeys(USERS, "train"), records, [])
    save(data, tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def imported(folder: Path, either: Store, capsys: pytest.CaptureFixture[str]) -> Import:
    """Runs the command; its exit code, the counts of heads, and what it says."""

    def do(bundle: Path, *more: str) -> tuple[int, dict[str, int], str]:
        url = either.url.render_as_string(hide_password=False)
        into = ["--store", url, "--bundle", str(bundle), "--json"]
        code = run(["users", "import", str(folder), *into, *more])
        out, said = capsys.readouterr()
        counts = json.loads(out) if out else {}
        return code, {name: counts.get(name) for name in COUNTS}, said

    return do


def counts(*values: int) -> dict[str, int]:
    return dict(zip(COUNTS, values, strict=True))


@pytest.mark.anyio
async def test_learned_users_have_their_heads_from_the_first_request(
    either: Store, imported: Import, bundles: dict[str, Path]
) -> None:
    assert imported(bundles["tags"]) == (0, counts(2, 0, 0), "")
    bundle = Bundle.load(bundles["tags"])
    async with running(either, bundles["tags"], candidates=3) as world:
        for user in USERS:
            answer = await world.ask("the storm at the harbour", user=user)
            assert answer.headers["x-hydra-personalized"] == "true"
            snapshot = world.app.state.gateway.deployment.users.current(user)
            heads = bundle.heads_of(user)
            assert snapshot.heads.keys() == heads.keys()
            for name, head in heads.items():
                assert np.array_equal(snapshot.heads[name].numbers, head.numbers)
                assert snapshot.heads[name].records == head.records
            assert bool(heads) == (user != "new")
    assert imported(bundles["tags"])[1] == counts(0, 2, 0), "the same again changes nothing"


def test_a_head_that_feedback_has_moved_stays(
    either: Store, imported: Import, bundles: dict[str, Path]
) -> None:
    imported(bundles["tags"])
    weights = Bundle.load(bundles["tags"]).weights
    own = either.heads("train0", weights)
    with either.change("train0") as change:
        change.put_heads(weights, moved := own | {FITTED: own["adapter"]})
    assert imported(bundles["tags"])[1] == counts(0, 2, 0)
    assert either.heads("train0", weights) == moved


def test_no_head_comes_that_knows_what_the_store_must_not(
    either: Store, imported: Import, bundles: dict[str, Path]
) -> None:
    imported(bundles["tags"])
    with either.change("train0") as change:
        change.switch_record("r0", off=True)
    own = records_of("train1")[0]
    either.add_records("train1", [Record("train1", "more", own.input, own.output)])
    with either.change("train1") as change:
        assert change.remove("more")
    code, found, said = imported(bundles["tags"])
    assert (code, found) == (0, counts(1, 0, 1))
    assert said == (
        "users whose heads were left out: 1; they have learned from records that this store lacks,"
        " has changed or switched off\n"
    )
    weights = Bundle.load(bundles["tags"]).weights
    assert not either.heads("train0", weights)
    assert either.heads("train1", weights)


def test_heads_of_another_base_are_refused_or_wait(
    either: Store, imported: Import, bundles: dict[str, Path], tmp_path: Path
) -> None:
    other, _, said = imported(bundles["titles"])
    assert other == 2
    assert len(said.strip().splitlines()) == 1
    assert "kind and labels must agree" in said
    assert either.users() == [], "nothing was written"
    either.set_bundle(named(tmp_path / "elsewhere", "0" * 64))
    code, found, said = imported(bundles["tags"])
    assert (code, found) == (0, counts(2, 0, 0))
    assert said == (
        f"servers of this store use another bundle, {tmp_path / 'elsewhere'}: these heads count"
        f" after `hydra-llm bundles use {bundles['tags']}`\n"
    )


def test_users_that_a_bundle_does_not_know_are_told(
    either: Store, bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, queries = records_of("new", 3), [Query("new", "q", "a question", "a title")]
    save(DataSet.from_records(TITLES, {"new": "test"}, records, queries), tmp_path / "titles")
    url = either.url.render_as_string(hide_password=False)
    more = ["--store", url, "--bundle", str(bundles["titles"])]
    assert run(["users", "import", str(tmp_path / "titles"), *more]) == 0
    said = capsys.readouterr().err
    assert f"{bundles['titles']} has heads of none of these users: `hydra-llm fit`" in said
