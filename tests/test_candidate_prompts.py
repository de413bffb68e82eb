"""Candidates of several prompts: what the LLM is asked, how equal answers count, and that the
benchmark, labelling and answering ask alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from hydra_llm.bench.bbox import BBoxAdapter
from hydra_llm.bench.method import Parts, find_methods
from hydra_llm.bundle import Bundle
from hydra_llm.config import Settings, load_settings
from hydra_llm.errors import LLMError, SettingsError
from hydra_llm.history import as_query
from hydra_llm.llm.base import Sampling
from hydra_llm.llm.concurrency import run_sync
from hydra_llm.pipeline import UserPipeline
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.training.labelling import adapter_groups
from hydra_llm.types import Candidate, Generation, Message, Query, Record, Usage

TITLES = Task("titles", "generation", "Title of: {input}")
TAGS = Task("tags", "classification", "Which tag? {input}", ("calm", "loud"))
TEXTS = ("rain one", "war two", "love three", "war six", "love seven")
RECORDS = {
    "u": [Record("u", str(i), text, f"on {text}", position=i) for i, text in enumerate(TEXTS)],
    "new": [],
}
QUERY = Query("u", "q", "war five", "on war", position=9)
NAMES = ("zero-shot", "icl-random@1", "icl-random@2", "recent@1", "recent@9", "rag@1", "rag@4")


class Counted:
    """Vectors that count the letter a text begins with."""

    version = 0

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        starts = [[text.startswith(word) for word in ("rain", "war", "love")] for text in texts]
        return np.array(starts, dtype=np.float32).reshape(-1, 3)


@dataclass
class Said:
    """Answers each prompt by its number of records, and samples by their index; some calls fail."""

    failing: frozenset[int] = frozenset()  # numbers of records
    calls: list[tuple[str, Sampling]] = field(default_factory=list)
    identity: Mapping[str, Any] = field(default_factory=lambda: {"kind": "fake", "model": "said"})

    async def generate(self, messages: Sequence[Message], sampling: Sampling) -> Generation:
        (message,) = messages
        self.calls.append((message["content"], sampling))
        shown = message["content"].count("This person wrote: ")
        if shown in self.failing:
            raise LLMError("HTTP 500")
        greedy = sampling.temperature == 0
        texts = [f"{shown} shown" if greedy else f"sample {i}" for i in range(sampling.n)]
        return Generation(tuple(texts), Usage(calls=1))

    @property
    def asked(self) -> list[tuple[int, int, float]]:
        """Number of records, of texts, and temperature of each call."""
        return sorted(
            (text.count("This person wrote: "), own.n, own.temperature) for text, own in self.calls
        )

    async def aclose(self) -> None: ...


def parts(llm: Said, task: Task = TITLES, **chosen: Any) -> Parts:
    settings = Settings(**{"samples": 6, "k": 2, "retrieved": 3, **chosen})
    bundle = Bundle(task, settings, {}, Counted(), CohortStats())  # type: ignore[arg-type]
    return Parts(bundle, llm, settings, RECORDS)


def pipeline(llm: Said, task: Task = TITLES, **chosen: Any) -> UserPipeline:
    return parts(llm, task, **chosen).personalizer(rerank=True, adapt=True)


def test_each_prompt_is_asked_once_in_place_of_a_sample() -> None:
    llm = Said()
    proposal = pipeline(llm, candidate_prompts="zero-shot, recent@1").propose(QUERY)
    assert llm.asked == [(0, 1, 0.0), (1, 1, 0.0), (2, 1, 0.0), (2, 3, 0.5)]
    assert proposal.candidates == (
        *(Candidate(f"{n} shown", f"{n} shown", 1, greedy=True) for n in (2, 0, 1)),
        *(Candidate(f"sample {i}", f"sample {i}", 1) for i in range(3)),
    )
    assert proposal.messages[0]["content"].count("This person wrote: ") == 2
    assert proposal.usage == Usage(calls=4)


def test_equal_answers_of_prompts_are_votes() -> None:
    llm = Said()
    proposal = pipeline(llm, candidate_prompts="rag@1,recent@1,icl-random@2").propose(QUERY)
    votes = {own.answer: own.votes for own in proposal.candidates}
    assert votes == {"2 shown": 2, "1 shown": 2, "sample 0": 1, "sample 1": 1}
    assert sum(votes.values()) == 6, "the number of answers stays"


def test_an_equal_prompt_is_not_asked_again() -> None:
    llm = Said()
    pipeline(llm, candidate_prompts="zero-shot,recent@4,rag@2").propose(replace(QUERY, user="new"))
    assert llm.asked == [(0, 1, 0.0), (0, 5, 0.5)], "a user without records has one prompt"


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        ({"samples": 1}, [(2, 1, 0.0)]),
        ({"samples": 2}, [(0, 1, 0.0), (2, 1, 0.0)]),
        ({"samples": 3, "greedy_first": False}, [(0, 1, 0.0), (1, 1, 0.0), (2, 1, 0.5)]),
    ],
)
def test_the_prompt_itself_always_has_an_answer(chosen: dict[str, Any], asked: Any) -> None:
    llm = Said()
    pipeline(llm, candidate_prompts="zero-shot,rag@1", **chosen).propose(QUERY)
    assert llm.asked == asked


def test_tasks_with_labels_have_one_prompt() -> None:
    assert pipeline(Said(), TAGS, candidate_prompts="zero-shot").beside == ()


def test_a_prompt_that_fails_is_noted() -> None:
    proposal = pipeline(Said(frozenset({0})), candidate_prompts="zero-shot,rag@1").propose(QUERY)
    assert [own.answer for own in proposal.candidates[:2]] == ["2 shown", "1 shown"]
    assert proposal.notes == ("a call failed: HTTP 500",)
    assert proposal.usage == Usage(calls=3, failed=1)


@pytest.mark.parametrize("name", [*NAMES, "rag-dense@2"])
@pytest.mark.parametrize("gate", ["auto", "always"])
def test_a_prompt_is_that_of_the_benchmark(name: str, gate: str) -> None:
    """So that a recording of the benchmark's prompts holds the candidates."""
    ours, theirs = Said(), Said()
    asks = partial(parts, gate=gate, prompt_style="block")
    asks(ours, candidate_prompts=name).personalizer(rerank=True).propose(QUERY)
    (method,) = find_methods([name], TITLES.kind)
    run_sync(partial(method.build(asks(theirs)).aanswer, QUERY))
    ((text, sampling),) = theirs.calls
    assert (text, sampling) in ours.calls


@pytest.mark.parametrize("name", ["hydra-adapter", "hydra-published"])
def test_published_methods_sample_one_prompt(name: str) -> None:
    asked = []
    for prompts in ("", "rag@4,recent@1"):
        llm = Said()
        (method,) = find_methods([name], TITLES.kind)
        run_sync(partial(method.build(parts(llm, candidate_prompts=prompts)).aanswer, QUERY))
        asked.append(llm.calls)
    assert asked[0] == asked[1]
    assert BBoxAdapter(parts(Said(), candidate_prompts="zero-shot")).pipeline.beside == ()


@pytest.mark.parametrize("name", ["hydra", "oracle", "mbr", "random", "self-consistency"])
def test_bounds_choose_among_the_same_candidates(name: str) -> None:
    llm, own = Said(), Said()
    chosen = {"candidate_prompts": "zero-shot,rag@1"}
    (method,) = find_methods([name], TITLES.kind)
    answer = run_sync(partial(method.build(parts(llm, **chosen)).aanswer, QUERY))
    assert answer.proposal.candidates == pipeline(own, **chosen).propose(QUERY).candidates
    assert llm.calls == own.calls


async def test_the_adapter_learns_from_what_is_asked_later(anyio_backend: str) -> None:
    llm = Said()
    own = pipeline(llm, candidate_prompts="zero-shot,recent@1")
    query = as_query(RECORDS["u"][3])
    collected = await adapter_groups(own, [query])
    proposal = await own.apropose(query)
    (group,) = collected.groups(parts(llm).bundle.featurizer)
    assert collected.calls == 1
    assert list(group.rights) == [candidate.text for candidate in proposal.candidates]
    assert llm.calls[: len(llm.calls) // 2] == llm.calls[len(llm.calls) // 2 :]


@pytest.mark.parametrize(
    "names", ["rag", "rag@0", "rag@x", "zero-shot@1", "pag@1", "zero-shot,best@2"]
)
def test_an_unknown_prompt_is_named(names: str) -> None:
    wrong = names.rpartition(",")[2]
    with pytest.raises(SettingsError, match=f"unknown prompt '{wrong}': take some of zero-shot, "):
        load_settings(candidate_prompts=names)
