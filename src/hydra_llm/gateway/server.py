"""The application behind uvicorn: in this process, or in several worker processes on one socket."""

import logging
import math
import multiprocessing
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import FastAPI

from hydra_llm.config import Settings
from hydra_llm.environment import open_standard_streams
from hydra_llm.errors import HydraError, SettingsError
from hydra_llm.gateway.app import make_app
from hydra_llm.gateway.auth import Access
from hydra_llm.gateway.embedded import open_upstream
from hydra_llm.gateway.request_log import logging_to_stderr
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.telemetry import METRICS_FOLDER, log
from hydra_llm.gateway.upstream import Upstream
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.registry import bare_llm
from hydra_llm.store.store import Store

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection: the server must not close one while a request arrives."""
POLL_SECONDS = 0.2  # how soon a signal or a worker's end is seen
PAUSE_SECONDS = 0.5  # before a worker is replaced: it may fail again at once
HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
SPAWN = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold

Started = Callable[[Mapping[str, str]], None]
"""Called once, when requests are answered, with what they are answered with."""


@dataclass(frozen=True)
class Service:
    """What is served, as plain values: a worker process gets it pickled."""

    llm: str
    store: str = field(repr=False)  # its URL may hold a password
    settings: ServeSettings
    bundle: Path | None
    here: Settings
    access: Access

    def open_llm(self) -> tuple[Upstream, ChatLLM | None]:
        """The upstream, and the LLM that labels candidates; nothing is connected or loaded yet."""
        # An endpoint is asked without the SDK; learning alone needs it, whose extra brings it.
        plain = self.llm.startswith("openai:") and find_spec("openai") is None
        model = None if plain else bare_llm(self.llm, self.here)
        return open_upstream(self.llm, model, timeout=self.settings.upstream_timeout), model

    def app(self, store: Store) -> FastAPI:
        """The application; raises as `make_app`."""
        upstream, model = self.open_llm()
        options: dict[str, Any] = {"llm": model, "here": self.here, "access": self.access}
        return make_app(store, upstream, self.settings, self.bundle, **options)


# ---- one process


def run_app(app: FastAPI, listening: socket.socket, started: Started) -> None:
    """Serve until a signal ends it and the requests in flight have ended."""
    gateway = app.state.gateway
    server = uvicorn.Server(_config(app, gateway.settings))
    # The terminal is gone: requests in flight end, as with SIGTERM.
    _on_hangup(lambda *_: server.handle_exit(signal.SIGTERM, None))
    deployment = gateway.deployment
    private = {"private": "the LLM sees no record"} if deployment.private else {}
    bundle = deployment.id[:12] or "none (records alone)"
    started({"bundle": bundle, "gate": deployment.gate, **private})
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again in the end
        server.run([listening])


def _config(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    drain = None if settings.drain is None else math.ceil(settings.drain)  # whole seconds
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=drain,
        proxy_headers=bool(settings.proxy),  # by default uvicorn trusts all of loopback
        forwarded_allow_ips=list(settings.proxy),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def _on_hangup(handler: Callable[..., None]) -> None:
    """Handle SIGHUP, unless it is ignored, as under nohup."""
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        signal.signal(HANGUP, handler)


def check_tls(settings: ServeSettings) -> None:
    """Raise `SettingsError` unless certificate and key can be used, without asking for a password:
    a server has nobody to ask.
    """
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None:
        if key is not None:
            raise SettingsError("--tls-key: name the certificate too, by --tls-cert")
        return
    asked = False

    def password() -> str:
        nonlocal asked
        asked = True
        return ""

    try:
        for file in filter(None, (cert, key)):
            file.open("rb").close()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password)
    except ssl.SSLError as error:
        names = " --tls-key ".join(map(str, filter(None, (cert, key))))
        none = f"no certificate with the key that belongs to it, both as PEM ({error.reason})"
        why = "the key is encrypted: give it without a password" if asked else none
        raise SettingsError(f"--tls-cert {names}: {why}") from None
    except OSError as error:
        raise SettingsError(f"TLS: {error.filename}: {error.strerror}") from None


# ---- several


@dataclass(frozen=True)
class Told:
    """What the first worker tells the parent: what it serves, or why it cannot."""

    serves: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    exit_code: int = 0


class Workers:
    """Worker processes that accept from one socket, each with an application of its own. One that
    ends by itself is replaced; a signal to this process ends them all, in-flight requests first.
    """

    def __init__(self, service: Service, listening: socket.socket):
        self._service, self._listening = service, listening
        self._processes: list[SpawnProcess] = []
        self._stopping = threading.Event()

    def run(self, started: Started) -> None:
        """Serve until a signal ends it. Raises `HydraError` if the first worker cannot start."""
        _on_hangup(self._stop)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        count = self._service.settings.workers
        threads = max(1, (os.cpu_count() or 1) // count)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # together no more than cores
        with _shared_metrics():
            try:
                if told := self._start_first():
                    started(told.serves)
                    self._processes += [self._start() for _ in range(count - 1)]
                    self._watch()
            finally:
                self._end()

    def _stop(self, *_: object) -> None:
        self._stopping.set()

    def _start(self, told: Connection | None = None) -> SpawnProcess:
        process = SPAWN.Process(target=work, args=(self._service, self._listening, told))
        process.start()
        return process

    def _start_first(self) -> Told | None:
        """What the first worker tells; None if a signal comes before."""
        receiver, sender = SPAWN.Pipe(duplex=False)
        self._processes = [self._start(sender)]
        sender.close()
        while not self._stopping.is_set():
            if receiver.poll(POLL_SECONDS):
                try:
                    told: Told = receiver.recv()
                except EOFError:
                    self._processes[0].join()
                    code = self._processes[0].exitcode
                    told = Told(fault=f"a worker process ended at its start: exit code {code}")
                if told.fault:
                    error = HydraError(told.fault)
                    error.exit_code = told.exit_code or error.exit_code
                    raise error
                return told
        return None

    def _watch(self) -> None:
        """Replace workers that end, until a signal comes."""
        from prometheus_client.multiprocess import mark_process_dead

        while not self._stopping.is_set():
            wait([process.sentinel for process in self._processes], POLL_SECONDS)
            for place, process in enumerate(self._processes):
                if process.is_alive() or self._stopping.wait(PAUSE_SECONDS):
                    continue
                log.warning("worker %s ended: exit code %s", process.pid, process.exitcode)
                mark_process_dead(process.pid)
                self._processes[place] = self._start()

    def _end(self) -> None:
        self._listening.close()  # with the workers' own copies: then connections are refused
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def work(service: Service, listening: socket.socket, told: Connection | None) -> None:
    """A worker process. The first one tells its parent through `told` that it serves."""
    open_standard_streams()
    if HANGUP is not None:
        signal.signal(HANGUP, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def started(serves: Mapping[str, str]) -> None:
        if told:
            told.send(Told(serves))
            told.close()

    timeout = service.settings.store_timeout
    with suppress(KeyboardInterrupt), logging_to_stderr(service.settings.log):
        try:
            with closing(Store(service.store, timeout=timeout, create=False)) as store:
                run_app(service.app(store), listening, started)
        except HydraError as error:
            if told and not told.closed:
                told.send(Told(fault=str(error), exit_code=error.exit_code))
            else:
                log.error("a worker cannot start: %s", error)
            sys.exit(error.exit_code)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):  # it ends already
                signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    """End as by a signal when the parent is gone, even if it was killed: it replaces no worker."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        logging.getLogger(__name__).warning("the parent process is gone: this worker ends")
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """Workers count in files of one folder, so that any of them has the figures of all."""
    with TemporaryDirectory(prefix="hydra-llm-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[METRICS_FOLDER]
