"""The entry-point door that every kind of plug-in goes through."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from hydra_llm import plugins
from hydra_llm.errors import SettingsError
from hydra_llm.plugins import Registry

GROUP = "hydra_llm.task_kinds"
KINDS: Registry[object] = Registry(GROUP, {"zip": "zipfile:ZipFile", "abs": "math:fabs"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers `good`, `broken` (no such module) and a rival of `abs`."""
    package = ModuleType("foreign_package")
    package.thing = 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foreign_package", package)
    points = [
        EntryPoint("good", "foreign_package:thing", GROUP),
        EntryPoint("broken", "no_such_package:thing", GROUP),
        EntryPoint("abs", "foreign_package:thing", GROUP),
    ]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points if group == GROUP else pytest.fail(group)
    )


def test_built_in_and_installed_names_load_alike(installed: None) -> None:
    import math

    assert KINDS.names() == ["zip", "abs", "broken", "good"]
    assert KINDS.load("good") == 5
    assert KINDS.load("abs") is math.fabs  # a built-in name is not replaced


def test_an_unknown_name_is_one_line_with_the_names(installed: None) -> None:
    with pytest.raises(SettingsError) as caught:
        KINDS.load("other")
    assert str(caught.value) == "unknown task kind 'other': take one of zip, abs, broken, good"


def test_a_foreign_plug_in_that_does_not_import(installed: None) -> None:
    with pytest.raises(SettingsError) as caught:
        KINDS.load("broken")
    assert "task kind 'broken' cannot be loaded from no_such_package:thing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plug_in_of_another_kind_is_one_line(installed: None) -> None:
    registry: Registry[object] = Registry(GROUP, {"zip": "zipfile:ZipFile"}, needs=("read", "open"))
    assert registry.load("zip")
    with pytest.raises(SettingsError) as caught:
        registry.load("good")
    expected = "the task kind 'good' is no task kind: foreign_package:thing has no 'read'"
    assert str(caught.value) == expected


def test_a_plug_in_that_exits_is_one_line(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def exits(point: EntryPoint) -> object:
        sys.exit(3)

    monkeypatch.setattr(EntryPoint, "load", exits)
    with pytest.raises(SettingsError, match="cannot be loaded"):
        KINDS.load("good")


def test_nothing_is_imported_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    registry: Registry[str] = Registry("hydra_llm.poems", {"zen": "this:s"}, kind="poem")
    assert "zen" in registry.names()
    assert "this" not in sys.modules
    assert registry.load("zen")
    with pytest.raises(SettingsError, match="unknown poem"):
        registry.load("ode")
