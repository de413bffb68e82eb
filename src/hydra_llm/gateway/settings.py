"""Settings of the gateway: flag > environment (`HYDRA_SERVE_...`) > `[serve]` of `hydra-llm.toml` >
default. Secrets never stand here.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import EnvSettingsSource, SettingsConfigDict

from hydra_llm.config import SERVE_TABLE, SETTINGS_FILE, Given, settings_file
from hydra_llm.errors import SettingsError


class ServeSettings(Given):
    """All that changes what the gateway does, beside its LLM, store and bundle."""

    model_config = SettingsConfigDict(
        env_prefix="HYDRA_SERVE_", extra="forbid", frozen=True, allow_inf_nan=False
    )

    # ---- answering
    placement: Literal["turns", "block"] = "turns"
    """Records as example turns before the conversation, or as a block in a system message of their
    own.
    """
    retrieved: int | None = Field(default=None, ge=0)
    """Records that are retrieved and reranked; None is as many as the bundle was learned with, and
    10 without one. A request that wants more in its prompt has as many.
    """
    k: int | None = Field(default=None, ge=0)
    """Of them, how many stand in the prompt; None is as many as the bundle was learned with, and 4
    without one.
    """
    candidates: int = Field(default=8, ge=1, le=64)
    """Answers among which the adapter picks, where a bundle is in use: the caller's own request,
    and samples.
    """
    temperature: float = Field(default=0.5, ge=0, le=2)
    """Of the samples, where the caller's own is lower."""
    caution: float = Field(default=1.0, ge=0)
    """The first candidate stands where the pick's lead is less than so many standard deviations of
    what the head leaves uncertain.
    """
    max_prompt_tokens: int = Field(default=4096, ge=64)
    """Records are shown as long as the prompt stays within this; the caller's own messages are
    never cut.
    """
    deadline: float = Field(default=60.0, gt=0)
    """Seconds after which the candidates that have come must do; where none has, the caller's own
    is waited for.
    """
    upstream_timeout: float = Field(default=600.0, gt=0)
    """Seconds until an upstream that says nothing counts as failed."""
    personalization: bool = True
    """Whether replies carry the object `personalization`."""

    # ---- keeping
    keep_days: float = Field(default=30.0, ge=0)
    """How long answered requests wait for feedback."""

    # ---- limits
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Of a request's body; what is longer is not read to its end."""
    max_records: int = Field(default=10_000, ge=1)
    """Records of one user."""
    max_records_per_request: int = Field(default=1_000, ge=1)
    """Records that one call may add."""
    max_text: int = Field(default=100_000, ge=1)
    """Characters of a record's input or output."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Of one key, counted by each server process for itself; None is no limit."""
    users_in_memory: int = Field(default=10_000, ge=1)
    """Histories and heads at hand; others are read from the store when they are asked for."""
    drain: float | None = Field(default=None, ge=0)
    """Seconds that requests in flight get when the server is told to stop, rounded up; None is as
    long as they take.
    """
    patience: float = Field(default=10.0, gt=0)
    """Seconds that a request waits for the store, before it goes without."""
    waiting: int = Field(default=256, ge=1)
    """Requests that may wait to be scored; more go through as they are."""


def load_serve_settings(file: Path | None = None, **given: Any) -> ServeSettings:
    """The gateway's settings; entries of `given` that are None were not given.

    Raises:
        SettingsError: an unknown setting, a value out of range, or a file that is not TOML.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    values = {**_of_file(file), **EnvSettingsSource(ServeSettings)(), **flags}
    try:
        return ServeSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "settings"
        raise SettingsError(
            f"setting 'serve.{place}': {first['msg']} (got {first.get('input')!r})"
        ) from None


def _of_file(file: Path | None) -> dict[str, Any]:
    found = settings_file(file).get(SERVE_TABLE, {})
    if not isinstance(found, dict):
        raise SettingsError(f"{file or SETTINGS_FILE}: '{SERVE_TABLE}' must be a table")
    return found
