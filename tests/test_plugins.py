"""The registry that every kind of plug-in goes through."""

import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hydra_llm import plugins
from hydra_llm.bench.method import find_methods
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings
from hydra_llm.errors import BundleError, SettingsError
from hydra_llm.llm.registry import bare_llm
from hydra_llm.model.persistence import read_bundle, write_bundle
from hydra_llm.plugins import Registry
from hydra_llm.retrieve import make_retriever
from hydra_llm.testing import check_head

GROUP = "hydra_llm.task_kinds"
KINDS: Registry[object] = Registry(GROUP, {"zip": "zipfile:ZipFile", "abs": "math:fabs"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that registers `good` and `broken` (no such module)."""
    package = ModuleType("foreign_package")
    package.thing = 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foreign_package", package)
    points = [
        EntryPoint("good", "foreign_package:thing", GROUP),
        EntryPoint("broken", "no_such_package:thing", GROUP),
    ]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points if group == GROUP else pytest.fail(group)
    )


def test_built_in_and_installed_names_load_alike(installed: None) -> None:
    assert KINDS.names() == ["zip", "abs", "broken", "good"]
    assert KINDS.load("good") == 5
    assert KINDS.load("zip") is zipfile.ZipFile


def test_an_added_plugin_loads_and_its_name_is_its_own(installed: None) -> None:
    kinds: Registry[object] = Registry(GROUP, {"zip": "zipfile:ZipFile"})
    kinds.add("own", 7)
    assert kinds.names() == ["zip", "broken", "good", "own"]
    assert kinds.load("own") == 7
    for taken in ("zip", "good", "own"):
        with pytest.raises(SettingsError, match=f"the task kind '{taken}' is taken in the group"):
            kinds.add(taken, 8)


def test_an_unknown_name_is_one_line_with_names_and_group(installed: None) -> None:
    with pytest.raises(SettingsError) as caught:
        KINDS.load("other")
    assert str(caught.value) == (
        "unknown task kind 'other': take one of zip, abs, broken, good, or install the package that"
        " registers it in the entry-point group hydra_llm.task_kinds"
    )


@pytest.mark.parametrize(
    ("name", "packages"), [("same", "one and by two"), ("abs", "hydra-llm and by one")]
)
def test_a_name_of_two_packages_is_one_line_with_both(
    name: str, packages: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where one of the packages is hydra-llm: a built-in part is not replaced silently."""
    points = {"one": "same = math:one\nabs = math:one\n", "two": "same = math:two\n"}
    for package, lines in points.items():
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[object] = Registry(GROUP, {"zip": "zipfile:ZipFile", "abs": "math:fabs"})
    assert registry.names() == ["zip", "abs", "same"]
    assert registry.load("zip") is zipfile.ZipFile
    with pytest.raises(SettingsError) as caught:
        registry.load(name)
    assert str(caught.value) == (
        f"the task kind '{name}' is registered by {packages} in the entry-point group {GROUP}:"
        " uninstall one"
    )


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


def test_a_head_that_calls_itself_otherwise_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle names a head by its own name, and could not be loaded again."""
    point = EntryPoint("other", "hydra_llm.model.heads.bias:BiasHead", "hydra_llm.heads")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    with pytest.raises(SettingsError) as caught:
        check_head("other")
    assert str(caught.value) == "the head 'other' calls itself 'bias': register it under that name"


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


OLD_BUNDLE = Path(__file__).with_name("model") / "data" / "tags-linear"
TAKE = "or install the package that registers it in the entry-point group hydra_llm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: config["scorers"]["adapter"].update(head="zap"),
            f"unknown head 'zap': take one of mlp, linear, lowrank, kernel, bias, {TAKE}.heads",
        ),
        (
            lambda config: config["settings"].update(head="zap"),
            f"unknown head 'zap': take one of mlp, linear, lowrank, kernel, bias, {TAKE}.heads",
        ),
        (
            lambda config: config["task"].update(kind="zap"),
            "config.json: field 'kind': 'zap' is not one of classification, rating, generation,"
            f" {TAKE}.task_kinds",
        ),
    ],
)
def test_a_bundle_whose_plug_in_is_missing_names_it(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = Bundle.load(OLD_BUNDLE, cache=tmp_path).save(tmp_path / "bundle")
    files = read_bundle(folder)
    change(files.config)
    write_bundle(folder, files)
    with pytest.raises(BundleError) as caught:
        Bundle.load(folder, cache=tmp_path)
    assert str(caught.value).startswith(f"{folder}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (make_retriever, f"unknown retriever 'zap': take one of bm25, .*, {TAKE}.retrievers"),
        (lambda name: find_methods([name]), f"method 'zap': take some .*, all, {TAKE}.methods"),
        (lambda name: bare_llm(name, Settings()), f"LLM 'zap': take one of openai.*, {TAKE}.llms"),
    ],
)
def test_every_group_is_named_where_a_plug_in_is_missing(
    load: Callable[[str], object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load("zap")
