"""MovieLens inside recbole: the counts of the real files, and what is mended in them."""

from pathlib import Path

import pytest

from hydra_llm.datasets.check import summarize
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.demo import RATING, movielens, people
from hydra_llm.datasets.native import load, save, user_columns
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.history import before
from hydra_llm.types import Record


@pytest.mark.slow
def test_real_users_with_times_in_order_and_no_leak() -> None:
    dataset = movielens(20, 10, seed=0)
    summary = summarize(dataset)
    assert summary["users"] == {"train": 20, "test": 10}
    assert all(leak["count"] == 0 for leak in summary["leaks"].values())
    assert summary["duplicates"]["count"] == 0
    for user in dataset.users():
        history, queries = dataset.history(user), dataset.queries(user)
        assert 20 <= len(history) + len(queries) <= 60
        assert len(queries) == min(10, (len(history) + len(queries)) // 5)
        stamps = [float(entry.time) for entry in (*history, *queries)]
        assert stamps == sorted(stamps)
        assert all(before(history, query) == history for query in queries)


@pytest.fixture(scope="module")
def everything() -> DataSet:
    """All users with all their ratings."""
    return movielens(900, 42, per_user=10_000)


@pytest.mark.slow
def test_every_rating_of_the_source_is_there_or_accounted_for(everything: DataSet) -> None:
    dataset = everything
    entries = sum(1 for _ in dataset.stream_history()) + sum(1 for _ in dataset.stream_queries())
    repeats = int(dataset.notes[0].split()[0])
    # Of the 100,000 ratings nine are of the film that has no title; user 300 has 19 left, one too
    # few.
    assert entries + repeats == 100_000 - 9 - 19
    assert set(dataset.users()) == {f"u{number}" for number in range(1, 944)} - {"u300"}


def test_titles_are_written_as_people_write_them(everything: DataSet) -> None:
    texts = {record.input for record in everything.stream_history()}
    assert {
        "The Godfather (1972). Action, Crime, Drama",
        "Les Misérables (1995). Drama, Musical",
        "Good Morning (1971)",
    } <= texts
    assert (
        "Land Before Time III: The Time of the Great Giving (1995). Animation, Children's" in texts
    )


@pytest.mark.slow
def test_the_seed_decides_and_more_users_keep_the_ones_of_fewer() -> None:
    few, many, other = movielens(5, 5, seed=1), movielens(9, 9, seed=1), movielens(5, 5, seed=2)
    assert set(few.users("train")) < set(many.users("train"))
    assert set(few.users("test")) < set(many.users("test"))
    assert movielens(5, 5, seed=1).digest == few.digest != other.digest


def test_too_many_users_or_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="942"):
        movielens(900, 100)
    with pytest.raises(DataError, match=r"ml-100k\.item: No such file"):
        movielens(1, 1, folder=tmp_path)


def test_a_file_of_another_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"ml-100k\.item:1: field 'release_year'"):
        movielens(1, 1, folder=tmp_path)
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n1\tX\n",
        encoding="utf-8",
    )
    with pytest.raises(DataError, match=r"ml-100k\.item:2: 2 fields instead of 4"):
        movielens(1, 1, folder=tmp_path)


def test_ages_and_genders_are_columns_of_users(tmp_path: Path) -> None:
    """943 people from 7 to 73 years of age, 273 of them women."""
    columns, records = people(), [Record(user, "1", "a film", "4") for user in ("u1", "u2")]
    dataset = DataSet.from_records(RATING, {"u1": "train", "u2": "test"}, records, [])
    assert len(columns) == 943
    assert [own["gender"] for own in columns.values()].count("F") == 273
    ages = [own["age"] for own in columns.values()]
    assert (min(ages), max(ages)) == (7, 73)
    save(dataset, tmp_path / "d", columns)
    assert load(tmp_path / "d").digest == dataset.digest
    assert user_columns(tmp_path / "d") == {
        "u1": {"age": 24, "gender": "M"},
        "u2": {"age": 53, "gender": "F"},
    }
