"""BBox-Adapter learns preferences from its own samples and sees no later record."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm.bench import bbox
from hydra_llm.bench.bbox import (
    ALPHA,
    ROUNDS,
    BBoxAdapter,
    Energy,
    Pools,
    distribution,
    expected_negatives,
    nce_loss,
)
from hydra_llm.bench.experiment import run_methods
from hydra_llm.bench.method import Parts, find_methods
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.errors import LLMError
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.model.interactions import Cross, Groups
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.types import Answer, Message, Query, Record

TAGS = Task(
    "tags",
    "classification",
    "Which tag? {input}",
    ("calm", "loud", "odd", "dull"),
    metrics=("accuracy",),
)
TITLES = Task("titles", "generation", "Title of: {input}")
TOPICS = ("sea", "war", "love", "space")
TRAIN, NEW = [f"train{i}" for i in range(6)], [f"new{i}" for i in range(5)]
RECORDS, QUERIES = 16, 12


class Store:
    """Texts as the topic or the answer that they begin with."""

    words = (*TOPICS, *TAGS.labels)

    class encoder:
        width = 8

    version = 0

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.array(
            [[text.startswith(word) for word in self.words] for text in texts], dtype=np.float32
        )


def people(alike: bool, task: Task = TAGS) -> tuple[dict[str, list[Record]], list[Query]]:
    """Everybody gives each topic an answer, and keeps to it; all the same one, or everyone an own
    one.
    """
    dice, records, queries = random.Random(3), {}, []
    for user in [*TRAIN, *NEW]:
        answers = list(TAGS.labels)
        if not alike:
            dice.shuffle(answers)
        taste = dict(zip(TOPICS, answers, strict=True))
        told = [dice.choice(TOPICS) for _ in range(RECORDS + QUERIES)]
        records[user] = [
            Record(user, f"r{i}", f"{t} {i}", taste[t], position=i)
            for i, t in enumerate(told[:RECORDS])
        ]
        if user in NEW:
            queries += [
                Query(user, f"q{i}", f"{t} {i}", taste[t], position=100 + i)
                for i, t in enumerate(told[RECORDS:], RECORDS)
            ]
    return records, queries


def anything(messages: Sequence[Message], index: int, rng: random.Random) -> str:
    return rng.choice(TAGS.labels)


def parts(
    records: dict[str, list[Record]], llm: Any = None, task: Task = TAGS, **chosen: Any
) -> Parts:
    given = Settings(
        **{
            "samples": 6,
            "k": 1,
            "retrieved": 2,
            "queries_per_user": RECORDS,
            "concurrency": 2,
            "width": 16,
            **chosen,
        }
    )
    bundle = Bundle(
        task, given, {}, Store(), CohortStats(), records=dict(records), trained_on=tuple(TRAIN)
    )  # type: ignore[arg-type]
    return Parts(
        bundle,
        llm or RuleLLM(anything),
        given,
        {user: records[user] for user in records if user in NEW},
    )


def gain(name: str, having: Parts, queries: Sequence[Query]) -> float:
    samples = run_sync(lambda: run_methods(find_methods([name]), having, queries))
    assert not any(sample.error for sample in samples)
    return float(
        np.mean([having.bundle.task.gain(sample.answer, sample.gold) for sample in samples])
    )


def picks(having: Parts, queries: Sequence[Query]) -> list[Answer]:
    answerer = BBoxAdapter(having)

    async def ask() -> list[Answer]:
        return [await answerer.aanswer(query) for query in queries]

    return run_sync(ask)


# ---- it learns


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False], ids=["one taste", "own tastes"])
@pytest.mark.parametrize("label_features", [True, False], ids=["labels", "tower"])
def test_bbox_learns_preferences_from_samples(alike: bool, label_features: bool) -> None:
    records, queries = people(alike)
    having = parts(records, label_features=label_features)
    learned, chance, best = (
        gain(name, having, queries) for name in ("bbox-adapter@6", "random@6", "oracle@6")
    )
    assert chance < 0.4 < 0.6 < best
    share = (
        0.8 if alike else 0.6
    )  # of what choosing can win; seeds 0 to 2 reach all of it, and .7 to 1
    assert learned > chance + share * (best - chance), (learned, chance, best)
    strangers = [
        replace(query, user=f"stranger of {query.user}") for query in queries
    ]  # they have the shared energy
    nobody = gain("bbox-adapter@6", having, strangers)
    assert nobody > 0.6 if alike else nobody < learned - 0.2, (nobody, learned)


@pytest.mark.slow
def test_bbox_learns_texts() -> None:
    records, queries = people(alike=True)
    having = parts(records, task=TITLES)
    assert gain("bbox-adapter@6", having, queries) > gain("random@6", having, queries) + 0.3


# ---- the loss and the rounds


def test_the_loss_and_its_gradient_are_those_of_equation_3() -> None:
    g = np.array([[0.5, -1.0, 2.0], [0.25, 1.5, -0.5]])
    gold, drawn, a = [2, 0], [(0, 0), (0, 0), (0, 1), (1, 1)], 0.3
    expected = (
        sum(a * g[i, k] ** 2 - g[i, k] for i, k in enumerate(gold)) / 2
        + sum(a * g[i, m] ** 2 + g[i, m] for i, m in drawn) / 4
    )
    slope = np.zeros((2, 3))
    for i, k in enumerate(gold):
        slope[i, k] += (2 * a * g[i, k] - 1) / 2
    for i, m in drawn:
        slope[i, m] += (2 * a * g[i, m] + 1) / 4
    energies = torch.tensor(g, requires_grad=True)
    loss = nce_loss(
        energies, torch.tensor(gold), torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), a
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected)
    assert expected == pytest.approx(0.140625)  # worked out by hand
    assert energies.grad is not None
    np.testing.assert_allclose(energies.grad.numpy(), slope, atol=1e-12)
    alone = nce_loss(torch.tensor([[2.0, 7.0]]), torch.tensor([0]), torch.zeros(1, 2), a)
    assert float(alone) == pytest.approx(a * 4 - 2)  # nothing was drawn that is wrong


def made_pools(count: int = 40) -> Pools:
    draw = torch.Generator().manual_seed(1)
    right = torch.randn(count, 4, 3, generator=draw)
    groups = Groups(
        torch.zeros(count, 0),
        right,
        torch.zeros(count, 4, 0),
        torch.ones(count, 4, dtype=torch.bool),
    )
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0]).expand(count, 4)
    return Pools(groups, shares, (right @ torch.tensor([2.0, -1.0, 0.0])).argmax(-1))


def test_negatives_are_expected_draws_of_wrong_candidates() -> None:
    energies, shares = torch.tensor([[0.0, math.log(2.0), 5.0]]), torch.tensor([[0.5, 0.25, 0.0]])
    torch.testing.assert_close(distribution(energies, shares), torch.tensor([[0.5, 0.5, 0.0]]))
    pools = made_pools()
    even = torch.zeros(40, 4)
    counts = expected_negatives(even, pools, 200)
    assert (counts.gather(1, pools.gold[:, None]) == 0).all()
    drawn = torch.multinomial(
        pools.shares, 20_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    wrong = torch.arange(4) != pools.gold[:, None]
    seen = (
        torch.nn.functional.one_hot(drawn, 4).sum(1) / 100 * wrong
    )  # of 200 draws, on average over a hundred times
    torch.testing.assert_close(counts, seen, atol=3.0, rtol=0)
    assert (counts[:, 3] == 0).all()  # the LLM never said it


def test_each_round_draws_negatives_from_the_last_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    pools, seen = made_pools(), []

    def spy(energies: torch.Tensor, *given: Any) -> torch.Tensor:
        counts = expected_negatives(energies, *given)
        seen.append((energies.clone(), counts))
        return counts

    monkeypatch.setattr(bbox, "expected_negatives", spy)
    start = Energy(Cross(3), torch.zeros(3))
    end = bbox.adapted(start, pools, draws=8, weight_decay=0.01)
    assert len(seen) == ROUNDS > 1
    assert (start.weights == 0).all()  # a copy learns
    assert not torch.equal(start.weights, end.weights)
    (first, before), *_, (last, after) = seen
    assert not torch.equal(before, after)
    assert after.sum() < before.sum()  # the gold answer, where the LLM says it, takes its share
    picked = end(pools.groups).argmax(-1)
    assert (
        (picked == pools.gold).float().mean()
        > 0.9
        > (first.argmax(-1) == pools.gold).float().mean()
    )
    hard = (after * last).sum() / after.sum() > (before * last).sum() / before.sum()
    assert hard  # the later negatives are those that the energy of the day holds for good
    assert end(pools.groups).abs().max() < 3 / (2 * ALPHA)


# ---- what it may see, and what it costs


@pytest.mark.slow
def test_bbox_is_deterministic_by_seed() -> None:
    records, queries = people(alike=False)

    def scores(**chosen: Any) -> list[list[float | None]]:
        answers = picks(parts(records, queries_per_user=4, **chosen), queries[::4])
        return [[candidate.score for candidate in answer.candidates] for answer in answers]

    torch.manual_seed(5)
    one = scores()
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    assert scores() == one
    assert torch.equal(torch.random.get_rng_state(), state)
    assert scores(seed=1) != one


@pytest.mark.slow
def test_the_order_of_the_users_changes_nothing() -> None:
    records, queries = people(alike=False)
    few = queries[::4]
    there, back = (
        picks(parts(records, queries_per_user=4), few),
        picks(parts(records, queries_per_user=4), few[::-1]),
    )
    assert [a.candidates for a in there] == [a.candidates for a in back[::-1]]


@pytest.mark.slow
@pytest.mark.parametrize("user", ["new0", "train0"])
def test_nothing_later_than_the_query_is_seen_nor_its_own_answer(user: str) -> None:
    records, _ = people(alike=False)
    cut, turned = 9, dict(zip(TAGS.labels, TAGS.labels[1:] + TAGS.labels[:1], strict=True))
    early = Query(user, "early", "sea 99", "calm", position=cut)
    others = [
        *records[user][:cut],
        *(
            replace(record, input="war " + record.input, output=turned[record.output])
            for record in records[user][cut:]
        ),
    ]
    now = picks(parts(records), [early])[0]
    altered = parts({**records, user: others})
    assert picks(altered, [replace(early, gold="odd")])[0].candidates == now.candidates
    late = replace(early, position=10**6)
    assert picks(parts(records), [late])[0].candidates != picks(altered, [late])[0].candidates


def test_bbox_pools_are_sampled_once_outside_answer_costs() -> None:
    records, queries = people(alike=True)
    llm = RuleLLM(anything)
    two = [query for query in queries if query.user == NEW[0]][:3]
    answerer = BBoxAdapter(parts(records, llm, queries_per_user=2))
    assert llm.calls == []
    answers = [run_sync(lambda query=query: answerer.aanswer(query)) for query in two]
    assert len(llm.calls) == 2 * (
        len(TRAIN) * 2 + 2 + 3
    )  # a greedy call and one for the samples: training users, the user, queries
    assert [answer.usage.calls for answer in answers] == [2, 2, 2]
    shown = [" ".join(message["content"] for message in call) for call in llm.calls]
    assert all(
        "Which tag?" in text and any(label in text for label in TAGS.labels) for text in shown
    )  # each with a record


def test_bbox_learns_from_labelled_users_only() -> None:
    records, queries = people(alike=True)
    llm = RuleLLM(anything)
    picks(parts(records, llm, queries_per_user=2, asked_users=1), queries[:1])
    assert len(llm.calls) == 2 * (2 + 2 + 1)
    with pytest.raises(LLMError, match="labelled_users"):
        picks(parts(records, asked_users=0), queries[:1])


def failing(when: Callable[[str], bool]) -> RuleLLM:
    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        if when(messages[-1]["content"]):
            raise LLMError("HTTP 500")
        return anything(messages, index, rng)

    return RuleLLM(rule)


@pytest.mark.slow
def test_bbox_skips_failed_calls_and_fails_without_a_pool() -> None:
    records, queries = people(alike=True)
    some = failing(lambda text: "sea" in text)
    calm = [query for query in queries if "sea" not in query.input]
    assert gain("bbox-adapter@6", parts(records, some, prompt_style="turns"), calm) > 0.6
    none = failing(lambda text: int(text.split()[-1]) < RECORDS)  # every record, no query
    having = parts(records, none, prompt_style="turns", k=0)
    samples = run_sync(
        lambda: run_methods(find_methods(["bbox-adapter", "self-consistency"]), having, queries[:4])
    )
    assert [sample.error for sample in samples] == ["HTTP 500"] * 4 + [""] * 4
    assert len(none.calls) == 2 * (
        len(TRAIN) * (RECORDS - 1) + 4
    )  # a dead LLM is not asked for the pools at every query
    silent = RuleLLM(lambda messages, index, rng: "who knows")
    with pytest.raises(LLMError, match="could be read"):
        picks(parts(records, silent), queries[:1])


@pytest.mark.slow
def test_the_command_line_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "stars"
    data.mkdir()
    task = {
        "name": "stars",
        "kind": "rating",
        "prompt": "How many stars? {input}",
        "labels": ["1", "2", "3"],
    }
    (data / "task.json").write_text(json.dumps(task))
    splits = {"t0": "train", "t1": "train", "new": "test"}
    (data / "users.jsonl").write_text(
        "".join(json.dumps({"user": u, "split": s}) + "\n" for u, s in splits.items())
    )
    for name, first, count, users in (("history", 0, 6, splits), ("queries", 6, 2, ["new"])):
        rows = [(u, i) for u in users for i in range(first, first + count)]
        lines = [
            {
                "user": u,
                "id": f"{i}",
                "time": str(2000 + i),
                "input": f"{1 + i % 3} storms",
                "output": str(1 + i % 3),
            }
            for u, i in rows
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = [
        "--out",
        str(tmp_path / "run"),
        "--set",
        f"cache={tmp_path / 'cache'}",
        "--set",
        "constrain=true",
        "--set",
        "max_length=16",
    ]
    assert (
        run(
            [
                "bench",
                "run",
                str(data),
                "--llm",
                "fake",
                "--methods",
                "rag@1,bbox-adapter@4",
                *out,
                "--json",
            ]
        )
        == 0
    )
    rag, row = json.loads(capsys.readouterr().out)
    assert (row["method"], row["queries"], row["failed"], row["unparsable"]) == (
        "bbox-adapter@4",
        2,
        0,
        0,
    )
    assert (rag["calls"], row["calls"]) == (1, 2)
    assert run(["bench", "show", str(tmp_path / "run"), "--costs"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "adapter of others" in printed
    assert "bbox-adapter@4, new users" in printed
