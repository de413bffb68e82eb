"""Choosing: what maximises the expected gain, by brute force; ties; scorers that see what is not
there.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.config import Settings
from hydra_llm.context import Context
from hydra_llm.model.heads import Head, make_head
from hydra_llm.model.interactions import Interaction, LabelBilinear, Tower
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.scorer import Loss, Scorer
from hydra_llm.select import (
    TIE,
    FirstCandidate,
    LearnedSelector,
    Selection,
    all_labels,
    candidate_text,
    first_best,
    select,
)
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.tasks.generation import overlap
from hydra_llm.types import Candidate, Query, Record

TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud", "odd"))
STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3", "4", "5"))
TITLES = Task("titles", "generation", "Title of: {input}")
QUERY = Query("u", "q", "rain night")


class Hashed:
    """Texts as vectors of their words, without an encoder."""

    version = 0

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split() or [""]:
                row += (
                    np.random.default_rng(sum(map(ord, word))).standard_normal(8).astype(np.float32)
                )
            row /= np.linalg.norm(row)
        return rows


def texts(*answers: str) -> list[Candidate]:
    return [Candidate(answer, answer, votes=1) for answer in answers]


shares = st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any)


@given(shares)
def test_the_pick_of_ratings_is_the_median(weights: list[int]) -> None:
    share = np.array(weights) / sum(weights)
    pick = select(STARS, texts(*STARS.labels), np.log(share + 1e-9), share, "expected-gain")
    below, above = sum(weights[: pick + 1]), sum(weights[pick:])
    assert (
        2 * below >= sum(weights) <= 2 * above
    )  # half of the mass or more on either side, the pick included


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_the_pick_of_labels_is_the_mode(scores: list[float]) -> None:
    odds, first = (
        np.exp(scores),
        next(place for place, score in enumerate(scores) if score >= max(scores) - TIE),
    )
    for how in ("expected-gain", "best"):
        assert select(TAGS, texts(*TAGS.labels), np.array(scores), odds / odds.sum(), how) == first


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(["a b", "a c", "b a c", "d", "d e f"]), min_size=1, max_size=5, unique=True
    ),
    shares,
)
def test_the_pick_of_texts_has_the_least_bayes_risk(answers: list[str], weights: list[int]) -> None:
    weights = [weight + 1 for weight in weights[: len(answers)]]
    share = np.array(weights) / sum(weights)
    expected = [
        sum(p * overlap(answer, gold) for p, gold in zip(share, answers, strict=True))
        for answer in answers
    ]
    pick = select(TITLES, texts(*answers), np.log(share), share, "expected-gain")
    assert expected[pick] == pytest.approx(max(expected), abs=TIE)
    assert all(
        value < max(expected) - TIE + 1e-9 for value in expected[:pick]
    )  # the first of equals
    assert select(TITLES, texts(*answers), np.log(share), share, "best") == weights.index(
        max(weights)
    )


@pytest.mark.parametrize(
    ("task", "how"), list(product((TAGS, STARS, TITLES), ("best", "expected-gain")))
)
def test_ties_go_to_the_first(task: Task, how: str) -> None:
    answers = task.labels[1:3] or ("rain", "night")
    assert select(task, texts(*answers), np.zeros(2), np.full(2, 0.5), how) == 0
    assert select(task, texts(*reversed(answers)), np.zeros(2), np.full(2, 0.5), how) == 0


def adapter(
    task: Task,
    *,
    by_label: bool = False,
    weights: dict[str, float] | None = None,
    select: str = "best",
    loss: Loss = "listwise",
) -> LearnedSelector:
    """A scorer that knows its evidence's weights, and of user u that everything is a little
    different.
    """
    featurizer = Featurizer(task, Hashed(), CohortStats())  # type: ignore[arg-type]
    torch.manual_seed(0)
    interaction: Interaction = LabelBilinear(8, len(task.labels), 4) if by_label else Tower(8, 4)
    scorer = Scorer(
        interaction, make_head("linear", interaction), featurizer.adapter_names, loss=loss
    ).eval()
    for name, weight in (weights or {}).items():
        scorer.vote_weight[featurizer.adapter_names.index(name)] = weight
    return LearnedSelector(scorer, featurizer, Settings.checked({"select": select}))


def seen(chooser: LearnedSelector, past: Sequence[Record] = (), user: str = "u") -> Context:
    return Context(
        Query(user, "q", QUERY.input), tuple(past), vectorize=chooser.featurizer.vectorize
    )


@pytest.mark.parametrize("by_label", [False, True])
def test_scores_and_probabilities_stand_at_their_candidates(by_label: bool) -> None:
    chooser = adapter(TAGS, by_label=by_label, weights={"llm_votes": 1.0})
    candidates = [
        Candidate("what?", None, 9),
        Candidate("odd", "odd", 1),
        Candidate("The tag is calm", "calm", 5),
    ]
    scored, chosen, *_ = chooser.choose(seen(chooser), candidates)
    assert chosen == 2
    assert [(c.text, c.answer, c.votes) for c in scored] == [
        (c.text, c.answer, c.votes) for c in candidates
    ]
    assert scored[0].score is None is scored[0].probability  # what cannot be read is not scored
    assert sum(c.probability or 0.0 for c in scored) == pytest.approx(1)
    assert (scored[2].score or 0) > (scored[1].score or 0)
    assert (scored[2].probability or 0) > (scored[1].probability or 0)


def test_label_features_score_a_label_whatever_else_is_offered() -> None:
    chooser = adapter(TAGS, by_label=True)
    chooser.scorer.head.set_shared(torch.randn(chooser.scorer.interaction.size), torch.zeros(()))
    alone, *_ = chooser.choose(seen(chooser), texts("odd"))
    turned, *_ = chooser.choose(seen(chooser), texts("odd", "calm", "loud"))
    assert turned[0].score == pytest.approx(alone[0].score)
    assert alone[0].probability == pytest.approx(1)


def test_binary_scores_become_shares_of_their_odds() -> None:
    chooser = adapter(TAGS, loss="binary", weights={"llm_greedy": 2.0})
    scored, chosen, *_ = chooser.choose(
        seen(chooser), [Candidate("odd", "odd", 1), Candidate("calm", "calm", 1, greedy=True)]
    )
    odds = [1 / (1 + np.exp(-(c.score or 0.0))) for c in scored]
    assert chosen == 1
    assert [c.probability for c in scored] == pytest.approx([odd / sum(odds) for odd in odds])


def test_a_user_has_an_own_choice_and_a_stranger_the_shared_one() -> None:
    chooser = adapter(TITLES)
    candidates = texts("loud war film", "rain song", "quiet night")
    strangers, first, *_ = chooser.choose(seen(chooser, user="stranger"), candidates)
    assert first == 0
    assert {c.score for c in strangers} == {0.0}
    features = []
    for c in candidates:  # a head that points at the second candidate's features
        one, *_ = chooser.choose(seen(chooser), [c])
        features.append(one[0].score)
    from hydra_llm.model.interactions import make_groups

    rows = chooser.featurizer.adapter(QUERY, candidates, chooser.featurizer.vectorize([]))
    cases = make_groups(
        chooser.featurizer.features,
        chooser.scorer.interaction,
        [QUERY.input],
        [[c.text for c in candidates]],
        [rows.tolist()],
    )
    phi = chooser.scorer.interaction(cases)[0].detach()
    numbers = torch.cat([10 * (phi[1] - (phi[0] + phi[2]) / 2), torch.zeros(1)])
    own = replace(seen(chooser), heads={"adapter": Head.of(numbers)})
    assert chooser.choose(own, candidates)[1] == 1
    assert chooser.choose(seen(chooser, user="stranger"), candidates)[1] == 0


def test_nothing_readable_leaves_the_first() -> None:
    candidates = [Candidate("?", None, 2), Candidate("!", None, 1)]
    assert adapter(TAGS).choose(Context(QUERY), candidates) == Selection(candidates, 0)
    assert FirstCandidate().choose(Context(QUERY), candidates) == Selection(candidates, 0)


def test_the_users_history_moves_the_evidence() -> None:
    chooser = adapter(TAGS, by_label=True, weights={"share_all": 1.0})
    past = [Record("u", str(i), "rain night", "odd", position=i) for i in range(5)]
    assert chooser.choose(seen(chooser, past), texts("calm", "loud", "odd"))[1] == 2
    assert chooser.choose(seen(chooser), texts("calm", "loud", "odd"))[1] == 0


def test_every_label_is_offered_once_with_its_votes() -> None:
    odd = Candidate("It is odd", "odd", 3, greedy=True)
    offered = all_labels(TAGS, [odd])
    assert [c.answer for c in offered] == ["calm", "loud", "odd"]
    assert offered[2] == odd
    assert [c.votes for c in offered] == [0, 0, 3]
    assert [candidate_text(TAGS, c) for c in offered] == [
        "calm",
        "loud",
        "odd",
    ]  # not the LLM's wording
    assert candidate_text(TITLES, Candidate("A text", "a text")) == "A text"


@pytest.mark.parametrize(
    ("task", "by_label"), [(TAGS, True), (TAGS, False), (TITLES, False), (STARS, True)]
)
def test_abstention_keeps_the_first_if_the_lead_is_uncertain(task: Task, by_label: bool) -> None:
    chooser = adapter(
        task,
        by_label=by_label,
        weights={"llm_votes": 0.2, "llm_greedy": -0.5},
        select="expected-gain",
    )
    scorer, (first, *others) = (
        chooser.scorer,
        task.labels or ("quiet rain night", "loud war film", "rain song in the night"),
    )
    offered = [
        Candidate(first, first, 1, greedy=True),
        *(replace(c, votes=3) for c in texts(*others)),
    ]
    chooser.settings = chooser.settings.model_copy(update={"abstention_threshold": 1.0})
    assert not chooser.choose(seen(chooser), offered).abstained, (
        "nothing is known of this bundle's uncertainty"
    )
    left = len(task.labels) if by_label else 1
    scorer.posterior = LaplacePosterior(left, scorer.interaction.size // left)
    scorer.prior_precision = torch.tensor(1e-4)
    unsure = chooser.choose(seen(chooser), offered)
    assert (unsure.abstained, unsure.chosen) == (True, 0)
    scorer.prior_precision = torch.tensor(1e8)
    sure = chooser.choose(seen(chooser), offered)
    assert not sure.abstained
    assert sure.chosen != 0
    assert unsure.candidates == sure.candidates, "scores do not depend on caution"


def test_score_uncertainty_is_that_of_posterior_head_samples() -> None:
    for task, by_label in ((TAGS, True), (TITLES, False)):
        chooser = adapter(task, by_label=by_label)
        scorer = chooser.scorer
        left = len(task.labels) if by_label else 1
        right = scorer.interaction.size // left
        scorer.posterior = LaplacePosterior.of(torch.eye(left), torch.eye(right))
        scorer.prior_precision = torch.tensor(2.0)
        scorer.scale = scorer.scale_alone = torch.tensor(1.5)
        groups = chooser.groups(seen(chooser), texts("calm", "loud", "odd"))
        heads = (
            torch.randn(20_000, scorer.interaction.size, generator=torch.Generator().manual_seed(0))
            / 9**0.5
        )
        x = scorer.interaction(groups)
        drawn = (
            1.5 * scorer.interaction.dot(x[None].expand(len(heads), *x.shape), heads)[:, 0].detach()
        )
        covariance = scorer.covariance(groups, Head.of(scorer.head.empty(), 7))
        assert covariance is not None
        assert torch.allclose(
            covariance, torch.cov(drawn.T), atol=0.05 * float(covariance.diagonal().max())
        )
        stranger = scorer.covariance(groups, None)
        assert stranger is not None
        assert torch.allclose(stranger, covariance * 9 / 2, atol=1e-5), (
            "who has no head is less certain"
        )


def test_a_last_digit_is_no_lead() -> None:
    values = np.array([0.2, 0.7, 0.7 + 1e-7, 0.7001])
    assert first_best(values) == 3
    assert first_best(values[:3]) == 1
    assert first_best(-values) == 0


def test_auto_takes_the_score_of_words_as_the_gain() -> None:
    plain = adapter(TITLES, select="auto")
    assert plain.how == "expected-gain"
    interaction = Tower(8, 4)
    names = (*plain.featurizer.adapter_names, *TITLES.strategy.word_columns)
    scorer = Scorer(interaction, make_head("linear", interaction), names)
    for chosen, how in (("auto", "best"), ("best", "best"), ("expected-gain", "expected-gain")):
        settings = Settings.checked({"select": chosen})
        assert LearnedSelector(scorer, plain.featurizer, settings).how == how
