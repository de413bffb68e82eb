"""Settings of the gateway: flag > environment (`HYDRA_SERVE_...`) > `[serve]` of `hydra-llm.toml` >
default. Secrets are no settings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from hydra_llm.config import (
    SERVE_TABLE,
    SETTINGS_FILE,
    Group,
    environment,
    log_renamed,
    settings_file,
    unknown,
    validated,
)
from hydra_llm.errors import SettingsError

RENAMED: Mapping[str, str] = {
    "caution": "abstention_threshold",
    "keep_days": "retention_days",
    "patience": "store_timeout",
    "waiting": "scoring_queue",
}
"""Former name → name; former names are accepted as aliases."""


class ServeSettings(Group):
    """All settings of the gateway, beside its LLM, store and bundle."""

    # ---- answering
    placement: Literal["auto", "turns", "block"] = "auto"
    """Records as example turns behind the system messages (turns), or listed in front of the last
    user message's text (block); auto is the bundle's style, or turns without a bundle.
    """
    retrieved: int | None = Field(default=None, ge=0)
    """Number of records that are retrieved and reranked, at least `k`; None is the bundle's value,
    or 10 without a bundle.
    """
    k: int | None = Field(default=None, ge=0)
    """Number of records in the prompt; None is the bundle's value, or 4 without a bundle."""
    candidates: int | None = Field(default=None, ge=1, le=64)
    """Number of candidates for the adapter, if a bundle is in use: the caller's own request, and
    samples; None is the bundle's number of samples.
    """
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Min temperature of the samples; a higher one of the caller is kept. None is the bundle's."""
    abstention_threshold: float | None = Field(default=None, ge=0)
    """Keep candidate 0 unless the expected-gain margin exceeds this many posterior SDs of the
    user's head; 0 disables abstention, None is the bundle's value.
    """
    max_prompt_tokens: int | None = Field(default=None, ge=64)
    """Token limit of the prompt with records; the caller's own messages are never cut. None is the
    bundle's value, or 4096 without a bundle.
    """
    deadline: float = Field(default=60.0, gt=0)
    """Samples later than this many seconds are dropped; the caller's own answer is always awaited
    if no other has arrived.
    """
    upstream_timeout: float = Field(default=600.0, gt=0)
    """Read timeout of the upstream LLM, in seconds."""
    personalization: bool = True
    """Add the object `personalization` to replies."""

    # ---- retention
    retention_days: float = Field(default=30.0, ge=0)
    """Days that answered requests are kept for feedback."""

    # ---- limits
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Max size of a request body; the rest of a longer one is not read."""
    max_records: int = Field(default=10_000, ge=1)
    """Max records per user."""
    max_records_per_request: int = Field(default=1_000, ge=1)
    """Max records that one call may add."""
    max_text: int = Field(default=100_000, ge=1)
    """Max characters of a record's input or output."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Rate limit per key and server process; None is no limit."""
    users_in_memory: int = Field(default=10_000, ge=1)
    """Max users whose histories and heads are cached in memory; others are read from the store."""
    drain: float | None = Field(default=None, ge=0)
    """Graceful shutdown timeout for requests in flight, in seconds (rounded up); None is no limit.
    """
    store_timeout: float = Field(default=10.0, gt=0)
    """Read timeout of the store, in seconds; a request then goes on without it."""
    scoring_queue: int = Field(default=256, ge=1)
    """Max requests that wait for scoring; further ones are answered without it."""

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, values: Any) -> Any:
        return resolve(values) if isinstance(values, Mapping) else values


def resolve(values: Mapping[str, Any], hint: bool = False) -> dict[str, Any]:
    """Settings under their current names; `hint` logs those of former names.

    Raises:
        SettingsError: an unknown name; suggests the nearest ones.
    """
    out: dict[str, Any] = {}
    for name, value in values.items():
        new = name.lower().removeprefix(f"{SERVE_TABLE}.").replace("-", "_")
        new = RENAMED.get(new, new)
        if new not in ServeSettings.model_fields:
            raise unknown(
                f"{SERVE_TABLE}.{name}", [*ServeSettings.model_fields, *RENAMED], _spelled
            )
        if hint and name in RENAMED:
            log_renamed(f"{SERVE_TABLE}.{name}", f"{SERVE_TABLE}.{new}")
        out[new] = value
    return out


def _spelled(name: str) -> str:
    return f"{SERVE_TABLE}.{RENAMED.get(name, name)}"


def load_serve_settings(file: Path | None = None, **given: Any) -> ServeSettings:
    """The gateway's settings. `given` are flags; entries that are None count as not given.

    Raises:
        SettingsError: an unknown setting, a value out of range, or a file that is not TOML.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    values = {**resolve(_table(file), hint=True), **environment(VARIABLES), **resolve(flags)}
    return validated(ServeSettings, values, f"{SERVE_TABLE}.")


VARIABLES: Mapping[str, str] = {
    f"HYDRA_SERVE_{name.upper()}": RENAMED.get(name, name)
    for name in (*RENAMED, *ServeSettings.model_fields)
}
"""Environment variable → setting; the current name of a setting comes last and wins."""


def _table(file: Path | None) -> dict[str, Any]:
    found = settings_file(file).get(SERVE_TABLE, {})
    if not isinstance(found, dict):
        raise SettingsError(f"{file or SETTINGS_FILE}: '{SERVE_TABLE}' must be a table")
    return found
