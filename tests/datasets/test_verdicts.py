"""What `data check` and `learn` say of data: each fault is told where it is, and only there."""

from collections.abc import Sequence

import pytest

from hydra_llm.datasets.check import rows, summarize
from hydra_llm.datasets.dataset import DataSet, Split
from hydra_llm.datasets.verdicts import Verdict, doubts, verdicts
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Record


def data(
    train: int = 30,
    new: int = 10,
    outputs: Sequence[str] = ("yes", "no", "yes", "yes", "no"),
    *,
    names: Sequence[str] = (),
    labels: Sequence[str] = ("no", "yes"),
    time: str = "2024",
) -> DataSet:
    """Each of so many users has these outputs, and each new one five queries."""
    kind = "classification" if labels else "generation"
    task = Task("t", kind, "{input}", tuple(labels))
    users = [*names, *(f"u{n}" for n in range(len(names), train + new))]
    splits: dict[str, Split] = {u: "train" if n < train else "test" for n, u in enumerate(users)}
    records = [
        Record(user, f"r{n}", f"text {n}", output, time)
        for user in users
        for n, output in enumerate(outputs)
    ]
    gold = outputs[0] if outputs else labels[0]
    queries = [
        Query(user, f"q{n}", f"query {n}", gold, "2025") for user in users[train:] for n in range(5)
    ]
    return DataSet.from_records(task, splits, records, queries)


def said(dataset: DataSet) -> dict[str, tuple[str, float]]:
    return {own.check: (own.severity, own.number) for own in doubts(dataset)}


def test_a_good_data_set_is_enough_in_three_lines() -> None:
    assert [(own.severity, own.check, own.number) for own in verdicts(data())] == [
        ("ok", "training users", 30),
        ("ok", "new users", 10),
        ("ok", "records", 5),
    ]


MANY = [f"label {n}" for n in range(60)]
FAULTS = {
    "no training user": (data(train=0), "training users", "error", 0),
    "no records": (data(outputs=()), "training users", "error", 0),
    "too few training users": (data(train=4), "training users", "warning", 4),
    "few training users": (data(train=29), "training users", "warning", 29),
    "too few new users": (data(new=4), "new users", "warning", 4),
    "no new user": (data(new=0), "new users", "warning", 0),
    "few queries": (data(new=9), "new users", "warning", 45),
    "few records": (data(outputs=("yes", "no")), "records", "warning", 2),
    "constant": (data(outputs=["yes"] * 5), "answers", "error", 1),
    "constant text": (data(outputs=["same"] * 5, labels=()), "answers", "error", 1),
    "nearly constant": (data(outputs=["yes"] * 39 + ["no"]), "answers", "warning", 0.975),
    "many labels": (data(outputs=MANY, labels=MANY), "labels", "warning", 60),
    "rare labels": (data(1, 0, MANY[:12], labels=MANY[:12]), "labels", "warning", 12),
    "labels alike": (
        data(outputs=("Yes", "yes", "no"), labels=("no", "yes", "Yes")),
        "labels",
        "warning",
        1,
    ),
    "missing values": (data(outputs=("yes", "NaN"), labels=("yes", "NaN")), "labels", "warning", 1),
    "users alike": (data(names=("Anna", "anna", "cafe\u0301", "caf\u00e9")), "users", "warning", 2),
    "times": (data(time=""), "times", "warning", 200),
    "days as numbers": (data(time="45321"), "times in 1970", "warning", 200),
}


@pytest.mark.parametrize(("dataset", "check", "severity", "number"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_told(dataset: DataSet, check: str, severity: str, number: float) -> None:
    assert said(dataset)[check] == (severity, number)
    (own,) = [own for own in doubts(dataset) if own.check == check]
    assert "\n" not in str(own)
    assert (severity, str(own)) in rows(summarize(dataset))


def test_users_of_one_label_each_and_repeated_records_are_told() -> None:
    task = Task("t", "classification", "{input}", ("no", "yes"))
    splits: dict[str, Split] = {f"u{n}": "train" for n in range(40)}
    records = [
        Record(user, str(i), "same" if i > 2 else f"text {i}", ("no", "yes")[n % 2], "2024")
        for n, user in enumerate(splits)
        for i in range(5)
    ]
    found = said(DataSet.from_records(task, splits, records, []))
    assert found.pop("new users") == ("warning", 0)
    assert found == {"one-label users": ("warning", 40), "duplicates": ("warning", 40)}


def test_learning_needs_no_new_users_and_errors_come_first() -> None:
    dataset = data(train=2, new=0, outputs=["yes"] * 4, time="")
    severities = [own.severity for own in verdicts(dataset)]
    assert severities == sorted(severities, key=("error", "warning", "ok").index)
    assert "new users" not in {own.check for own in doubts(dataset, of_learning=True)}
    assert str(Verdict("ok", "records", 3, "3 are enough")) == "records: 3 are enough"
