"""What private mode excludes when a bundle is learned or fitted: the LLM never sees a record.

`Pipeline.render` leaves records out of prompts, `labelling.asked_about` asks the LLM about known
queries alone, which are no records, and `afit` asks no LLM: a user's head is fitted on what the
user's own records answered.
"""

from collections.abc import Mapping, Sequence

from hydra_llm.config import Settings
from hydra_llm.datasets.dataset import offered
from hydra_llm.errors import DataError, SettingsError
from hydra_llm.tasks.base import Task
from hydra_llm.types import Query, Record

CONFLICTS: Mapping[str, Mapping[str, str]] = {
    "rerank": {"always": "orders the records of prompts that have none"},
    "reranker_labels": {"llm": "shows the LLM records"},
    "reranker_check": {"llm": "shows the LLM records"},
    "fit_labels": {"llm": "asks the LLM about users' records"},
    "label_queries": {
        "history": "asks the LLM about users' records",
        "both": "asks the LLM about users' records",
    },
}
"""Setting → the values that need the LLM to see a record, and what they do."""


def check_private(settings: Settings, names: Sequence[str] = tuple(CONFLICTS)) -> None:
    """SettingsError: private mode, and one of these settings needs the LLM to see a record."""
    for name in names if settings.private else ():
        value = getattr(settings, name)
        if value in CONFLICTS[name]:
            why = f"{name}={value} {CONFLICTS[name][value]}, which the LLM must not see"
            raise SettingsError(f"setting 'private': {why}: leave {name} out")


def check_askable(
    settings: Settings, task: Task, records: Mapping[str, Sequence[Record]], asked: Sequence[Query]
) -> None:
    """DataError: private mode, and there is nothing that the LLM may be asked to learn from."""
    if not settings.private or asked or task.labels:
        return
    if not any(offered(record) for own in records.values() for record in own):
        fault = "private: the LLM may be asked about known queries alone, and there are none"
        raise DataError(f"{fault}: give training users queries with outputs in queries.jsonl")
