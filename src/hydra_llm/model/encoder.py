"""Encoder φ: texts, or pairs of texts, to vectors (paper: the Longformer under both scorers).

transformers is imported when the first encoder is opened. Knows no users and no heads.
Letters: B texts or pairs, L tokens, H width.
"""

from hydra_llm.extras import require

require("learn", "an encoder")

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hydra_llm.data_wheels import data_file
from hydra_llm.errors import SettingsError
from hydra_llm.model.precision import Precision, in_precision

if TYPE_CHECKING:
    from hydra_llm.model.onnx_encoder import Graph

Pooling = Literal["mean", "cls"]
Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)

HUB_TIMEOUT = 10.0  # seconds for the question whether the hub is there
TOKENIZED_AT_ONCE = 1024  # texts in memory as tokens; among them, those of like length are batched
CHARACTERS_PER_TOKEN = 100  # at most: a longer word is one unknown token
GRAPH_TOKENS = 96  # the longest text for which ONNX Runtime is the faster one in fp32
REPORTED_FROM = 256  # fewer texts are encoded without a report of progress
# Tokenizers that give the same tokens of these texts are the same, whatever wrote their files.
PROBE = ["", "The Café, 12.5% of 北京's 🙂 naïve\tTEXT\x00!", ("left Side", "right side\n")]
_warned_of_cut = False


class Encoder(torch.nn.Module):
    """A transformer, its tokenizer and its pooling. Thread-safe, except in training mode."""

    precision: Precision = "fp32"
    graph: "Graph | None" = None  # by which `encode` and `encode_pairs` run, instead of torch

    def __init__(self, model: Any, tokenizer: Any, name: str, pooling: Pooling, max_length: int):
        super().__init__()
        if getattr(model, "pooler", None) is not None:
            # unused here, and random where a checkpoint lacks it: it would change the digest
            model.pooler = None
        self.model, self.tokenizer = model, tokenizer
        self.name, self.pooling = name, pooling
        self.max_length = min(max_length, _window(model))
        self.width: int = model.config.hidden_size
        self.cut = 0  # how many texts were longer than `max_length` tokens so far
        types = getattr(model.config, "type_vocab_size", 0)
        self._has_types = types > 1 and "token_type_ids" in tokenizer.model_input_names
        self._is_longformer = hasattr(model.config, "attention_window")
        # Set once and called directly: the tokenizer's own __call__ sets these anew each time,
        # which is slow and not thread-safe.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.enable_truncation(self.max_length, strategy="longest_first")
        self._digest: tuple[int, str] | None = None
        self._tensors: list[Tensor] | None = None  # walking the modules costs more than a look-up

    @property
    def digest(self) -> str:
        """sha256 over weights (and their precision), tokenizer, pooling, max_length: the key of
        cached features.
        """
        if self._tensors is None:
            self._tensors = [*self.model.parameters(), *self.model.buffers()]
        # grows with every step of an optimizer and every load
        version = sum(tensor._version for tensor in self._tensors)
        if self._digest is None or self._digest[0] != version:
            made = [self.pooling, self.max_length, *["int8"] * (self.precision == "int8")]
            hasher = hashlib.sha256(json.dumps(made).encode())
            tokens = [encoding.ids for encoding in self._backend.encode_batch(PROBE)]
            hasher.update(json.dumps([sorted(self._backend.get_vocab().items()), tokens]).encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                hasher.update(flat.view(torch.uint8).numpy().data)
            self._digest = version, hasher.hexdigest()
        return self._digest[1]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `.to()` and its like call: they replace the tensors."""
        self._digest = self._tensors = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def encode(
        self, texts: Sequence[str], batch: int = 32, progress: Progress | None = None
    ) -> np.ndarray:
        """Each text alone, [B, H] float32 with rows of length 1: a dot product is a cosine.
        `progress` is called with (done, total) texts.
        """
        return normalize(self._encode(self._clean(texts), batch, progress), dim=1).numpy()

    def encode_pairs(
        self,
        left: Sequence[str],
        right: Sequence[str],
        batch: int = 16,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Each pair as one text (`cross`), [B, H] float32, not normalised."""
        pairs = list(zip(self._clean(left), self._clean(right), strict=True))
        return self._encode(pairs, batch, progress).numpy()

    def forward_pairs(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        """As `encode_pairs`, in one batch, with gradients and (in training mode) dropout."""
        pairs = list(zip(self._clean(left), self._clean(right), strict=True))
        if not pairs:
            return torch.empty(0, self.width)
        return self.pooled(self._inputs(self._tokenize(pairs)))

    def at(self, precision: Precision) -> "Encoder":
        """The same weights, which are of fp32, in another precision; its features are others."""
        if precision in (self.precision, "fp32"):
            return self
        other = self.of(in_precision(self.model, precision))
        other.precision = precision
        return other

    def by_graph(self, graph: "Graph | None") -> "Encoder":
        """The same encoder, by ONNX Runtime; by torch if it is None."""
        other = self.of(self.model)
        other.precision, other.graph = self.precision, graph
        return other

    def of(self, model: Any) -> "Encoder":
        """This tokenizer and pooling, with another model."""
        return Encoder(model, self.tokenizer, self.name, self.pooling, self.max_length).eval()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None}  # another process opens its own

    def save(self, folder: Path) -> None:
        """Write model and tokenizer so that `open_encoder(str(folder))` gives the same digest."""
        with _quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @torch.inference_mode()
    def _encode(self, texts: Sequence[Any], batch: int, progress: Progress | None) -> Tensor:
        rows, training = torch.empty(len(texts), self.width), self.training
        if training:
            self.eval()  # without dropout
        try:
            for start in range(0, len(texts), TOKENIZED_AT_ONCE):
                encodings = self._tokenize(texts[start : start + TOKENIZED_AT_ONCE])
                by_length = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
                for first in range(0, len(by_length), batch):
                    group = by_length[first : first + batch]
                    vectors = self._run(self._inputs([encodings[i] for i in group]))
                    rows[[start + i for i in group]] = vectors.float().cpu()
                    if progress is not None and len(texts) > REPORTED_FROM:
                        progress(start + min(first + batch, len(by_length)), len(texts))
        finally:
            if training:
                self.train()
        return rows

    def _clean(self, texts: Sequence[str]) -> list[str]:
        """Replace lone surrogates, which JSON can carry and no tokenizer reads, and cut what is
        longer than any window: to tokenize a text of megabytes first would take a minute.
        """
        most = CHARACTERS_PER_TOKEN * self.max_length
        return [text[:most].encode("utf-8", "replace").decode() for text in texts]

    def _tokenize(self, texts: Sequence[Any]) -> list[Any]:
        global _warned_of_cut
        encodings: list[Any] = self._backend.encode_batch_fast(texts)
        count = sum(bool(encoding.overflowing) for encoding in encodings)
        self.cut += count
        if count and not _warned_of_cut:
            _warned_of_cut = True
            text = "%d text(s) longer than the encoder's window were cut to %d tokens (told once)"
            log.warning(text, count, self.max_length)
        return encodings

    def padded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The model's inputs [B, L] by name."""
        return self._inputs(self._tokenize(texts))

    def _inputs(self, encodings: Sequence[Any]) -> dict[str, Tensor]:
        ids = self._pad([encoding.ids for encoding in encodings], self.tokenizer.pad_token_id)
        mask = self._pad([encoding.attention_mask for encoding in encodings], 0)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            inputs["token_type_ids"] = self._pad([encoding.type_ids for encoding in encodings], 0)
        if self._is_longformer:
            # the first token must see the whole text, else a window is all that it knows
            inputs["global_attention_mask"] = torch.zeros_like(mask)
            inputs["global_attention_mask"][:, 0] = 1
        return inputs

    def _run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Without gradients, by whatever is to run it."""
        if self.precision == "int8" and self.graph is None:
            from hydra_llm.model.onnx_encoder import graph_of

            self.graph = graph_of(self)
        short = self.precision == "int8" or inputs["input_ids"].shape[1] <= GRAPH_TOKENS
        return self.graph(inputs) if self.graph and short else self.pooled(inputs)

    def pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model on B padded texts and pool its token vectors [B, L, H] to [B, H]."""
        tokens: Tensor = self.model(**inputs).last_hidden_state.float()
        if self.pooling == "cls":
            return tokens[:, 0]
        weight = inputs["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1)

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        padded = [row + [value] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, device=self.model.device)


def _window(model: Any) -> int:
    """The most tokens that a model has positions for."""
    modules = model.named_modules()
    table = next((m for name, m in modules if name.endswith("position_embeddings")), None)
    if not isinstance(table, torch.nn.Embedding):
        return int(getattr(model.config, "max_position_embeddings", 2**31 - 1))
    # RoBERTa and Longformer count positions from behind the padding's own
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def open_encoder(
    name: str,
    *,
    pooling: Pooling = "mean",
    max_length: int = 256,
    device: str = "cpu",
    precision: Precision = "fp32",
) -> Encoder:
    """Open `minilm`, a folder, or a model of the Hugging Face hub, from its cache if possible.
    Raises SettingsError: it is not there, cannot be reached, or is no encoder of texts.
    """
    if name == "minilm":
        model, tokenizer = _load(str(data_file("minilm").parent), local=True)
    elif name and Path(name).expanduser().is_dir():
        model, tokenizer = _load(str(Path(name).expanduser()), local=True)
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        raise SettingsError(f"encoder '{name}': no such folder")
    else:
        try:
            model, tokenizer = _load(name, local=True)  # its cache, without a request to the hub
        except SettingsError:
            _check_hub(name)
            model, tokenizer = _load(name, local=False)
    if fault := _fault(model.config, tokenizer):
        raise SettingsError(f"encoder '{name}': {fault}")
    encoder = Encoder(model, tokenizer, name, pooling, max_length)
    # the whole of it is put into eval mode: encode() puts back the mode that it finds
    return encoder.eval().at(precision).to(device)


def _check_hub(name: str) -> None:
    """One quick request: the loader would repeat each of its own for a minute without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError):
        fault = "no such folder, and no such model on the Hugging Face hub"
        raise SettingsError(f"encoder '{name}': {fault}") from None
    except Exception as error:  # OSError, httpx's own tree, and what proxies make of it
        place = f"encoder '{name}' is not in the local cache"
        fault = f"the Hugging Face hub cannot be reached ({_first_line(error)})"
        fix = "connect, or give a folder, or take 'minilm'"
        raise SettingsError(f"{place} and {fault}: {fix}") from error


def _load(source: str, *, local: bool) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            with_info = {"local_files_only": local, "output_loading_info": True}
            model, info = AutoModel.from_pretrained(source, **with_info)
    except Exception as error:  # of any tree: the hub client lets all of them through
        fix = "it needs config.json, tokenizer.json and model.safetensors of an encoder"
        problem = f"encoder '{source}' cannot be loaded ({_first_line(error)})"
        raise SettingsError(f"{problem}: {fix}") from error
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        lack = f"the checkpoint lacks {len(missing)} weights, '{missing[0]}' among them"
        raise SettingsError(f"encoder '{source}': {lack}")
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def _fault(config: Any, tokenizer: Any) -> str:
    """Why this is no encoder of whole texts; empty if it is one."""
    if config.is_encoder_decoder or not getattr(config, "hidden_size", None):
        return f"'{config.model_type}' is no encoder-only model"
    if not tokenizer.is_fast:
        return "its tokenizer has no tokenizer.json"
    size = len(tokenizer.get_vocab())  # a lost file leaves special tokens alone
    if not len(tokenizer.all_special_tokens) < size <= config.vocab_size:
        return f"its tokenizer has {size} tokens, the model {config.vocab_size}"
    if tokenizer.pad_token_id is None or not tokenizer("")["input_ids"]:
        return "its tokenizer has no padding or no special tokens, so it is none for whole texts"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal."""
    from transformers.utils import logging

    hf: Any = logging  # half of it is untyped
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(hf.CRITICAL)
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
