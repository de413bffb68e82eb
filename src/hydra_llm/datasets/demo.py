"""MovieLens-100K for the demo, from the data files inside the wheel recbole (never imported).

Source: Harper and Konstan 2015, GroupLens; research use. The files have one typed header line
(`user_id:token`), tabs between fields, articles behind titles (`Godfather, The`) and a few flaws,
which are corrected or left out with a note.
"""

import csv
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from hydra_llm.data_wheels import data_file
from hydra_llm.datasets.dataset import Builder, DataSet, Place, Row, Split, as_fields
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.tasks.base import Task

QUESTION = "What score from 1 to 5 would this person give this film? Answer with the number alone."
RATING = Task(
    name="movielens-100k",
    kind="rating",
    prompt=f"{QUESTION} film: {{input}}",
    labels=("1", "2", "3", "4", "5"),
    metrics=("mae", "rmse"),
    like="LaMP-3",
)
MIN_RATINGS = 20
"""Users with fewer are left out."""
ITEM_FIELDS = ("item_id", "movie_title", "release_year", "class")
RATING_FIELDS = ("user_id", "item_id", "rating", "timestamp")
USER_FIELDS = ("user_id", "age", "gender")


def movielens(
    users_train: int, users_test: int, seed: int = 0, per_user: int = 60, folder: Path | None = None
) -> DataSet:
    """MovieLens-100K as a rating task. The same seed gives the same users; asking for more users
    keeps those of fewer.

    Of each user the `per_user` latest ratings are taken; the last fifth of those (1 to 10) are
    the queries. `folder` holds `ml-100k.inter` and `ml-100k.item`; None: those of recbole.
    """
    folder = folder or data_file("movielens").parent
    ratings, notes = _read_ratings(folder)
    users = [user for user in sorted(ratings, key=int) if len(ratings[user]) >= MIN_RATINGS]
    if users_train + users_test > len(users) or min(users_train, users_test) < 0:
        available = f"MovieLens-100K has {len(users)} with {MIN_RATINGS} ratings"
        raise SettingsError(f"{users_train} + {users_test} users asked for, but {available}")
    random.Random(seed).shuffle(users)
    train: dict[str, Split] = dict.fromkeys(users[:users_train], "train")
    test: dict[str, Split] = dict.fromkeys(users[len(users) - users_test :], "test")
    chosen = train | test
    builder = Builder(RATING, {f"u{user}": split for user, split in chosen.items()})
    for user in chosen:
        builder.add_user(ratings[user][-per_user:])
    return builder.build(notes)


def people(folder: Path | None = None) -> dict[str, dict[str, str | float]]:
    """User of `movielens` → columns of users.jsonl: age in years, gender F or M; for
    `native.save(data, folder, people())` and `bench show --by`.
    """
    rows = _rows((folder or data_file("movielens").parent) / "ml-100k.user", USER_FIELDS)
    return {
        f"u{row['user_id']}": {"age": float(row["age"]), "gender": row["gender"]} for row in rows
    }


def _read_ratings(folder: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """Each user's ratings, oldest first (within one second as the file orders them), and what was
    left out. Only the first of a film is taken: a second one would leak a query's answer.
    """
    items = _rows(folder / "ml-100k.item", ITEM_FIELDS)
    films = {row["item_id"]: film for row in items if (film := _describe(row))}
    rows = [
        row for row in _rows(folder / "ml-100k.inter", RATING_FIELDS) if row["item_id"] in films
    ]
    ratings: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: int(row["timestamp"])):
        user, item, score, time = (row[name] for name in RATING_FIELDS)
        entry = as_fields(f"u{user}", f"m{item}", time, films[item], score)
        ratings[user].setdefault(films[item], (Place(), entry))
    of_users = {user: list(of_films.values()) for user, of_films in ratings.items()}
    dropped = len(rows) - sum(map(len, of_users.values()))
    repeats = f"{dropped} second ratings of a film by the same user were left out"
    unknown = "ratings of the film whose title and year are unknown were left out"
    return of_users, [f"{repeats} (the film has two numbers)", unknown]


def _rows(file: Path, fields: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = [column.partition(":")[0] for column in next(rows, [])]
            if missing := [name for name in fields if name not in names]:
                message = "is missing from the header: another version of the file?"
                raise Place(file, line=1).error(message, missing[0])
            for number, row in enumerate(rows, start=2):
                if len(row) != len(names):
                    message = f"{len(row)} fields instead of {len(names)}"
                    raise Place(file, line=number).error(message)
                yield dict(zip(names, row, strict=True))
    except OSError as error:
        raise DataError(f"{error.strerror}", file=file) from None


def _describe(row: Mapping[str, str]) -> str:
    """`The Godfather (1972). Action, Crime, Drama`; '' for the film of unknown title."""
    title, year = row["movie_title"], row["release_year"]
    if not year.isdigit() and not re.search(r"\(\d{4}\)$", title):
        return ""
    title = re.sub(r"^(.+), (The|A|An|La|Le|Les|Il|Das|Der|Die|El)\b", r"\2 \1", title)
    genres = ", ".join(genre for genre in row["class"].split() if genre != "unknown")
    dated = f"{title} ({year})" if year.isdigit() else title
    return f"{dated}. {genres}" if genres else dated
