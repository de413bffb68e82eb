"""From histories to labelled groups: nothing later reaches a group, and what each pair is worth is
what the LLM did with it.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import LLMError
from hydra_llm.history import as_query, before, in_order, parse_time, precedes
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import FailingLLM, RuleLLM
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import BM25
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.training.dataset import LabelledGroup
from hydra_llm.training.labelling import (
    Collected,
    adapter_groups,
    asked_about,
    offers_all,
    reranker_groups,
    training_queries,
    weak_adapter_groups,
    weak_reranker_groups,
)
from hydra_llm.types import Message, Query, Record

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
TITLES = Task("titles", "generation", "Title of: {input}")
OUTPUTS = {
    "tags": ("calm", "loud", "odd"),
    "stars": ("1", "3", "5"),
    "titles": ("a quiet night", "the loud war", "rain"),
}
WORDS = ("rain night", "old war", "love song", "night war film")


class Hashed:
    """Texts as vectors of their words, without an encoder."""

    version = 0

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 16), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split() or [""]:
                row += (
                    np.random.default_rng(sum(map(ord, word)))
                    .standard_normal(16)
                    .astype(np.float32)
                )
            row /= np.linalg.norm(row)
        return rows


def maker(task: Task) -> Featurizer:
    return Featurizer(task, Hashed(), CohortStats())  # type: ignore[arg-type]


def answers_by_the_prompt(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    """Says what depends on every letter of the prompt and on the sample."""
    outputs = ["calm", "loud", "odd", "1", "3", "5"]
    return rng.choice(outputs) + f" {sum(map(ord, messages[-1]['content'])) % 5 + 1}"


def personalizer(
    task: Task, records: dict[str, list[Record]], llm: Any = None, **chosen: Any
) -> UserPipeline:
    given = {"samples": 3, "k": 2, "retrieved": 3, **chosen}
    return UserPipeline(
        task, BM25(), Settings(**given), llm=llm or RuleLLM(answers_by_the_prompt), records=records
    )


def collect(
    task: Task, records: dict[str, list[Record]], queries: Sequence[Query]
) -> list[LabelledGroup]:
    """Every group of these queries, of all four kinds."""
    evidence, door = maker(task), personalizer(task, records)

    async def both() -> tuple[Collected, Collected]:
        return await reranker_groups(door, queries), await adapter_groups(door, queries)

    reranker, adapter = run_sync(both)
    assert not reranker.failures
    groups = [*reranker.groups(evidence), *adapter.groups(evidence)]
    groups += [
        group
        for query in queries
        for group in weak_reranker_groups(door, evidence, query.user)
        if group.query == query.id
    ]
    if task.labels:
        groups += [
            group
            for query in queries
            for group in weak_adapter_groups(evidence, records[query.user])
            if group.query == query.id
        ]
    return groups


def values(groups: Sequence[LabelledGroup]) -> list[dict[str, Any]]:
    """Groups as plain values, which compare by `==`."""
    return [asdict(group) | {"side_features": group.side_features.tolist()} for group in groups]


@st.composite
def records_of_one_user(draw: st.DrawFn, task: Task) -> list[Record]:
    times = draw(
        st.lists(
            st.sampled_from(["", "2019", "2020", "2020-02", "2020-02-01", "2020-02-01T10:00"]),
            min_size=2,
            max_size=7,
        )
    )
    return [
        Record(
            "u",
            f"r{i}",
            draw(st.sampled_from(WORDS)),
            draw(st.sampled_from(OUTPUTS[task.name])),
            time,
            parse_time(time),
            i,
        )
        for i, time in enumerate(times)
    ]


@pytest.mark.parametrize(
    "task",
    [TAGS, *(pytest.param(task, marks=pytest.mark.slow) for task in (STARS, TITLES))],
    ids=lambda task: task.name,
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_record_at_or_after_a_query_changes_its_group(task: Task, data: st.DataObject) -> None:
    records = data.draw(records_of_one_user(task))
    at = data.draw(st.sampled_from(records))
    query = as_query(at)
    expected = collect(task, {"u": records}, [query])
    changed = []
    for record in records:
        if record == at or precedes(record, at) or data.draw(st.booleans(), label="kept"):
            changed.append(record)
        elif data.draw(st.booleans(), label="changed"):
            changed.append(
                Record(
                    "u",
                    record.id,
                    "quite another text",
                    OUTPUTS[task.name][-1],
                    record.time,
                    record.span,
                    record.position,
                )
            )
    later = data.draw(
        st.lists(st.sampled_from(["", "2020-02-01T10:00", "2021", at.time]), max_size=3)
    )
    new = [
        Record("u", f"new{i}", at.input, OUTPUTS[task.name][0], time, parse_time(time), 50 + i)
        for i, time in enumerate(later)
    ]
    changed += [record for record in new if not precedes(record, at)]
    data.draw(st.randoms()).shuffle(changed)
    other = [Record("other", "r0", at.input, at.output, "2018", parse_time("2018"), 0)]
    assert values(collect(task, {"u": changed, "other": other}, [query])) == values(expected)


@pytest.mark.parametrize("task", [TAGS, TITLES], ids=lambda task: task.name)
def test_an_earlier_record_does_change_the_group(task: Task) -> None:
    """The property above would hold for groups that see nothing at all."""
    records = [
        Record("u", f"r{i}", WORDS[i], OUTPUTS[task.name][i % 3], position=i) for i in range(4)
    ]
    query = as_query(records[3])
    edited = [Record("u", "r0", "old song", OUTPUTS[task.name][1], position=0), *records[1:]]
    groups, others = collect(task, {"u": records}, [query]), collect(task, {"u": edited}, [query])
    assert all(
        not np.array_equal(group.side_features, other.side_features)
        for group, other in zip(groups, others, strict=True)
    )


@given(st.data())
def test_training_queries_are_the_last_records_with_a_history(data: st.DataObject) -> None:
    records = data.draw(records_of_one_user(TAGS))
    count = data.draw(st.integers(1, 8))
    queries = training_queries(TAGS, records, count)
    assert [query.id for query in queries] == [
        r.id for r in in_order(records)[-count:] if before(records, r)
    ]
    assert all(query.gold is not None for query in queries)


def test_a_record_is_as_useful_as_the_answer_that_it_leads_to() -> None:
    """An LLM that repeats the record's label: the record is useful if it has the query's label."""
    records = [
        Record("u", str(i), f"rain {i}", label, position=i)
        for i, label in enumerate(["calm", "loud", "calm", "odd", "calm"])
    ]

    def repeat(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        lines = [
            line for line in messages[-1]["content"].splitlines() if line.startswith("Label: ")
        ]
        assert len(lines) == 1, "one record alone stands in the prompt"
        return lines[0].removeprefix("Label: ")

    llm = RuleLLM(repeat)
    door = personalizer(
        TAGS, {"u": records}, llm, retrieved=10, record_answer=True, prompt_style="block"
    )
    collected = run_sync(lambda: reranker_groups(door, [as_query(records[4])]))
    (group,) = collected.groups(maker(TAGS))
    assert dict(zip(group.rights, group.gains, strict=True)) == {
        f"rain {i} → {records[i].output}": float(i in (0, 2)) for i in range(4)
    }
    assert collected.usage.calls == len(llm.calls) == 4
    assert group.voted
    blind = personalizer(
        TAGS,
        {"u": records},
        RuleLLM(repeat),
        retrieved=10,
        record_answer=False,
        prompt_style="block",
    )
    assert set(
        run_sync(lambda: reranker_groups(blind, [as_query(records[4])]))
        .groups(maker(TAGS))[0]
        .rights
    ) == {f"rain {i}" for i in range(4)}


def test_prompts_that_begin_alike_are_asked_one_after_the_other() -> None:
    records = [Record("u", str(i), f"rain {i}", TAGS.labels[i % 3], position=i) for i in range(9)]
    queries, llm = training_queries(TAGS, records, 4), RuleLLM(answers_by_the_prompt)
    door = personalizer(TAGS, {"u": records}, llm, retrieved=4, concurrency=1, prompt_style="block")
    joint = run_sync(lambda: reranker_groups(door, queries)).groups(maker(TAGS))
    asked = [[message["content"] for message in messages] for messages in llm.calls]
    assert len(asked) == 16
    assert asked == sorted(asked)
    single = [
        group
        for query in queries
        for group in run_sync(lambda own=query: reranker_groups(door, [own])).groups(maker(TAGS))
    ]
    seen = [[(own.query, own.rights, own.gains) for own in groups] for groups in (joint, single)]
    assert seen[0] == seen[1], "each query has its own answers, in its own order"


def test_candidates_are_the_samples_or_every_label() -> None:
    records = [Record("u", str(i), "rain", "calm", position=i) for i in range(3)]
    for candidates, features, expected in (
        ("sampled", False, {"loud": 0.0, "calm": 1.0}),
        ("sampled", True, {"calm": 1.0, "loud": 0.0, "odd": 0.0}),  # label features need them all
        ("labels", False, {"calm": 1.0, "loud": 0.0, "odd": 0.0}),
    ):
        answers = iter(["loud", "calm", "gibberish"])
        llm = RuleLLM(lambda messages, index, rng, answers=answers: next(answers))
        door = personalizer(
            TAGS, {"u": records}, llm, candidates=candidates, label_features=features
        )
        (group,) = run_sync(lambda door=door: adapter_groups(door, [as_query(records[2])])).groups(
            maker(TAGS)
        )
        assert dict(zip(group.rights, group.gains, strict=True)) == expected
        assert offers_all(TAGS, door.settings) == (len(expected) == 3)
        votes = dict(
            zip(
                group.rights,
                group.side_features[:, maker(TAGS).adapter_names.index("llm_votes")],
                strict=True,
            )
        )
        assert votes["loud"] == pytest.approx(votes["calm"])
        assert votes.get("odd", -9) < votes["calm"]


def test_the_users_own_text_is_a_candidate_only_if_asked_for() -> None:
    records = [Record("u", str(i), "rain", "a quiet night", position=i) for i in range(2)]
    for rule, expected in (
        ("graded", ["the loud war"]),
        ("gold-positive", ["the loud war", "a quiet night"]),
    ):
        door = personalizer(
            TITLES, {"u": records}, RuleLLM(lambda *_: "the loud war"), label_rule=rule
        )
        (group,) = run_sync(lambda door=door: adapter_groups(door, [as_query(records[1])])).groups(
            maker(TITLES)
        )
        assert list(group.rights) == expected
        assert group.gains[-1] == (1.0 if rule == "gold-positive" else 0.0)


def test_every_record_teaches_all_labels_without_the_llm() -> None:
    records = [Record("u", str(i), WORDS[i], TAGS.labels[i], position=9 - i) for i in range(3)]
    groups = weak_adapter_groups(maker(TAGS), records)
    assert [group.query for group in groups] == ["2", "1", "0"]
    assert [group.gains for group in groups] == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert all(tuple(group.rights) == TAGS.labels and not group.voted for group in groups)
    assert (
        len(np.unique(groups[0].side_features, axis=0)) == 1
    )  # the first sees nothing: all labels alike
    assert len(np.unique(groups[1].side_features, axis=0)) > 1


def test_what_failed_is_reported_and_left_out() -> None:
    records = [Record("u", str(i), f"rain {i}", "calm", position=i) for i in range(6)]
    queries = training_queries(TAGS, records, 2)
    door = personalizer(
        TAGS, {"u": records}, FailingLLM(RuleLLM(lambda *_: "calm"), every=2), retrieved=3
    )
    collected = run_sync(lambda: reranker_groups(door, queries))
    assert len(collected.failures) == 3 == collected.usage.failed
    assert all("query" in line and "record" in line for line in collected.failures)
    assert sum(len(group.rights) for group in collected.groups(maker(TAGS))) == 3
    assert all(
        gain == 1.0 for group in collected.groups(maker(TAGS)) for gain in group.gains
    )  # failed is not zero
    door = personalizer(TAGS, {"u": records}, FailingLLM(RuleLLM(lambda *_: "calm")))
    collected = run_sync(lambda: adapter_groups(door, queries))
    assert collected.groups(maker(TAGS)) == []
    assert [line.split(":")[0] for line in collected.failures] == ["query 4", "query 5"]
    with pytest.raises(LLMError):
        run_sync(lambda: door.apropose(queries[0]))


def test_groups_of_an_unsorted_history_are_in_order_of_time() -> None:
    from hydra_llm.model.interactions import LabelBilinear
    from hydra_llm.training.dataset import make_training_set

    times = ["2020-03-01", "2020-01-01", "2020-02-01"]
    records = [
        Record("u", time, "rain", "calm", time, parse_time(time), i) for i, time in enumerate(times)
    ]
    groups = weak_adapter_groups(maker(TAGS), records)
    assert [group.query for group in groups] == sorted(times)
    table = make_training_set(
        Hashed(),  # type: ignore[arg-type]
        LabelBilinear(16, 3, 2),
        groups,
        rule="exact",
        loss="listwise",
    )
    early, late = table.split_late()
    latest = next(group for group in groups if group.query == max(times))
    assert late.positions.tolist() == [latest.position]
    assert len(early) == 2


# ---- what the history teaches the reranker without the LLM


@pytest.mark.parametrize("task", [TAGS, STARS, TITLES], ids=lambda task: task.name)
def test_a_record_is_worth_what_its_own_answer_would_be(task: Task) -> None:
    records = [
        Record("u", f"r{i}", WORDS[i % 4], OUTPUTS[task.name][i % 3], position=i) for i in range(6)
    ]
    llm = RuleLLM(answers_by_the_prompt)
    door = personalizer(task, {"u": records}, llm)
    groups = weak_reranker_groups(door, maker(task), "u")
    assert llm.calls == []
    assert [group.query for group in groups] == [
        "r2",
        "r3",
        "r4",
        "r5",
    ]  # the first sees nothing, the second has no choice
    for group in groups:
        query = as_query(next(record for record in records if record.id == group.query))
        retrieved = BM25().retrieve(query, before(records, query), 3)
        assert group.gains == pytest.approx(
            [task.gain(item.record.output, query.gold or "") for item in retrieved]
        )
        assert group.rights == [f"{item.record.input} → {item.record.output}" for item in retrieved]
        assert not group.voted


def test_a_history_without_labels_teaches_nothing_by_copies() -> None:
    task = Task(
        "pick", "classification", "Which? {input}", ("[1]", "[2]"), extra={"free_history": True}
    )
    records = [Record("u", f"r{i}", f"rain {i}", f"a title {i}", position=i) for i in range(4)]
    assert weak_reranker_groups(personalizer(task, {"u": records}), maker(task), "u") == []


def known_and_unknown() -> DataSet:
    """A user with four records, then two known queries and one without an answer; and one with
    records alone.
    """
    records = {
        u: [Record(u, f"r{i}", f"rain {i}", "calm", position=i) for i in range(4)] for u in "uv"
    }
    golds = [None, "loud", "odd"]
    queries = [Query("u", f"q{i}", f"war {i}", golds[i], position=4 + i) for i in range(3)]
    return DataSet(TAGS, {"u": "train", "v": "train"}, records, {"u": queries})


@pytest.mark.parametrize(
    ("how", "most", "of_u", "of_v"),
    [
        ("auto", 2, ["query:q1", "query:q2"], ["r2", "r3"]),
        ("history", 3, ["r3", "query:q1", "query:q2"], ["r1", "r2", "r3"]),
        ("queries", 3, ["q1", "q2"], []),
        ("queries", 1, ["q1"], []),
        ("both", 3, ["r3", "q1", "q2"], ["r1", "r2", "r3"]),
        ("both", 1, ["q1"], ["r3"]),
    ],
)
def test_labelled_are_known_queries_or_latest_records(
    how: str, most: int, of_u: list[str], of_v: list[str]
) -> None:
    chosen = Settings(label_queries=how, queries_per_user=most)  # type: ignore[arg-type]
    asked = asked_about(known_and_unknown(), chosen, ["u", "v"])
    assert [query.id for query in asked.queries["u"]] == of_u
    assert [query.id for query in asked.queries["v"]] == of_v
    assert asked.all == [*asked.queries["u"], *asked.queries["v"]]
    seen = [record.id for record in before(asked.records["u"], asked.queries["u"][-1])]
    known = [] if how in ("queries", "both") else ["query:q1"]
    assert seen == ["r0", "r1", "r2", "r3", *known]  # a known query sees the history alone
