"""The word model: counts of words, boosted trees as arrays, and P(word of the answer)."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from hydra_llm.model.word_model import FEATURES, Forest, WordModel, word_features
from hydra_llm.training.word_model import _Rows, _skill, as_forest, learn_word_model
from hydra_llm.types import Record
from hydra_llm.word_counts import OwnWords, PopulationWords, UserWords, text_profile

KEPT = ("red", "blue", "green", "gold", "pink", "teal")


def record(user: str, place: int, input: str, output: str) -> Record:
    return Record(user, f"{user}-{place}", input, output, position=place)


def histories(users: int = 12, records: int = 12) -> dict[str, list[Record]]:
    """Answers keep the colour of the input, and nothing else of it."""
    rng, fillers = np.random.default_rng(0), [f"filler{i}" for i in range(30)]
    made = {}
    for user in range(users):
        own = []
        for place in range(records):
            colour, said = KEPT[rng.integers(len(KEPT))], " ".join(rng.choice(fillers, 5))
            own.append(record(f"u{user}", place, f"{said} {colour} today.", f"the {colour} one"))
        made[f"u{user}"] = own
    return made


def test_trees_equal_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(500, 5))
    target = features[:, 0] + features[:, 1] * features[:, 2] + rng.normal(size=500) > 0
    model = HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=9).fit(features, target)
    logits = as_forest(model).logits(features)
    expected = model.predict_proba(features)[:, 1]
    assert 1 / (1 + np.exp(-logits)) == pytest.approx(expected, abs=1e-9)


def test_constant_forest() -> None:
    logits = Forest.constant(0.25).logits(np.zeros((3, 2)))
    assert 1 / (1 + np.exp(-logits)) == pytest.approx([0.25] * 3)


def test_learns_which_words_are_kept() -> None:
    models = learn_word_model(histories())
    assert models is not None
    shares = models.model.probabilities(
        ["teal", "filler3", "the", "filler9"], "filler3 teal today.", UserWords()
    )
    assert shares[0] > 0.5 > shares[1]
    assert shares[2] > 0.5 > shares[3]
    again = learn_word_model(histories())
    assert again is not None
    assert (again.model.forest.value == models.model.forest.value).all()


def test_own_model_has_not_seen_the_user() -> None:
    made = histories()
    made["u0"] = [record("u0", i, "quaint thing", "quaint") for i in range(4)]
    made["u1"] = [record("u1", i, "quaint thing", "quaint") for i in range(4)]
    models = learn_word_model(made)
    assert models is not None
    assert models.model.population.counts["quaint"][:3] == [8, 8, 8]
    assert "quaint" not in models.without["u0"].population.counts  # one other user has it


def test_skill_is_that_of_held_out_users() -> None:
    models = learn_word_model(histories())
    assert models is not None
    assert 0.5 < models.model.skill <= 1  # they keep the same words
    draw = np.random.default_rng(0)
    by_lot = {
        user: [replace(own, output=str(draw.choice(own.input.split()))) for own in records]
        for user, records in histories().items()
    }
    models = learn_word_model(by_lot)
    assert models is not None
    assert models.model.skill < 0.1


def test_skill_of_known_shares() -> None:
    features = np.zeros((5, len(FEATURES)))
    features[:4, FEATURES.index("inside")] = 1  # the last is no word of the input
    record = np.array([0, 0, 1, 1, 1])
    rows = _Rows(features, np.array([True, False, True, True, True]), record)
    assert _skill([rows], [Forest.constant(0.3)]) == 0  # one share for all tells nothing
    own = FEATURES.index("length")
    features[0, own] = 1
    forest = Forest(
        feature=np.array([own, 0, 0]),
        threshold=np.array([0.5, np.inf, np.inf]),
        left=np.array([1, 1, 2]),
        right=np.array([2, 1, 2]),
        value=np.array([0.0, -9.0, 9.0]),
        roots=np.array([0]),
        depth=1,
        baseline=0.0,
    )
    assert _skill([rows], [forest]) == pytest.approx(1, abs=1e-3)
    features[:2, own] = [0, 1]
    assert _skill([rows], [forest]) == pytest.approx(-3, abs=1e-2)  # upside down


def test_restored_from_arrays() -> None:
    models = learn_word_model(histories())
    assert models is not None
    model = models.model
    again = WordModel.restore(model.config(), model.arrays())
    assert again is not None
    asked, text = ["teal", "the", "unseen"], "filler1 teal"
    assert (
        again.probabilities(asked, text, UserWords())
        == model.probabilities(asked, text, UserWords())
    ).all()
    assert again.skill == model.skill
    older = {name: value for name, value in model.config().items() if name != "skill"}
    unmeasured = WordModel.restore(older, model.arrays())
    assert unmeasured is not None
    assert unmeasured.skill == 0
    assert WordModel.restore(None, {}) is None
    with pytest.raises(ValueError, match="other features"):
        WordModel.restore({**model.config(), "features": ["count"]}, model.arrays())


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"u0": [record("u0", 0, "a", "a")]},
        {"u0": [record("u0", 0, "", "")], "u1": [record("u1", 0, "", "")]},
        {f"u{i}": [record(f"u{i}", p, "!", "?") for p in range(3)] for i in range(4)},
    ],
)
def test_too_little_to_learn_from(made: dict[str, list[Record]]) -> None:
    assert learn_word_model(made) is None


def test_vocabulary_of_one_word() -> None:
    """Nothing tells what an answer lacks: a model would give the same to any word."""
    made = {f"u{i}": [record(f"u{i}", p, "yes", "yes") for p in range(20)] for i in range(6)}
    assert learn_word_model(made) is None
    made["u0"][3] = record("u0", 3, "yes no", "yes")
    assert learn_word_model(made) is None


def test_scripts_without_blanks() -> None:
    texts = [("北京今天下雨", "北京下雨"), ("上海今天晴", "上海晴"), ("วันนี้ฝนตก", "ฝนตก")]
    made = {f"u{i}": [record(f"u{i}", p, *texts[(i + p) % 3]) for p in range(12)] for i in range(6)}
    population = PopulationWords.of(made.values())
    assert population.counts["北"][:3] == [24, 24, 24]
    assert "北京今天下雨" not in population.counts
    models = learn_word_model(made)
    assert models is not None
    kept, dropped = models.model.probabilities(["北", "今"], texts[0][0], UserWords())
    assert kept > 0.5 > dropped


def test_features_are_finite() -> None:
    population = PopulationWords.of(histories().values())
    for text in ("", "   ", "!?"):
        rows = word_features(["", "unknown", "red"], text, population, UserWords())
        assert rows.shape == (3, len(FEATURES))
        assert np.isfinite(rows).all()
    assert np.isfinite(word_features(["a"], "a b", PopulationWords(), UserWords())).all()


def test_profile_of_a_text() -> None:
    profile = text_profile("We present LaMP. The New York Times said so. LaMP wins!")
    lamp, york, wins = (profile.places[word] for word in ("lamp", "york", "wins"))
    assert profile.sentences == 3
    assert (lamp.sentence, lamp.mixed_case, lamp.inner_capital, lamp.in_last) == (0, 1, 1, 1)
    assert lamp.times == pytest.approx(np.log(3))
    assert (york.capital_run, york.mixed_case, york.sentence) == (1, 0, 1)
    assert (wins.in_last, wins.capital, wins.first) == (1, 0, 1.0 - 1 / len(profile.tokens))


def test_user_counts_follow_records() -> None:
    records = [record("u", i, f"about word{i}", f"word{i} it is") for i in range(5)]
    kept, one = OwnWords(), UserWords()
    one.add(records)
    early = kept.of(records[:3])
    assert kept.of(records) == one  # two were added
    assert early.records == 3  # and the earlier counts stand
    del records[1]  # a record that was deleted leaves nothing
    assert kept.of(records).outputs["word1"] == 0
    assert kept.of(records).rows(["word2", "it"]).tolist() == [[1, 1, 1], [0, 4, 0]]
    assert kept.of([]) == UserWords()
