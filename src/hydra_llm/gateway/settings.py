"""The gateway's settings: flag > environment (`HYDRA_SERVE_...`) > `[serve]` table > default."""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hydra_llm import config, environment
from hydra_llm.config import SERVE_TABLE
from hydra_llm.errors import SettingsError
from hydra_llm.plugins import RETRIEVERS
from hydra_llm.setting_names import Names

RENAMED: Mapping[str, str] = {
    "candidates": "samples",
    "caution": "abstention_threshold",
    "keep_days": "retention_days",
    "patience": "store_timeout",
    "waiting": "scoring_queue",
}
"""Former name → name; former names are accepted as aliases."""


class ServeSettings(config.Group):
    """All settings of the gateway, beside its LLM, store and bundle."""

    error_prefix = "serve."

    # ---- answering
    placement: Literal["auto", "turns", "block"] = "auto"
    """turns: example turns; block: a list in the last user message; auto: as learned, or turns."""
    gate: Literal["auto", "always", "off"] = "auto"
    """As `retrieval.gate`: other questions pass through as `off-task` or `not-relevant`."""
    retrieved: int | None = Field(default=None, ge=0)
    """Records retrieved and reranked, at least `k`; None is the bundle's value, or 10 without."""
    retriever: str | None = None
    """As `retrieval.retriever`; None is the bundle's, or bm25. dense, hybrid: extra `learn`."""
    k: int | None = Field(default=None, ge=0)
    """Number of records in the prompt; None is the bundle's value, or 4 without a bundle."""
    samples: int | None = Field(default=None, ge=1, le=64)
    """Texts of the LLM per answer, the caller's own included; None is the bundle's value."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Min temperature of the samples; a higher one of the caller is kept. None is the bundle's."""
    abstention_threshold: float | None = Field(default=None, ge=0)
    """As `selection.abstention_threshold`; None is the bundle's value."""
    encoder_precision: Literal["fp32", "bf16", "int8", "fastest"] | None = None
    """fastest: bf16 where the processor has AMX, else fp32; int8: needs the extra `onnx`; None is
    the bundle's own. But for fp32, answers may differ where two candidates score almost alike, so
    servers of one store should have the same.
    """
    max_prompt_tokens: int | None = Field(default=None, ge=64)
    """Token limit of the prompt, caller's text never cut; None is the bundle's, 4096 without."""
    private: bool | None = None
    """As `research.private`: no record is sent to the LLM; None is the bundle's value."""
    mask: str | None = None
    """As `research.mask`: personal data that the LLM gets as placeholders; None is that setting."""
    deadline: float = Field(default=60.0, gt=0)
    """Samples later than this many seconds are dropped, once any answer has arrived."""
    upstream_timeout: float = Field(default=600.0, gt=0)
    """Read timeout of the upstream LLM, in seconds."""
    stream_usage: bool = False
    """Ask the upstream for the tokens of streams too, where the caller does not; few refuse it."""
    personalization: bool = True
    """Add the object `personalization` to replies."""

    # ---- pictures
    vision: str | None = None
    """openai:MODEL[@URL] that describes pictures of records; None: records are texts alone."""
    vision_hosts: tuple[str, ...] = ()
    """Hosts (or host:port) from which pictures are fetched; others come as data: URLs alone."""
    vision_requests: bool = False
    """Describe pictures of requests too, to find records; the upstream gets them as they are."""
    max_picture_bytes: int = Field(default=4 * 2**20, ge=1024)
    """Max size of a picture that is described."""

    # ---- users
    user_headers: tuple[str, ...] = (
        "x-hydra-user",
        "x-openwebui-user-id",
        "x-litellm-end-user-id",
        "x-litellm-customer-id",
        "x-litellm-user_api_key_end_user_id",
    )
    """Headers that name the user, the first that is given wins: ours, Open WebUI's, LiteLLM's."""
    user_fields: tuple[str, ...] = (
        "user",
        "safety_identifier",
        "metadata.user_id",
        "metadata.userId",
        "metadata.user",
        "metadata.user.id",
        "metadata.end_user_id",
        "metadata.trace_user_id",
        "litellm_metadata.user_id",
        "litellm_metadata.user",
        "litellm_metadata.trace_user_id",
    )
    """Fields of a request's body that name the user, after the headers; dots lead into objects."""

    # ---- operation
    workers: int = Field(default=1, ge=1, le=64)
    """Worker processes on one socket, each with the bundle (and an embedded LLM) in memory."""
    tls_cert: Path | None = None
    """PEM file of the certificate and its chain; then the server speaks HTTPS."""
    tls_key: Path | None = None
    """PEM file of the certificate's key, without a password; None: it is in `tls_cert`."""
    proxy: tuple[str, ...] = ()
    """Addresses or networks of reverse proxies, whose X-Forwarded-For and -Proto alone count."""
    root_path: str = ""
    """Prefix of the paths behind a reverse proxy, as /llm, whether the proxy removes it or not."""
    log: Literal["text", "json", "off"] = "text"
    """A line on stderr per request; off: failures only."""
    traces: Literal["off", "otlp"] = "off"
    """otlp: spans to the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT (HTTP); needs the extra `otel`."""
    cors_origins: tuple[str, ...] = ()
    """Origins of browser applications, separated by commas, as https://app.example; * is any."""

    passthrough: Literal["admin", "all", "off"] = "admin"
    """Whose requests to other paths of /v1 are passed on; the upstream's key opens them."""

    # ---- dashboard
    dashboard: bool = False
    """Serve pages for people at /ui, with sign-in by key. Off: there is no such path."""
    session_hours: float = Field(default=8.0, gt=0, le=24 * 30)
    """Hours after which one has to sign in at the dashboard again."""

    # ---- changing taste
    detect_changes: bool = False
    """See at each feedback whether the user's taste has changed, then learn fast; extra `drift`."""
    question_pool: Path | None = None
    """Text file, a question of the task per line, for `GET /v1/users/{user}/next-question`."""

    # ---- retention
    retention_days: float = Field(default=30.0, ge=0)
    """Days that answered requests are kept for feedback, and responses for conversations."""

    spend_days: int = Field(default=400, ge=1)
    """Days after which what was spent is nobody's, and of no key; the sums stay."""

    audit_days: int = Field(default=365, ge=1)
    """Days that the audit log is kept: who has read or deleted what."""

    # ---- limits
    max_body_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Max size of a request body; the rest of a longer one is not read."""
    max_records: int = Field(default=10_000, ge=1)
    """Max records per user."""
    max_records_per_request: int = Field(default=1_000, ge=1)
    """Max records that one call may add."""
    max_text: int = Field(default=100_000, ge=1)
    """Max characters of a record's input or output."""
    wrong_keys_per_minute: int = Field(default=20, ge=0)
    """Wrong keys an address may send per minute and server process, then 429; 0 is no limit."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Rate limit per key, of all servers of the store together; None is no limit."""
    key_limits: str = ""
    """What each key may spend: 5/day, 100/month (money), 20000 tokens/minute; of all servers."""
    user_limits: str = ""
    """What each user may spend, written as `key_limits`."""
    users_in_memory: int = Field(default=10_000, ge=1)
    """Max users whose histories and heads are cached in memory; others are read from the store."""
    drain: float | None = Field(default=None, ge=0)
    """Graceful shutdown timeout for requests in flight, in seconds (rounded up); None: no limit."""
    store_timeout: float = Field(default=10.0, gt=0)
    """Read timeout of the store, in seconds; a request then goes on without it."""
    scoring_queue: int = Field(default=256, ge=1)
    """Max requests that wait for scoring; further ones are answered without it."""

    @field_validator(
        "user_headers", "user_fields", "cors_origins", "proxy", "vision_hosts", mode="before"
    )
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Flags and variables hold a list as a text with commas."""
        if not isinstance(value, str):
            return value
        return [part.strip() for part in value.split(",") if part.strip()]

    @field_validator("retriever")
    @classmethod
    def _known_retriever(cls, name: str | None) -> str | None:
        return name and config.known(RETRIEVERS, name)

    @field_validator("mask")
    @classmethod
    def _known_detectors(cls, names: str | None) -> str | None:
        return names and config.Research.checked({"mask": names}).mask

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    f"write an origin as https://app.example, without path: '{origin}'"
                )
        return origins

    @field_validator("vision_hosts")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[\w.-]+(:\d+)?", host):
                raise ValueError(f"write a host as images.example.com, without scheme: '{host}'")
        return tuple(host.lower() for host in hosts)

    @field_validator("proxy")
    @classmethod
    def _addresses(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                form = "write a proxy as an address or a network, 10.0.0.7 or 10.0.0.0/8"
                raise ValueError(f"{form}: '{proxy}'") from None
        return proxies

    @field_validator("key_limits", "user_limits")
    @classmethod
    def _limits(cls, text: str) -> str:
        if text.strip():
            from hydra_llm.gateway.spend_limits import parse_limits  # which needs the store

            parse_limits(text)
        return text

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, path: str) -> str:
        path = path.rstrip("/")
        if path and not re.fullmatch(r"(/[\w.~-]+)+", path, re.ASCII):
            raise ValueError(f"write a prefix of paths as /llm: '{path}'")
        return path

    @field_validator("user_headers")
    @classmethod
    def _lower(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ValueError(f"no header can have the name '{name}'")
        return tuple(name.lower() for name in names)

    @field_validator("user_fields")
    @classmethod
    def _paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not all(path.split(".")):
                raise ValueError(f"write a field as metadata.user_id: '{path}'")
        return paths

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, values: Any) -> Any:
        return NAMES.flat({SERVE_TABLE: values}) if isinstance(values, Mapping) else values


NAMES = Names(dict.fromkeys(ServeSettings.model_fields, SERVE_TABLE), RENAMED)
VARIABLES: Mapping[str, str] = {
    f"HYDRA_SERVE_{name.upper()}": RENAMED.get(name, name)
    for name in (*RENAMED, *ServeSettings.model_fields)
}
"""Environment variable → setting; the current name of a setting comes last and wins."""


def load_serve_settings(file: Path | None = None, **given: Any) -> ServeSettings:
    """The gateway's settings. `given` are flags; entries that are None count as not given. Raises
    SettingsError: an unknown setting, a value out of range, or a file that is not TOML.
    """
    table = environment.settings_file(file).get(SERVE_TABLE, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{file or environment.SETTINGS_FILE}: '{SERVE_TABLE}' must be a table")
    in_file = NAMES.flat({SERVE_TABLE: table}, hint=True)
    flags = NAMES.flat({SERVE_TABLE: given})
    return ServeSettings.checked(in_file | config.environment(VARIABLES) | flags)
