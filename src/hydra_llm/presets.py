"""Settings that have a name: `--preset paper`."""

from collections.abc import Mapping
from typing import Any

# The authors' settings (HYDRA, arXiv 2406.02888, appendix on implementation details).
PAPER: dict[str, Any] = {"encoder": "allenai/longformer-base-4096", "max_length": 4096}
PAPER |= {"pooling": "cls", "features": "cross", "tune_encoder": True}
PAPER |= {"head": "mlp", "prior": "random", "users": 100, "word_model": False}
PAPER |= {"loss": "binary", "lr": 2e-5, "batch": 64, "epochs": 2, "weight_decay": 0.01}
PAPER |= {"label_rule": "above-mean", "reranker_labels": "llm", "record_answer": False}
PAPER |= {"retrieved": 10, "k": 1, "rerank": "always", "candidates": "sampled", "select": "best"}
PAPER |= {"samples": 8, "greedy_first": False, "temperature": 1.0}
PRESETS: Mapping[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}
