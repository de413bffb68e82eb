"""Why an answer was picked: parts that add up, records whose lead is what is lost without them, and
a set of records that decides.
"""

import random
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from hydra_llm import fit, learn
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.pipeline import UserPipeline
from hydra_llm.reasons import Reasons, in_words, of, why
from hydra_llm.select import FirstCandidate, Selection
from hydra_llm.tasks import choices
from hydra_llm.tasks.base import Task
from hydra_llm.training.discounts import set_discount
from hydra_llm.training.leave_out import LeaveOut, refit_of
from hydra_llm.types import Answer
from tests.learning import ONE_STRENGTH
from tests.test_end_to_end import STARS, TAGS, crowd_pleaser, world

Explained = tuple[UserPipeline, list[tuple[Answer, Reasons]]]


@pytest.fixture(scope="module", params=[TAGS, STARS], ids=["labels", "ratings"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    simulated, llm = world(request.param), crowd_pleaser(request.param)
    settings = Settings(samples=2, retrieved=4, k=2, queries_per_user=2, width=32, max_length=32)
    folder = tmp_path_factory.mktemp("reasons") / "bundle"
    learn(simulated.data, llm, settings, out=folder, strengths=ONE_STRENGTH)
    return fit(simulated.data, folder, llm).bundle


@pytest.fixture(scope="module")
def answered(bundle: Bundle) -> Explained:
    """A personalizer, its answers to new users' queries, and their reasons."""
    simulated, llm = world(bundle.task), crowd_pleaser(bundle.task)
    personalizer = bundle.personalizer(llm, bundle.settings)
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


def refitted(bundle: Bundle, answer: Answer, gone: Collection[str]) -> Answer:
    """The pick among the same candidates by a user who has never had these records."""
    query = answer.proposal.query
    kept = [own for own in bundle.records[query.user] if own.id not in gone]
    poorer = DataSet.from_records(bundle.task, {query.user: "test"}, kept, [])
    one = fit(poorer, bundle, users=[query.user]).bundle
    return one.personalizer(crowd_pleaser(bundle.task)).decide(
        replace(one.pipeline().context(query, kept, one.heads_of(query.user))), answer.proposal
    )


def test_sets_of_a_refit_flip_the_pick_of_a_user_without_them(
    bundle: Bundle, answered: Explained
) -> None:
    """Each record of them is needed, and as many others rarely change the pick."""
    personalizer, pairs = answered
    dice, found, by_lot = random.Random(0), 0, 0
    for answer, as_fitted in pairs[::4]:
        reasons = why(personalizer, answer, refit_of(bundle))
        assert reasons is not None
        assert reasons.parts == as_fitted.parts
        needed = {record.id for record in reasons.needed}
        if not needed:
            continue
        found += 1
        assert refitted(bundle, answer, needed).text != answer.text
        for one in list(needed)[:2]:
            assert refitted(bundle, answer, needed - {one}).text == answer.text
        drawn = dice.sample([own.record.id for own in reasons.records], len(needed))
        by_lot += refitted(bundle, answer, drawn).text != answer.text
    assert found >= 4
    assert by_lot <= found / 2


def leave_out(bundle: Bundle, context: Context) -> LeaveOut:
    refit = refit_of(bundle)
    own = refit(context) if refit else None
    assert isinstance(own, LeaveOut)
    return own


def test_near_heads_are_those_of_a_fit_without_the_record(
    bundle: Bundle, answered: Explained
) -> None:
    """Nearer to it than the head with all records, but for side features of later records."""
    personalizer, pairs = answered
    moved, missed = 0.0, 0.0
    for answer, _ in pairs[::10]:
        context = personalizer.context_of(answer.proposal.query)
        own = leave_out(bundle, context)
        assert set(own.near) == {record.id for record in context.visible}
        for record in context.visible[-6:]:
            exact = own.without({record.id}).numbers
            moved += float(np.linalg.norm(exact - own.head.numbers))
            missed += float(np.linalg.norm(exact - own.near[record.id].numbers))
    assert missed < moved / 3


def test_near_heads_know_a_discount(bundle: Bundle) -> None:
    """Without a record it is gone, and those before it are less old."""
    simulated, scorer = world(bundle.task), deepcopy(bundle.scorers["adapter"])
    set_discount(scorer, 0.8)
    discounted = replace(bundle, scorers={**bundle.scorers, "adapter": scorer})
    own = fit(simulated.data, discounted).bundle
    personalizer, moved, missed = own.personalizer(crowd_pleaser(bundle.task)), 0.0, 0.0
    for query in simulated.queries[::10]:
        left = leave_out(own, context := personalizer.context_of(query))
        for record in context.visible[-6:]:
            exact = left.without({record.id}).numbers
            moved += float(np.linalg.norm(exact - left.head.numbers))
            missed += float(np.linalg.norm(exact - left.near[record.id].numbers))
    assert missed < 0.45 * moved


def test_a_head_that_a_refit_would_not_make_stays(bundle: Bundle, answered: Explained) -> None:
    """Such as one that feedback has moved, or none at all."""
    personalizer, ((answer, as_fitted), *_) = answered
    refit, context = refit_of(bundle), personalizer.context_of(answer.proposal.query)
    assert refit is not None
    head = context.heads["adapter"]
    moved = replace(head, numbers=head.numbers + 0.1)
    explained = partial(why, answer=answer, refit=refit)
    for heads in ({"adapter": {answer.proposal.query.user: moved}}, {}):
        other = replace(personalizer, heads=heads)
        assert refit(other.context_of(answer.proposal.query)) is None
        assert explained(other) == why(other, answer)
    assert explained(personalizer) != as_fitted


def test_no_refit_where_the_llm_would_have_to_be_asked_again(bundle: Bundle) -> None:
    texts = replace(bundle, task=Task("headlines", "generation", "Write a headline: {input}"))
    assert refit_of(texts) is None
    assert refit_of(replace(bundle, scorers={})) is None


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
