"""Users as a person reads them, over HTTP and by the commands; import, export and deletion."""

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load, save
from hydra_llm.gateway.auth import make_key
from hydra_llm.gateway.profile import WIDTH, describe, in_words, leanings
from hydra_llm.gateway.schemas import RecordIn
from hydra_llm.gateway.user_cache import texts_of
from hydra_llm.model.heads.linear import LinearHead
from hydra_llm.model.interactions import LabelBilinear
from hydra_llm.store.store import Store
from hydra_llm.store.values import Request, StoredFeedback, StoredHead
from hydra_llm.types import Query, Record
from tests.waiting import async_until

from .conftest import TAGS, TITLES, records_of, running, tastes

anyio = pytest.mark.anyio
BOB = [Record("bob", f"r{i}", f"a question {i}", f"Yes, number {i}!") for i in range(4)]


def profile_of(store: Store, user: str, bundle: Bundle | None = None) -> dict[str, Any]:
    kept = store.export_user(user)
    assert kept is not None
    records = store.records(user)[1]
    learned = leanings(kept, records, bundle) if bundle else {}
    return describe(kept, records, learned, bundle.task if bundle else None)


# ---- what is said of a user


def test_a_user_without_a_bundle_is_described_by_style(store: Store) -> None:
    store.add_records("bob", BOB)
    content = {"candidates": [], "visible": 4, "records": ["r1", "r1", "r3", "gone"]}
    store.add_request(Request("q", "bob", 1.0, "", "asked", content))
    with store.change("bob") as bob:
        bob.put_feedback(StoredFeedback("q", 1.0, {"said": {"edited": "no"}}))
    profile = profile_of(store, "bob")
    assert profile["counts"] == {"records": 4, "feedback": 1, "requests": 1, "keys": 0}
    assert profile["feedback"] == {"edited": 1}
    assert profile["answers"]["words"] == 3
    style = {"hold an exclamation mark": 1.0, "hold a number": 1.0}
    assert profile["answers"]["style"] == style
    assert [(item["id"], item["times"]) for item in profile["most_used"]] == [("r1", 2), ("r3", 1)]
    text = "\n".join(in_words(profile))
    assert "4 records; 1 answered request; feedback on 1 (1 edited)" in text
    assert "Typically 3 words" in text
    assert "2x r1: a question 1 -> Yes, number 1!" in text


def test_choices_are_told_from_free_texts_and_times_are_told(store: Store) -> None:
    records = [
        Record("bob", str(i), "tea", "keep" if i % 4 else "toss", f"2024-0{i + 1}")
        for i in range(8)
    ]
    store.add_records("bob", records)
    profile = profile_of(store, "bob")
    assert profile["answers"]["shares"] == {"keep": 0.75, "toss": 0.25}
    assert (profile["first_time"], profile["last_time"]) == ("2024-01", "2024-08")
    assert '"keep" 75%, "toss" 25%' in "\n".join(in_words(profile))


@pytest.mark.parametrize("output", ["茶" * 500, "word " * 300, "x" * 900, "", "a\nb\x1b[31m"])
def test_words_fit_a_terminal_whatever_a_user_wrote(store: Store, output: str) -> None:
    store.add_records(
        "u" * 60, [Record("", f"{i}", output or "y", output or "z") for i in range(3)]
    )
    lines = in_words(profile_of(store, "u" * 60))
    assert max(map(cell_len, lines)) <= WIDTH
    assert all(line.isprintable() for line in lines)
    store.add_records("new", [])
    assert in_words(profile_of(store, "new"))[0] == "new"


def test_what_a_head_raises_is_what_it_was_taught(store: Store, bundles: dict[str, Path]) -> None:
    """A head of made-up numbers that favours one label."""
    bundle = Bundle.load(bundles["tags"])
    bundle.features.keep = False
    store.add_records("ada", records_of("ada"))
    for place, label in enumerate(TAGS.labels):
        numbers = head_for_label(bundle, place)
        with store.change("ada") as ada:
            ada.put_heads(bundle.weights, {"adapter": StoredHead(20, 0.0, numbers)})
        learned = profile_of(store, "ada", bundle)["learned"]
        assert set(learned) == {"adapter"}
        items = learned["adapter"]["leanings"]
        assert {item["text"] for item in items} == set(TAGS.labels)
        assert items[0]["text"] == label
        assert items[0]["probability"] > 0.1 > 0 > items[1]["probability"]
        text = "\n".join(in_words(profile_of(store, "ada", bundle)))
        points = f"{100 * items[0]['probability']:+.1f}"
        assert (
            f"What the adapter has learned from 20 records (norm 5)\n   {points}  {label}" in text
        )
    with store.change("ada") as ada:
        ada.put_heads(bundle.weights, {"adapter": StoredHead(20, 0.0, bytes(len(numbers)))})
    text = "\n".join(in_words(profile_of(store, "ada", bundle)))
    assert "nothing that changes an answer" in text
    assert not profile_of(store, "ada")["learned"], "heads of another bundle say nothing"


def head_for_label(bundle: Bundle, place: int) -> bytes:
    """Numbers of a head that raises one label by the constants of the labels' coding."""
    adapter = bundle.adapter
    assert adapter is not None
    assert isinstance(adapter.head, LinearHead)
    assert isinstance(adapter.interaction, LabelBilinear)
    coding = adapter.interaction.coding
    row = np.eye(len(TAGS.labels))[place] if coding is None else coding[place].numpy()
    numbers = np.zeros(adapter.head.numbers_per_user or 0, dtype="<f4")
    own = numbers[adapter.head.learned : adapter.head.coordinates].reshape(len(row), -1)
    own[:, -1] = 5.0 * row / np.linalg.norm(row)  # each column's constant is its last number
    return numbers.tobytes()


# ---- over HTTP


@pytest.mark.parametrize(
    ("given", "kept"), [(None, ""), (1706695200.0, "1706695200"), ("2020", "2020")]
)
def test_a_time_may_be_null_a_number_or_a_text(given: object, kept: str) -> None:
    record = {"id": "1", "input": "a", "output": "b", "time": given}
    assert RecordIn.model_validate(record).time == kept


@anyio
async def test_users_are_listed_in_pages_for_whom_a_key_may_speak(either: Store) -> None:
    for user in ("cleo", "ada", "bob"):
        either.add_records(user, records_of(user, 3))
    admin, tenant = make_key(either, admin=True)[1], make_key(either, users=["bob", "x"])[1]
    async with running(either) as world:

        async def listed(key: str, **query: Any) -> Mapping[str, Any]:
            headers = {"authorization": f"Bearer {key}"}
            answer = await world.http.get("/v1/users", params=query, headers=headers)
            return answer.json()

        first = await listed(admin, limit=2)
        assert [user["id"] for user in first["data"]] == ["ada", "bob"]
        assert first["has_more"] is True
        assert first["data"][0] | {"created": 0} == {
            "id": "ada",
            "created": 0,
            "records": 3,
            "feedback": 0,
            "requests": 0,
            "latest": None,
        }
        rest = await listed(admin, limit=2, after="bob")
        assert [user["id"] for user in rest["data"]] == ["cleo"]
        assert rest["has_more"] is False
        assert [user["id"] for user in (await listed(tenant))["data"]] == ["bob"]
        assert (await listed(admin, limit=0))["error"]["type"] == "invalid_request_error"
        assert (await listed(admin, after="a\0"))["error"]["param"] == "after"
        headers = {"authorization": f"Bearer {admin}"}
        lossy = await world.http.get("/v1/users?after=%ff", headers=headers)
        assert (lossy.status_code, "not UTF-8" in lossy.text) == (400, True)


@anyio
@pytest.mark.parametrize("kind", [TAGS.name, TITLES.name])
async def test_a_user_is_shown_with_what_was_learned(
    store: Store, bundles: dict[str, Path], kind: str
) -> None:
    store.add_records("ada", records_of("ada"))
    async with running(store, bundles[kind], candidates=2, k=2) as world:
        assert (await world.ask(records_of("ada")[0].input)).status_code == 200
        assert (await world.http.post("/v1/users/ada/fit")).status_code == 202
        await async_until(lambda: bool(store.heads("ada", world.app.state.gateway.deployment.id)))
        shown = (await world.http.get("/v1/users/ada")).json()
        assert (await world.http.get("/v1/users/nobody")).status_code == 404
    assert shown["counts"]["requests"] == 1
    assert sum(item["times"] for item in shown["most_used"]) == 2
    assert set(shown["learned"]) == {"adapter", "reranker"}
    assert shown["learned"]["reranker"]["records"] > 0
    # The word model reads records of texts: a user's adapter head learns from feedback alone.
    assert shown["learned"]["adapter"]["records"] == (20 if kind == TAGS.name else 0)
    assert shown["text"].startswith("ada\n  20 records; 1 answered request")
    favourite = max(tastes("ada").values(), key=[r.output for r in records_of("ada")].count)
    if kind == TAGS.name:
        assert next(iter(shown["answers"]["shares"])) == favourite


# ---- the commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two users, five records each."""
    records = [record for user in ("ada", "bob") for record in records_of(user, 5)]
    queries = [Query("bob", "q", "a question", "calm")]
    splits = {"ada": "train", "bob": "test"}
    save(DataSet.from_records(TAGS, splits, records, queries), tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYDRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features.sqlite"


def test_a_data_set_is_imported_once_and_replaced_on_demand(
    store: Store, folder: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def imported(*more: str) -> list[int]:
        assert (
            run(["users", "import", str(folder), "--store", str(store.url), "--json", *more]) == 0
        )
        counts = json.loads(capsys.readouterr().out)
        return [counts[name] for name in ("users", "added", "changed", "unchanged", "deleted")]

    assert imported() == [2, 10, 0, 0, 0]
    assert imported() == [2, 0, 0, 10, 0]
    store.add_records("ada", [Record("ada", "mine", "asked elsewhere", "calm")])
    store.add_records("ada", [Record("ada", "r0", "changed since", "calm")])
    assert imported() == [2, 0, 1, 9, 0]
    assert "mine" in {record.id for record in store.records("ada")[1]}
    assert imported("--replace") == [2, 0, 0, 10, 1]
    assert imported("--answered") == [2, 1, 0, 10, 0], "a query with its known answer"
    assert imported("--replace") == [2, 0, 0, 10, 1]
    assert store.records("ada")[1] == load(folder).history("ada")


def test_ids_that_the_gateway_refuses_are_not_imported(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, user, id in (
        ("a", "ada", "feedback:req_1"),
        ("b", "x" * 300, "1"),
        ("c", "a\tb", "1"),
    ):
        data = DataSet.from_records(TITLES, {user: "train"}, [Record(user, id, "q", "a")], [])
        save(data, tmp_path / name)
        assert run(["users", "import", str(tmp_path / name), "--store", str(store.url)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert store.users() == []


def test_the_commands_list_show_export_and_delete(
    store: Store, own_cache: Path, bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.load(bundles["tags"])
    texts = texts_of(records_of("ada", 5))
    bundle.features.texts(texts, keep=True)
    store.add_records("ada", records_of("ada", 5))
    store.add_records("bob", BOB)

    def called(*words: str, code: int = 0) -> str:
        assert run(["users", *words, "--store", str(store.url)]) == code
        output = capsys.readouterr()
        return output.err if code else output.out

    assert [row["user"] for row in json.loads(called("list", "--json"))] == ["ada", "bob"]
    assert "ada" in called("list", "--limit", "1")
    assert called("show", "ada").startswith("ada\n  5 records")
    assert called("show", "ada", "--bundle", str(bundles["tags"])).startswith("ada\n  5 records")
    assert json.loads(called("show", "ada", "--json"))["counts"]["records"] == 5
    assert len(json.loads(called("export", "ada"))["records"]) == 5
    with sqlite3.connect(own_cache) as file:
        assert file.execute("SELECT count(*) FROM features").fetchone() == (len(set(texts)),)
        deleted = json.loads(called("delete", "ada", "--json"))["deleted"]
        assert (deleted["records"], deleted["features"]) == (5, len(set(texts)))
        assert file.execute("SELECT count(*) FROM features").fetchone() == (0,)
    for command in ("show", "export", "delete"):
        assert "no user 'ada' in this store: see `hydra-llm users list`" in called(
            command, "ada", code=2
        )
    assert store.users() == ["bob"]
