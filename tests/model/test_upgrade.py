"""Bundles of format 1, written by the code before users became values, and of format 2, by the code
before word model and learned prior, with the scores that these gave.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm.bundle import Bundle, delete_from
from hydra_llm.history import parse_time
from hydra_llm.model.interactions import Groups
from hydra_llm.model.persistence import FORMAT
from hydra_llm.model.scorer import Scorer
from hydra_llm.model.upgrade import reranker_helps
from hydra_llm.training.word_model import learn_word_model
from tests.model.test_word_model import histories

DATA = Path(__file__).with_name("data")
NAMES = ("tags-linear", "stars-lowrank", "tags-kernel", "titles-mlp")
NAMES += ("format-2/tags-linear", "format-2/stars-lowrank")  # the first two, saved again
NAMES += ("format-4/tags-kernel", "format-4/stars-lowrank")  # before users had a file of their own
USERS = ("train0", "new0", "new1", "nobody")


def groups_of(scorer: Scorer) -> Groups:
    """The groups that the expected scores are of."""
    draw, config = np.random.default_rng(1), scorer.interaction.config()
    count, candidates = 4, config.get("labels", 3)
    mask = torch.ones(count, candidates, dtype=torch.bool)
    mask[1, 2] = scorer.interaction.by_label

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(draw.standard_normal(shape).astype("float32"))

    left, right = normal(count, config["width"]), normal(count, candidates, config["width"])
    side = normal(count, candidates, len(scorer.side_names))
    return Groups(left, None if scorer.interaction.by_label else right, side, mask)


def scores_of(bundle: Bundle, name: str) -> np.ndarray:
    scorer = bundle.scorers[name]
    heads = [bundle.heads[name].get(user) for user in USERS]
    scores: np.ndarray = scorer.score(groups_of(scorer), heads).numpy()
    return scores


def expected_of(name: str) -> dict[str, Any]:
    expected: dict[str, Any] = json.loads((DATA / Path(name).name / "expected.json").read_text())
    return expected


@pytest.mark.parametrize("name", NAMES)
def test_an_old_bundle_gives_the_scores_that_it_gave(name: str, tmp_path: Path) -> None:
    bundle, expected = Bundle.load(DATA / name, cache=tmp_path), expected_of(name)
    assert bundle.use_reranker == expected["reranks"]
    assert set(bundle.scorers) == set(expected["scores"])
    for scorer, scores in expected["scores"].items():
        wanted = np.array([[-np.inf if v is None else v for v in row] for row in scores])
        there = np.isfinite(wanted)
        actual = scores_of(bundle, scorer)
        assert (np.isfinite(actual) == there).all()
        assert np.abs(actual[there] - wanted[there]).max() < 1e-6 * max(
            1, np.abs(wanted[there]).max()
        )
        covariance = bundle.scorers[scorer].covariance(
            groups_of(bundle.scorers[scorer])[[0]], bundle.heads[scorer]["new0"]
        )
        assert (covariance is None) == (expected["covariance"][scorer] is None)
        if covariance is not None:
            assert np.allclose(covariance, expected["covariance"][scorer], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_heads_keep_what_they_were_learned_from(name: str, tmp_path: Path) -> None:
    bundle, expected = Bundle.load(DATA / name, cache=tmp_path), expected_of(name)
    for scorer, known in expected["known"].items():
        heads = bundle.heads[scorer]
        assert {user: head.records for user, head in heads.items()} == known
        for user, head in heads.items():
            learned = bundle.records[user][: head.records]
            assert head.until == (parse_time(learned[-1].time)[0] if learned else -math.inf)


def test_forgotten_users_are_not_users(tmp_path: Path) -> None:
    config = json.loads((DATA / "tags-linear" / "config.json").read_text())
    assert any(user.startswith("\0") for user in config["scorers"]["adapter"]["users"])
    bundle = Bundle.load(DATA / "tags-linear", cache=tmp_path)
    assert set(bundle.heads["adapter"]) == set(bundle.records)
    assert not any(user.startswith("\0") for user in bundle.heads["adapter"])


@pytest.mark.parametrize("name", NAMES)
def test_an_upgraded_bundle_is_written_in_the_present_format(name: str, tmp_path: Path) -> None:
    old = Bundle.load(DATA / name, cache=tmp_path)
    folder = old.save(tmp_path / "bundle")
    assert json.loads((folder / "config.json").read_text())["format"] == FORMAT == 5
    new = Bundle.load(folder, cache=tmp_path)
    assert new.use_reranker == old.use_reranker
    for scorer in old.scorers:
        assert np.array_equal(scores_of(new, scorer), scores_of(old, scorer))
        for user, head in old.heads[scorer].items():
            again = new.heads[scorer][user]
            assert (again.records, again.until) == (head.records, head.until)


@pytest.mark.parametrize("name", ["tags-linear", "format-4/tags-kernel"])
def test_a_user_is_deleted_from_an_old_bundle(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / name, tmp_path / "bundle"))
    old = Bundle.load(folder, cache=tmp_path)
    assert delete_from(folder, "new0")
    new = Bundle.load(folder, cache=tmp_path)
    for kept, before in ((new.records, old.records), *zip_heads(new, old)):
        assert set(kept) == set(before) - {"new0"}
    assert np.array_equal(
        new.heads["adapter"]["new1"].numbers, old.heads["adapter"]["new1"].numbers
    )
    assert delete_from(folder, "new0") is None
    assert not list(folder.rglob("history.jsonl.gz"))


def zip_heads(new: Bundle, old: Bundle) -> list[tuple[Any, Any]]:
    return [(new.heads[scorer], old.heads[scorer]) for scorer in old.scorers]


@pytest.mark.parametrize("name", NAMES)
def test_settings_say_how_an_old_bundle_was_learned(name: str, tmp_path: Path) -> None:
    settings = Bundle.load(DATA / name, cache=tmp_path).settings
    assert (settings.word_model, settings.fit_labels) == (False, "llm")
    assert (settings.head_prior, settings.select) == ("isotropic", "expected-gain")


def test_a_word_model_under_the_former_number_is_read(tmp_path: Path) -> None:
    models = learn_word_model(histories())
    assert models is not None
    folder = Path(shutil.copytree(DATA / "format-4" / "titles-mlp", tmp_path / "bundle"))
    new = Bundle.load(folder, cache=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    config = {**config, "format": 2}
    sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps({**config, "sha256": sha256}))
    again = Bundle.load(folder, cache=tmp_path)
    assert again.settings.stored() == new.settings.stored()
    assert again.word_model is not None
    assert again.word_model.population == models.model.population


def test_the_reranker_is_used_unless_it_was_worth_less() -> None:
    cases = ((0.6, 0.5, True), (0.5, 0.5, True), (0.4, 0.5, False), (None, None, True))
    for pick, first, used in cases:
        assert reranker_helps({"reranker": {"gain_pick": pick, "gain_first": first}}) is used
    assert reranker_helps({})
