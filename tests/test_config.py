"""Settings: groups, aliases, precedence of sources, fixed settings of a bundle, errors."""

from itertools import combinations
from pathlib import Path

import pytest

from hydra_llm.config import (
    FIXED,
    GROUP_OF,
    GROUPS,
    LOCAL,
    STORED_NAMES,
    Settings,
    load_settings,
    settings_over,
)
from hydra_llm.errors import SettingsError
from hydra_llm.presets import PAPER
from hydra_llm.setting_names import log_renamed

LAYERS = {"file": 5, "environment": 6, "preset": 8, "flag": 7}
"""`samples` in each source, weakest first; 8 is the paper preset's."""
SUBSETS = [names for size in range(len(LAYERS) + 1) for names in combinations(LAYERS, size)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the test; no hint has been logged."""
    monkeypatch.chdir(tmp_path)
    log_renamed.cache_clear()
    return tmp_path


@pytest.mark.parametrize("sources", SUBSETS, ids="+".join)
@pytest.mark.parametrize("named", [False, True], ids=["hydra-llm.toml", "--config"])
def test_the_strongest_source_wins(
    sources: tuple[str, ...], named: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / ("own.toml" if named else "hydra-llm.toml")
    file.write_text("samples = 5\nretries = 9" if "file" in sources else "retries = 9")
    if "environment" in sources:
        monkeypatch.setenv("HYDRA_SAMPLES", "6")
    preset = "paper" if "preset" in sources else "default"
    flags = {"samples": "7" if "flag" in sources else None}
    learned = Settings(samples=4, k=2, head="kernel")
    fresh = load_settings(preset, file if named else None, **flags)
    over = settings_over(learned, preset, file if named else None, **flags)
    strongest = [LAYERS[name] for name in sources][-1:]
    assert [fresh.samples] == (strongest or [Settings().samples])
    assert [over.samples] == (strongest or [4])
    assert (fresh.retries, over.retries) == (9, 9)
    assert (fresh.head, over.head) == (
        PAPER["head"] if "preset" in sources else Settings().head,
        "kernel",
    )
    assert over.k == (PAPER["k"] if "preset" in sources else 2)


def test_settings_read_no_environment_and_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "hydra-llm.toml").write_text("k = 9\nwrong = 1")
    monkeypatch.setenv("HYDRA_SAMPLES", "9")
    assert (Settings().k, Settings().samples) == (4, 8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("users", "0", "greater than or equal to 1"),
        ("users", "-3", "greater than or equal to 1"),
        ("labelled_users", "-1", "greater than or equal to 0"),
        ("lr", "inf", "finite"),
        ("temperature", "nan", "finite"),
        ("k", "abc", "valid integer"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"setting '{name}': .*{message}.*{value}") as caught:
        load_settings(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("retreiver", "did you mean retrieval.retriever"),
        ("model.k", "did you mean retrieval.k?"),
        ("cautoin", "did you mean selection.abstention_threshold?"),
        ("frobnicate", "see docs/settings.md"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str, folder: Path) -> None:
    (folder / "s.toml").write_text(f"{name} = 1")
    for read in (
        lambda: load_settings(**{name: "1"}),
        lambda: Settings(**{name: "1"}),  # type: ignore[arg-type]
        lambda: load_settings(file=folder / "s.toml"),
    ):
        with pytest.raises(SettingsError) as caught:
            read()
        assert str(caught.value).startswith(f"unknown setting '{name}': {nearest}")
        assert "\n" not in str(caught.value)


# ---- groups and aliases


def test_every_setting_is_documented_in_one_group() -> None:
    assert sum(len(group.model_fields) for group in GROUPS.values()) == len(GROUP_OF)
    assert set(Settings.model_fields) == set(GROUP_OF)
    assert all(group.__doc__ for group in GROUPS.values())
    common = [name for name, group in GROUP_OF.items() if group != "research"]
    assert 22 <= len(common) <= 30
    assert not set(GROUPS) & set(GROUP_OF)


def another(name: str) -> str | int | float:
    """A value that is not the setting's default."""
    default = getattr(Settings(), name)
    choices = getattr(Settings.model_fields[name].annotation, "__args__", ())
    if name == "concurrency":
        return "3"
    if choices and isinstance(choices[0], str):
        return next(str(choice) for choice in choices if choice != default)
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, str):
        known = {"head": "kernel", "retriever": "hybrid", "candidate_prompts": "zero-shot"}
        known |= {"engine": "ray", "discount": "auto", "mask": "email"}
        return known.get(name, "x")
    return 0.25 if isinstance(default, float) or float in choices else "100"


@pytest.mark.parametrize("name", GROUP_OF)
def test_grouped_flat_and_former_names_are_one_setting(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = another(name)
    wanted = load_settings(**{name: value})
    assert wanted != Settings()
    for spelled in {name, f"{GROUP_OF[name]}.{name}", STORED_NAMES.get(name, name)}:
        assert load_settings(**{spelled: value}) == wanted
        (folder / "s.toml").write_text(f"{spelled} = '{value}'")
        assert load_settings(file=folder / "s.toml") == wanted
        if spelled != "fit_seed":
            with monkeypatch.context() as patch:
                patch.setenv(f"HYDRA_{spelled.replace('.', '_').upper()}", str(value))
                assert load_settings() == wanted


def test_stored_settings_keep_their_names() -> None:
    """Names in bundles, manifests and run logs, as written before names were grouped."""
    stored = load_settings(caution=1.5, asked_users=3).stored()
    assert (stored["caution"], stored["asked_users"], stored["votes"]) == (1.5, 3, True)
    assert not set(stored) & {*STORED_NAMES, *LOCAL}
    assert Settings(**stored) == Settings(abstention_threshold=1.5, labelled_users=3)


def test_flat_names_in_files_are_hinted_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "hydra-llm.toml").write_text("k = 2\nasked_users = 3\nretrieval.retrieved = 7")
    monkeypatch.setenv("HYDRA_SAMPLES", "3")
    for _ in range(2):
        settings = load_settings(caution=1)
    assert (settings.k, settings.labelled_users, settings.retrieved, settings.samples) == (
        2,
        3,
        7,
        3,
    )
    assert [record.getMessage() for record in caplog.records] == [
        "'k' is now written 'retrieval.k'",
        "'asked_users' is now written 'training.labelled_users'",
    ]


def test_the_grouped_environment_variable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_K", "2")
    monkeypatch.setenv("HYDRA_RETRIEVAL_K", "3")
    assert load_settings().k == 3
    assert load_settings("paper").k == PAPER["k"]


def test_former_names_of_the_gateways_settings_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hydra_llm.gateway.settings import ServeSettings, load_serve_settings

    (folder / "hydra-llm.toml").write_text("[serve]\ncaution = 0.5\nkeep_days = 3")
    monkeypatch.setenv("HYDRA_SERVE_PATIENCE", "4")
    settings = load_serve_settings(waiting=7)
    assert settings == ServeSettings(
        abstention_threshold=0.5, retention_days=3, store_timeout=4, scoring_queue=7
    )
    assert [record.getMessage() for record in caplog.records] == [
        "'serve.caution' is now written 'serve.abstention_threshold'",
        "'serve.keep_days' is now written 'serve.retention_days'",
    ]
    with pytest.raises(SettingsError, match=r"'serve\.deadlin': did you mean serve\.deadline"):
        load_serve_settings(deadlin=3)


# ---- errors


def test_an_error_in_the_environment_is_that_of_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(labelled_users=0).labelled_users == 0
    monkeypatch.setenv("HYDRA_K", "abc")
    for read in (load_settings, lambda: settings_over(Settings())):
        with pytest.raises(SettingsError, match=r"setting 'k': .*got 'abc'"):
            read()
    assert load_settings(K="3").k == 3  # a flag wins, in whatever case


@pytest.mark.parametrize("content", [b"k = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(folder: Path, content: bytes) -> None:
    (folder / "hydra-llm.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"hydra-llm\.toml: not TOML: "):
        load_settings()
    with pytest.raises(SettingsError, match=r"nowhere\.toml: no such settings file"):
        load_settings("default", Path("nowhere.toml"))


def test_fixed_settings_of_a_bundle_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = Settings(head="kernel", max_length=32)
    (folder / "hydra-llm.toml").write_text("encoder = 'other'\nk = 1")
    monkeypatch.setenv("HYDRA_RANK", "3")
    over = settings_over(learned, "paper", None, head="kernel", max_length="32", users=None)
    assert {name: getattr(over, name) for name in FIXED} == {
        name: getattr(learned, name) for name in FIXED
    }
    assert (over.k, over.candidates, over.select) == (1, "sampled", "best")
    with pytest.raises(
        SettingsError,
        match=(
            r"^setting 'max_length': was fixed to 32 when the bundle was learned; learn another"
            r" bundle for 64$"
        ),
    ):
        settings_over(learned, max_length="64")


def test_no_setting_is_both_local_and_fixed() -> None:
    assert set(Settings.model_fields) >= FIXED | LOCAL
    assert not FIXED & LOCAL


def test_other_commands_ignore_the_gateways_table(tmp_path: Path) -> None:
    from hydra_llm.gateway.settings import load_serve_settings

    file = tmp_path / "hydra-llm.toml"
    file.write_text("k = 2\n[serve]\nk = 7\n")
    assert load_settings(file=file).k == 2
    assert load_serve_settings(file).k == 7
    file.write_text("serve = 3\n")
    with pytest.raises(SettingsError, match="must be a table"):
        load_serve_settings(file)
