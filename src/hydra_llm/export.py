"""A bundle's adapter and one user's head for a device; `hydra_llm.device` has the folder's files.

The graph of the scorer is traced from `Scorer` itself, with a user's numbers as an input: whatever
interaction and head compute is in it. Only heads whose numbers grow with the history are not fixed
inputs. The encoder's weights are int8 with a scale for each output channel: one scale a matrix
lowers the cosine to fp32 from .99 to .96. 7 bits, as processors without VNNI add in 16.
Letters: L tokens, D width, C candidates, E side features, P numbers of a head.
"""

from hydra_llm.extras import require

require("onnx", "an export to ONNX")

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from hydra_llm import __version__
from hydra_llm.bundle import Bundle
from hydra_llm.device import (
    ENCODER,
    FORMAT,
    MANIFEST,
    SCORER,
    USER,
    WORDS,
    OnnxEncoder,
    open_encoder,
    open_session,
    read_manifest,
    text_digest,
)
from hydra_llm.errors import BundleError, UnknownUser
from hydra_llm.model.encoder import Encoder
from hydra_llm.model.groups import Groups
from hydra_llm.model.interactions import LabelBilinear
from hydra_llm.model.onnx_encoder import FLOATS, trace
from hydra_llm.model.scorer import Scorer
from hydra_llm.text import json_text
from hydra_llm.types import ALWAYS

SAME = 1e-3  # between a score of the graph and of the scorer, relative to the largest
PROBE = ("A quiet film about two sailors.", "Senate votes late on the budget, 51 to 49!")


def export_onnx(bundle: Bundle, folder: Path, user: str | None = None) -> dict[str, Any]:
    """Write a device's folder; with `user` also that user's file, which alone is written where the
    folder was exported from this bundle before. Returns bytes by file and the encoder's error.

    Raises:
        BundleError: a part that a graph cannot express; a folder of other things.
        UnknownUser: the bundle has no such user.
    """
    if user is not None and user not in bundle.records:
        raise UnknownUser(f"unknown user '{user}': the bundle has {len(bundle.records)} users")
    known = _present(folder)
    files: dict[str, int] = {}
    if known is None or not bundle.weights or known["bundle"] != bundle.weights:
        scorer = _expressible(bundle)
        folder.mkdir(parents=True, exist_ok=True)
        known = _write_shared(bundle, scorer, folder)
        names = (*known["files"], MANIFEST)
        files = {name: (folder / name).stat().st_size for name in names}
    if user is not None:
        _write(folder / USER, json_text(_of_user(bundle, user)))
        files[USER] = (folder / USER).stat().st_size
    return {"files": files, "least_cosine": known["encoder"]["least_cosine"]}


def _present(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier export, None if it is damaged; BundleError for a folder of other
    things.
    """
    if (folder / MANIFEST).is_file():
        with suppress(BundleError):
            return read_manifest(folder)
        return None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder}: holds other things than an export: choose another folder")
    return None


def _expressible(bundle: Bundle) -> Scorer:
    """The adapter; BundleError that names what a graph cannot express."""
    scorer = bundle.adapter
    if scorer is None:
        raise BundleError("the bundle has no adapter: there is nothing that a device could pick by")
    if bundle.settings.abstention_threshold:
        fault = "setting 'abstention_threshold' needs the head's posterior"
        raise BundleError(f"{fault}, which is not exported: learn with 0")
    if scorer.head.numbers_per_user is None:
        fault = f"head '{scorer.head.name}' of the adapter grows with the history"
        raise BundleError(f"{fault}, so it is no input of a graph: learn with head=linear")
    if bundle.features.encoder._is_longformer:
        fault = f"encoder '{bundle.features.encoder.name}' is a Longformer"
        raise BundleError(f"{fault}, whose attention is no graph: learn with encoder=minilm")
    return scorer


def _write_shared(bundle: Bundle, scorer: Scorer, folder: Path) -> dict[str, Any]:
    (folder / MANIFEST).unlink(missing_ok=True)
    encoder = bundle.features.encoder
    entry = {"pooling": encoder.pooling, "width": encoder.width, "max_length": encoder.max_length}
    encoder.tokenizer.save_pretrained(folder)
    names = ["tokenizer.json", "tokenizer_config.json", ENCODER, SCORER]
    write_encoder(encoder, folder / ENCODER)
    write_scorer(scorer, folder / SCORER)
    if bundle.word_model:
        arrays: dict[str, Any] = bundle.word_model.arrays()
        np.savez_compressed(folder / WORDS, **arrays)
        names.append(WORDS)
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    opened = open_encoder(folder, {"encoder": entry, "files": files})
    manifest = {
        "format": FORMAT,
        "made_by": f"hydra-llm {__version__}",
        "bundle": bundle.weights,
        "task": bundle.task.to_json(),
        "settings": bundle.settings.stored(),
        "population": asdict(bundle.population),
        "word_model": bundle.word_model and bundle.word_model.config(),
        "encoder": {**entry, "least_cosine": _least_cosine(encoder, opened)},
        "scorer": _entry(bundle, scorer),
        "files": files,
    }
    _write(folder / MANIFEST, json_text(manifest))
    return manifest


def _entry(bundle: Bundle, scorer: Scorer) -> dict[str, Any]:
    """The manifest's "scorer"."""
    return {
        "interaction": scorer.interaction.kind,
        "head": scorer.head.name,
        "by_label": scorer.interaction.by_label,
        "reads_pairs": scorer.interaction.reads_pairs,
        "side_features": list(scorer.side_names),
        "head_numbers": scorer.head.numbers_per_user,
        "loss": scorer.loss,
        "hears_llm": scorer.hears_llm,
        "known_texts": known_texts(bundle, scorer),
    }


def known_texts(bundle: Bundle, scorer: Scorer) -> dict[str, int]:
    """Digest of a text → its place among those that many users have answered. The scorer has their
    vectors alone, which int8 changes: the texts are those of records in the bundle.
    """
    interaction = scorer.interaction
    if not isinstance(interaction, LabelBilinear) or interaction.known is None:
        return {}
    texts = sorted({own.input for records in bundle.records.values() for own in records})
    vectors = torch.from_numpy(bundle.features.texts(texts))
    places = interaction.places_of(vectors).tolist()
    return {text_digest(text): p for text, p in zip(texts, places, strict=True) if p >= 0}


def _of_user(bundle: Bundle, user: str) -> dict[str, Any]:
    heads = {
        name: {"numbers": own.numbers.tolist(), "records": own.records, "until": own.until}
        for name, own in bundle.heads_of(user).items()
        if name == "adapter"
    }
    records = [asdict(record) for record in bundle.records[user]]
    for own in records:
        own["span"] = None if own["span"] == ALWAYS else own["span"]
    return {"bundle": bundle.weights, "user": user, "heads": heads, "records": records}


def _write(path: Path, text: str) -> None:
    """A process that is killed leaves the old file or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


# ---- graphs


def write_encoder(encoder: Encoder, path: Path) -> None:
    """The encoder in int8; BundleError if its model cannot be traced."""
    with tempfile.TemporaryDirectory() as place, _reported(f"encoder '{encoder.name}'"):
        whole = Path(place) / ENCODER
        trace(encoder, whole)
        options = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
        quantize_dynamic(whole, path, **options, extra_options=FLOATS)


class _Scoring(nn.Module):
    """The calibrated scores [C] of one group, as a function of tensors alone."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer

    def forward(
        self,
        side: Tensor,
        head: Tensor,
        left: Tensor | None = None,
        right: Tensor | None = None,
        place: Tensor | None = None,
    ) -> Tensor:
        """`side` [C, E], `head` [P], and of `left` [D], `right` [C, D], `place` [1] what the
        interaction reads.
        """
        scorer, interaction = self.scorer, self.scorer.interaction
        of_query = torch.zeros(1, 0) if left is None else left[None]
        mask = torch.ones(1, side.shape[0], dtype=torch.bool)
        groups = Groups(of_query, None if right is None else right[None], side[None], mask)
        if place is None:
            x = interaction(groups)
        else:
            assert isinstance(interaction, LabelBilinear)
            x = interaction.at_places(of_query, place)
        core = scorer.head.score_numbers(interaction, x, head[None]) + scorer.side_score(groups)
        return scorer.calibrated(core, groups)[0]


def _random_inputs(scorer: Scorer, count: int) -> dict[str, Tensor]:
    """A group that the scorer could read, with `count` candidates unless they are its labels."""
    interaction, draw = scorer.interaction, torch.Generator().manual_seed(count)
    if isinstance(interaction, LabelBilinear):
        count = interaction.labels
    width = int(interaction.width)  # type: ignore[arg-type]
    shapes = {"side": (count, len(scorer.side_names)), "head": (scorer.head.numbers_per_user or 0,)}
    if not interaction.reads_pairs:
        shapes["left"] = (width,)
    if not interaction.by_label:
        shapes["right"] = (count, width)
    inputs = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    if getattr(interaction, "known", None) is not None:
        inputs["place"] = torch.tensor([count % 2 - 1])
    return inputs


def write_scorer(scorer: Scorer, path: Path) -> None:
    """The scorer with a user's numbers as an input; BundleError if it cannot be traced."""
    module, what = _Scoring(scorer).eval(), f"head '{scorer.head.name}' of the adapter"
    inputs = _random_inputs(scorer, 3)
    free = {} if scorer.interaction.by_label else {0: torch.export.Dim.DYNAMIC}
    shapes = {name: free if name in ("side", "right") else {} for name in inputs}
    with _reported(what):
        _trace(module, inputs, shapes, "scores", path)
        session = open_session(path)
        for count in (2, 5):
            tried = _random_inputs(scorer, count)
            expected = module(**tried).detach().numpy()
            found = session.run(None, {name: own.numpy() for name, own in tried.items()})[0]
            if np.abs(found - expected).max() > SAME * max(1.0, np.abs(expected).max()):
                raise ValueError("the graph's scores are others")


def _trace(
    module: nn.Module, inputs: dict[str, Tensor], shapes: Any, output: str, path: Path
) -> None:
    with torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            module,
            kwargs=inputs,
            f=path,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Whatever the exporters raise, as one line that names the part; without their warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of torch's, onnxscript's and onnxruntime's own trees
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{what} cannot be exported to ONNX: {line}") from error
    finally:
        logging.disable(disabled)


def _least_cosine(encoder: Encoder, other: OnnxEncoder) -> float:
    """Between vectors of the encoder and of its int8 copy."""
    return float((encoder.encode(PROBE) * other.encode(PROBE)).sum(1).min())
