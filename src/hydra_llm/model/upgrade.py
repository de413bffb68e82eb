"""Bundles of older formats as the present one.

Format 1 kept users' heads as rows of the scorer's tensors, some of them of users who were
forgotten. It lacked whether the reranker is used, and until when a head has learned. Format 2 had
neither word model nor recorded choices, and no learned prior with effects of known texts; later
releases wrote these under the same number, so that 2 may have them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hydra_llm.history import in_order
from hydra_llm.model.heads import Head, HeadMatrix, latest_time
from hydra_llm.model.heads.kernel import pack
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.persistence import BundleFiles

# prefixes of tensors' names in format 1 (regular expressions), and now
RENAMED = {r"combiner\.": "interaction.", "evidence_": "side_", r"curvature\.": "posterior."}
RENAMED |= {r"bank\.": "head."}
LEARNED_WITH = {"word_model": False, "fit_labels": "llm"}
LEARNED_WITH |= {"head_prior": "isotropic", "reranker_check": "llm"}
"""How bundles were learned whose settings do not say."""
FORGOTTEN = "\0forgotten-"  # prefix of the name in the row of a forgotten user


def upgraded(files: BundleFiles) -> BundleFiles:
    """The files in the present format; KeyError, TypeError or ValueError if they are broken."""
    if files.config["format"] >= 3:
        return files
    settings = {**LEARNED_WITH, **files.config["settings"]}
    files = replace(files, config={**files.config, "settings": settings})
    return files if files.config["format"] == 2 else _of_format_1(files)


def _of_format_1(files: BundleFiles) -> BundleFiles:
    config: dict[str, Any] = {**files.config, "scorers": {}}
    tensors: dict[str, Tensor] = {}
    for name, old in files.config["scorers"].items():
        own = tensors_of(name, files.tensors)
        for prefix, present in RENAMED.items():
            own = {re.sub(f"^{prefix}", present, key): value for key, value in own.items()}
        entry = {key: old[key] for key in ("head", "rank", "evidence", "loss")}
        entry["interaction"] = old.get("interaction") or old["combiner"]
        heads: dict[str, Head] = {}
        for row, (user, known) in enumerate(zip(old["users"], old["known"], strict=True)):
            if not user.startswith(FORGOTTEN):
                until = latest_time(in_order(files.records.get(user, ()))[:known])
                heads[user] = Head.of(_numbers(old["head"], own, row), known, until)
        matrix = HeadMatrix.of(heads)
        config["scorers"][name] = entry | matrix.config()
        own = _shared(entry, own) | matrix.tensors()
        tensors |= {f"{name}.{key}": value for key, value in own.items()}
    config["use_reranker"] = reranker_helps(config["report"])
    return BundleFiles(config, tensors, files.records, files.card, files.encoder)


def tensors_of(scorer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one of a bundle's scorers, under their own names."""
    parts = {name: name.partition(".") for name in tensors}
    return {key: tensors[name] for name, (own, _, key) in parts.items() if own == scorer}


def reranker_helps(report: Mapping[str, Any]) -> bool:
    """False if held-out users' gain with the reranker's records was measured as lower."""
    gains = report.get("reranker", {})
    pick, first = gains.get("gain_pick"), gains.get("gain_first")
    return pick is None or first is None or not pick < first


def _shared(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = ("head.weight", "head.bias", "head.keys.", "head.residuals.")
    kept = {name: value for name, value in tensors.items() if not name.startswith(own)}
    # of low-rank heads on label features it was measured for other coordinates
    lacks = entry["head"] == "lowrank" and entry["interaction"]["kind"] == "label"
    if lacks or "posterior.left" not in kept:
        none = LaplacePosterior().state_dict()
        kept |= {f"posterior.{part}": value for part, value in none.items()}
    return kept


def _numbers(kind: str, tensors: Mapping[str, Tensor], row: int) -> Any:
    if kind == "kernel":
        none = torch.zeros(0, 1)
        return pack(*(tensors.get(f"head.{part}.{row}", none) for part in ("keys", "residuals")))
    weight = tensors["head.weight"][row]
    return torch.cat([weight, tensors["head.bias"][row : row + 1]]) if kind == "linear" else weight
