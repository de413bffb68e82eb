"""`fit`, `ask` and `bench run` on a learned bundle: precedence of settings, what the bundle keeps,
and concurrent writers.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_llm import fit, learn
from hydra_llm.bundle import Bundle
from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import DataSet
from hydra_llm.datasets.native import load, save
from hydra_llm.errors import BundleError
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Record
from tests.learning import ONE_STRENGTH

STARS = Task("stars", "rating", "How many stars? {input}", ("1", "2", "3"))
USERS = {"t0": "train", "t1": "train", "one": "test", "two": "test"}
RECORDS = [
    Record(user, f"r{i}", f"rain {i} of {user}", str(1 + (i + at) % 3), str(2000 + i))
    for at, user in enumerate(USERS)
    for i in range(5)
]
QUERIES = [Query(user, "q", "a film", "2", "2010") for user in ("one", "two")]
LEARNED = {
    "epochs": 0,
    "samples": 2,
    "retrieved": 3,
    "queries_per_user": 1,
    "k": 1,
    "max_length": 32,
}
LABELS = "fake:rule=labels"


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a bundle with a head for user `two`."""
    folder = tmp_path_factory.mktemp("learned")
    dataset = DataSet.from_records(STARS, USERS, RECORDS, QUERIES)  # type: ignore[arg-type]
    save(dataset, folder / "data")
    settings = Settings(**LEARNED, cache=folder / "cache")  # type: ignore[arg-type]
    learn(dataset, LABELS, settings, out=folder / "bundle", strengths=ONE_STRENGTH)
    fit(dataset, folder / "bundle", LABELS, users=["two"])
    return folder


@pytest.fixture
def bundle(learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(learned / "bundle", tmp_path / "bundle"))


Hydra = Callable[..., Any]


@pytest.fixture
def hydra(capsys: pytest.CaptureFixture[str]) -> Hydra:
    """The JSON that a command prints, or its one line of error."""

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        code = run([*map(str, arguments), "--json"])
        result = capsys.readouterr()
        if code:
            assert (code, result.out, result.err.count("\n")) == (2, "", 1), result
            return result.err.removeprefix("hydra-llm: ").rstrip("\n")
        return json.loads(result.out)

    return call


def stored(bundle: Path) -> Any:
    return json.loads((bundle / "config.json").read_text())["settings"]


@pytest.mark.slow
def test_precedence_is_flag_preset_environment_file_bundle(
    hydra: Hydra, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def votes(*more: object) -> int:
        asked = ["--llm", LABELS, "--set", "ask=always"]  # also where votes have no weight
        result = hydra("ask", "--bundle", bundle, *asked, "--user", "two", *more, "rain")
        return sum(candidate["votes"] for candidate in result["candidates"])

    Path("own.toml").write_text("llm.samples = 3")
    assert votes() == 2
    assert votes("--config", "own.toml") == 3
    Path("hydra-llm.toml").write_text("[llm]\nsamples = 5")
    assert votes() == 5
    monkeypatch.setenv("HYDRA_SAMPLES", "4")
    assert votes() == 4
    assert votes("--preset", "paper") == 8
    assert votes("--preset", "paper", "--config", "own.toml") == 8
    assert votes("--preset", "paper", "--set", "llm.samples=6") == 6


@pytest.mark.slow
def test_a_preset_beats_file_and_environment_in_fit_and_bench(
    hydra: Hydra, learned: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Settings] = []

    def spy(*arguments: Any, settings: Settings, **options: Any) -> Any:
        used.append(settings)
        return fit(*arguments, settings=settings, **options)

    monkeypatch.setattr("hydra_llm.training.api.fit", spy)
    Path("hydra-llm.toml").write_text("[llm]\nsamples = 3\n[retrieval]\nretrieved = 1")
    monkeypatch.setenv("HYDRA_LLM_TEMPERATURE", "0.25")
    common = [learned / "data", "--bundle", bundle, "--llm", LABELS]
    for options, wanted in (([], (3, 1, 0.25)), (["--preset", "paper"], (8, 10, 1.0))):
        out = f"run{len(options)}"
        hydra("fit", *common, *options)
        hydra("bench", "run", *common, "--methods", "rag", "--out", out, *options)
        ran = json.loads(Path(out, "manifest.json").read_text())["settings"]
        assert (used[-1].samples, used[-1].retrieved, used[-1].temperature) == wanted
        assert (ran["samples"], ran["retrieved"], ran["temperature"]) == wanted


def test_limit_of_ask_keeps_the_latest_records(hydra: Hydra, bundle: Path) -> None:
    ask = ["ask", "--bundle", bundle, "--llm", LABELS, "--user", "two"]
    assert len(hydra(*ask, "rain")["retrieved"]) == 3
    assert {record["id"] for record in hydra(*ask, "--limit", 2, "rain")["retrieved"]} == {
        "r3",
        "r4",
    }
    assert len(hydra(*ask, "--limit", 9, "rain")["retrieved"]) == 3
    assert hydra(
        "ask", "--bundle", bundle, "--llm", LABELS, "--user", "none", "--limit", 2, "rain"
    ).startswith("unknown user 'none'")


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [("features", "cross", "tower"), ("head", "mlp", "linear"), ("max_length", 64, 32)],
)
def test_every_command_refuses_to_change_a_fixed_setting(
    hydra: Hydra, learned: Path, bundle: Path, name: str, value: object, was: object
) -> None:
    data, common = (
        learned / "data",
        ["--bundle", bundle, "--llm", LABELS, "--set", "candidates=sampled"],
    )
    line = (
        f"setting '{name}': was fixed to {was!r} when the bundle was learned; learn another bundle"
        f" for {value!r}"
    )
    change = ["--set", f"{name}={value}"]
    assert hydra("fit", data, *common, *change) == line
    assert hydra("ask", "--user", "two", *common, *change, "rain") == line
    assert hydra("bench", "run", data, "--out", "run", *common, *change) == line
    assert not Path("run").exists()
    assert hydra("fit", data, *common, "--set", f"{name}={was}")["users"] == 2


def test_sampled_candidates_work_with_a_label_adapter(hydra: Hydra, bundle: Path) -> None:
    result = hydra(
        "ask",
        "--bundle",
        bundle,
        "--llm",
        "fake:echo",
        "--user",
        "two",
        "--candidates",
        "sampled",
        "2",
    )
    assert [candidate["answer"] for candidate in result["candidates"]] == ["2"]
    assert result["candidates"][0]["probability"] == pytest.approx(1)


def test_fit_leaves_the_settings_of_the_bundles_training(
    hydra: Hydra, learned: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(bundle)
    monkeypatch.setenv("HYDRA_K", "0")
    result = hydra(
        "fit",
        learned / "data",
        "--bundle",
        bundle,
        "--llm",
        LABELS,
        "--preset",
        "paper",
        "--seed",
        3,
        "--set",
        "retrieved=1",
    )
    assert result["users"] == 2
    assert stored(bundle) == before
    assert {key: before[key] for key in LEARNED} == LEARNED


def test_a_benchmark_records_the_settings_of_a_preset(
    hydra: Hydra, learned: Path, bundle: Path
) -> None:
    methods = ["--methods", "rag,hydra-published", "--out", "run", "--preset", "paper"]
    rows = hydra("bench", "run", learned / "data", "--bundle", bundle, "--llm", LABELS, *methods)
    assert [row["failed"] for row in rows] == [0, 0]
    ran = json.loads(Path("run/manifest.json").read_text())["settings"]
    assert (ran["samples"], ran["candidates"], ran["head"], ran["epochs"]) == (
        8,
        "sampled",
        "linear",
        0,
    )


@pytest.mark.parametrize("command", ["ask", "fit", "bench run"])
def test_a_wrong_environment_or_file_is_one_line(
    hydra: Hydra, learned: Path, bundle: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = {
        "ask": ["--user", "two", "rain"],
        "fit": [learned / "data"],
        "bench run": [learned / "data", "--out", "run"],
    }[command]
    line = [*command.split(), "--bundle", bundle, "--llm", LABELS, *rest]
    with monkeypatch.context() as patch:
        patch.setenv("HYDRA_K", "abc")
        assert hydra(*line).startswith("setting 'k': Input should be a valid integer")
    Path("hydra-llm.toml").write_text("k =")
    assert hydra(*line).startswith("hydra-llm.toml: not TOML: ")


def test_heads_that_another_process_saved_are_not_lost(learned: Path, bundle: Path) -> None:
    dataset = DataSet.from_records(STARS, USERS, RECORDS, QUERIES)  # type: ignore[arg-type]
    first, second = Bundle.load(bundle), Bundle.load(bundle)
    ours = fit(dataset, first, LABELS, users=["one"], settings=first.settings_with(seed=1)).bundle
    fit(dataset, second, LABELS, users=["two"]).bundle.save(bundle)
    second.save(bundle)  # the same process may save again
    with pytest.raises(BundleError, match="was changed by another process since it was read"):
        ours.save(bundle)
    assert set(Bundle.load(bundle).records) == {"t0", "t1", "two"}
    fit(dataset, bundle, LABELS, users=["one"])
    assert set(Bundle.load(bundle).records) == {"t0", "t1", "one", "two"}
    ours.save(bundle.parent / "elsewhere")
    ours.save(bundle.parent / "elsewhere")
    assert set(Bundle.load(bundle.parent / "elsewhere").records) == {"t0", "t1", "one", "two"}


def test_fits_of_two_processes_are_both_kept(learned: Path, bundle: Path) -> None:
    dataset = load(learned / "data")
    first, second = Bundle.load(bundle), Bundle.load(bundle)
    fit(dataset, first, LABELS, users=["one"]).bundle.save_users(bundle, ["one"])
    fit(dataset, second, LABELS, users=["two"]).bundle.save_users(bundle, ["two"])
    assert set(Bundle.load(bundle).records) == {"t0", "t1", "one", "two"}
    assert "one" in second.records, "an open bundle sees who was added"
    with pytest.raises(BundleError, match="was changed by another process since it was read"):
        first.save(bundle)  # it holds no head of `two`


def test_one_user_is_fitted_and_deleted_in_place(hydra: Hydra, learned: Path, bundle: Path) -> None:
    (file,) = bundle.glob("content-*/users.sqlite")
    config = (bundle / "config.json").read_bytes()
    hydra("fit", learned / "data", "--bundle", bundle, "--llm", LABELS, "--user", "one")
    loaded = Bundle.load(bundle)
    assert set(loaded.records) == {"t0", "t1", "one", "two"}
    heads = [head.numbers.tobytes() for head in loaded.heads_of("one").values()]
    assert (bundle / "config.json").read_bytes() == config
    assert list(bundle.glob("content-*/users.sqlite")) == [file]
    deleted = hydra("users", "delete", "one", "--bundle", bundle)["deleted"]
    assert (deleted["heads"], deleted["records"]) == (len(heads), len(loaded.records.get("t0", ())))
    data = file.read_bytes()
    assert not any(len(head) > 16 and head in data for head in heads)
    assert "one" not in loaded.records, "an open bundle sees who was deleted"
    assert set(Bundle.load(bundle).records) == {"t0", "t1", "two"}
    assert "no user 'one' in the bundle" in hydra("users", "delete", "one", "--bundle", bundle)


def test_a_deleted_training_user_is_named_nowhere(hydra: Hydra, bundle: Path) -> None:
    assert hydra("users", "delete", "t0", "--bundle", bundle)["deleted"]["records"]
    again = Bundle.load(bundle)
    assert again.trained_on == ("t1",)
    assert set(again.records) == {"t1", "two"}
    for path in bundle.rglob("*"):
        assert path.is_dir() or b'"t0"' not in path.read_bytes()
