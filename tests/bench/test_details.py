"""Details of a run are read back as they were written, share what they have in common, and survive
a kill.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.bench.details import FILE, DetailsLog, details_of, read_details, shortened
from hydra_llm.bench.runlog import RunLog, Sample, read_run
from hydra_llm.errors import SettingsError
from hydra_llm.types import Answer, Candidate, Proposal, Query, Ranked, Record

KEY = ("hydra", "u", "q", 0)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.text(min_size=20),
    lambda own: st.lists(own) | st.dictionaries(st.text(), own),
)


@given(
    st.fixed_dictionaries(
        {"input": VALUES, "records": st.lists(VALUES), "messages": st.lists(VALUES)}
    )
)
def test_details_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, details: Mapping[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    log = DetailsLog(folder)
    log.add(KEY, details)
    log.add(("rag", "u", "q", 1), details)
    assert read_details(folder) == {KEY: details, ("rag", "u", "q", 1): details}


def test_texts_that_look_like_references_or_are_no_utf8(tmp_path: Path) -> None:
    details = {
        "input": "#0123456789abcdef",
        "messages": [{"role": "user", "content": "\ud800" * 30}],
    }
    DetailsLog(tmp_path).add(KEY, details)
    assert read_details(tmp_path) == {KEY: details}


def test_a_text_stands_once_also_after_a_restart(tmp_path: Path) -> None:
    text = "a long prompt that all methods share"
    for seed in range(3):
        DetailsLog(tmp_path).add(("rag", "u", "q", seed), {"messages": [text, text], "input": text})
    assert (tmp_path / FILE).read_text().count(text) == 1
    assert len(read_details(tmp_path)) == 3


def test_a_kill_within_a_line_loses_that_line_only(tmp_path: Path) -> None:
    log = DetailsLog(tmp_path)
    log.add(KEY, {"input": "the first question, as it was asked"})
    whole = (tmp_path / FILE).stat().st_size
    log.add(("rag", "u", "q", 0), {"input": "the second question, as it was asked"})
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(whole + 20)
    assert list(read_details(tmp_path)) == [KEY]
    DetailsLog(tmp_path).add(
        ("rag", "u", "q", 0), {"input": "the second question, as it was asked"}
    )
    assert list(read_details(tmp_path)) == [KEY, ("rag", "u", "q", 0)]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"sample": ["rag"]}', '{"sample": ["m", "u", "q", 0], "input": "#0"}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(f'{{"part": "1", "is": "text"}}\n{line}\n')
    with pytest.raises(SettingsError, match=r"details\.jsonl:2: cannot be read"):
        read_details(tmp_path)


def test_numbers_that_json_lacks_are_null() -> None:
    assert shortened([float("nan"), float("inf"), 0.12345678], str) == [None, None, 0.123457]


def test_details_of_an_answer() -> None:
    record = Record("u", "r1", "wine number 1", "dry", "2024")
    query = Query("u", "q", "wine number 2", gold="sweet")
    candidates = (Candidate("Sweet!", "sweet", votes=3, score=1.5, probability=0.8),)
    message = {"role": "user", "content": "Which taste?"}
    ranked = (Ranked(record, 2.0, 0, 0.7),)
    proposal = Proposal(query, ranked, ranked, (message,), candidates, shown=1)
    details = details_of(query, Answer("sweet", proposal, candidates, 0))
    assert details["records"] == [
        {"id": "r1", "input": "wine number 1", "output": "dry", "time": "2024"}
        | {"score": 2.0, "rank": 0, "usefulness": 0.7}
    ]
    assert (details["input"], details["shown"], details["chosen"]) == ("wine number 2", 1, 0)
    assert details["messages"] == [message]
    assert details["candidates"][0]["probability"] == 0.8
    assert details_of(query) == {"input": "wine number 2", "time": ""}


def test_a_run_of_an_older_version_has_none(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", {"data": "d"})
    log.add(Sample("rag", "u", "q", "x", "x"))
    assert read_details(tmp_path / "run") == {}
    log.add(Sample("rag", "u", "q2", "x", "x"), {"input": "?"})
    assert list(read_details(tmp_path / "run")) == [("rag", "u", "q2", 0)]
    assert len(read_run(tmp_path / "run")[1]) == 2
