"""The LLM as a judge, and what people would notice of a method: by hand, and by the command."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hydra_llm.bench import perceived
from hydra_llm.bench.judge import (
    UNKNOWN,
    Case,
    Judge,
    Verdict,
    by_lot,
    choice_cases,
    judged,
    longer_taken,
    score,
)
from hydra_llm.bench.report.tables import open_run
from hydra_llm.bench.runlog import RunLog, Sample
from hydra_llm.cli.judge import Asked, measured
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load
from hydra_llm.errors import LLMError
from hydra_llm.gate import LexicalGate
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.none import NoLLM
from hydra_llm.masking import detectors
from hydra_llm.pipeline import UserPipeline
from hydra_llm.plugins import DETECTORS
from hydra_llm.retrieve import make_retriever
from hydra_llm.tasks.base import Task
from hydra_llm.types import Message, Query, Record
from tests.made_choices import choice_data, write_choices

TITLES = Task("titles", "generation", "Title of: {input}")
RECORDS = (Record("ada", "1", "rain", "Wet days"), Record("ada", "2", "sun", "Dry days"))


def case(own: str, other: str, user: str = "ada", id: str = "q") -> Case:
    return Case(Query(user, id, "snow"), RECORDS if user == "ada" else (), own, other)


def replies(choose: str) -> RuleLLM:
    """A judge that takes A always, the longer answer, or says nothing that can be read."""

    def rule(messages: Sequence[Message], index: int, rng: random.Random) -> str:
        text = messages[-1]["content"]
        if "Write a rubric" in text:
            return "Prefers two words."
        if choose == "unread":
            return "Both are fine."
        _, _, answers = text.partition("Answer A:\n")
        a, _, rest = answers.partition("\n\nAnswer B:\n")
        b = rest.partition("\n\nThe order")[0]
        return "A" if choose == "first" or len(a) > len(b) else "**Answer B**"

    return RuleLLM(rule)


def verdicts(llm: RuleLLM, cases: Sequence[Case]) -> list[Verdict]:
    judge = Judge(llm, Settings(), TITLES.prompt)
    return run_sync(partial(judged, judge, cases))


def test_a_judge_of_the_order_decides_nothing() -> None:
    found = verdicts(replies("first"), [case("a b", "c"), case("d", "e f")])
    assert [own.votes for own in found] == [(1.0, 0.0)] * 2
    told = score(found)
    assert (told.rate, told.shown_first, told.consistent) == (0.5, 1.0, 0.0)


def test_a_verdict_counts_where_both_orders_agree() -> None:
    llm = replies("longer")
    found = verdicts(llm, [case("a b", "c"), case("d", "e f"), case("same", "same")])
    assert [own.score for own in found] == [1.0, 0.0, 0.5]
    told = score(found)
    assert (told.rate, told.shown_first, told.consistent, told.equal) == (0.5, 0.5, 1.0, 1)
    assert len(llm.calls) == 1 + 2 * 2  # a rubric, both orders; equal answers ask nobody


def test_the_rubric_is_made_of_the_persons_records() -> None:
    llm = replies("longer")
    verdicts(llm, [case("a b", "c"), case("a b", "c", "bob")])
    texts = [messages[0]["content"] for messages in llm.calls]
    (rubric,) = (text for text in texts if "Write a rubric" in text)
    assert "- rain → Wet days\n- sun → Dry days" in rubric
    asked = [text for text in texts if "Answer A" in text]
    assert sum("Prefers two words." in text for text in asked) == 2
    assert sum(UNKNOWN in text for text in asked) == 2
    assert all("Title of: snow" in text for text in asked)


def test_unread_replies_and_failed_calls_are_not_guessed() -> None:
    told = score(verdicts(replies("unread"), [case("a", "b")]))
    assert (told.rate, told.unread, told.failed) == (0.5, 2, 0)
    failed = Verdict("u", "q", error="lost")
    assert math.isnan(failed.score)
    told = score([failed, Verdict("u", "p", (1.0, 1.0))])
    assert (told.rate, told.failed) == (1.0, 1)

    class Dead(RuleLLM):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> object:  # type: ignore[override]
            raise LLMError("no route")

    with pytest.raises(LLMError, match="no route"):
        verdicts(Dead(lambda messages, index, rng: ""), [case("a", "b"), case("c", "d")])


@pytest.mark.parametrize(
    ("reply", "vote"),
    [
        ("A", 1.0),
        ("b.", 0.0),
        ("**Answer B**", 0.0),
        ("Answer: A", 1.0),
        ("A is better", 1.0),
        ("B because it is short", 0.0),
        ("A person like this would", None),
        ("Neither", None),
        ("", None),
    ],
)
def test_replies_are_read(reply: str, vote: float | None) -> None:
    (found,) = verdicts(RuleLLM(lambda messages, index, rng: reply), [case("x", "y")])
    assert found.votes[0] == vote


def test_choices_of_people_are_drawn_alike() -> None:
    data = choice_data(users=12)
    few, many = choice_cases(data, 3, 0), choice_cases(data, 8, 0)
    assert few == many[:3]
    assert all(own.own == own.query.gold and own.other in own.query.offered for own in many)
    assert all(own.other != own.own and len(own.visible) == 6 for own in many)
    every = choice_cases(data, None, 0)  # half of the users take the longest, half the shortest
    assert {own.query.user for own in every} == set(data.users("test"))
    taken = [c.own.count(" ") > c.other.count(" ") for c in every]
    assert longer_taken(every) == sum(taken) / len(taken)
    assert by_lot(every, 2, 1) == by_lot(every, 5, 1)[:2]
    assert len({own.query.user for own in choice_cases(data, 6, 0)}) == 6  # users take turns


# ---- without a judge


def samples(method: str, answers: str) -> list[Sample]:
    """A query for each user; the gold answer is b."""
    return [Sample(method, f"u{place}", "q", "b", own) for place, own in enumerate(answers)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tags = Task("tags", "classification", "{input}", ("a", "b", "c"))
    log = RunLog(tmp_path / "run", {"data": "d", "task": tags.to_json(), "llm": {"model": "m"}})
    for method, answers in (
        ("rag@4", "aabbc"),
        ("hydra@4,8", "abbbb"),
        ("mismatched@4,8", "abccb"),
        ("rag@1", "ccccc"),
    ):
        for sample in samples(method, answers):
            log.add(sample)
    return tmp_path / "run"


def test_wins_and_answers_of_another_user(folder: Path) -> None:
    opened = open_run(folder)
    names = perceived.chosen_methods(opened, None, None)
    assert names == ("hydra@4,8", "rag@4")
    won = perceived.win_rate(opened.task, perceived.answered_pairs(opened, *names))
    assert won.value == (0.5 + 1 + 0.5 + 0.5 + 1) / 5
    assert won.interval.low <= won.value <= won.interval.high
    (same,) = perceived.as_another(opened, "hydra@4,8").values()
    assert same.value == 3 / 5
    assert perceived.as_another(opened, "rag@4") == {}


def test_answers_that_are_more_like_another_users() -> None:
    styles = {"u0": "WHY NOT", "u1": "a small quiet note, as ever", "u2": "1 2 3 4 5"}
    records = [
        Record(user, str(i), "x", f"{text} {i}") for user, text in styles.items() for i in range(4)
    ]
    queries = [Query(user, "q", "x", f"{text} 9") for user, text in styles.items()]
    data = DataSet.from_records(TITLES, dict.fromkeys(styles, "test"), records, queries)
    own = [Sample("m", user, "q", f"{text} 9", f"{text} 7") for user, text in styles.items()]
    swapped = [replace(s, answer=own[i - 1].answer) for i, s in enumerate(own)]
    found = perceived.nearer_to_others(data, {"own": own, "swapped": swapped})
    assert (found["own"].value, found["people"].value) == (0, 0)
    assert found["swapped"].value >= 0.5
    alone = perceived.nearer_to_others(data, {"one": own[:1]})
    assert math.isnan(alone["one"].value)


def stages(llm: object, gate: str = "auto") -> UserPipeline:
    texts = ["rain", "sun", "storm", "frost", "fog", "hail", "wind", "thaw", "snow", "cloud"]
    records = [
        Record(
            "ada", str(i), f"A quiet report of {text} over the northern hills", text, "", (0, 0), i
        )
        for i, text in enumerate(texts)
    ]
    return UserPipeline(
        TITLES,
        make_retriever("bm25"),
        Settings(gate=gate),  # type: ignore[arg-type]
        gate=LexicalGate(),
        llm=llm,  # type: ignore[arg-type]
        records={"ada": records},
    )


IMPERSONAL = ("What is the capital of Mongolia?", "Hello there!", "Compute 17 times 3, please.")
OWN = ("A quiet report of rain over the northern hills",)


def test_nothing_changes_where_nothing_personal_is_asked() -> None:
    """With the gate no record is shown; without it answers do change."""
    said = RuleLLM(lambda messages, index, rng: str(len(str(messages))))
    found = run_sync(partial(perceived.impersonal, stages(said), ["ada"], IMPERSONAL))
    assert found.changed is not None
    assert (found.passed.value, found.changed.value, said.calls) == (0, 0, [])
    open_gate = stages(said, gate="off")
    found = run_sync(partial(perceived.impersonal, open_gate, ["ada"], IMPERSONAL))
    assert found.changed is not None
    assert (found.passed.value, found.changed.value) == (1, 1)
    told = run_sync(partial(perceived.impersonal, stages(NoLLM()), ["ada"], IMPERSONAL + OWN))
    assert told.changed is None
    assert told.passed.value == 1 / 4


# ---- the command


@pytest.fixture
def on_choices(tmp_path: Path) -> tuple[Path, Path]:
    """A run on made-up choices: hydra takes what was taken, without the history the first one."""
    data = write_choices(tmp_path / "data", users=12)
    loaded = load(data)
    manifest = {"data": loaded.digest, "task": loaded.task.to_json(), "llm": {"kind": "none"}}
    log = RunLog(tmp_path / "run", manifest)
    for user in loaded.users("test"):
        for query in loaded.queries(user):
            gold = query.gold or ""
            for method, answer in (("hydra", gold), ("no-history", query.offered[0])):
                right = {"choice_accuracy": float(answer == gold), "earlier": 6.0}
                log.add(Sample(method, user, query.id, gold, answer, choice=right))
    return tmp_path / "run", data


def command(on_choices: tuple[Path, Path], *more: str) -> list[str]:
    folder, data = on_choices
    cache = f"--set=cache={folder.parent / 'cache'}"
    return ["bench", "judge", str(folder), "--data", str(data), cache, *more]


def test_the_command_judges_records_and_replays(
    on_choices: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = tmp_path / "judge.jsonl.gz"
    llm = ["--llm", "fake:rule=labels", "--record", str(recording)]
    assert run(command(on_choices, *llm, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["against"]) == ("hydra", "no-history")
    assert told["judge"]["people"]["cases"] == 12
    assert 0 < told["judge"]["people"]["shown_first"] < 1
    assert told["win_rate"]["rate"] >= 0.5
    assert json.loads((on_choices[0] / "judge.json").read_text()) == told
    assert run(command(on_choices, "--replay", str(recording), "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == told
    assert run(command(on_choices, "--replay", str(recording), "--people-limit", "5")) == 0
    printed = capsys.readouterr().out
    assert "the judge agrees with people" in printed
    assert "shown first in" in printed
    assert "no better than a coin" in printed


def test_a_judge_sees_placeholders_and_in_private_mode_nothing(
    on_choices: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = on_choices
    seen = list[str]()

    def noted(messages: Sequence[Message], index: int, dice: random.Random) -> str:
        seen.append(str(messages))
        return "A"

    llm, loaded = RuleLLM(noted), load(data)
    DETECTORS.add("all", lambda text: [(0, len(text))])
    try:
        how = (llm, Settings(mask="all"), lambda *_: None)
        measured(folder, (loaded, loaded), Asked(limit=3, people_limit=3), *how)
    finally:
        del DETECTORS.added["all"]
        detectors.cache_clear()
    assert seen
    assert all("[ALL_1]" in own and "Wh" not in own for own in seen)
    assert run(command(on_choices, "--llm", "fake:echo", "--set", "private=true")) == 2
    assert "setting 'private': the judge's rubrics are written from" in capsys.readouterr().err


def test_without_an_llm_nobody_judges(
    on_choices: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(on_choices)) == 0
    printed = capsys.readouterr().out
    assert "wins, by the task's gain" in printed
    assert "judge" not in printed.replace("judge.json", "")
    assert json.loads((on_choices[0] / "judge.json").read_text())["judge"] is None


def test_faults_of_the_command_are_one_line(
    on_choices: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_choices(tmp_path / "other", users=8)
    for more, said in (
        (["--method", "rag"], "has no method 'rag': hydra, no-history"),
        (["--method", "no-history", "--against", "no-history"], "nothing to compare"),
        (["--llm", "fake:echo", "--replay", "x"], "one of --llm SPEC and --replay FILE"),
        (["--people", str(tmp_path / "none")], "none"),
    ):
        assert run(command(on_choices, *more)) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert run(["bench", "judge", str(on_choices[0]), "--data", str(other)]) == 2
    assert "has answered another data set" in capsys.readouterr().err
