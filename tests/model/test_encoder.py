"""The encoder against sentence-transformers and bare transformers, and what must not depend on the
batch, the length or the network.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_llm.data_wheels import data_file
from hydra_llm.errors import SettingsError
from hydra_llm.model import encoder as module
from hydra_llm.model.encoder import Encoder, open_encoder
from tests.waiting import FOREVER

TEXTS = [
    "A quiet film about rain.",
    "",
    "Stars & stripes; old war films, twice: " + "very old films " * 12,
    "🙂🙂 emoji only 🎬",
    "שלום עולם — مرحبا بالعالم",
    "nul\x00in the middle\ud800",
    " \t\n",
    "Café naïve Ångström 北京",
]
LEFT = ["Which tag fits?", "night rain", "", "a film " * 30]
RIGHT = ["A heist goes wrong.", "dull song " * 40, "only right", "short"]


def readable(texts: list[str]) -> list[str]:
    """What other libraries can read: without lone surrogates."""
    return [text.replace("\ud800", "?") for text in texts]


def test_minilm_agrees_with_sentence_transformers(minilm: Encoder) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(data_file("minilm").parent), device="cpu").encode(
        readable(TEXTS), normalize_embeddings=True
    )
    ours = minilm.encode(TEXTS)
    assert ours.shape == (len(TEXTS), 384)
    assert ours.dtype == np.float32
    assert ((ours * theirs).sum(1) > 0.99999).all()
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("folder", ["tiny_folder", "longformer_folder"])
def test_pairs_agree_with_a_bare_forward_pass(
    folder: str, pooling: Any, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = str(request.getfixturevalue(folder))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    ours = open_encoder(path, pooling=pooling, max_length=24)
    rows = ours.encode_pairs(LEFT, RIGHT, batch=3)
    for left, right, row in zip(LEFT, RIGHT, rows, strict=True):
        inputs = dict(
            tokenizer(left, right, truncation="longest_first", max_length=24, return_tensors="pt")
        )
        if folder == "longformer_folder":
            inputs.pop("token_type_ids", None)
            inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
            inputs["global_attention_mask"][:, 0] = 1
        with torch.no_grad():
            tokens = model(**inputs).last_hidden_state[0]
        assert torch.allclose(
            tokens.mean(0) if pooling == "mean" else tokens[0], torch.from_numpy(row), atol=1e-5
        )


def test_the_longformers_first_token_sees_past_its_window(longformer_folder: Path) -> None:
    """With local attention alone (window 8, 2 layers) the first token could not know of a word 40
    tokens on.
    """
    encoder = open_encoder(str(longformer_folder), pooling="cls", max_length=64)
    same = ["the " * 40 + last for last in ("song", "war")]
    one, other = encoder.encode_pairs(same, ["", ""])
    assert np.abs(one - other).max() > 1e-4
    assert encoder.max_length == 64


def test_the_window_is_the_models_own_where_that_is_smaller(
    tiny_folder: Path, longformer_folder: Path
) -> None:
    for folder, fits in ((tiny_folder, 40), (longformer_folder, 65)):
        encoder = open_encoder(str(folder), max_length=4096)
        assert encoder.max_length == fits
        encoder.encode(["star " * 500])  # one position too many would be an index error
        assert encoder.cut == 1


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=9), batch=st.integers(1, 4))
def test_a_text_is_encoded_alike_in_every_company(
    tiny: Encoder, texts: list[str], batch: int
) -> None:
    together = tiny.encode(texts, batch=batch)
    alone = np.concatenate([tiny.encode([text]) for text in texts])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.isfinite(together).all()


def test_minilms_rows_do_not_depend_on_the_batch(minilm: Encoder) -> None:
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    assert np.allclose(minilm.encode(TEXTS, batch=3), alone, atol=1e-5)
    pairs = np.concatenate(
        [minilm.encode_pairs([left], [right]) for left, right in zip(LEFT, RIGHT, strict=True)]
    )
    assert np.allclose(
        minilm.encode_pairs(LEFT, RIGHT), pairs, atol=1e-4
    )  # not normalised: values up to 10


def test_order_holds_beyond_what_is_tokenized_at_once(
    tiny: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [word * count for count in range(1, 6) for word in ("film ", "war ", "! ")]
    whole = tiny.encode(texts)
    monkeypatch.setattr(module, "TOKENIZED_AT_ONCE", 4)
    assert np.allclose(tiny.encode(texts, batch=3), whole, atol=1e-5)


def test_nothing_to_encode(tiny: Encoder) -> None:
    assert tiny.encode([]).shape == (0, 16)
    assert tiny.encode_pairs([], []).shape == (0, 16)
    assert tiny.forward_pairs([], []).shape == (0, 16)
    with pytest.raises(ValueError, match="shorter"):
        tiny.encode_pairs(["a"], [])


def test_long_texts_are_cut_by_tokens_and_told_once(
    tiny: Encoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_warned_of_cut", False)
    with caplog.at_level(logging.WARNING):
        rows = tiny.encode(["film " * 31, "film " * 30 + "war", "film " * 30])
        tiny.encode_pairs(["film " * 20], ["war " * 20])
    assert np.allclose(rows[0], rows[2], atol=1e-6)  # [CLS] and [SEP] take two of the 32
    assert np.allclose(rows[1], rows[2], atol=1e-6)
    assert tiny.cut == 3
    assert [record.getMessage() for record in caplog.records] == [
        "2 text(s) longer than the encoder's window were cut to 32 tokens (told once)"
    ]


def test_fine_tuning_learns_and_changes_the_digest(tiny_folder: Path) -> None:
    encoder = open_encoder(str(tiny_folder), max_length=32)
    assert not encoder.training
    before, wanted = encoder.digest, torch.ones(len(LEFT), 16)
    assert torch.allclose(
        encoder.forward_pairs(LEFT, RIGHT),
        torch.from_numpy(encoder.encode_pairs(LEFT, RIGHT)),
        atol=1e-5,
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (encoder.forward_pairs(LEFT, RIGHT) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert encoder.digest != before


def test_encoding_is_without_dropout_even_while_training(tiny: Encoder) -> None:
    expected = tiny.encode(TEXTS)
    tiny.train()
    assert np.array_equal(tiny.encode(TEXTS), expected)
    assert tiny.training


def test_the_digest_names_all_that_changes_a_vector(
    tiny_folder: Path, longformer_folder: Path, tmp_path: Path, save_model: Any
) -> None:
    path = str(tiny_folder)
    tuned = open_encoder(path)
    tuned.model.get_parameter("encoder.layer.0.output.dense.bias").data[0] += 1
    tokenizer = json.loads((save_model(tmp_path / "cased") / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (tmp_path / "cased" / "tokenizer.json").write_text(json.dumps(tokenizer))
    digests = [
        open_encoder(path).digest,
        open_encoder(path, pooling="cls").digest,
        open_encoder(path, max_length=20).digest,
        open_encoder(str(longformer_folder)).digest,
        open_encoder(str(save_model(tmp_path / "other", seed=1))).digest,
        tuned.digest,
    ]
    assert len(set(digests)) == len(digests)


def test_a_saved_encoder_is_the_same_one(
    tiny: Encoder, longformer_folder: Path, tmp_path: Path
) -> None:
    for number, encoder in enumerate((tiny, open_encoder(str(longformer_folder), max_length=32))):
        encoder.save(tmp_path / str(number))
        again = open_encoder(str(tmp_path / str(number)), max_length=32)
        assert again.digest == encoder.digest
        assert np.array_equal(again.encode(TEXTS), encoder.encode(TEXTS))


def test_several_threads_share_an_encoder(tiny: Encoder) -> None:
    expected, wrong = tiny.encode(TEXTS), []

    def work() -> None:
        wrong.extend(
            1
            for _ in range(10)
            if not np.allclose(tiny.encode(TEXTS, batch=2), expected, atol=1e-5)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what cannot be opened


def broken(folder: Path, save_model: Any, how: str) -> str:
    save_model(folder)
    if how == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif how == "truncated":
        (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:2000]
        )
    elif how == "lacks weights":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["encoder.layer.1.output.dense.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "model_type": "no-such-model", "architectures": []})
        )
    return str(folder)


@pytest.mark.parametrize(
    "how", ["empty", "truncated", "lacks weights", "no tokenizer", "unknown type"]
)
def test_a_broken_folder_is_one_line_that_names_it(
    how: str, tmp_path: Path, save_model: Any
) -> None:
    path = broken(tmp_path / "encoder", save_model, how)
    with pytest.raises(SettingsError) as caught:
        open_encoder(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c", "two words", "\x00", ""]
)
def test_an_unknown_name_is_one_line(name: str) -> None:
    with pytest.raises(SettingsError, match="no such folder"):
        open_encoder(name)


def test_a_model_without_padding_is_refused(tmp_path: Path, save_model: Any) -> None:
    folder = save_model(tmp_path / "encoder", "longformer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": None}))
    with pytest.raises(SettingsError, match="padding"):
        open_encoder(str(folder))


# ---- the hub


def test_progress_is_reported_of_many_texts_only(
    tiny: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        reports.append((done, total))

    monkeypatch.setattr(module, "REPORTED_FROM", 3)
    tiny.encode(["a", "b", "c"], progress=progress)
    assert reports == []
    tiny.encode(["a", "b", "c", "d", "e"], batch=2, progress=progress)
    assert reports == [(2, 5), (4, 5), (5, 5)]


@pytest.fixture
def hub(longformer_folder: Path) -> Iterator[str]:
    """A Hugging Face hub on loopback that has one model, under Longformer's name."""
    name, commit = "allenai/longformer-base-4096", "0" * 40

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == f"/api/models/{name}":
                return self.answer(json.dumps({"id": name, "sha": commit, "siblings": []}).encode())
            file = longformer_folder / path.rsplit("/", 1)[-1]
            if path.startswith(f"/{name}/resolve/") and file.is_file():
                return self.answer(file.read_bytes())
            return self.answer(b"{}", 404, "RepoNotFound" if name not in path else "EntryNotFound")

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200, error: str = "") -> None:
            self.send_response(status)
            headers = {
                "Content-Length": len(body),
                "X-Repo-Commit": commit,
                "ETag": f'"{hash(body)}"',
                "X-Error-Code": error,
            }
            for key, value in headers.items():
                if value != "":
                    self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


OPEN = """
from hydra_llm.data_wheels import data_file
from hydra_llm.errors import SettingsError
from hydra_llm.model.encoder import open_encoder
for name in ("allenai/longformer-base-4096", "allenai/no-such-model"):
    try:
        print(open_encoder(name, pooling="cls", max_length=4096).digest)
    except SettingsError as error:
        print(error)
"""


def open_from_hub(endpoint: str, home: Path) -> list[str]:
    """In a process of its own: the hub client reads its environment when it is imported."""
    changed = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", OPEN],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        check=True,
        timeout=FOREVER,
    )
    return run.stdout.splitlines()


@pytest.mark.slow
def test_longformer_loads_from_a_hub_and_then_from_its_cache(
    hub: str, longformer_folder: Path, tmp_path: Path
) -> None:
    digest = open_encoder(str(longformer_folder), pooling="cls", max_length=4096).digest
    unknown = (
        "encoder 'allenai/no-such-model': no such folder, and no such model on the Hugging Face hub"
    )
    assert open_from_hub(hub, tmp_path) == [digest, unknown]
    unreachable = "http://127.0.0.1:9"
    cached, missing = open_from_hub(unreachable, tmp_path)
    assert cached == digest
    assert (
        "'allenai/no-such-model' is not in the local cache and the Hugging Face hub cannot be"
        " reached" in missing
    )
    assert "take 'minilm'" in missing
