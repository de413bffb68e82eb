"""A recording repeats a run without the LLM, holds no prompt, and says what is wrong with it in one
line.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from hydra_llm.cli.main import run
from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, UserFault
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import (
    CachedLLM,
    merge_recording,
    open_recording,
    read_recording,
    write_recording,
)
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.llm.fake import RuleLLM
from hydra_llm.llm.registry import open_llm
from hydra_llm.types import Message

SAID = "do not write \ud800 or \u2028 me down"


def ask(llm: CachedLLM, text: str = SAID, n: int = 2, temperature: float = 0.7) -> Sequence[str]:
    messages: list[Message] = [{"role": "user", "content": text}]
    return run_sync(
        lambda: llm.generate(messages, Sampling(n=n, temperature=temperature, seed=1))
    ).texts


def numbered(tmp_path: Path, name: str = "cache") -> CachedLLM:
    return CachedLLM(
        RuleLLM(lambda messages, index, rng: f"{index} of {len(messages[-1]['content'])} \u2028"),
        tmp_path / name,
    )


def test_answers_are_those_that_were_given(tmp_path: Path) -> None:
    llm, file = numbered(tmp_path), tmp_path / "r.jsonl.gz"
    given = ask(llm), ask(llm, "other", n=1, temperature=0)
    assert write_recording(file, llm) == 2
    again = open_recording(file)
    assert (ask(again), ask(again, "other", n=1, temperature=0)) == given
    assert again.identity == llm.identity
    assert b"write" not in gzip.decompress(file.read_bytes())
    with pytest.raises(
        LLMError, match=r"r\.jsonl\.gz: no kept answer for request [0-9a-f]{64}, candidate 2"
    ):
        ask(again, n=3)


def test_a_recording_holds_what_was_used_and_grows(tmp_path: Path) -> None:
    ask(numbered(tmp_path), "of an earlier run")
    llm, file = numbered(tmp_path), tmp_path / "r.jsonl.gz"
    ask(llm, n=1)
    assert write_recording(file, llm) == 1
    first = file.read_bytes()
    assert write_recording(file, llm) == 1
    assert file.read_bytes() == first
    later = numbered(tmp_path)
    ask(later, n=2)
    ask(later, "more")
    assert write_recording(file, later) == 2
    assert {len(rows) for rows in read_recording(file)[1].values()} == {2}


def test_a_prompt_that_was_too_long_is_too_long_again(tmp_path: Path) -> None:
    def refuse(*_: object) -> str:
        raise LLMRefused("too long", fits=0.5)

    llm, file = CachedLLM(RuleLLM(refuse), tmp_path / "cache"), tmp_path / "r.jsonl.gz"
    with pytest.raises(LLMRefused):
        ask(llm)
    write_recording(file, llm)
    with pytest.raises(LLMRefused, match="too long") as caught:
        ask(open_recording(file))
    assert caught.value.fits == 0.5


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is no recording"),
        (b"plain text", "cannot be read"),
        (gzip.compress(b"{}\n", mtime=0), "is no recording"),
        (gzip.compress(b"[]\n", mtime=0), "is no recording"),
        (
            gzip.compress(b'{"format": 2, "llm": {}}\n', mtime=0),
            "format 2 is made by a newer hydra-llm",
        ),
        (gzip.compress(b'{"format": 1, "llm": {}}\n{"key"', mtime=0), "is damaged"),
        (gzip.compress(b'{"format": 1, "llm": {}}\n', mtime=0)[:-9], "is damaged"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_recording_is_told_in_one_line(
    content: bytes | None, fault: str, tmp_path: Path
) -> None:
    file = tmp_path / "r.jsonl.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserFault, match=fault) as caught:
        open_llm(f"replay:{file}", Settings())
    assert str(caught.value).startswith(str(file))


def test_a_run_resumes_from_another_machines_recording(tmp_path: Path) -> None:
    llm, file = numbered(tmp_path), tmp_path / "r.jsonl.gz"
    given = ask(llm, n=2)
    write_recording(file, llm)
    fake = RuleLLM(lambda messages, index, rng: "new")
    here = CachedLLM(fake, tmp_path / "empty")
    merge_recording(file, here)
    assert ask(here, n=3) == (*given, "new")
    assert len(fake.calls) == 1
    assert write_recording(file, here) == 1
    assert ask(open_recording(file), n=3) == (*given, "new")


def test_a_recording_of_another_llm_is_not_added_to(tmp_path: Path) -> None:
    llm, other = (
        numbered(tmp_path),
        CachedLLM(RuleLLM(lambda *_: "x", name="other"), tmp_path / "cache"),
    )
    file = tmp_path / "r.jsonl.gz"
    for each in (llm, other):
        ask(each)
    write_recording(file, llm)
    with pytest.raises(UserFault, match="another LLM"):
        write_recording(file, other)
    with pytest.raises(UserFault, match="another LLM"):
        merge_recording(file, other)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_minilm")
def test_a_benchmark_is_repeated_without_the_llm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "stars"
    data.mkdir()
    task = {
        "name": "stars",
        "kind": "rating",
        "prompt": "How many stars? {input}",
        "labels": ["1", "2", "3"],
    }
    (data / "task.json").write_text(json.dumps(task))
    splits = {"t0": "train", "t1": "train", "new": "test"}
    (data / "users.jsonl").write_text(
        "".join(json.dumps({"user": u, "split": s}) + "\n" for u, s in splits.items())
    )
    for name, first, count, users in (("history", 0, 6, splits), ("queries", 6, 2, ["new"])):
        rows = [(u, i) for u in users for i in range(first, first + count)]
        lines = [
            {
                "user": u,
                "id": f"{i}",
                "time": str(2000 + i),
                "input": f"rain {i} {u}",
                "output": str(1 + i % 3),
            }
            for u, i in rows
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file, tables = tmp_path / "r.jsonl.gz", []
    for name, llm, more in (
        ("one", "fake:rule=labels", ["--record", str(file)]),
        ("two", f"replay:{file}", []),
    ):
        here = ["--llm", llm, *more, "--set", f"cache={tmp_path / name}"]
        bundle, few = (
            ["--bundle", str(tmp_path / f"{name}-b")],
            ["--set", "samples=3", "--set", "retrieved=3", "--set", "k=2"],
        )
        assert run(["learn", str(data), *here, "--out", bundle[1], *few]) == 0
        assert run(["fit", str(data), *here, *bundle]) == 0
        capsys.readouterr()
        assert (
            run(
                [
                    "bench",
                    "run",
                    str(data),
                    *here,
                    *bundle,
                    "--methods",
                    "all",
                    "--out",
                    str(tmp_path / f"{name}-run"),
                    "--json",
                ]
            )
            == 0
        )
        rows = json.loads(capsys.readouterr().out)
        assert len(rows) > 15
        tables.append(
            [
                {key: value for key, value in row.items() if not key.endswith("seconds")}
                for row in rows
            ]
        )
    assert tables[0] == tables[1]
    capsys.readouterr()
    alone = [
        "bench",
        "run",
        str(data),
        "--llm",
        f"replay:{file}",
        "--out",
        str(tmp_path / "alone"),
        "--json",
        "--users",
        "1",
        *few,
    ]
    for _ in range(2):  # without a bundle it learns one; a repeat takes it up
        assert run([*alone, "--set", f"cache={tmp_path / 'three'}"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [
            {key: value for key, value in row.items() if not key.endswith("seconds")}
            for row in rows
        ] == tables[0]
    assert run([*alone, "--set", "head=kernel"]) == 2
    assert (
        "holds another run (settings.head: 'linear' there, 'kernel' asked): take another --out"
        in capsys.readouterr().err
    )
