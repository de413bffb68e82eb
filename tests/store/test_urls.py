"""Which database a store is in: any name of a file, no file by mistake, no secret in a message."""

import os
from pathlib import Path

import pytest
import sqlalchemy as sa

from hydra_llm.errors import SettingsError, StoreError
from hydra_llm.store.backup import backup, open_backup, restore
from hydra_llm.store.database import Database, create_engine
from hydra_llm.store.store import Store
from hydra_llm.store.urls import file_url, parse_url, shown
from hydra_llm.types import Record

ODD_NAMES = ["what?.db", "50%25.db", "a%20b.db", "a b#c.db", "x?mode=ro.db", "茶.db", "file:y.db"]
ADA = [Record("ada", "1", "tea", "green")]


@pytest.mark.parametrize("name", [*ODD_NAMES, os.fsdecode(b"caf\xe9.db")])
def test_a_file_has_the_name_that_was_given(tmp_path: Path, name: str) -> None:
    (tmp_path / "b").mkdir()
    live = Store(f"sqlite:///{tmp_path / name}")
    live.add_records("ada", ADA)
    backup(live, tmp_path / "b" / name)
    live.close()
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [name]
    assert [file.name for file in (tmp_path / "b").iterdir()] == [name]
    saved = open_backup(tmp_path / "b" / name)
    target = Store(f"sqlite:///{tmp_path / 'new.db'}")
    assert restore(target, saved)["records"] == 1
    for store in (saved, target):
        store.close()
    assert shown(file_url(Path(name))).isprintable()


def test_a_backup_is_read_in_a_folder_that_nobody_may_write(tmp_path: Path) -> None:
    live = Store(f"sqlite:///{tmp_path / 'live.db'}")
    live.add_records("ada", ADA)
    file = tmp_path / "saved.db"
    backup(live, file)
    live.close()
    before = file.read_bytes()
    saved = open_backup(file)
    assert saved.records("ada")[1][0].output == "green"
    with pytest.raises(StoreError, match="readonly"):
        saved.add_records("bob", ADA)
    assert [path.name for path in tmp_path.glob("saved*")] == ["saved.db"], "no log beside it"
    saved.close()
    assert file.read_bytes() == before


def test_the_latest_rows_of_a_store_in_use_are_in_its_log(tmp_path: Path) -> None:
    live = Store(f"sqlite:///{tmp_path / 'live.db'}")
    live.add_records("ada", ADA)
    saved = open_backup(tmp_path / "live.db")
    assert saved.users() == ["ada"]
    for store in (saved, live):
        store.close()


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0", b"no database", "cut", "foreign"])
def test_what_is_no_backup_is_refused_and_left_alone(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "saved.db"
    if content == "cut":
        live = Store(f"sqlite:///{tmp_path / 'live.db'}")
        live.add_records("ada", [Record("ada", str(i), "tea " * 200, "green") for i in range(99)])
        backup(live, file)
        live.close()
        content = file.read_bytes()[:-8192]
    if content == "foreign":
        with sa.create_engine(file_url(file)).begin() as connection:
            connection.exec_driver_sql("CREATE TABLE flowers (name TEXT)")
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(StoreError) as caught:
        open_backup(file)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def test_a_backup_onto_anything_that_is_there_is_refused(tmp_path: Path) -> None:
    live = Store(f"sqlite:///{tmp_path / 'live.db'}")
    live.add_records("ada", ADA)
    (tmp_path / "link.db").symlink_to(tmp_path / "nowhere" / "x.db")
    for name, fault in (("live.db", "exists already"), (".", "a folder"), ("link.db", "exists")):
        with pytest.raises(StoreError, match=fault):
            backup(live, tmp_path / name)
    with pytest.raises(StoreError, match="unable to open"):
        backup(live, tmp_path / "no folder" / "x.db")
    live.close()
    assert {file.name for file in tmp_path.iterdir()} == {"live.db", "link.db"}


def test_a_backup_on_a_full_disk_leaves_no_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Store(f"sqlite:///{tmp_path / 'live.db'}")
    live.add_records("ada", [Record("ada", str(i), "tea " * 999, "green") for i in range(99)])

    def small(store: Store, url: sa.URL, **options: object) -> None:
        init(store, url)

        @sa.event.listens_for(store.engine, "begin")
        def limit(connection: sa.Connection) -> None:
            connection.exec_driver_sql("PRAGMA max_page_count = 60")  # SQLITE_FULL, as a full disk

    init = Store.__init__
    monkeypatch.setattr(Store, "__init__", small)
    with pytest.raises(StoreError, match="full"):
        backup(live, tmp_path / "saved.db")
    live.close()
    assert [file.name for file in tmp_path.iterdir()] == ["live.db"]


def test_a_missing_store_is_not_made_and_the_nearest_is_named(tmp_path: Path) -> None:
    Store(f"sqlite:///{tmp_path / 'live.db'}").close()
    (tmp_path / "lives.db").write_text("no database")
    (tmp_path / "empty.db").touch()
    for name, fix in (
        ("liv.db", f"there is no such file: did you mean sqlite:///{tmp_path / 'live.db'}"),
        ("zebra.db", "there is no such file: `hydra-llm store migrate --store sqlite:"),
        ("empty.db", "it has no tables"),
        (".", "is a folder"),
        ("no folder/x.db", "there is no such file"),
    ):
        with pytest.raises(StoreError) as caught:
            Store(f"sqlite:///{tmp_path / name}", create=False)
        assert fix in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"live.db", "lives.db", "empty.db"}
    assert not (tmp_path / "empty.db").stat().st_size


def test_a_file_of_another_program_gets_no_tables(tmp_path: Path) -> None:
    file = tmp_path / "flowers.db"
    with sa.create_engine(file_url(file)).begin() as connection:
        connection.exec_driver_sql("CREATE TABLE flowers (name TEXT)")
    before = file.read_bytes()
    for create in (True, False):
        with pytest.raises(StoreError, match="hydra-llm has not made its tables: take another"):
            Store(f"sqlite:///{file}", create=create)
    assert file.read_bytes() == before, "not even its journal mode"


def test_a_database_without_tables_is_left_as_it_is(url: str) -> None:
    database = Database(url)
    if not database.on_sqlite:
        with pytest.raises(StoreError, match="no tables of hydra-llm: `hydra-llm store migrate`"):
            Store(url, create=False)
        with database.reading() as connection:
            assert not sa.inspect(connection).get_table_names()
    database.close()
    assert [Store(url).created, Store(url).created] == [True, False]
    Store(url, create=False).close()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_name_of_postgresql_and_any_password(scheme: str) -> None:
    url = parse_url(f"{scheme}://ada:p%40s%25%2F%3A%3F%23@host:5/db?sslpassword=hidden-2")
    assert (url.drivername, url.password) == ("postgresql+psycopg", "p@s%/:?#")
    assert shown(url) == "postgresql+psycopg://ada:***@host:5/db"


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("postgresql://ada:my@secret-word@host/db", "write @ in a password"),
        ("postgresql://ada:secret-word@host:port/db", "no database URL"),
        ("postgresql:ada:secret-word", "no database URL"),
        ("postgresql+psycopg2://ada:secret-word@host/db", r"psycopg2 is not supported"),
        ("sqlite:///:memory:", "name a file"),
        ("sqlite:///", "name a file"),
        ("sqlite://secret-word@host/db", "name a file"),
    ],
)
def test_a_url_that_is_refused_shows_no_secret(url: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault) as caught:
        parse_url(url)
    assert "secret-word" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_postgresql_that_is_not_utf8_is_refused_in_one_line(url: str) -> None:
    if url.startswith("sqlite"):
        return  # it has no other encodings
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        for encoding in ("SQL_ASCII", "LATIN1"):
            name = f"{sa.make_url(url).database}_{encoding.lower()}"
            locale = "TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
            connection.exec_driver_sql(f"CREATE DATABASE {name} ENCODING '{encoding}' {locale}")
            other = sa.make_url(url).set(database=name).render_as_string(hide_password=False)
            with pytest.raises(StoreError, match=f"has the encoding {encoding}: create one by"):
                Store(other)
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_pooler_gets_no_options_and_no_prepared_statements(url: str) -> None:
    engine = create_engine(url, timeout=7.5)
    if engine.dialect.name == "sqlite":
        return
    seen: dict[str, object] = {}

    @sa.event.listens_for(engine, "do_connect")
    def note(
        dialect: object, record: object, arguments: object, options: dict[str, object]
    ) -> None:
        seen.update(options)

    with engine.connect() as connection:
        for _ in range(9):  # psycopg would prepare it at the sixth time
            assert connection.scalar(sa.text("SHOW statement_timeout")) == "7500ms"
        assert connection.scalar(sa.text("SELECT count(*) FROM pg_prepared_statements")) == 0
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        raw.autocommit = True
        outside = raw.execute("SHOW statement_timeout").fetchone()
        assert outside == ("0",), "a setting of the session would reach others behind a pooler"
    engine.dispose()
    assert "options" not in seen
