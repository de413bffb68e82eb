"""What holds for every test: no network but loopback, caches in a folder of their own, no settings
from the developer's shell, bounded memory.
"""

import errno
import ipaddress
import os
import re
import resource
import secrets
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# On a busy machine an example may take long. `make test-fast` takes the profile "fast".
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "fast", parent=hypothesis.settings.get_profile("tests"), max_examples=15
)
hypothesis.settings.load_profile("tests")

# Before any test module imports a library that reads them.
_CACHES = tempfile.TemporaryDirectory(prefix="hydra-llm-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_WAIT_POLICY="PASSIVE",
    XDG_CACHE_HOME=_CACHES.name,
)
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it for its workers
for _name in [name for name in os.environ if name.startswith(("HYDRA_", "OPENAI_"))]:
    del os.environ[_name]


MAX_MEMORY = 4 * 2**30
"""Bytes of memory that a test process, or a process that a test starts, may ever hold."""
_peaks: dict[str, int] = {}
"""Test file to the largest memory so far, for the files that raised it; of all workers."""


def _peak() -> int:
    """Of this process (not by getrusage, which counts the parent's memory too) or of a child."""
    own = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert own is not None
    return max(int(own[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = _peak()
    result = yield
    if _peak() > before:
        _peaks[item.nodeid.partition("::")[0]] = _peak()
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for file, peak in getattr(node, "workeroutput", {}).get("peaks", {}).items():
        _peaks[file] = max(peak, _peaks.get(file, 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peaks"] = _peaks
    elif max(_peaks.values(), default=0) > MAX_MEMORY:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest = sorted(_peaks.items(), key=lambda item: -item[1])[:3]
    for file, peak in largest:
        too_much = f", more than {MAX_MEMORY / 2**30:.1f}" * (peak > MAX_MEMORY)
        terminalreporter.write_line(f"peak memory {peak / 2**30:.1f} GB in {file}{too_much}")


class NetworkBlocked(OSError):
    """What a machine without network answers."""


def is_local(family: int, address: Any) -> bool:
    """Whether an address of connect() stays on this machine."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True)
def refused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Refuse every connection that leaves this machine, and fail the test that tried, even if the
    code under it caught the error.

    Gives the refused addresses; a test that means to be refused clears them.
    """
    addresses: list[Any] = []

    def guarded(name: str) -> Any:
        real = getattr(socket.socket, name)

        def connect(self: socket.socket, address: Any) -> Any:
            if is_local(self.family, address):
                return real(self, address)
            addresses.append(address)
            raise NetworkBlocked(
                errno.ENETUNREACH, f"tests need no network, but something connected to {address!r}"
            )

        return connect

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
    yield addresses
    assert not addresses, f"left this machine: {addresses}"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, empty at its start."""
    folder = tmp_path / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the package does."""
    return "asyncio"


@pytest.fixture(scope="session")
def open_once() -> Callable[..., Any]:
    """As `open_encoder`, but MiniLM is read once: loading it and hashing its weights would be most
    of what a small test costs. One whose weights a test has changed is opened again.
    """
    from hydra_llm.model.encoder import Encoder, open_encoder

    opened: dict[Any, tuple[Encoder, str]] = {}

    def open_shared(name: str, **options: Any) -> Encoder:
        key = (name, *sorted(options.items()))
        if key not in opened or opened[key][0].digest != opened[key][1]:
            encoder = open_encoder(name, **options)
            if name != "minilm":
                return encoder
            opened[key] = encoder, encoder.digest
        return opened[key][0]

    return open_shared


@pytest.fixture(scope="session")
def shared_minilm(open_once: Callable[..., Any]) -> Iterator[None]:
    """Share one MiniLM among the bundles that a process loads and learns."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("model.persistence", "training.api", "model.encoder"):
            patch.setattr(f"hydra_llm.{module}.open_encoder", open_once)
        yield


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database: a file of SQLite, and a database of a real PostgreSQL
    (tools/with_postgres.py starts one).
    """
    import sqlalchemy as sa

    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    server = os.environ.get("TEST_POSTGRES_URL")
    if not server:
        pytest.skip("no PostgreSQL: run `make test`, or tools/with_postgres.py")
    name = f"test_{secrets.token_hex(6)}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
