"""Recorded choices become labelled groups, and are learned from without an LLM."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_llm import fit, learn
from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.errors import DataError
from hydra_llm.history import as_query, before
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.none import NoLLM
from hydra_llm.tasks.base import Task
from hydra_llm.tasks.choices import ATTRIBUTES, attributes
from hydra_llm.training.dataset import LabelledGroup, make_training_set
from hydra_llm.training.labelling import choice_group, choice_groups
from hydra_llm.types import Choice, Message, Query, Record
from tests.learning import ONE_STRENGTH
from tests.made_choices import TASK, choice_data, choices_of

pytestmark = pytest.mark.usefixtures("shared_minilm")


@pytest.fixture(scope="module")
def data() -> DataSet:
    return choice_data()


@pytest.fixture(scope="module")
def bundle(data: DataSet, shared_minilm: None) -> Bundle:
    return learn(data, NoLLM(), strengths=ONE_STRENGTH).bundle


def test_each_choice_is_a_group_of_the_records_before_it(bundle: Bundle) -> None:
    records = choices_of("ada", 4, long=True)
    groups = choice_groups(bundle.featurizer, records)
    assert [group.position for group in groups] == [0, 1, 2, 3]
    for group, choice in zip(groups, records, strict=True):
        assert group.rights == list(choice.candidates)
        assert list(group.gains) == [float(i == choice.chosen) for i in range(3)]
        assert (group.exact, group.query, group.left) == (True, choice.id, choice.input)
        alone = choice_group(bundle.featurizer, as_query(choice), before(records, choice))
        assert np.array_equal(alone.side_features, group.side_features)


def test_the_target_is_the_one_that_was_taken(bundle: Bundle) -> None:
    """Whatever the rule of the groups beside it."""
    (chosen, *_) = choice_groups(bundle.featurizer, choices_of("ada", 1, long=True))
    graded = LabelledGroup("ada", "q", "x", ["a", "b"], [0.2, 0.6], chosen.side_features[:2], 1)
    scorer = bundle.scorers["adapter"]
    for groups in ([chosen, graded], [graded, chosen]):
        made = make_training_set(
            bundle.features, scorer.interaction, groups, rule="graded", loss="listwise", spread=0.1
        )
        assert torch.equal(made.target[0], torch.tensor(chosen.gains))
        assert made.target[1].min() > 0 or made.target[1, 2] == 0
        assert 0.5 < made.target[1, 1] < 1


def test_choices_are_learned_from_without_an_llm(data: DataSet, bundle: Bundle) -> None:
    assert bundle.llm == {"kind": "none"}
    report = bundle.report["adapter"]
    assert report["groups"] == 6 * 8
    assert report["loss_user"] < report["loss_uniform"] / 4
    assert report["loss_shared"] < report["loss_uniform"] / 4
    assert bundle.report["reranker"] == {"skipped": "no LLM was given"}
    assert bundle.report["calls"] == 0
    fitted = fit(data, bundle, NoLLM()).bundle
    new = data.users("test")
    assert all(fitted.heads["adapter"][user].records == 6 for user in new)
    answers = fitted.personalizer(NoLLM())
    picks = [answers.answer(query) for user in new for query in data.queries(user)]
    assert all(len(pick.candidates) == 3 and not pick.usage.calls for pick in picks)
    right = [pick.text == pick.proposal.query.gold for pick in picks]
    assert np.mean(right) > 0.8


def test_a_bundle_keeps_the_choices_of_its_users(
    data: DataSet, bundle: Bundle, tmp_path: Path
) -> None:
    bundle.save(tmp_path / "bundle")
    again = Bundle.load(tmp_path / "bundle")
    user = data.users("train")[0]
    assert list(again.records[user]) == list(bundle.records[user])
    assert isinstance(again.records[user][0], Choice)
    query = data.queries(user)[0]
    scores = [
        [own.score for own in each.personalizer(NoLLM()).answer(query).candidates]
        for each in (again, replace(bundle, word_models={}))  # these are of learning alone
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_records_beside_choices_are_labelled_by_the_llm() -> None:
    records: list[Record] = []
    for user in ("ada", "bob", "cleo"):
        records += choices_of(user, 6, long=True)
        records += [
            Record(user, f"{user}-r{i}", f"rain {i}", f"wet day {i}", str(1600000100 + i))
            for i in range(4)
        ]
    data = DataSet.from_records(TASK, dict.fromkeys(("ada", "bob", "cleo"), "train"), records, [])  # type: ignore[arg-type]
    llm = RuleLLM(lambda messages, index, rng: f"wet {rng.choice('abc')} day {index % 2}")
    settings = load_settings(samples=4, queries_per_user=2, retrieved=2)
    learned = learn(data, llm, settings, strengths=ONE_STRENGTH)
    assert learned.bundle.report["adapter"]["groups"] == 3 * 6 + 3 * 2
    questions = {_question(call) for call in llm.calls}
    assert all("rain" in question for question in questions)
    assert learn(data, NoLLM(), settings, strengths=ONE_STRENGTH).bundle.report["adapter"][
        "groups"
    ] == (3 * 6)


def _question(messages: Sequence[Message]) -> str:
    return messages[-1]["content"].rpartition("Go on:")[2]


def test_without_choices_an_llm_is_asked_for() -> None:
    record = Record("ada", "1", "rain", "a wet day")
    data = DataSet.from_records(TASK, {"ada": "train"}, [record], [])
    with pytest.raises(DataError, match="give --llm SPEC"):
        learn(data, NoLLM())


def test_a_choice_of_new_users_sees_earlier_ones_only(bundle: Bundle) -> None:
    records = choices_of("ada", 5, long=True)
    query = as_query(records[2])
    later = [*records[:2], *records[3:]]
    feature = bundle.featurizer.adapter
    candidates = bundle.personalizer(NoLLM()).propose(query).candidates
    seen = feature(query, candidates, bundle.featurizer.vectorize(before(later, query)))
    first = feature(query, candidates, bundle.featurizer.vectorize(records[:2]))
    assert np.array_equal(seen, first)
    assert isinstance(query, Query)


def test_choices_among_labels_are_answers_against_all_labels() -> None:
    """Learned without an LLM; a pick is one of those offered."""
    task = Task("tags", "classification", "Which? {input}", ("calm", "loud", "odd"))
    dice, records = random.Random(0), []
    for user in (f"user{i}" for i in range(6)):
        for place in range(8):
            own = ("calm", "loud")[place % 2]
            offered = tuple(dice.sample([own, "odd"], 2))
            text = f"{'quiet night' if own == 'calm' else 'busy street'} {place}"
            fields = (user, f"{user}-{place}", text, own, str(2000 + place))
            records.append(
                Choice(*fields, position=place, candidates=offered, chosen=offered.index(own))
            )
    splits = {f"user{i}": "train" for i in range(6)}
    data = DataSet.from_records(task, splits, records, [])  # type: ignore[arg-type]
    learned = learn(data, NoLLM(), strengths=ONE_STRENGTH).bundle
    query = Query("user0", "q", "busy street again", "loud", offered=("odd", "loud"))
    answer = learned.personalizer(NoLLM()).answer(query)
    assert [own.text for own in answer.candidates] == ["odd", "loud"]
    assert answer.text == "loud"
    assert sum(own.probability or 0 for own in answer.candidates) == pytest.approx(1)


def test_the_place_is_neutral_where_none_was_shown(bundle: Bundle) -> None:
    query = as_query(choices_of("ada", 1, long=True)[0])
    candidates = bundle.personalizer(NoLLM()).propose(query).candidates
    none = bundle.featurizer.vectorize([])
    rows = [
        bundle.featurizer.adapter(asked, candidates, none)
        for asked in (query, replace(query, offered=()))
    ]
    names = list(bundle.featurizer.adapter_names)
    places = [names.index(f"choice_{name}") for name in ("place", "first")]
    assert (rows[0][:, places] != 0).any()
    assert (rows[1][:, places] == 0).all()
    others = [place for place in range(len(names)) if place not in places]
    assert np.array_equal(rows[0][:, others], rows[1][:, others])


def test_attributes_by_hand() -> None:
    texts = ("and the rain, again", "The sun shines.")
    rows = attributes("We saw the rain", texts, True)
    by_name = dict(zip(ATTRIBUTES, (2 * rows).T.tolist(), strict=True))  # ± the difference
    assert by_name["first"] == [1.0, -1.0]
    assert by_name["place"] == pytest.approx([-np.log(2), np.log(2)])
    assert by_name["words"] == pytest.approx([np.log(5 / 4), -np.log(5 / 4)])
    assert by_name["longest"] == [1.0, -1.0]
    assert by_name["lower"] == by_name["fits"] == [1.0, -1.0]
    assert by_name["upper"] == by_name["ends"] == [-1.0, 1.0]
    assert by_name["commas"] == [1.0, -1.0]
    assert by_name["repeated"] == pytest.approx([2 / 4 - 1 / 3, 1 / 3 - 2 / 4])
    assert by_name["repeated_pairs"] == pytest.approx([1 / 3, -1 / 3])
