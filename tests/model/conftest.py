"""The encoders that the model's tests share: MiniLM, and random models of a few kilobytes saved as
any encoder folder is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_llm.model.encoder import Encoder, open_encoder

SaveModel = Callable[..., Path]
WORDS = [
    "the",
    "a",
    "film",
    "song",
    "of",
    "night",
    "rain",
    "star",
    "love",
    "war",
    "old",
    "new",
    "great",
    "dull",
    "slow",
]
WORDS += ["##ly", "##s", "!", ",", ".", "?", "caf", "##e", "5", "1"]


def _save_tokenizer(folder: Path, kind: str = "bert") -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    if kind == "bert":
        BertTokenizer(vocab=vocab).save_pretrained(folder)
        return
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pair = "[CLS] $A [SEP] [SEP] $B [SEP]"  # as RoBERTa and Longformer join a pair
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(
        zip(
            ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True
        )
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def _save_model(folder: Path, kind: str = "bert", seed: int = 0, **changes: Any) -> Path:
    from transformers import BertConfig, BertModel, LongformerConfig, LongformerModel

    size = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    torch.manual_seed(seed)
    if kind == "longformer":
        positions = {
            "max_position_embeddings": 66,
            "attention_window": [8, 8],
            "type_vocab_size": 1,
            "pad_token_id": 0,
            "sep_token_id": 3,
        }
        # positions start behind the padding's own, 0 here: 65 tokens fit
        LongformerModel(LongformerConfig(**size, **positions, **changes)).save_pretrained(folder)
    else:
        BertModel(BertConfig(**size, max_position_embeddings=40, **changes)).save_pretrained(folder)
    _save_tokenizer(folder, kind)
    return folder


@pytest.fixture(scope="session")
def save_model() -> SaveModel:
    """`save_model(folder, kind="bert"|"longformer", seed=0, **config)` writes an encoder folder."""
    return _save_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_model(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="session")
def longformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_model(tmp_path_factory.mktemp("encoder") / "longformer", "longformer")


@pytest.fixture
def tiny(tiny_folder: Path) -> Encoder:
    return open_encoder(str(tiny_folder), max_length=32)


@pytest.fixture(scope="session")
def minilm() -> Encoder:
    return open_encoder("minilm")
