"""Real users from an installed package, for the demo: MovieLens-100K inside the wheel recbole (its
data files only, never imported).

Source: Harper and Konstan 2015, GroupLens; research use. The wheel's files have one typed header
line (`user_id:token`), tabs between fields, articles behind titles (`Godfather, The`) and a few
flaws, which are corrected or left out here with a note. Knows no LLM.
"""

import csv
import random
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from hydra_llm.datasets.dataset import FIELDS, Builder, DataSet, Place, Split, held_out
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.tasks.base import Task

RATING = Task(
    name="movielens-100k",
    kind="rating",
    prompt=(
        "What score from 1 to 5 would this person give this film? Answer with the number alone."
        " film: {input}"
    ),
    labels=("1", "2", "3", "4", "5"),
    metrics=("mae", "rmse"),
    like="LaMP-3",
)
INSTALL = "pip install --no-deps recbole==1.2.1"
MIN_RATINGS = 20
"""Users with fewer are left out."""

Rating = tuple[str, str, str, str]
"""Film, score, seconds since 1970, the film's number."""


def movielens(
    users_train: int, users_test: int, seed: int = 0, per_user: int = 60, folder: Path | None = None
) -> DataSet:
    """MovieLens-100K as a rating task. The same seed gives the same users; asking for more users
    keeps those of fewer.

    Of each user the `per_user` latest ratings are taken; the last fifth of those (1 to 10) are
    the queries. `folder` holds `ml-100k.inter` and `ml-100k.item`; None: the installed wheel.

    Raises:
        DataError: the wheel is not installed, or its files are not as expected.
        SettingsError: more users asked for than there are.
    """
    folder = folder or _wheel_folder()
    ratings = _read_ratings(folder)
    notes = _drop_repeats(ratings)
    users = [user for user in sorted(ratings, key=int) if len(ratings[user]) >= MIN_RATINGS]
    if users_train + users_test > len(users) or min(users_train, users_test) < 0:
        raise SettingsError(
            f"{users_train} + {users_test} users asked for, but MovieLens-100K has {len(users)}"
            f" with {MIN_RATINGS} ratings"
        )
    random.Random(seed).shuffle(users)
    train: dict[str, Split] = dict.fromkeys(users[:users_train], "train")
    test: dict[str, Split] = dict.fromkeys(users[len(users) - users_test :], "test")
    return _build(ratings, train | test, per_user, notes)


def _build(
    ratings: Mapping[str, list[Rating]],
    chosen: Mapping[str, Split],
    per_user: int,
    notes: list[str],
) -> DataSet:
    builder = Builder(RATING, {f"u{user}": split for user, split in chosen.items()})
    for user in chosen:
        latest = ratings[user][-per_user:]
        first_query = len(latest) - held_out(len(latest))
        for at, (film, score, time, item) in enumerate(latest):
            entry = dict(zip(FIELDS, (f"u{user}", f"m{item}", time, film, score), strict=True))
            builder.add("history" if at < first_query else "queries", entry)
    return builder.build(notes)


def _wheel_folder() -> Path:
    spec = find_spec("recbole")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file():
            return folder
    raise DataError(
        "the demo's users come from MovieLens-100K inside recbole 1.2.1, which is not installed:"
        f" {INSTALL}"
    )


def _read_ratings(folder: Path) -> dict[str, list[Rating]]:
    """Each user's ratings, oldest first; within one second as the file orders them."""
    items = _rows(folder / "ml-100k.item", ("item_id", "movie_title", "release_year", "class"))
    films = {row["item_id"]: film for row in items if (film := _describe(row))}
    ratings: dict[str, list[Rating]] = {}
    for row in _rows(folder / "ml-100k.inter", ("user_id", "item_id", "rating", "timestamp")):
        if row["item_id"] in films:
            ratings.setdefault(row["user_id"], []).append(
                (films[row["item_id"]], row["rating"], row["timestamp"], row["item_id"])
            )
    for its in ratings.values():
        its.sort(key=lambda rating: int(rating[2]))
    return ratings


def _rows(file: Path, fields: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = [column.partition(":")[0] for column in next(rows, [])]
            if missing := [name for name in fields if name not in names]:
                place, message = Place(file, line=1), "is missing from the header"
                raise place.error(f"{message}: another version of the file?", missing[0])
            for number, row in enumerate(rows, start=2):
                if len(row) != len(names):
                    place = Place(file, line=number)
                    raise place.error(f"{len(row)} fields instead of {len(names)}")
                yield dict(zip(names, row, strict=True))
    except OSError as error:
        raise DataError(f"{error.strerror}: {INSTALL}", file=file) from None


def _describe(row: Mapping[str, str]) -> str:
    """`The Godfather (1972). Action, Crime, Drama`; '' for the film of unknown title."""
    title, year = row["movie_title"], row["release_year"]
    if not year.isdigit() and not re.search(r"\(\d{4}\)$", title):
        return ""
    title = re.sub(r"^(.+), (The|A|An|La|Le|Les|Il|Das|Der|Die|El)\b", r"\2 \1", title)
    genres = ", ".join(genre for genre in row["class"].split() if genre != "unknown")
    dated = f"{title} ({year})" if year.isdigit() else title
    return f"{dated}. {genres}" if genres else dated


def _drop_repeats(ratings: Mapping[str, list[Rating]]) -> list[str]:
    """A few films have two numbers: keep each user's first rating of a film, or a query's answer
    could be in the history.
    """
    dropped = 0
    for its in ratings.values():
        first = {rating[0]: rating for rating in reversed(its)}
        dropped += len(its) - len(first)
        its[:] = [rating for rating in its if first.get(rating[0]) is rating]
    return [
        f"{dropped} second ratings of a film by the same user were left out (the film has two"
        " numbers)",
        "ratings of the film whose title and year are unknown were left out",
    ]
