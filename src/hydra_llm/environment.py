"""What surrounds the process: environment variables, the settings file, the home folder, proxies,
standard streams.
"""

import io
import logging
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra_llm.errors import SettingsError

SETTINGS_FILE = "hydra-llm.toml"
OWN = ("HYDRA_", "OPENAI_")
# Kubernetes sets NAME_PORT=tcp://ADDRESS in every pod beside a service of that name.
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")
SECRETS = ("HYDRA_ADMIN_KEY", "OPENAI_API_KEY", "PGPASSWORD")
"""Variables that NAME_FILE gives too: containers mount secrets as files."""

logger = logging.getLogger(__name__)


def variables() -> dict[str, str]:
    """Our variables that are set, by upper-case name. Blanks around a value are removed, but of a
    key, which is checked when it is read; an empty one counts as not set, and so does an address
    that Kubernetes put there.
    """
    own = ((name.upper(), value) for name, value in os.environ.items())
    return {
        name: value if name.endswith("_KEY") else value.strip()
        for name, value in own
        if value.strip() and name.startswith(OWN) and not SERVICE_LINK.match(value.strip())
    }


def settings_file(file: Path | None) -> dict[str, Any]:
    """The settings file, by default the one of this folder; empty if there is none.
    SettingsError: the named file does not exist, or the file is not TOML.
    """
    path = file or Path(SETTINGS_FILE)
    if file is None and not path.is_file():
        return {}
    if not path.is_file():
        raise SettingsError(f"{file}: no such settings file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SettingsError(f"{path}: not TOML: {error}") from None


def clean_variables() -> None:
    """Keep only `variables` of ours in the environment; a service's address is logged."""
    kept = variables()
    for name, value in list(os.environ.items()):
        if name.upper().startswith(OWN):
            if SERVICE_LINK.match(value.strip()):
                reason = "is ignored: Kubernetes names a service by it"
                logger.warning("%s=%s %s", name, value.strip(), reason)
            if name.upper() in kept:
                os.environ[name] = kept[name.upper()]
            else:
                del os.environ[name]


def read_secret_files() -> None:
    """Set each of SECRETS whose NAME_FILE names a file. Raises SettingsError: it cannot be read, or
    the variable itself is set too.
    """
    for name in SECRETS:
        file = os.environ.pop(f"{name}_FILE", "").strip()
        if not file:
            continue
        if os.environ.get(name, "").strip():
            raise SettingsError(f"{name} and {name}_FILE are both set: unset one of them")
        try:
            os.environ[name] = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise SettingsError(f"{name}_FILE {file}: {why}") from None


def expanded(path: Path) -> Path:
    """The path with `~` as the home folder. Raises SettingsError: there is none."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise SettingsError(f"{path}: there is no home folder: write the whole path") from None


def cache_folder() -> Path:
    """`hydra-llm` in XDG_CACHE_HOME, or in ~/.cache. Raises SettingsError: no home folder."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return expanded(Path(given)) / "hydra-llm"
    try:
        return Path.home() / ".cache" / "hydra-llm"
    except RuntimeError:
        fix = "set HYDRA_CACHE to a folder for caches"
        raise SettingsError(f"there is no home folder: {fix}") from None


@contextmanager
def http_client_faults() -> Iterator[None]:
    """Around the making of an HTTP client: SettingsError for a proxy or a certificate file in the
    environment that cannot be used.
    """
    try:
        for name, value in os.environ.items():
            if name.upper() in PROXIES[:3]:  # ValueError: no number of a port
                _ = urlsplit(f"//{value.rpartition('://')[2]}").port
        yield
    except Exception as error:
        names = CERTIFICATES if isinstance(error, OSError) else PROXIES
        found = [name for name in os.environ if name.upper() in names and os.environ[name]]
        if not found:
            raise
        missing = [name for name in found if not Path(os.environ[name]).exists()]
        shown = " or ".join((names is CERTIFICATES and missing) or found)
        raise SettingsError(f"{shown} in the environment cannot be used: {_cause(error)}") from None


def _cause(error: Exception) -> str:
    """What is wrong, without a proxy's name and password."""
    if isinstance(error, ImportError):
        return "a SOCKS proxy needs the package socksio (pip install socksio)"
    text = error.strerror or "it cannot be read" if isinstance(error, OSError) else str(error)
    return re.sub(r"://[^/\s@]*@", "://", text)


def open_standard_streams() -> None:
    """Give a process whose stdin, stdout or stderr is closed the null device, so that no other
    file gets their numbers; characters that a stream's encoding lacks are written escaped.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(opened)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
