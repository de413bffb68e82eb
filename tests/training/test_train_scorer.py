"""What a scorer starts from before its labels are read."""

import pytest

from hydra_llm.model.word_model import Forest, WordModel
from hydra_llm.tasks.base import Task
from hydra_llm.training.train_scorer import belief, side_prior
from hydra_llm.word_counts import PopulationWords


def test_belief_grows_with_the_skill_of_the_word_model() -> None:
    assert [belief(skill) for skill in (-1.0, 0.0)] == [0, 0]
    assert belief(0.04) == pytest.approx(0.3)
    assert belief(0.25) == pytest.approx(0.75)
    assert belief(0.9) == 1


def test_only_estimates_of_the_gain_are_believed() -> None:
    names = ("length", "llm_agreement", "expected_rouge")
    model = WordModel(PopulationWords(), Forest.constant(0.1), skill=0.25)
    titles = Task("titles", "generation", "Title of: {input}")
    assert side_prior(titles, model, names).tolist() == pytest.approx([0, 0, 0.75])
    stars = Task("stars", "rating", "How many stars? {input}", ("1", "2", "5"))
    assert side_prior(stars, model, names).tolist() == [0, 0, 0]
