"""The cache: keys, replay, two processes, a kill in the middle of writes, a full disk, a damaged
file.
"""

import asyncio
import hashlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.config import Settings
from hydra_llm.errors import LLMError, LLMRefused, UserFault
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.cache import CachedLLM, key_of, request_of
from hydra_llm.llm.fake import FailingLLM, RuleLLM
from hydra_llm.llm.meter import Meter, Prices
from hydra_llm.pipeline import UserPipeline
from hydra_llm.retrieve import Nothing
from hydra_llm.tasks.base import Task
from hydra_llm.types import Generation, Message, Query, Usage
from tests.waiting import FOREVER

from .conftest import stored_rows

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "Name a film"}]


class Counting:
    """Answers that are never the same twice, and the requests (n, seed) that it got."""

    identity: Mapping[str, Any] = {"kind": "fake", "model": "counting", "constrains": False}

    def __init__(self, prefix: str = "") -> None:
        self.requests: list[tuple[int, int | None]] = []
        self.prefix = prefix
        self.given = 0

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        n = sampling.n
        self.requests.append((n, sampling.seed))
        await asyncio.sleep(0.01)
        texts = tuple(f"{self.prefix}{self.given + i}" for i in range(n))
        self.given += n
        return Generation(
            texts, Usage(calls=1, prompt_tokens=10, completion_tokens=3 * n + 1, seconds=0.5)
        )

    async def aclose(self) -> None:
        pass


async def test_a_replay_gives_the_same_texts_and_usage(tmp_path: Path) -> None:
    meter = Meter(Counting(), prices=Prices(prompt=1e6, completion=1e6))
    llm = CachedLLM(meter, tmp_path / "c.sqlite")
    first = await llm.generate(MESSAGES, Sampling(n=4, temperature=1.0))
    again = await llm.generate(MESSAGES, Sampling(n=4, temperature=1.0))
    assert again.texts == first.texts == ("0", "1", "2", "3")
    assert first.usage == Usage(
        calls=1, prompt_tokens=10, completion_tokens=13, cost=23.0, seconds=0.5
    )
    assert again.usage == Usage(cached=1, prompt_tokens=10, completion_tokens=13, seconds=0.5)
    assert llm.usage == first.usage + again.usage
    assert meter.usage == first.usage
    await llm.aclose()


async def test_another_process_later_replays_it_all_without_the_llm(tmp_path: Path) -> None:
    first = CachedLLM(Counting(), tmp_path / "c.sqlite")
    drawn = [
        (await first.generate(MESSAGES, Sampling(n=n, temperature=t, seed=1))).texts
        for n, t in [(3, 1.0), (1, 0.0), (2, 0.5)]
    ]
    await first.aclose()
    inner = Counting()
    later = CachedLLM(inner, tmp_path / "c.sqlite", replay_only=True)
    # in another order: it does not matter
    again = [
        (await later.generate(MESSAGES, Sampling(n=n, temperature=t, seed=1))).texts
        for n, t in [(2, 0.5), (1, 0.0), (3, 1.0)]
    ]
    assert again[::-1] == drawn
    assert inner.requests == []
    with pytest.raises(LLMError, match=r"no kept answer for request [0-9a-f]{64}, candidate 3"):
        await later.generate(MESSAGES, Sampling(n=4, temperature=1.0, seed=1))
    assert inner.requests == []


async def test_only_missing_samples_are_asked_for_with_their_seeds(tmp_path: Path) -> None:
    inner = Counting()
    llm = CachedLLM(inner, tmp_path / "c.sqlite")
    four = await llm.generate(MESSAGES, Sampling(n=4, temperature=1.0, seed=7))
    eight = await llm.generate(MESSAGES, Sampling(n=8, temperature=1.0, seed=7))
    two = await llm.generate(MESSAGES, Sampling(n=2, temperature=1.0, seed=7))
    assert eight.texts[:4] == four.texts
    assert two.texts == four.texts[:2]
    (_, start), *_ = inner.requests
    assert inner.requests == [(4, start), (4, start + 4)]
    assert (eight.usage.calls, eight.usage.cached) == (1, 1)


async def test_each_prompt_has_draws_of_its_own(tmp_path: Path) -> None:
    """Of an LLM whose draws depend on the seed alone, as an engine's random numbers do, no sample
    is the same quantile for all prompts.
    """

    class Engine:
        identity: Mapping[str, Any] = {"kind": "fake", "model": "engine", "constrains": False}

        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
            seed = sampling.seed
            assert seed is not None
            draws = (random.Random(seed + i).random() for i in range(sampling.n))
            return Generation(tuple(map(str, draws)))

    llm = CachedLLM(Engine(), tmp_path / "c.sqlite")
    drawn = [
        (
            await llm.generate(
                [{"role": "user", "content": f"{i}"}], Sampling(n=7, temperature=1.0, seed=0)
            )
        ).texts
        for i in range(50)
    ]
    assert len({text for texts in drawn for text in texts}) == 50 * 7
    again = CachedLLM(Engine(), tmp_path / "d.sqlite")
    assert (
        await again.generate(
            [{"role": "user", "content": "3"}], Sampling(n=7, temperature=1.0, seed=0)
        )
    ).texts == drawn[3]


async def test_eight_samples_start_with_the_four_of_the_same_seed(tmp_path: Path) -> None:
    def drawn(messages: Sequence[Message], index: int, rng: Any) -> str:
        return str(rng.random())

    at_once = CachedLLM(RuleLLM(drawn), tmp_path / "a.sqlite")
    in_steps = CachedLLM(RuleLLM(drawn), tmp_path / "b.sqlite")
    await in_steps.generate(MESSAGES, Sampling(n=3, temperature=1.0, seed=5))
    whole = (await at_once.generate(MESSAGES, Sampling(n=8, temperature=1.0, seed=5))).texts
    assert (
        await in_steps.generate(MESSAGES, Sampling(n=8, temperature=1.0, seed=5))
    ).texts == whole
    assert len(set(whole)) == 8


async def test_greedy_texts_are_one_call(tmp_path: Path) -> None:
    inner = Counting()
    llm = CachedLLM(inner, tmp_path / "c.sqlite")
    assert (await llm.generate(MESSAGES, Sampling(n=5, temperature=0.0, seed=1))).texts == (
        "0",
    ) * 5
    assert (await llm.generate(MESSAGES, Sampling(n=1, temperature=0.0, seed=2))).texts == ("0",)
    assert [n for n, _ in inner.requests] == [1]


async def test_identical_calls_in_flight_are_made_once(tmp_path: Path) -> None:
    inner = Counting()
    llm = CachedLLM(inner, tmp_path / "c.sqlite")
    generations: list[Generation] = []

    async def one(n: int) -> None:
        generations.append(await llm.generate(MESSAGES, Sampling(n=n, temperature=1.0)))

    async with anyio.create_task_group() as group:
        for n in (3, 3, 2, 3):
            group.start_soon(one, n)
    assert len(inner.requests) == 1
    assert {generation.texts[:2] for generation in generations} == {("0", "1")}
    assert llm._locks == {}


async def test_a_failed_call_is_not_kept_and_the_next_one_is_made(tmp_path: Path) -> None:
    inner = FailingLLM(RuleLLM(lambda messages, index, rng: "fine"), every=2)
    inner.calls = 1  # the next one fails
    llm = CachedLLM(inner, tmp_path / "c.sqlite")
    with pytest.raises(LLMError):
        await llm.generate(MESSAGES, Sampling())
    assert stored_rows(llm) == []
    assert (await llm.generate(MESSAGES, Sampling())).texts == ("fine",)
    ((request, candidate, row),) = stored_rows(llm)
    assert (request["messages"], candidate, row["text"]) == (MESSAGES, 0, "fine")


class Miserly(Counting):
    """A plug-in that gives fewer texts than it was asked for."""

    most = 2

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        fewer = replace(sampling, n=min(sampling.n, self.most))
        return await super().generate(messages, fewer)


async def test_too_few_texts_are_one_line_and_those_that_came_are_kept(tmp_path: Path) -> None:
    inner = Miserly()
    llm = CachedLLM(meter := Meter(inner), tmp_path / "c.sqlite")
    with pytest.raises(LLMError, match=r"^the LLM gave 2 of 5 texts$"):
        await llm.generate(MESSAGES, Sampling(n=5, temperature=1.0, seed=7))
    with pytest.raises(LLMError, match=r"^the LLM gave 2 of 3 texts$"):
        await llm.generate(MESSAGES, Sampling(n=5, temperature=1.0, seed=7))
    assert (await llm.generate(MESSAGES, Sampling(n=5, temperature=1.0, seed=7))).texts == (
        "0",
        "1",
        "2",
        "3",
        "4",
    )
    (_, start), *_ = inner.requests
    assert inner.requests == [(2, start), (2, start + 2), (1, start + 4)]
    inner.most = 0
    with pytest.raises(LLMError, match="0 of 1"):
        await llm.generate([{"role": "user", "content": "other"}], Sampling())
    assert meter.usage.calls == 4


async def test_too_many_texts_are_cut_to_what_was_asked_for(tmp_path: Path) -> None:
    class Generous(Counting):
        async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
            return await super().generate(messages, replace(sampling, n=sampling.n + 1))

    llm = CachedLLM(Generous(), tmp_path / "c.sqlite")
    assert (await llm.generate(MESSAGES, Sampling(n=2, temperature=1.0))).texts == ("0", "1")
    assert len(stored_rows(llm)) == 2


class Narrow(Counting):
    """Refuses a prompt that is longer than its window."""

    window = 20

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        if len(messages[0]["content"]) > self.window:
            raise LLMRefused("too long", fits=0.5)
        return await super().generate(messages, sampling)


async def test_a_replay_without_the_llm_cuts_a_prompt_as_it_was_cut(tmp_path: Path) -> None:
    task, query = Task("t", "generation", "{input}"), Query("u", "q", "x" * 50)

    def asker(inner: Counting, *, replay_only: bool = False) -> UserPipeline:
        return UserPipeline(
            task,
            Nothing(),
            Settings(samples=3),
            llm=CachedLLM(inner, tmp_path / "c.sqlite", replay_only=replay_only),
        )

    first = await asker(Narrow()).apropose(query)
    again = await asker(unasked := Narrow(), replay_only=True).apropose(query)
    assert (again.messages, again.candidates, again.notes) == (
        first.messages,
        first.candidates,
        first.notes,
    )
    assert unasked.requests == []
    grown = Narrow()
    grown.window = 99  # an LLM at hand is asked again: its window may have grown
    whole = await asker(grown).apropose(query)
    assert whole.messages[0]["content"] == query.input
    assert (await asker(unasked, replay_only=True).apropose(query)).candidates == whole.candidates
    assert all("text" in row for _, _, row in stored_rows(asker(unasked).llm))  # type: ignore[attr-defined]


# ---- keys

content = st.text(max_size=12)
requests = st.fixed_dictionaries(
    {
        "identity": st.dictionaries(
            st.sampled_from(["kind", "model", "sha256"]), st.text(max_size=4), min_size=1
        ),
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["system", "user", "assistant"]), "content": content}
            ),
            min_size=1,
            max_size=3,
        ),
        "temperature": st.floats(0.01, 2),
        "max_tokens": st.integers(1, 99),
        "stop": st.lists(content, max_size=2).map(tuple),
        "seed": st.none() | st.integers(0, 99),
        "choices": st.lists(content, max_size=2).map(tuple),
    }
)


def key(request: dict[str, Any]) -> str:
    request = dict(request)
    identity, messages = request.pop("identity"), request.pop("messages")
    return key_of(request_of(identity, messages, Sampling(**request)))


@given(requests, requests)
def test_requests_have_one_key_if_and_only_if_they_are_equal(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert (key(one) == key(other)) == (one == other)


@given(
    requests,
    requests,
    st.sampled_from(
        ["identity", "messages", "temperature", "max_tokens", "stop", "seed", "choices"]
    ),
)
def test_each_single_input_changes_the_key(
    one: dict[str, Any], other: dict[str, Any], name: str
) -> None:
    changed = {**one, name: other[name]}
    assert (key(one) == key(changed)) == (one[name] == other[name])


def test_the_key_is_the_sha256_of_sorted_json() -> None:
    request = request_of(
        {"model": "m"},
        [{"role": "user", "content": "é"}],
        Sampling(temperature=1, max_tokens=2, seed=3, choices=("a",)),
    )
    written = (
        '{"choices":["a"],"llm":{"model":"m"},"max_tokens":2,"messages":[{"content":"\\u00e9","role":"user"}],'
        '"seed":3,"stop":[],"temperature":1.0}'
    )
    assert key_of(request) == hashlib.sha256(written.encode()).hexdigest()


GGUF = {
    "kind": "gguf",
    "model": "smollm2-135m-instruct",
    "sha256": "ab",
    "engine": "xllamacpp 2026.1",
    "sampler": {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "constrains": True,
}
OPENAI = {"kind": "openai", "model": "gpt", "base_url": "https://host/v1", "constrains": False}


@pytest.mark.parametrize(
    ("identity", "sampling", "golden"),
    [
        (OPENAI, Sampling(n=8), "28be92e40a8b0c56f3a61555e2c17bd8ea7ae7de33d5d5acd1eb11474af97701"),
        (
            OPENAI,
            Sampling(seed=5),
            "28be92e40a8b0c56f3a61555e2c17bd8ea7ae7de33d5d5acd1eb11474af97701",
        ),
        (
            OPENAI,
            Sampling(temperature=1, seed=5),
            "41174d27160679694f2c0a4f3c0d07554f0f57b6a8cf75bc3e7ec5fc26322f67",
        ),
        (
            OPENAI,
            Sampling(temperature=0.5, max_tokens=16, stop=("\n", "END")),
            "0141c9f31eb3cb171765cea4c12da6d2b9e6e9284c61274d641814803f1866bb",
        ),
        (
            GGUF,
            Sampling(max_tokens=7, choices=("sci-fi", "drama")),
            "426fa460b1cf658d3ff003120c13a1082ee9b0f4cbe7af88ee1f9d52dbfe3b68",
        ),
        (
            GGUF,
            Sampling(temperature=0.7, seed=0, choices=("1", "2")),
            "40cc5965c1c6d68cd56c5c39f582cf8998c3b2eba91bbe80c3ad47dc8d5593ea",
        ),
    ],
)
def test_keys_of_version_0_1_stay(
    identity: dict[str, Any], sampling: Sampling, golden: str
) -> None:
    """Computed by the code before `Sampling`: existing caches and recordings keep answering."""
    messages = [
        {"role": "system", "content": "é \u2028 🎬"},
        {"role": "user", "content": "Name a film"},
    ]
    assert key_of(request_of(identity, messages, sampling)) == golden


@settings(max_examples=25, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 5), st.sampled_from([0.0, 1.0])),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_the_order_of_calls_does_not_matter(
    calls: list[tuple[str, int, float]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(calls))

    def rule(messages: Sequence[Message], index: int, rng: Any) -> str:
        return messages[0]["content"] + str(rng.random())

    async def all_of(
        order: Sequence[tuple[str, int, float]], path: Path
    ) -> dict[Any, tuple[str, ...]]:
        llm = CachedLLM(RuleLLM(rule), path)
        try:
            return {
                call: (
                    (
                        await llm.generate(
                            [{"role": "user", "content": call[0]}],
                            Sampling(n=call[1], temperature=call[2], seed=3),
                        )
                    ).texts
                )
                for call in order
            }
        finally:
            await llm.aclose()

    with tempfile.TemporaryDirectory() as folder:
        assert asyncio.run(all_of(calls, Path(folder, "a"))) == asyncio.run(
            all_of(shuffled, Path(folder, "b"))
        )


# ---- several processes, and machines that fail

WORKER = textwrap.dedent("""
    import asyncio, json, sys
    from hydra_llm.llm.base import Sampling
    from hydra_llm.llm.cache import CachedLLM
    from hydra_llm.llm.fake import RuleLLM

    path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

    async def main():
        def rule(messages, index, rng):
            return f"{name} {messages[0]['content']} {index} " + "x" * 500

        llm = CachedLLM(RuleLLM(rule, name="same"), path)
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(count):
            message = {"role": "user", "content": str(i)}
            generation = await llm.generate([message], Sampling(n=3, temperature=1.0))
            print(json.dumps([i, *generation.texts]), flush=True)

    asyncio.run(main())
    """)


def start(path: Path, name: str, count: int) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def release(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def stored(path: Path) -> dict[tuple[str, int], str]:
    with sqlite3.connect(path) as database:
        query = (
            "SELECT r.payload, a.candidate, a.payload FROM answers a JOIN requests r ON r.id ="
            " a.request"
        )
        rows = [
            (json.loads(r)["messages"][0]["content"], c, json.loads(a)["text"])
            for r, c, a in database.execute(query)
        ]
    texts = {(content, candidate): text for content, candidate, text in rows}
    assert len(texts) == len(rows)  # nothing twice
    return texts


def test_the_first_answer_stored_is_that_of_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    both = [start(path, name, 60) for name in ("one", "two")]
    for process in both:
        release(process)
    printed = [
        [json.loads(line) for line in process.communicate()[0].splitlines()] for process in both
    ]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    assert stored(path) == {
        (str(i), candidate): text
        for i, *texts in printed[0]
        for candidate, text in enumerate(texts)
    }
    assert len(stored(path)) == 180


@pytest.mark.slow
def test_a_kill_amid_writes_loses_no_returned_answer(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    process = start(path, "one", 100_000)
    release(process)
    assert process.stdout is not None
    printed = [json.loads(process.stdout.readline()) for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = stored(path)
    for i, *texts in printed:
        assert [kept[str(i), candidate] for candidate in range(3)] == texts
    per_call = [
        sum((content, c) in kept for c in range(3)) for content in {content for content, _ in kept}
    ]
    assert set(per_call) == {3}
    again = start(path, "two", 40)
    assert [json.loads(line) for line in again.communicate("\n")[0].splitlines()] == printed


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
"""


def test_a_full_disk_is_logged_once_and_loses_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    script = FULL_DISK + WORKER
    run = subprocess.run(
        [sys.executable, "-c", script, str(path), "one", "300"],
        input="\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=FOREVER,
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()[1:]]
    assert len(answers) == 300
    assert run.stderr.count("\n") == 1
    assert str(path) in run.stderr
    assert "cannot keep answers" in run.stderr
    kept = stored(path)
    assert 0 < len(kept) < 900
    printed = {
        (str(i), candidate): text for i, *texts in answers for candidate, text in enumerate(texts)
    }
    assert all(printed[place] == text for place, text in kept.items())


async def test_answers_that_the_disk_refused_are_kept_for_this_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Counting()
    llm = CachedLLM(inner, tmp_path / "c.sqlite")
    llm.file.connection.execute("PRAGMA query_only = ON")  # every write fails from now on
    first = await llm.generate(MESSAGES, Sampling(n=3, temperature=1.0))
    other = await llm.generate([{"role": "user", "content": "other"}], Sampling())
    assert (await llm.generate(MESSAGES, Sampling(n=3, temperature=1.0))).texts == first.texts
    assert (
        await llm.generate([{"role": "user", "content": "other"}], Sampling())
    ).texts == other.texts
    assert len(inner.requests) == 2
    assert len(caplog.records) == 1


def test_a_damaged_file_is_one_line_that_names_it_and_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is no database, " * 100)
    with pytest.raises(
        UserFault, match="c.sqlite: the cache of answers is damaged .*: delete or move it"
    ):
        CachedLLM(Counting(), path)


async def test_damage_in_the_middle_of_the_file_is_the_same_line(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    llm = CachedLLM(RuleLLM(lambda messages, index, rng: "fine"), path)
    for i in range(300):
        await llm.generate([{"role": "user", "content": str(i) + "x" * 200}], Sampling())
    await llm.aclose()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(UserFault, match="damaged"):
        await CachedLLM(llm.inner, path).generate(MESSAGES, Sampling())


def test_a_disk_that_is_full_from_the_start_is_told_once_too(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    script = FULL_DISK.replace("200_000", "0") + WORKER
    run = subprocess.run(
        [sys.executable, "-c", script, str(path), "one", "3"],
        input="\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=FOREVER,
    )
    assert len(run.stdout.splitlines()) == 4
    assert run.stderr.count("\n") == 1
    assert "cannot keep answers" in run.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserFault, match="cannot open the cache"):
        CachedLLM(Counting(), tmp_path / "file" / "c.sqlite")


def test_a_cache_held_by_another_process_is_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    llm = CachedLLM(Counting(), path)
    # as on a shared disk, where readers wait for a writer
    llm.file.connection.execute("PRAGMA journal_mode = DELETE")
    llm.file.connection.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        UserFault,
        match=r"c\.sqlite: the cache of answers is held by another process \(database is locked\)",
    ):
        asyncio.run(llm.generate(MESSAGES, Sampling()))
    other.execute("COMMIT")
    assert asyncio.run(llm.generate(MESSAGES, Sampling())).texts == ("0",)
    asyncio.run(llm.aclose())
    with pytest.raises(
        UserFault, match="cannot be read .*closed"
    ):  # nor one that was closed: nobody should delete it
        asyncio.run(llm.generate(MESSAGES, Sampling()))


@pytest.mark.slow
def test_a_second_process_that_writes_for_a_while_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    llm = CachedLLM(Counting(), path)
    script = f"""
import sqlite3, sys, time
d = sqlite3.connect({str(path)!r}, isolation_level=None)
d.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
time.sleep(0.7)
d.execute("COMMIT")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    asyncio.run(llm.generate(MESSAGES, Sampling()))
    assert process.wait() == 0
    assert len(stored_rows(llm)) == 1
    assert llm._unwritten == {}


def test_the_form_of_an_answer_is_in_the_key() -> None:
    plain, formed = (request_of({}, [], Sampling(form=form)) for form in ("", "{}"))
    assert "form" not in plain, "keys of older caches and recordings stay"
    assert formed == {**plain, "form": "{}"}
