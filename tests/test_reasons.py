"""Why an answer was picked: parts that add up, records whose lead is what is lost without them, and
a set of records that decides.
"""

import random
from dataclasses import replace

import numpy as np
import pytest

from hydra_llm import fit, learn
from hydra_llm.config import Settings
from hydra_llm.pipeline import UserPipeline
from hydra_llm.reasons import Reasons, in_words, of, why
from hydra_llm.select import FirstCandidate, Selection
from hydra_llm.tasks import choices
from hydra_llm.tasks.base import Task
from hydra_llm.types import Answer
from tests.learning import ONE_STRENGTH
from tests.test_end_to_end import STARS, TAGS, crowd_pleaser, world

Explained = tuple[UserPipeline, list[tuple[Answer, Reasons]]]


@pytest.fixture(scope="module", params=[TAGS, STARS], ids=["labels", "ratings"])
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    """A personalizer, its answers to new users' queries, and their reasons."""
    simulated, llm = world(request.param), crowd_pleaser(request.param)
    settings = Settings(samples=2, retrieved=4, k=2, queries_per_user=2, width=32, max_length=32)
    folder = tmp_path_factory.mktemp("reasons") / "bundle"
    learn(simulated.data, llm, settings, out=folder, strengths=ONE_STRENGTH)
    fitted = fit(simulated.data, folder, llm)
    personalizer = fitted.bundle.personalizer(llm, settings)
    pairs = []
    for query in simulated.queries:
        answer = personalizer.answer(query)
        reasons = why(personalizer, answer)
        assert reasons is not None
        pairs.append((answer, reasons))
    return personalizer, pairs


def without(personalizer: UserPipeline, answer: Answer, ids: set[str]) -> Answer:
    """The pick among the same candidates by a user without these records."""
    user = answer.proposal.query.user
    fewer = [record for record in personalizer.records[user] if record.id not in ids]
    poorer = replace(personalizer, records={user: fewer})
    context = poorer.context_of(answer.proposal.query)
    heads = personalizer.context_of(answer.proposal.query).heads  # as fitted with all of them
    return poorer.decide(replace(context, heads=heads), answer.proposal)


def test_the_parts_add_up_to_the_lead(answered: Explained) -> None:
    for _, reasons in answered[1]:
        assert reasons.pick.score is not None
        assert reasons.runner_up.score is not None
        lead = reasons.pick.score - reasons.runner_up.score
        assert reasons.lead == pytest.approx(lead, abs=1e-4)
        assert {"shared", "head"} < set(reasons.parts)
        sizes = [abs(value) for value in reasons.parts.values()]
        assert sizes == sorted(sizes, reverse=True)


def test_a_records_lead_is_what_is_lost_without_it(answered: Explained) -> None:
    personalizer, pairs = answered
    for answer, reasons in pairs[::6]:
        for weight in (reasons.records[0], reasons.records[-1]):
            other = without(personalizer, answer, {weight.record.id})
            scores = {own.answer: own.score or 0.0 for own in other.candidates}
            left = scores[reasons.pick.answer] - scores[reasons.runner_up.answer]
            assert weight.lead == pytest.approx(reasons.lead - left, abs=1e-4)


def test_without_the_needed_records_another_answer_is_picked(answered: Explained) -> None:
    """Each of them is needed, and as many others rarely change the pick."""
    personalizer, pairs = answered
    dice, found, by_lot = random.Random(0), 0, 0
    for answer, reasons in pairs:
        needed = {record.id for record in reasons.needed}
        if not needed:
            continue
        found += 1
        assert without(personalizer, answer, needed).text != answer.text
        for one in needed:
            assert without(personalizer, answer, needed - {one}).text == answer.text
        all_ids = [record.id for record in personalizer.records[answer.proposal.query.user]]
        drawn = set(dice.sample(all_ids, len(needed)))
        by_lot += without(personalizer, answer, drawn).text != answer.text
    assert found >= 5
    assert by_lot <= found / 4


def test_no_reasons_where_no_adapter_decides(answered: Explained) -> None:
    personalizer, ((answer, _), *_) = answered
    assert why(replace(personalizer, selector=FirstCandidate()), answer) is None
    context = personalizer.context_of(answer.proposal.query)
    kept = Selection(list(answer.candidates), 0, abstained=True, parts={"head": np.zeros(9)})
    assert of(personalizer.selector, context, kept) is None
    one = personalizer.select(context, answer.candidates[:1])
    assert of(personalizer.selector, context, one) is None


def test_parts_in_words_add_up_too() -> None:
    parts = {"share_0.05": 1.0, "share_0.5": -3.0, "share_all": 0.5, "own": 0.25}
    told = in_words(parts)
    assert told == {
        "share of this label in records like the question": -2.0,
        "share of this label in the user's records": 0.5,
        "own": 0.25,
    }
    assert list(told.values()) == [-2.0, 0.5, 0.25]


def test_every_side_feature_has_words() -> None:
    texts = Task("headlines", "generation", "Write a headline: {input}")
    names = {"shared", "head", *choices.COLUMNS}
    for task in (TAGS, STARS, texts):
        names |= {*task.strategy.candidate_columns, *task.strategy.word_columns}
    assert not [name for name in names if name in in_words({name: 1.0})]
