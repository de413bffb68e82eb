"""A bundle comes back as it was written, or not at all: damage, newer formats, kill -9, two
writers, hostile names.
"""

import gzip
import hashlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_llm.errors import BundleError
from hydra_llm.history import parse_time
from hydra_llm.model import persistence as module
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.persistence import (
    BundleFiles,
    encoder_config,
    encoder_of,
    read_bundle,
    write_bundle,
)
from hydra_llm.types import Record
from tests.waiting import FOREVER

RECORDS = {
    "u1": [
        Record("u1", "r1", "A film\nwith lines", "5", "2020", parse_time("2020"), 0),
        Record("u1", "r2", "\x00\ud800🙂", "", position=1),
    ],
    "שלום": [
        Record(
            "שלום",
            "r1",
            "x",
            "y",
            "2021-02-03T04:05:06.7Z",
            parse_time("2021-02-03T04:05:06.7Z"),
            2**62,
        )
    ],
}


def some_files(tag: int = 1) -> BundleFiles:
    tensors = {
        "base/weight": torch.arange(12.0).reshape(3, 4).t() + tag,  # a view: not contiguous
        "heads": torch.full((5, 2), float(tag), dtype=torch.float16),
        "empty": torch.empty(0, 3),
        "index": torch.tensor(tag),
    }
    config = {
        "task": {"name": "films", "labels": ["1", "5"]},
        "users": {"u1": 0, "שלום": 1},
        "tag": tag,
        "loss": 0.1 + 0.2,
    }
    return BundleFiles(config, tensors, RECORDS, f"# Films {tag}\n\n🙂")


def content_of(folder: Path) -> Path:
    return folder / str(json.loads((folder / "config.json").read_text())["content"])


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the config by hand, with its own sha256 set to match."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    config["sha256"] = module._config_sha256(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_bundle_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written, folder = some_files(), tmp_path / "new" / "bundle"
    write_bundle(folder, written)
    read = read_bundle(folder)
    assert {key: read.config[key] for key in written.config} == written.config
    assert read.records == RECORDS
    assert read.card == written.card == (folder / "README.md").read_text(encoding="utf-8")
    assert read.encoder is None
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


def test_the_config_lists_every_content_file_with_hash_and_size(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format"], config["hydra_llm"]) == (module.FORMAT, module.__version__)
    files = {path.name: path.read_bytes() for path in content_of(tmp_path).iterdir()}
    assert files.pop("users.sqlite")  # which changes in place
    assert config["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in files.items()
    }
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {
        "config.json",
        "README.md",
        config["content"],
    }


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=30, deadline=None)
@given(value=json_values, texts=st.lists(st.text(alphabet=st.characters()), min_size=1, max_size=5))
def test_any_text_and_any_json_survive(
    tmp_path_factory: pytest.TempPathFactory, value: Any, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    records = {
        user: [Record(user, text, text, text, text, (0.1, math.inf), 7) for text in texts]
        for user in texts
    }
    write_bundle(folder, BundleFiles({"value": value}, records=records))
    read = read_bundle(folder)
    assert read.config["value"] == value
    assert read.records == records


def test_a_newer_bundle_replaces_the_older_one_whole(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files(1))
    (tmp_path / "content-00000000").mkdir()  # what a writer that was killed leaves
    read = read_bundle(tmp_path)
    read.config["tag"] = 2
    write_bundle(tmp_path, BundleFiles(read.config, {}, {}, "second"))
    again = read_bundle(tmp_path)
    assert (again.config["tag"], again.tensors, again.records, again.card) == (2, {}, {}, "second")
    assert again.config["created"] == read.config["created"]
    assert [path.name for path in tmp_path.glob("content-*")] == [again.config["content"]]


def test_a_number_that_is_none_is_null(tmp_path: Path) -> None:
    write_bundle(
        tmp_path, BundleFiles({"report": {"loss": math.nan, "worst": [math.inf, -math.inf, 0.5]}})
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert (
        config["report"]
        == {"loss": None, "worst": [None, None, 0.5]}
        == read_bundle(tmp_path).config["report"]
    )


def test_a_bundle_with_nan_of_an_older_version_is_still_read(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files())
    edit_config(tmp_path, lambda config: config.update(loss=math.nan))
    assert math.isnan(read_bundle(tmp_path).config["loss"])


# ---- the encoder


@pytest.mark.slow
def test_a_tuned_encoder_travels_with_the_bundle(tiny: Encoder, tmp_path: Path) -> None:
    for parameter in tiny.parameters():
        parameter.detach().add_(0.01)
    tiny.name = "tuned"
    write_bundle(tmp_path / "bundle", BundleFiles({}, encoder=tiny))
    moved = (tmp_path / "bundle").rename(tmp_path / "elsewhere")
    read = read_bundle(moved)
    encoder = encoder_of(read)
    assert encoder is read.encoder
    assert encoder_config(encoder) == encoder_config(tiny) == read.config["encoder"]
    assert (
        encoder.encode_pairs(["a film"], ["night"]) == tiny.encode_pairs(["a film"], ["night"])
    ).all()


def test_a_named_encoder_must_be_the_same_one(
    tiny: Encoder, tmp_path: Path, save_model: Any
) -> None:
    place = save_model(tmp_path / "encoder")
    made_with = encoder_config(open_encoder(str(place), pooling="cls", max_length=20))
    write_bundle(tmp_path / "bundle", BundleFiles({"encoder": made_with}))
    assert encoder_config(encoder_of(read_bundle(tmp_path / "bundle"))) == made_with
    save_model(place, seed=1)
    with pytest.raises(BundleError, match="not the encoder that the bundle was made with"):
        encoder_of(read_bundle(tmp_path / "bundle"))


def test_an_encoder_put_into_the_bundle_is_refused(
    tiny: Encoder, tmp_path: Path, save_model: Any
) -> None:
    write_bundle(tmp_path, BundleFiles({}, encoder=tiny))
    extra = content_of(tmp_path) / "encoder" / "adapter_config.json"
    extra.write_text("{}")
    with pytest.raises(BundleError, match="does not list"):
        read_bundle(tmp_path)
    extra.unlink()
    edit_config(tmp_path, lambda config: config["encoder"].update(digest="0" * 64))
    with pytest.raises(BundleError, match="not the encoder"):
        read_bundle(tmp_path)
    edit_config(tmp_path, lambda config: config.pop("encoder"))
    with pytest.raises(BundleError, match="no description of its encoder"):
        read_bundle(tmp_path)


# ---- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "name",
    ["weights.safetensors", "README.md", "encoder/model.safetensors", "encoder/tokenizer.json"],
)
@pytest.mark.parametrize(
    ("damage", "message"), [(flip, "damaged"), (cut, "damaged"), (Path.unlink, "missing")]
)
def test_a_damaged_file_is_named(
    name: str, damage: Callable[[Path], None], message: str, tiny: Encoder, tmp_path: Path
) -> None:
    files = some_files()
    files.encoder = tiny
    write_bundle(tmp_path, files)
    damage(content_of(tmp_path) / name)
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(tmp_path)
    assert str(content_of(tmp_path) / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_of_the_config_is_noticed(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files())
    good = (tmp_path / "config.json").read_bytes()
    expected = json.loads(good)
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        (tmp_path / "config.json").write_bytes(bad)
        try:
            read, problem = read_bundle(tmp_path).config, ""
        except BundleError as error:
            read, problem = {}, str(error)
        assert (
            read == expected or str(tmp_path) in problem
        )  # a blank that became another blank does no harm


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("\ufeff\x00", "not JSON"),
        ("[1]", "no bundle of hydra-llm"),
        ('{"model_type": "bert"}', "no bundle of hydra-llm"),
        ('{"format": 6, "hydra_llm": "9.1"}', r"made by a newer hydra-llm \(9.1\); upgrade"),
        ('{"format": 1, "hydra_llm": "0.1"}', "sha256"),
    ],
)
def test_a_config_that_is_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=message) as caught:
        read_bundle(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"no config\.json"):
        read_bundle(tmp_path)


def test_wrong_content_under_a_right_hash_is_an_error(tmp_path: Path) -> None:
    def put(name: str, data: bytes) -> None:
        write_bundle(tmp_path, some_files())
        (content_of(tmp_path) / name).write_bytes(data)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        edit_config(tmp_path, lambda config: config["files"].update({name: entry}))
        if name == "history.jsonl.gz":
            edit_config(tmp_path, lambda config: config.update(format=4))

    for name, data in (
        ("weights.safetensors", b"\xff" * 100),
        ("history.jsonl.gz", b"no gzip"),
        ("history.jsonl.gz", gzip.compress(b'{"user": "u"}\n', mtime=0)),
        ("history.jsonl.gz", gzip.compress(b"[]\n", mtime=0)),
        ("README.md", b"\xff"),
    ):
        put(name, data)
        with pytest.raises(BundleError, match="damaged|cannot be read"):
            read_bundle(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.json",
        "/etc/passwd.json",
        "encoder/../../x.json",
        "a\\..\\x.json",
        "..json",
        "x.pkl",
        "encoder/pytorch_model.bin",
        "encoder/deep/x.json",
        "x.json\n",
    ],
)
def test_no_name_leads_out_of_the_bundle_or_to_a_pickle(name: str, tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files())
    edit_config(
        tmp_path, lambda config: config["files"].update({name: {"sha256": "0", "bytes": 0}})
    )
    with pytest.raises(BundleError, match="no file that a bundle may hold"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("content", ["..", "/etc", "content-0000000g", "content-00000000/..", None])
def test_the_content_folder_cannot_be_another_one(content: str | None, tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files())
    edit_config(tmp_path, lambda config: config.update(content=content))
    with pytest.raises(BundleError, match="no list of files"):
        read_bundle(tmp_path)


# ---- writers


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BundleError, match=r"holds 'config\.json' and is no bundle"):
        write_bundle(tmp_path, some_files())
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"config.json"}
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is a file"):
        write_bundle(tmp_path / "file", some_files())
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "below", some_files())


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files(1))
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(BundleError, match="another process is writing"),
    ):
        write_bundle(tmp_path, some_files(2))
    assert read_bundle(tmp_path).config["tag"] == 1
    write_bundle(tmp_path, some_files(3))


def test_a_writer_does_not_undo_what_another_wrote_since_it_read(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files(1))
    mine, theirs = read_bundle(tmp_path), read_bundle(tmp_path)
    mine.config["tag"], theirs.config["tag"] = 2, 3
    written = write_bundle(tmp_path, theirs, replaces=theirs.version)
    with pytest.raises(
        BundleError, match="was changed by another process since it was read"
    ) as caught:
        write_bundle(tmp_path, mine, replaces=mine.version)
    assert "\n" not in str(caught.value)
    assert read_bundle(tmp_path).config["tag"] == 3
    assert read_bundle(tmp_path).version == written
    assert len(list(tmp_path.glob("content-*"))) == 1
    write_bundle(tmp_path, mine, replaces=written)
    assert read_bundle(tmp_path).config["tag"] == 2
    write_bundle(tmp_path, some_files(4))  # learned anew: replaces whatever stands there
    write_bundle(
        tmp_path / "new", mine, replaces=written
    )  # nothing stands there that could be lost
    assert read_bundle(tmp_path).config["tag"] == 4


def test_what_fails_or_is_interrupted_leaves_the_older_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path, some_files(1))
    real = module._sync
    for fault in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        for last in range(20):  # fail at each place where something is made durable
            done = 0

            def sync(path: Path, last: int = last, fault: BaseException = fault) -> None:
                nonlocal done
                done += 1
                if done > last:
                    raise fault
                real(path)

            monkeypatch.setattr(module, "_sync", sync)
            try:
                write_bundle(tmp_path, some_files(2))
                break
            except (BundleError, KeyboardInterrupt):
                read = read_bundle(tmp_path)
                tag = read.config["tag"]
                assert torch.equal(read.tensors["index"], torch.tensor(tag))
                assert len(list(tmp_path.glob("content-*"))) == 1
        assert last > 5
        monkeypatch.setattr(module, "_sync", real)
        write_bundle(tmp_path, some_files(1))


KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from hydra_llm.model.persistence import BundleFiles, read_bundle, write_bundle
from hydra_llm.types import Record
torch.set_num_threads(1)
folder, seen, clean = Path(sys.argv[1]), set(), 0

def write(tag):
    records = {"u": [Record("u", str(i), f"text {tag}", "x") for i in range(tag % 50 + 1)]}
    heads = {"heads": torch.full((2000,), tag)}
    write_bundle(folder, BundleFiles({"tag": tag}, heads, records, str(tag)))

def events(tag, last=None):
    "Write; count the interpreter's calls and returns, and end without a trace at the last one."
    count = 0
    def profile(frame, event, arg):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(profile)
    write(tag)
    sys.setprofile(None)
    return count

write(0)
full, tag = events(0), 0  # of the smallest bundle
draw = random.Random(int(sys.argv[2]))
for _ in range(40):
    last = draw.randrange(1, full)
    child = os.fork()
    if child == 0:
        tag += 1
        if draw.random() < 0.5:
            write(tag)
            tag += 1
        events(tag, last)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer came to an end"
    read = read_bundle(folder)
    tag = read.config["tag"]
    assert (read.tensors["heads"] == tag).all(), "mixed tensors"
    assert {record.input for record in read.records["u"]} == {f"text {tag}"}, "mixed records"
    assert read.card == str(tag), "mixed card"
    clean += len(list(folder.glob("content-*"))) == 1
    seen.add(tag)
write(tag + 1)
assert len(list(folder.glob("content-*"))) == 1, "left-overs stay"
print(len(seen), clean)
"""


@pytest.mark.slow
def test_kill_9_leaves_the_old_or_the_new_bundle(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "bundle"), "0"],
        capture_output=True,
        text=True,
        timeout=FOREVER,
    )
    assert run.returncode == 0, run.stderr
    bundles, clean = map(int, run.stdout.split())
    assert bundles > 3  # the writers got somewhere
    assert clean < 40  # and some were hit in the middle of writing


def test_a_reader_never_sees_a_mix_while_a_writer_replaces(tmp_path: Path) -> None:
    write_bundle(tmp_path, some_files(0))
    stop = threading.Event()

    def write() -> None:
        tag = 1
        while not stop.is_set():
            write_bundle(tmp_path, some_files(tag))
            tag += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        tags = set()
        reads, deadline = 0, time.monotonic() + FOREVER
        while (
            reads < 40 or len(tags) < 3
        ) and time.monotonic() < deadline:  # on a slow disk the writer may need a while
            reads += 1
            read = read_bundle(tmp_path)
            tags.add(read.config["tag"])
            assert read.tensors["index"].item() == read.config["tag"]
            assert read.card.startswith(f"# Films {read.config['tag']}\n")
    finally:
        stop.set()
        writer.join()
    assert len(tags) > 2  # the reader met several bundles
