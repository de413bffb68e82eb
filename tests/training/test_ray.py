"""`--engine ray` on a cluster of two workers: the same calls and numbers, also if a worker dies."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hydra_llm.bundle import Bundle
from hydra_llm.datasets.native import save
from hydra_llm.errors import BudgetExceeded, LLMError, LLMRefused, SettingsError
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.fake import FailingLLM
from hydra_llm.training import work
from hydra_llm.training.api import learn
from hydra_llm.training.engine import open_engine
from hydra_llm.types import Generation, Message
from tests.learning import ONE_STRENGTH
from tests.training.test_engine import Choosing, asking, learned
from tests.training.test_sample import RECORDS, made, same_heads, settings
from tests.waiting import FOREVER

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed (make test-ray has it)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers on this machine."""
    loopback = {"_node_ip_address": "127.0.0.1"}  # else a connection outside asks for its address
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=2, **loopback, **quiet)
    yield
    ray.shutdown()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill_a_worker() -> bool:
    """Kill one of this cluster's workers that does a part, if there is one."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            busy = (process / "cmdline").read_bytes().startswith(b"ray::_do")
            if busy and parent(parent(int(process.name))) == os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
                return True
        except (OSError, IndexError):
            continue
    return False


class Killing(Choosing):
    """Kills a worker in the middle of its part, once."""

    killed = False

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        if len(self.asked) > 20 and not self.killed:
            self.killed = kill_a_worker()
        return await super().generate(messages, sampling)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, list[str]]:
    """What this process learns, and what it asks the LLM."""
    llm = Choosing()
    return learned(asking(tmp_path_factory.mktemp("local")), llm), sorted(llm.asked)


def same_bundles(one: Bundle, other: Bundle) -> None:
    for name in ("reranker", "adapter"):
        assert one.heads[name].keys() == other.heads[name].keys()
        for user, head in one.heads[name].items():
            again = other.heads[name][user]
            np.testing.assert_allclose(head.numbers, again.numbers, rtol=0, atol=1e-6)
            assert (head.records, head.until) == (again.records, again.until)


def test_labels_calls_and_heads_are_the_same(
    local: tuple[Bundle, list[str]], tmp_path: Path
) -> None:
    llm, told = Choosing(), list[tuple[str, int, int]]()
    bundle = learned(asking(tmp_path, engine="ray"), llm, lambda *report: told.append(report))
    assert sorted(llm.asked) == local[1]
    same_bundles(bundle, local[0])
    assert bundle.report["calls"] == local[0].report["calls"]
    for stage in ("label records", "label candidates", "fit adapter"):
        done = [(done, total) for name, done, total in told if name == stage]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def test_a_killed_workers_part_asks_for_nothing_twice(
    local: tuple[Bundle, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llm = Killing()
    bundle = learned(asking(tmp_path, engine="ray"), llm)
    assert llm.killed
    assert capfd.readouterr().out == "", "a command prints its result there"
    assert sorted(llm.asked) == local[1]
    same_bundles(bundle, local[0])


def test_a_block_whose_worker_is_killed_is_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "blocks", partial(work.blocks, most=RECORDS))
    data, found, killed = made(), {}, list[bool]()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "fit heads" and not any(killed):
            killed.append(kill_a_worker())

    for engine in ("local", "ray"):
        given = settings(cache=tmp_path / engine, base_users=5, engine=engine)
        told = progress if engine == "ray" else lambda *report: None
        found[engine] = learn(data, "none", given, strengths=ONE_STRENGTH, progress=told).bundle
    assert any(killed)
    users = list(found["local"].heads["adapter"])
    assert len(users) == 12
    same_heads(found["local"], found["ray"], users, tolerance=1e-6)


def test_a_spent_budget_stops_and_the_same_command_goes_on(
    local: tuple[Bundle, list[str]], tmp_path: Path
) -> None:
    llm = Choosing()
    with pytest.raises(BudgetExceeded, match="max_calls=30 is spent"):
        learned(asking(tmp_path, engine="ray", max_calls=30), llm)
    assert len(llm.asked) == 30
    same_bundles(learned(asking(tmp_path, engine="ray"), llm), local[0])
    assert sorted(llm.asked) == local[1]


def test_a_first_call_that_is_refused_ends_the_run(tmp_path: Path) -> None:
    llm = FailingLLM(Choosing(), "refused")
    with pytest.raises(LLMRefused, match="failed as wished"):
        learned(asking(tmp_path, engine="ray"), llm)


class Soupless(Choosing):
    """Fails some calls, whatever their order."""

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        if "garlic soup 1" in messages[-1]["content"]:
            raise LLMError("no soup")
        return await super().generate(messages, sampling)


def test_calls_that_fail_are_left_out(tmp_path: Path) -> None:
    local, there = (
        learn(made(), Soupless(), asking(tmp_path / engine, engine=engine), strengths=ONE_STRENGTH)
        for engine in ("local", "ray")
    )
    assert local.failures == there.failures
    assert len(local.failures) > 5
    same_bundles(local.bundle, there.bundle)


def test_what_cannot_be_sent_is_one_line() -> None:
    with pytest.raises(SettingsError, match="cannot be sent to workers .* take engine=local"):
        list(open_engine("ray").each(max, threading.Lock(), [1]))


def test_an_unreachable_cluster_is_one_line(tmp_path: Path) -> None:
    save(made(), tmp_path / "data")
    line = ["learn", "data", "--out", "bundle", "--engine", "ray:127.0.0.1:9"]
    done = subprocess.run(
        [sys.executable, "-m", "hydra_llm", *line],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=FOREVER,
    )
    assert done.returncode == 2
    [said] = [line for line in done.stderr.splitlines() if line.startswith("hydra-llm:")]
    assert "engine=ray:127.0.0.1:9: no cluster can be reached there" in said
    assert "ray start --head" in said
    assert "Traceback" not in done.stderr
