"""Joint training: the same seed gives the same numbers, a stop costs nothing, and a tuned encoder
learns.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hydra_llm.errors import BundleError
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.heads import Head, SGDConfig, make_head
from hydra_llm.model.interactions import Cross, Groups, Tower
from hydra_llm.model.scorer import Scorer
from hydra_llm.plugins import HEADS
from hydra_llm.training.convex import fit_heads, heads_for
from hydra_llm.training.dataset import LabelledGroup, TrainingSet, make_training_set
from hydra_llm.training.sgd import TextSource, fit_unseen, held_out_users, train_jointly
from hydra_llm.training.strengths import fit_scorer

_spec = importlib.util.spec_from_file_location(
    "simulated", Path(__file__).with_name("simulated.py")
)
assert _spec is not None
assert _spec.loader is not None
simulated: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)

CONFIG = SGDConfig(epochs=4, lr=0.02, batch=16, patience=0, seed=3)


def towers(users: int = 6) -> TrainingSet:
    table, _ = simulated.simulate(users, 6)
    draw = torch.Generator().manual_seed(1)
    groups = table.groups
    return replace(
        table,
        groups=Groups(
            torch.randn(len(table), 5, generator=draw),
            groups.right,
            groups.side_features,
            groups.mask,
            groups.target,
        ),
    )


def scorer_of(table: TrainingSet, head: str = "mlp", features: str = "tower") -> Scorer:
    torch.manual_seed(0)
    interaction = Tower(5, 4) if features == "tower" else Cross(5)
    interaction.prepare(table.groups)
    return Scorer(interaction, make_head(head, interaction, rank=2), ())


def same(one: Scorer, other: Scorer) -> bool:
    theirs = other.tensors()
    return one.tensors().keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in one.tensors().items()
    )


def same_heads(one: dict[str, Head], other: dict[str, Head]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(head.numbers, other[name].numbers) for name, head in one.items()
    )


def own_scores(scorer: Scorer, table: TrainingSet, heads: dict[str, Head]) -> torch.Tensor:
    return scorer.score(table.groups, heads_for(table, heads))


class Stopped(Exception):
    """Ctrl-C, as a test can send it."""


def stop_after(epochs: int) -> Any:
    def done(epoch: int, total: int) -> None:
        if epoch == epochs:
            raise Stopped

    return done


@pytest.mark.parametrize("head", list(HEADS.builtin))
def test_the_same_seed_gives_the_same_numbers_another_does_not(head: str) -> None:
    table = towers()
    scorers = [scorer_of(table, head) for _ in range(3)]
    runs = [
        train_jointly(scorer, table, replace(CONFIG, seed=seed))
        for scorer, seed in zip(scorers, (3, 3, 4), strict=True)
    ]
    (losses, heads), (again, theirs), (others, _) = runs
    assert losses == again != others
    assert same(scorers[0], scorers[1])
    assert same_heads(heads, theirs)
    assert not same(scorers[0], scorers[2])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("epochs", [1, 2])
def test_few_epochs_are_kept(epochs: int) -> None:
    table = towers()
    scorer = scorer_of(table)
    before = {name: value.clone() for name, value in scorer.tensors().items()}
    _, heads = train_jointly(scorer, table, replace(CONFIG, epochs=epochs))
    assert not torch.equal(
        scorer.tensors()["interaction.layer.weight"], before["interaction.layer.weight"]
    )
    assert all(head.numbers.any() and head.records == 6 for head in heads.values())


@pytest.mark.parametrize("stopped_after", [1, 3])
@pytest.mark.parametrize("head", ["linear", "mlp", "kernel"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    head: str, stopped_after: int, tmp_path: Path
) -> None:
    table, file = towers(), tmp_path / "x.checkpoint"
    whole, parts = scorer_of(table, head), scorer_of(table, head)
    losses, heads = train_jointly(whole, table, CONFIG)
    with pytest.raises(Stopped):
        train_jointly(parts, table, CONFIG, checkpoint=file, done=stop_after(stopped_after))
    again = scorer_of(table, head)  # another process: nothing but the checkpoint is left
    resumed, theirs = train_jointly(again, table, CONFIG, checkpoint=file)
    assert resumed == losses
    assert same(again, whole)
    assert same_heads(heads, theirs)


def test_a_resumed_run_with_early_stopping_ends_the_same(tmp_path: Path) -> None:
    table, file = towers(10), tmp_path / "x.checkpoint"
    config = replace(CONFIG, epochs=40, lr=0.02, patience=3)  # held-out users soon get worse
    whole, parts, again = (scorer_of(table) for _ in range(3))
    losses, _ = train_jointly(whole, table, config)
    assert 3 < len(losses) < 40
    with pytest.raises(Stopped):
        train_jointly(parts, table, config, checkpoint=file, done=stop_after(len(losses) - 1))
    assert train_jointly(again, table, config, checkpoint=file)[0] == losses
    assert same(again, whole)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    table, file = towers(), tmp_path / "x.checkpoint"
    with pytest.raises(Stopped):
        train_jointly(scorer_of(table), table, CONFIG, checkpoint=file, done=stop_after(1))
    for other in (scorer_of(table, "linear"), scorer_of(table, features="cross")):
        with pytest.raises(BundleError, match="other settings or data"):
            train_jointly(other, table, CONFIG, checkpoint=file)
    fewer = table.of(table.names()[:4])
    with pytest.raises(BundleError, match="other settings or data"):
        train_jointly(scorer_of(table), fewer, CONFIG, checkpoint=file)


@pytest.mark.parametrize("changed", [{"seed": 9}, {"lr": 0.5}, {"batch": 4}, {"weight_decay": 0.9}])
def test_a_checkpoint_of_other_settings_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    table, file = towers(), tmp_path / "x.checkpoint"
    with pytest.raises(Stopped):
        train_jointly(scorer_of(table), table, CONFIG, checkpoint=file, done=stop_after(1))
    with pytest.raises(BundleError):
        train_jointly(scorer_of(table), table, replace(CONFIG, **changed), checkpoint=file)


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    table, file = towers(), tmp_path / "x.checkpoint"
    with pytest.raises(Stopped):
        train_jointly(scorer_of(table), table, CONFIG, checkpoint=file, done=stop_after(1))
    assert table.groups.target is not None
    other = replace(table, groups=replace(table.groups, target=table.target.flip(0)))
    with pytest.raises(BundleError):
        train_jointly(scorer_of(table), other, CONFIG, checkpoint=file)


def test_a_damaged_checkpoint_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.checkpoint"
    file.write_bytes(b"\0" * 100)
    with pytest.raises(BundleError, match="x.checkpoint"):
        train_jointly(scorer_of(towers()), towers(), CONFIG, checkpoint=file)


KILLED = """
import os, signal, sys, importlib.util
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
import hydra_llm.training.sgd as sgd
spec = importlib.util.spec_from_file_location("test_joint", {this!r})
here = importlib.util.module_from_spec(spec)
sys.modules["test_joint"] = here
spec.loader.exec_module(here)
real, count = sgd.save_file, 0

def save_half(tensors, path, metadata):
    global count
    count += 1
    real(tensors, path, metadata)
    if count == 3:  # in the middle of writing: half of the bytes are there
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

sgd.save_file = save_half
table = here.towers()
sgd.train_jointly(here.scorer_of(table), table, here.CONFIG, checkpoint=Path({file!r}))
"""


@pytest.mark.slow
def test_a_kill_during_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    file = tmp_path / "x.checkpoint"
    script = KILLED.format(tests=str(Path(__file__).parent), this=__file__, file=str(file))
    killed = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    table, epochs = towers(), []
    whole, again = scorer_of(table), scorer_of(table)
    train_jointly(again, table, CONFIG, checkpoint=file, done=lambda epoch, _: epochs.append(epoch))
    assert epochs == [3, 4]  # two epochs were done and kept
    train_jointly(whole, table, CONFIG)
    assert all(
        torch.allclose(value, whole.tensors()[name], atol=1e-5)
        for name, value in again.tensors().items()
    )


# ---- a tuned encoder

POSITIVE, NEGATIVE = (
    ("great film", "love song", "star of night"),
    ("dull war", "slow rain", "old film"),
)


def word_groups(users: Sequence[str] = ("a", "b", "c")) -> list[LabelledGroup]:
    """User by user, the great thing is right and the dull one is not; c wants it the other way
    round.
    """
    out = []
    for user in users:
        for place in range(6):
            good, bad = POSITIVE[place % 3], NEGATIVE[(place + place // 3) % 3]
            gains = (1.0, 0.0) if user != "c" else (0.0, 1.0)
            out.append(
                LabelledGroup(
                    user, str(place), "the film", (good, bad), gains, np.zeros((2, 0)), place
                )
            )
    return out


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    spec = importlib.util.spec_from_file_location(
        "model_conftest", Path(__file__).parents[1] / "model" / "conftest.py"
    )
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return open_encoder(str(conftest._save_model(tmp_path / "bert")), max_length=16)


def test_tuning_lowers_the_loss_and_gives_another_encoder(encoder: Encoder) -> None:
    groups, store = word_groups(), FeatureCache(encoder)
    interaction = Cross(encoder.width)
    table = make_training_set(store, interaction, groups, rule="exact", loss="listwise")
    interaction.prepare(table.groups)
    scorer = Scorer(interaction, make_head("linear", interaction), ())
    scorer.prior_precision = torch.tensor(0.1)
    digest, vectors = encoder.digest, store.pairs(["the film"], ["dull war"])
    losses, heads = train_jointly(
        scorer,
        table,
        SGDConfig(epochs=12, lr=5e-3, batch=8, patience=0),
        source=TextSource(encoder, groups),
    )
    assert losses[-1] < 0.8 * losses[0]
    assert not encoder.training
    assert encoder.digest != digest
    assert not torch.allclose(
        torch.from_numpy(store.pairs(["the film"], ["dull war"])),
        torch.from_numpy(vectors),
        atol=1e-3,
    )  # no stale features
    now = make_training_set(store, interaction, groups, rule="exact", loss="listwise")
    assert now.groups.target is not None
    right = own_scores(scorer, now, heads).argmax(-1) == now.groups.target.argmax(-1)
    assert right.float().mean() > 0.8  # c's head, too, on one shared encoder


def test_fresh_features_stand_where_the_tables_do(encoder: Encoder) -> None:
    other = LabelledGroup("b", "0", "a song", ("night",), (1.0,), np.zeros((1, 0)), 0)
    groups = [*word_groups(("a",)), other]
    store = FeatureCache(encoder)
    table = make_training_set(store, Cross(encoder.width), groups, rule="exact", loss="binary")
    with torch.no_grad():
        filled = TextSource(encoder, groups).fill(table, torch.tensor([6, 0, 3]))
    assert table.groups.right is not None
    assert filled.right is not None
    assert torch.allclose(filled.right, table.groups.right[[6, 0, 3]], atol=1e-4)
    assert filled.right[0, 1].abs().sum() == 0


# ---- new users with mlp heads


def fit_mlp(
    scorer: Scorer,
    table: TrainingSet,
    names: Sequence[str],
    config: SGDConfig,
    *,
    random_start: bool,
) -> dict[str, Head]:
    return fit_heads(scorer, table, names, sgd=replace(config, random_start=random_start))


@pytest.mark.parametrize("random_start", [pytest.param(False, marks=pytest.mark.slow), True])
def test_mlp_heads_are_fitted_and_the_shared_one_stays(random_start: bool) -> None:
    table = towers(8)
    train, new = table.of(table.names()[:5]), table.of(table.names()[5:])
    scorer = scorer_of(table)
    train_jointly(scorer, train, replace(CONFIG, epochs=10))
    before = {name: value.clone() for name, value in scorer.tensors().items()}
    heads = fit_mlp(scorer, new, new.names(), replace(CONFIG, epochs=40), random_start=random_start)
    assert all(torch.equal(value, before[name]) for name, value in scorer.tensors().items())
    own, shared = (own_scores(scorer, new, of).log_softmax(-1) for of in (heads, {}))
    wanted = new.target.bool()
    assert own[wanted].mean() > shared[wanted].mean()


def test_the_shared_prior_keeps_a_head_nearer_to_the_shared_head() -> None:
    table = towers(8)
    train, new = table.of(table.names()[:5]), table.of(table.names()[5:])
    scorer = scorer_of(table)
    train_jointly(scorer, train, replace(CONFIG, epochs=10))
    first, *others = new.names()
    distance = {}
    for start in (False, True):
        heads = fit_mlp(
            scorer, new.take([0, 1]), new.names(), replace(CONFIG, epochs=5), random_start=start
        )
        distance[start] = float(np.linalg.norm(heads[first].numbers))
        # without groups the head is the shared one
        assert not any(heads[name].numbers.any() for name in others)
    assert 0 < distance[False] < 0.5 * distance[True]


@pytest.mark.parametrize("random_start", [False, True])
def test_an_mlp_head_does_not_depend_on_who_else_is_fitted(random_start: bool) -> None:
    table = towers(8)
    first, *others = table.names()[5:]
    numbers = []
    for names in ([first], [*others, first]):
        scorer = scorer_of(table)
        train_jointly(scorer, table.of(table.names()[:5]), CONFIG)
        heads = fit_mlp(scorer, table, names, CONFIG, random_start=random_start)
        numbers.append(heads[first].numbers)
        assert len({tuple(heads[name].numbers.tolist()) for name in names}) == len(names)
    assert np.array_equal(*numbers)


def test_training_draws_nothing_from_the_processs_generator() -> None:
    table = towers()
    state = torch.random.get_rng_state()
    train_jointly(scorer := scorer_of(table), table, CONFIG)
    torch.random.set_rng_state(state)
    expected = torch.rand(3)
    torch.random.set_rng_state(state)
    train_jointly(scorer, table, CONFIG)
    fit_mlp(scorer, table, table.names(), CONFIG, random_start=True)
    assert torch.equal(torch.rand(3), expected)


# ---- what is chosen on users whom nothing was trained on


def random_targets(users: int, groups: int = 12, signal: float = 0.0) -> TrainingSet:
    """Targets of chance: what predicts them has seen them. With `signal` the first feature of a
    candidate predicts them.
    """
    table = towers(users)
    draw = torch.Generator().manual_seed(5)
    count = users * groups
    left, right = torch.randn(count, 5, generator=draw), torch.randn(count, 4, 5, generator=draw)
    worth = (
        signal * right[..., 0] - torch.rand(count, 4, generator=draw).log().neg().log()
    )  # with noise of Gumbel's: a softmax draw
    cases = Groups(
        left,
        right,
        torch.zeros(count, 4, 0),
        torch.ones(count, 4, dtype=torch.bool),
        torch.nn.functional.one_hot(worth.argmax(1), 4).float(),
    )
    names = tuple(f"u{i:02}" for i in range(users) for _ in range(groups))
    return replace(
        table,
        groups=cases,
        users=names,
        positions=torch.arange(groups).repeat(users),
        voted=torch.zeros(count, dtype=torch.bool),
        gains=cases.target,
    )


@pytest.mark.slow
def test_chance_looks_informative_only_to_folds_of_training() -> None:
    table, config = random_targets(20), replace(CONFIG, epochs=60, patience=100, lr=0.03)
    torch.manual_seed(0)
    interaction = Tower(5, 16)
    interaction.prepare(table.groups)
    scorer = Scorer(interaction, make_head("linear", interaction), ())
    train_jointly(scorer, table, config)
    state = [tensor.clone() for tensor in interaction.parameters()]
    torch.manual_seed(0)
    everyone = Scorer(interaction, make_head("linear", interaction), ())
    train_jointly(everyone, table, replace(config, patience=0))
    seen, _ = fit_scorer(everyone, table)
    with torch.no_grad():
        for tensor, value in zip(interaction.parameters(), state, strict=True):
            tensor.copy_(value)
    unseen, _ = fit_scorer(scorer, table, unseen=held_out_users(table, config))
    assert seen.loss_shared < 0.97 * seen.loss_uniform  # the mistake that `unseen` is there for
    assert unseen.loss_shared > 0.99 * unseen.loss_uniform
    late = table.of(held_out_users(table, config)).split_late()[1]
    assert unseen.held_out_groups == len(late)


@pytest.mark.slow
@pytest.mark.parametrize("signal", [0.0, 2.0])
def test_mlp_heads_are_calibrated_on_users_outside_training(signal: float) -> None:
    table, config = (
        random_targets(300, signal=signal),
        replace(CONFIG, epochs=40, batch=512, patience=100, lr=0.05),
    )
    scorer = scorer_of(table)
    train_jointly(scorer, table, config)
    report, heads = fit_unseen(scorer, table, replace(config, random_start=True))
    assert report.loss_user > report.loss_calibrated
    if signal:
        assert report.scale > 0.2  # heads that overdo what is true are believed in part
        assert report.loss_calibrated < 0.9 * report.loss_uniform
    else:
        assert report.scale == pytest.approx(
            0.05
        )  # heads that only know chance must not be believed
        assert report.loss_calibrated == pytest.approx(report.loss_uniform, rel=0.02)
    assert heads.keys() == set(held_out_users(table, config))
    assert all(head.numbers.any() for head in heads.values())


def test_mlp_heads_without_held_out_users_stay_as_they_are() -> None:
    table = towers(4)
    scorer = scorer_of(table)
    train_jointly(scorer, table, CONFIG)
    report, heads = fit_unseen(scorer, table, CONFIG)
    assert heads == {}
    assert (report.held_out_groups, report.scale, float(scorer.scale)) == (0, 1.0, 1.0)
