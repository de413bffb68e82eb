"""A user's adapter without torch: what `hydra-llm bundles export --onnx` wrote, run by onnxruntime.

    FOLDER/manifest.json     task, settings, statistics; sha256 of every shared file
    FOLDER/encoder.onnx      token ids and mask [1, L] → a vector [1, D]; weights in int8
    FOLDER/tokenizer.json    and tokenizer_config.json
    FOLDER/scorer.onnx       vectors, side features and a user's numbers → scores [C]
    FOLDER/words.npz         the word model, for free texts
    FOLDER/user.json         one user's head and records: all that is personal

A server sends candidates that it made without records, and the device picks (private mode): records
and head never leave it. Needs the extra `device` alone.
Letters: L tokens, D width, C candidates, E side features, P numbers of a head.
"""

from hydra_llm.extras import require

require("device", "scoring on the device")

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions
from tokenizers import Tokenizer

from hydra_llm.config import Settings
from hydra_llm.errors import BundleError
from hydra_llm.history import before
from hydra_llm.model.feature_cache import FeatureCache
from hydra_llm.model.head import Head
from hydra_llm.model.users_file import record_of
from hydra_llm.model.word_model import WordModel
from hydra_llm.pipeline import Pipeline
from hydra_llm.retrieve import Nothing
from hydra_llm.select import LearnedSelector, Selection
from hydra_llm.side_features import Featurizer
from hydra_llm.tasks.base import CohortStats, Task
from hydra_llm.types import Candidate, Query, Record

FORMAT = 1
MANIFEST, USER = "manifest.json", "user.json"
ENCODER, SCORER, TOKENIZER, WORDS = "encoder.onnx", "scorer.onnx", "tokenizer.json", "words.npz"
CHARACTERS_PER_TOKEN = 100  # as model/encoder.py cuts texts
Floats = NDArray[np.float32]


class OnnxEncoder:
    """Texts, or pairs, to vectors, each alone: int8 scales are those of a whole batch."""

    def __init__(self, session: InferenceSession, tokenizer: Tokenizer, entry: Mapping[str, Any]):
        self._session, self._tokenizer = session, tokenizer
        self.width, self.max_length = int(entry["width"]), int(entry["max_length"])
        self.digest = str(entry["digest"])
        self._has_types = "token_type_ids" in {given.name for given in session.get_inputs()}
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_length, strategy="longest_first")

    def encode(self, texts: Sequence[str], **_: Any) -> Floats:
        """[B, D] rows of length 1."""
        rows = self._vectors([self._clean(text) for text in texts])
        unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit

    def encode_pairs(self, left: Sequence[str], right: Sequence[str], **_: Any) -> Floats:
        """[B, D], not normalised."""
        pairs = zip(map(self._clean, left), map(self._clean, right), strict=True)
        return self._vectors(list(pairs))

    def _vectors(self, items: Sequence[Any]) -> Floats:
        rows = np.empty((len(items), self.width), dtype=np.float32)
        for row, encoding in zip(rows, self._tokenizer.encode_batch(items), strict=True):
            inputs = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
            if self._has_types:
                inputs["token_type_ids"] = encoding.type_ids
            tensors = {name: np.array([own], dtype=np.int64) for name, own in inputs.items()}
            row[:] = self._session.run(None, tensors)[0][0]
        return rows

    def _clean(self, text: str) -> str:
        most = CHARACTERS_PER_TOKEN * self.max_length
        return text[:most].encode("utf-8", "replace").decode()


class Inputs(NamedTuple):
    """One group as the scorer's graph takes it."""

    left: Floats  # [D]
    right: Floats | None  # [C, D]; None: label features
    side: Floats  # [C, E]
    place: NDArray[np.int64]  # [1] of the query's text among the known ones, or −1


@dataclass(frozen=True)
class OnnxScorer:
    """What `LearnedSelector` needs of a scorer."""

    session: InferenceSession
    entry: Mapping[str, Any]  # the manifest's "scorer"

    @property
    def side_names(self) -> tuple[str, ...]:
        return tuple(self.entry["side_features"])

    @property
    def hears_llm(self) -> bool:
        return bool(self.entry["hears_llm"])

    @property
    def interaction(self) -> "OnnxScorer":
        return self

    @property
    def by_label(self) -> bool:
        return bool(self.entry["by_label"])

    @property
    def reads_pairs(self) -> bool:
        return bool(self.entry["reads_pairs"])

    def place(self, text: str) -> int:
        """Of a text among those that many users have answered; −1 for others."""
        return int(self.entry["known_texts"].get(text_digest(text), -1))

    def score(self, inputs: Inputs, heads: Sequence[Head | None]) -> Floats:
        """[1, C] with the head of one user; BundleError for a head of another size."""
        size, head = int(self.entry["head_numbers"]), heads[0]
        numbers = np.zeros(size, dtype=np.float32) if head is None else head.numbers
        if len(numbers) != size:
            fault = f"a head of {len(numbers)} numbers, where the scorer takes {size}"
            raise BundleError(f"{USER}: {fault}: export both from one bundle")
        given = {**inputs._asdict(), "head": np.ascontiguousarray(numbers, dtype=np.float32)}
        wanted = {own.name: given[own.name] for own in self.session.get_inputs()}
        scores: Floats = self.session.run(None, wanted)[0]
        return scores[None]

    def shares(self, scores: Floats) -> Floats:
        """As `Scorer.shares`."""
        if self.entry["loss"] == "listwise":
            odds = np.exp(scores - scores.max())
        else:
            odds = 1 / (1 + np.exp(-scores))
        shares: Floats = odds / max(float(odds.sum()), 1e-12)
        return shares

    def parts(self, inputs: Inputs, head: Head | None) -> dict[str, Floats]:
        return {}

    def covariance(self, inputs: Inputs, head: Head | None) -> None:
        return None


class OnnxSelector(LearnedSelector):
    """`LearnedSelector` with vectors and scores by onnxruntime."""

    def arranged(self, text: str, texts: Sequence[str], side: NDArray[np.floating]) -> Any:
        store, scorer, right = self.featurizer.features, self.scorer, None
        if scorer.interaction.reads_pairs:
            left, right = np.zeros(0, np.float32), store.pairs([text] * len(texts), texts)
        else:
            left = store.texts([text])[0]
            right = None if scorer.interaction.by_label else store.texts(texts)
        place = np.array([scorer.place(text)])  # type: ignore[operator]
        return Inputs(left, right, side.astype(np.float32), place)


@dataclass(frozen=True)
class Device:
    """One user's adapter, with the user's records."""

    pipeline: Pipeline
    user: str = ""
    records: tuple[Record, ...] = field(default=(), repr=False)
    heads: Mapping[str, Head] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, folder: Path | str, user: Path | str | None = None, *, cache: Path | None = None
    ) -> Self:
        """Read an exported folder and a user's file (default: `user.json` in it; without one the
        shared head answers). `cache` is a file that keeps vectors of texts.

        Raises:
            BundleError: not there, damaged, newer, or the user's file is of another bundle.
        """
        place = Path(folder)
        manifest = read_manifest(place)
        features = FeatureCache(open_encoder(place, manifest), cache)  # type: ignore[arg-type]
        stats, words = manifest["population"], manifest["word_model"]
        task, settings = Task.from_json(manifest["task"]), Settings.checked(manifest["settings"])
        shares = tuple(stats["label_shares"])
        arrays = dict(np.load(place / WORDS)) if words else {}
        cohort = CohortStats(**{**stats, "label_shares": shares})
        featurizer = Featurizer(task, features, cohort, WordModel.restore(words, arrays))
        scorer: Any = OnnxScorer(open_session(place / SCORER), manifest["scorer"])
        chosen = OnnxSelector(scorer, featurizer, settings)
        vectorize = featurizer.vectorize
        stages = Pipeline(task, Nothing(), settings, selector=chosen, vectorize=vectorize)
        file = Path(user) if user else place / USER
        if user is None and not file.exists():
            return cls(stages)
        return cls(stages, **_user(file, manifest["bundle"]))

    def read(self, texts: Sequence[str]) -> tuple[Candidate, ...]:
        """The texts of an LLM as candidates, the first as that of temperature 0."""
        return self.pipeline.read(texts, greedy=1)[0]

    def choose(self, question: Query | str, candidates: Sequence[Candidate]) -> Selection:
        """The candidates with this user's scores, and the pick; a text is asked as of now."""
        query = Query(self.user, "asked", question) if isinstance(question, str) else question
        visible = before(self.records, query)
        return self.pipeline.select(self.pipeline.context(query, visible, self.heads), candidates)


def text_digest(text: str) -> str:
    """The name of a known text in the manifest."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every file checked; BundleError if one is missing, damaged or newer."""
    manifest = _json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        fault = f"format {manifest.get('format')}, and this version reads {FORMAT}"
        raise BundleError(f"{folder / MANIFEST}: {fault}: export the bundle again")
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path}: missing: export the bundle again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise BundleError(f"{path}: damaged, its sha256 is another one: export it again")
    return manifest


def _user(path: Path, bundle: str) -> dict[str, Any]:
    """Arguments of `Device`."""
    kept = _json(path)
    if kept.get("bundle") != bundle:
        raise BundleError(f"{path}: was exported from another bundle: export it from this one")
    heads = {name: _head(**own) for name, own in kept["heads"].items()}
    records = tuple(record_of(values) for values in kept["records"])
    return {"user": kept["user"], "records": records, "heads": heads}


def _head(numbers: list[float], records: int, until: float | None) -> Head:
    times = -math.inf if until is None else until
    return Head.of(np.array(numbers, dtype=np.float32), records, times)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "make it by `hydra-llm bundles export BUNDLE --onnx FOLDER`"
        raise BundleError(f"{path}: cannot be read ({error}): {fix}") from None
    if not isinstance(value, dict):
        raise BundleError(f"{path}: holds no JSON object: export the bundle again")
    return value


def open_session(path: Path) -> InferenceSession:
    """A graph that runs on one core."""
    options = SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return InferenceSession(path, options, providers=["CPUExecutionProvider"])


def open_encoder(folder: Path, manifest: Mapping[str, Any]) -> OnnxEncoder:
    """The encoder of an exported folder."""
    entry = {**manifest["encoder"], "digest": manifest["files"][ENCODER]}
    return OnnxEncoder(
        open_session(folder / ENCODER), Tokenizer.from_file(str(folder / TOKENIZER)), entry
    )
