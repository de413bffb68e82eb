"""`hydra-llm serve` as a deployment has it: several processes, TLS, behind a proxy, secrets in
files.
"""

import os
import re
import signal
import ssl
import subprocess
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hydra_llm.cli.main import run
from hydra_llm.environment import read_secret_files
from hydra_llm.errors import SettingsError
from hydra_llm.store.store import Store
from tests.waiting import FOREVER, until

from .conftest import records_of, running
from .test_processes import SERVE, served

slow = pytest.mark.slow


def children(pid: int) -> list[int]:
    """The worker processes of a server."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    workers = []
    for child in listed:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                workers.append(int(child))
    return sorted(workers)


def fake(tmp_path: Path) -> list[str]:
    return ["--llm", "fake:echo", "--store", f"sqlite:///{tmp_path / 's.db'}"]


# ---- workers


@slow
def test_workers_are_one_server_of_one_store(url: str) -> None:
    """What one worker is told all know, one that is killed is replaced, and the figures are those
    of all. Each request has a connection of its own, so that any worker may get it.
    """
    message = {"role": "user", "content": "the battle for the bridge"}
    body = {"model": "fake:echo", "messages": [message], "user": "ada"}
    sent = [{"id": r.id, "input": r.input, "output": r.output} for r in records_of("ada")]
    asked = 0

    def ask() -> httpx2.Response:
        nonlocal asked
        asked += 1
        return httpx2.post(f"{at}/v1/chat/completions", json=body, timeout=FOREVER)

    def counted() -> float:
        figures = httpx2.get(f"{at}/metrics", timeout=FOREVER).text
        answers = re.findall(r'hydra_answers_total\{reason="personal"\} (\S+)', figures)
        return sum(map(float, answers))

    where = ["--llm", "fake:echo", "--store", url, "--workers", "3"]
    with served(*where) as (process, at, lines):
        assert [line.startswith("serving on ") for line in lines].count(True) == 1
        until(lambda: len(children(process.pid)) == 3)
        added = httpx2.post(f"{at}/v1/users/ada/records", json={"records": sent}, timeout=FOREVER)
        assert added.json()["added"] == 20
        for _ in range(12):
            assert ask().headers["x-hydra-personalized"] == "true"
        assert counted() == asked

        before = children(process.pid)
        os.kill(before[1], signal.SIGKILL)
        until(lambda: len(now := children(process.pid)) == 3 and now != before)
        for _ in range(12):
            with suppress(httpx2.TransportError):  # one that the killed worker had accepted
                assert ask().status_code == 200
        assert counted() >= 24 - 1
        deleted = httpx2.delete(f"{at}/v1/users/ada", timeout=FOREVER).json()["deleted"]
        assert deleted["records"] == 20
        reasons = Counter(ask().headers["x-hydra-personalized"] for _ in range(9))
        assert set(reasons) == {"false; reason=unknown-user"}
        workers = children(process.pid)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert process.stderr is not None
    log = process.stderr.read().decode()
    assert log.count("ended: exit code -9") == 1
    assert "Traceback" not in log


@slow
def test_workers_share_the_jobs(url: str) -> None:
    """Each waiting job is run once, by whichever worker claims it."""
    with served("--llm", "fake:echo", "--store", url, "--workers", "3") as (process, _, _):
        store = Store(url)
        for number in range(12):
            store.add_records(f"u{number}", records_of(f"u{number}", 1))
            assert store.add_job(f"job{number}", f"u{number}", "fit")

        def ended() -> list[str]:
            jobs = [store.job(f"u{number}", f"job{number}") for number in range(12)]
            return [job.error for job in jobs if job and job.state == "failed"]

        until(lambda: len(ended()) == 12)
        assert set(ended()) == {"there is no bundle: nothing to fit"}
        store.close()
    assert process.stderr is not None
    assert process.stderr.read().decode().count("jobs: a fit failed") == 12


@slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*SERVE, *fake(tmp_path), "--workers", "2"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr as lines:
        assert any(line.startswith("serving on ") for line in lines)
        until(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
        process.kill()
        process.wait(FOREVER)
        until(lambda: not [pid for pid in workers if alive(pid)])


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent to read how."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@slow
def test_workers_that_cannot_start_end_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = fake(tmp_path)
    store = Store(where[3])
    store.set_bundle(f"0123456789abcdef:{tmp_path / 'gone'}")
    store.close()
    command = [*SERVE, *where, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FOREVER)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("hydra-llm: ")
    assert "gone" in line
    assert "Traceback" not in done.stderr


# ---- TLS


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem for localhost with key.pem; both.pem; another key; an encrypted key."""
    folder = tmp_path_factory.mktemp("tls")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    openssl(folder, "req", "-x509", *new, "key.pem", "-out", "cert.pem", "-days", "2", *name)
    openssl(folder, "genpkey", "-algorithm", "ED25519", "-out", "other.pem")
    openssl(folder, "pkey", "-in", "key.pem", "-aes256", "-passout", "pass:x", "-out", "locked.pem")
    both = (folder / "cert.pem").read_text() + (folder / "key.pem").read_text()
    (folder / "both.pem").write_text(both)
    return folder


@slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_https(tmp_path: Path, tls: Path, workers: str) -> None:
    """With a certificate that clients verify; HTTP is refused."""
    pems = ["--tls-cert", str(tls / "cert.pem"), "--tls-key", str(tls / "key.pem")]
    if workers == "1":
        pems = ["--tls-cert", str(tls / "both.pem")]
    with served(*fake(tmp_path), *pems, "--workers", workers) as (_, at, _):
        assert at.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(tls / "cert.pem"))
        for _ in range(4):
            answer = httpx2.get(f"{at}/v1/models", verify=trusted, timeout=FOREVER)
            assert answer.status_code == 200
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{at.replace('https', 'http')}/v1/models", timeout=FOREVER)
        with pytest.raises(httpx2.ConnectError, match="certificate"):
            httpx2.get(f"{at}/v1/models", timeout=FOREVER)


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("none.pem", None, "none.pem: No such file or directory"),
        ("cert.pem", "none.pem", "none.pem: No such file or directory"),
        ("cert.pem", "other.pem", "no certificate with the key that belongs to it, both as PEM"),
        ("cert.pem", "locked.pem", "the key is encrypted: give it without a password"),
        ("cert.pem", None, "no certificate with the key that belongs to it, both as PEM"),
        ("key.pem", None, "no certificate with the key that belongs to it, both as PEM"),
        (None, "key.pem", "--tls-key: name the certificate too, by --tls-cert"),
    ],
)
def test_pem_files_that_cannot_be_used_are_one_line(
    tmp_path: Path,
    tls: Path,
    capsys: pytest.CaptureFixture[str],
    cert: str | None,
    key: str | None,
    message: str,
) -> None:
    given = {"--tls-cert": cert, "--tls-key": key}
    flags = [part for flag, name in given.items() if name for part in (flag, str(tls / name))]
    assert run(["serve", *fake(tmp_path), "--port", "0", *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)
    assert list(tmp_path.iterdir()) == []  # no store was made


# ---- behind a proxy


@slow
@pytest.mark.parametrize(("named", "scheme"), [("127.0.0.1", "https"), ("10.0.0.0/8", "http")])
def test_only_a_named_proxy_is_believed(tmp_path: Path, named: str, scheme: str) -> None:
    """Which scheme the client used shows where the server writes a URL: in a redirect. Who names a
    proxy needs a key: others can reach it.
    """
    where = [*fake(tmp_path), "--proxy", named]
    with served(*where) as (_, at, lines):
        (key,) = (line.split()[-1] for line in lines if line.startswith("admin key"))
        said = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9"}
        assert httpx2.get(f"{at}/v1/models", headers=said).status_code == 401
        answer = httpx2.get(f"{at}/docs/", headers=said | {"host": "llm.example"}, timeout=FOREVER)
        assert answer.headers["location"] == f"{scheme}://llm.example/docs"
        said["authorization"] = f"Bearer {key}"
        assert httpx2.get(f"{at}/v1/models", headers=said, timeout=FOREVER).status_code == 200


def test_nobody_is_believed_without_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even this machine, which uvicorn trusts by default."""
    from .test_settings import served as would_run

    config = would_run(monkeypatch, "--store", f"sqlite:///{tmp_path / 's.db'}")
    assert not config.proxy_headers


@pytest.mark.parametrize(
    "bad", ["proxy=*", "proxy=10.0.0.1/8", "root_path=llm", "workers=0", "user_limits=5"]
)
def test_bad_settings_of_a_deployment_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    assert run(["serve", *fake(tmp_path), "--port", "0", "--set", bad]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"serve.{bad.partition('=')[0]}" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_root_path_is_removed_by_the_proxy_or_here(store: Store, prefix: str) -> None:
    """Paths mean the same with the prefix and without it, also which of them need a key."""
    store.add_records("a/b", records_of("a/b"))
    async with running(store, root_path="/llm/") as world:
        http = world.http
        models = await http.get(f"{prefix}/v1/models")
        assert models.status_code == 200
        records = await http.get(f"{prefix}/v1/users/a%2Fb/records")
        assert len(records.json()["data"]) == 20
        page = (await http.get(f"{prefix}/docs")).text
        assert "/llm/openapi.json" in page
        scripts = re.findall(r'(?:src|href)="(/[^"]+)"', page)
        assert scripts
        for path in scripts:
            assert path.startswith("/llm/")
            assert (await http.get(path)).status_code == 200
        assert run(["keys", "create", "--admin", "--store", str(store.url)]) == 0
        for path in ("/health/liveness", "/metrics"):
            assert (await http.get(f"{prefix}{path}")).status_code == 200
        for path in ("/v1/models", "/v1/users/a%2Fb/records"):
            assert (await http.get(f"{prefix}{path}")).status_code == 401


# ---- secrets in files


def test_a_secret_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret in a file\n")
    for name in ("HYDRA_ADMIN_KEY", "OPENAI_API_KEY", "PGPASSWORD"):
        monkeypatch.setenv(f"{name}_FILE", str(secret))
        monkeypatch.setenv(name, "")
    read_secret_files()
    read_secret_files()  # a second command of the process reads nothing again
    got: dict[str, Any] = {name: os.environ[name] for name in ("HYDRA_ADMIN_KEY", "PGPASSWORD")}
    assert set(got.values()) == {"a secret in a file"}
    monkeypatch.setenv("PGPASSWORD_FILE", str(secret))
    with pytest.raises(SettingsError, match="PGPASSWORD and PGPASSWORD_FILE are both set"):
        read_secret_files()
    monkeypatch.setenv("PGPASSWORD", "")
    monkeypatch.setenv("PGPASSWORD_FILE", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="PGPASSWORD_FILE .*none: No such file"):
        read_secret_files()


@pytest.mark.parametrize(("length", "warned"), [(16, True), (31, True), (32, False), (0, False)])
def test_a_short_admin_key_is_warned_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    warned: bool,
) -> None:
    monkeypatch.setenv("HYDRA_ADMIN_KEY", "k" * length)
    folder = ["--store", f"sqlite:///{tmp_path}"]  # where no store can be: the server ends
    assert run(["serve", "--llm", "fake:echo", *folder, "--port", "0"]) != 0
    said = capsys.readouterr().err
    assert ("warning: HYDRA_ADMIN_KEY has fewer than 32 characters" in said) == warned
    assert "kkk" not in said
