"""The public names: complete, sorted, each at home where the table says, and cheap until used."""

import importlib
import pickle
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hydra_llm

HEAVY = (
    "torch",
    "transformers",
    "sentence_transformers",
    "openai",
    "numpy",
    "scipy",
    "sklearn",
    "pydantic",
    "rouge_score",
)


def loaded_by(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded after `code`."""
    listing = f"{code}\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(
        subprocess.run(
            [sys.executable, "-c", listing], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_all_is_sorted_and_has_a_home() -> None:
    assert hydra_llm.__all__ == sorted(hydra_llm.__all__)
    assert {name for names in hydra_llm._HOMES.values() for name in names} == set(hydra_llm.__all__)


@pytest.mark.parametrize("name", hydra_llm.__all__)
def test_each_name_is_the_one_of_its_home(name: str) -> None:
    assert getattr(hydra_llm, name) is getattr(
        importlib.import_module(hydra_llm._HOME_OF[name]), name
    )
    assert name in dir(hydra_llm)


def test_no_name_is_hidden_by_a_module() -> None:
    """Importing a submodule sets the package's attribute of its name, over whatever stood there."""
    assert not {module.name for module in pkgutil.iter_modules(hydra_llm.__path__)} & set(
        hydra_llm.__all__
    )


def test_an_unknown_name_says_so() -> None:
    with pytest.raises(AttributeError, match="no attribute 'learnt'"):
        hydra_llm.learnt  # noqa: B018


def test_the_import_loads_nothing_heavy() -> None:
    assert loaded_by("import hydra_llm") == set()
    assert loaded_by("from hydra_llm import Record, Answer, UserFault") == set()


def test_the_measure_sees_what_is_loaded() -> None:
    assert "pydantic" in loaded_by("from hydra_llm import Settings")


@pytest.mark.parametrize("name", ["learn", "fit", "alearn", "afit"])
def test_functions_for_sync_and_async_code_are_pickled_by_name(name: str) -> None:
    function = getattr(hydra_llm, name)
    assert function.__name__ == name
    assert pickle.loads(pickle.dumps(function)) is function


def test_the_reference_has_every_public_name_with_a_text() -> None:
    reference = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### `(\w+)`\n\n(.+?)(?=\n###? )", reference, re.S | re.M))
    assert sorted(sections) == hydra_llm.__all__
    for name, text in sections.items():
        words = re.sub(r"```.*?```", "", text, flags=re.S).split()
        assert len(words) >= 5, name
