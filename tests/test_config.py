"""Settings: which source wins, what a bundle's settings may become, and how a wrong one is told."""

from itertools import combinations
from pathlib import Path

import pytest

from hydra_llm.config import (
    OF_LEARNING,
    OF_THIS_MACHINE,
    PAPER,
    Settings,
    load_settings,
    settings_over,
)
from hydra_llm.errors import SettingsError

LAYERS = {"preset": 8, "file": 5, "environment": 6, "flag": 7}
"""`samples` as each source says it, weakest first; the paper's preset says 8."""
SUBSETS = [names for size in range(len(LAYERS) + 1) for names in combinations(LAYERS, size)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("given", SUBSETS, ids="+".join)
@pytest.mark.parametrize("named", [False, True], ids=["hydra-llm.toml", "--config"])
def test_the_strongest_source_wins(
    given: tuple[str, ...], named: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = here / ("own.toml" if named else "hydra-llm.toml")
    file.write_text("samples = 5\nretries = 9" if "file" in given else "retries = 9")
    if "environment" in given:
        monkeypatch.setenv("HYDRA_SAMPLES", "6")
    preset = "paper" if "preset" in given else "default"
    flags = {"samples": "7" if "flag" in given else None}
    learned = Settings(samples=4, k=2, head="kernel")
    fresh = load_settings(preset, file if named else None, **flags)
    over = settings_over(learned, preset, file if named else None, **flags)
    strongest = [LAYERS[name] for name in given][-1:]
    assert [fresh.samples] == (strongest or [Settings().samples])
    assert [over.samples] == (strongest or [4])
    assert (fresh.retries, over.retries) == (9, 9)
    assert (fresh.head, over.head) == (
        PAPER["head"] if "preset" in given else Settings().head,
        "kernel",
    )
    assert over.k == (PAPER["k"] if "preset" in given else 2)


def test_settings_alone_are_what_they_are_given(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "hydra-llm.toml").write_text("k = 9\nwrong = 1")
    monkeypatch.setenv("HYDRA_SAMPLES", "9")
    assert (Settings().k, Settings().samples) == (4, 8)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("users", "0", "greater than or equal to 1"),
        ("users", "-3", "greater than or equal to 1"),
        ("asked_users", "-1", "greater than or equal to 0"),
        ("lr", "inf", "finite"),
        ("temperature", "nan", "finite"),
        ("k", "abc", "valid integer"),
        ("frobnicate", "1", "not permitted"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"setting '{name}': .*{said}.*{value}") as caught:
        load_settings(**{name: value})
    assert "\n" not in str(caught.value)


def test_the_environment_is_told_as_a_flag_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(asked_users=0).asked_users == 0
    monkeypatch.setenv("HYDRA_K", "abc")
    for read in (load_settings, lambda: settings_over(Settings())):
        with pytest.raises(SettingsError, match=r"setting 'k': .*got 'abc'"):
            read()
    assert load_settings(K="3").k == 3  # a flag wins, in whatever case


@pytest.mark.parametrize("content", [b"k = ", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_named(here: Path, content: bytes) -> None:
    (here / "hydra-llm.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"hydra-llm\.toml: not TOML: "):
        load_settings()
    with pytest.raises(SettingsError, match=r"nowhere\.toml: no such settings file"):
        load_settings("default", Path("nowhere.toml"))


def test_what_learning_fixed_stays_fixed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = Settings(head="kernel", max_length=32)
    (here / "hydra-llm.toml").write_text("encoder = 'other'\nk = 1")
    monkeypatch.setenv("HYDRA_RANK", "3")
    over = settings_over(learned, "paper", None, head="kernel", max_length="32", users=None)
    assert {name: getattr(over, name) for name in OF_LEARNING} == {
        name: getattr(learned, name) for name in OF_LEARNING
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


def test_no_setting_is_both_the_machines_and_fixed_by_learning() -> None:
    assert set(Settings.model_fields) >= OF_LEARNING | OF_THIS_MACHINE
    assert not OF_LEARNING & OF_THIS_MACHINE


def test_the_gateways_table_is_no_setting_of_other_commands(tmp_path: Path) -> None:
    from hydra_llm.gateway.settings import load_serve_settings

    file = tmp_path / "hydra-llm.toml"
    file.write_text("k = 2\n[serve]\nk = 7\n")
    assert load_settings(file=file).k == 2
    assert load_serve_settings(file).k == 7
    file.write_text("serve = 3\n")
    with pytest.raises(SettingsError, match="must be a table"):
        load_serve_settings(file)
