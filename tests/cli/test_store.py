"""`hydra-llm store`: migration, check, backup, restore and scrub."""

import json
from pathlib import Path

import pytest
import sqlalchemy as sa

from hydra_llm.cli.main import run
from hydra_llm.store.migrate import LATEST
from hydra_llm.store.store import Store
from hydra_llm.types import Record


def test_a_store_is_created_checked_backed_up_and_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, other, backup = (
        f"sqlite:///{tmp_path / 'a.db'}",
        f"sqlite:///{tmp_path / 'b.db'}",
        str(tmp_path / "backup.db"),
    )
    assert run(["store", "migrate", "--store", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"from": None, "to": LATEST}
    store = Store(url)
    store.add_records("ada", [Record("ada", "r1", "question", "yes")])
    store.close()
    assert run(["store", "migrate", "--store", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"from": LATEST, "to": LATEST}
    assert run(["store", "backup", backup, "--store", url]) == 0
    assert f"wrote {backup}: it holds users' texts" in capsys.readouterr().err
    assert run(["store", "restore", backup, "--store", other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 1
    assert run(["store", "scrub", "--store", other]) == 0
    assert run(["store", "check", "--store", other, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["faults"], report["rows"]["users"]) == ([], 1)


def test_an_error_of_a_store_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.db"
    url = f"sqlite:///{file}"
    Store(url).close()
    for arguments, message in (
        (
            ["check", "--store", "nonsense"],
            "store 'nonsense': no database URL: sqlite:///FILE or postgresql+psycopg://...",
        ),
        (["restore", str(tmp_path / "none.db"), "--store", url], "none.db: no such file"),
        (["backup", str(file), "--store", url], "a.db: exists already, name a new file"),
    ):
        assert run(["store", *arguments]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP INDEX ix_jobs_state")
    engine.dispose()
    assert run(["store", "check", "--store", url]) == 1
    assert "unlike the schema: add_index" in capsys.readouterr().err
    with sa.create_engine(url).begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for command in ("check", "migrate"):
        assert run(["store", command, "--store", url]) == 2
        message = f"which a newer hydra-llm has made: this one knows {LATEST}"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "store check",
        "store scrub",
        "store backup FOLDER/out.db",
        "keys list",
        "keys revoke x",
        "bundles show",
        "users list",
        "users show ada",
        "users export ada",
        "users delete ada",
        "learn --llm fake:echo --out FOLDER/bundle",
    ],
)
def test_a_misspelt_store_is_one_line_and_makes_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    Store(f"sqlite:///{tmp_path / 'live.db'}").close()
    words = command.replace("FOLDER", str(tmp_path)).split()
    assert run([*words, "--store", f"sqlite:///{tmp_path / 'liv.db'}"]) == 2
    error = capsys.readouterr().err
    assert f"there is no such file: did you mean sqlite:///{tmp_path / 'live.db'}?" in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["live.db"]


def test_commands_that_make_a_store_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("store migrate", "keys create --admin", f"store restore {tmp_path / '1.db'}"):
        url = f"sqlite:///{tmp_path / str(len(list(tmp_path.iterdir())) + 1)}.db"
        assert run([*command.split(), "--store", url]) == 0
        assert f"store {url}: created" in capsys.readouterr().err


@pytest.mark.parametrize("id", ["", " ", "a\nb", "q" * 201, "\udcff"])
def test_no_key_is_made_for_a_user_whom_no_request_could_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], id: str
) -> None:
    url = f"sqlite:///{tmp_path / 'live.db'}"
    assert run(["keys", "create", "--user", "ada", "--user", id, "--store", url]) == 2
    error = capsys.readouterr().err
    assert "no request could name that user" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_key_of_one_user_named_twice_is_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'live.db'}"
    words = ["--user", "ada", "--user", "ada", "--json", "--store", url]
    assert run(["keys", "create", *words]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == "ada"
