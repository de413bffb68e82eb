"""Bundles of older formats as the present one.

Format 1 kept users' heads as rows of the scorer's tensors, some of them of users who were
forgotten. It lacked whether the reranker is used, and until when a head has learned. Format 2 had
neither word model nor recorded choices, and no learned prior with effects of known texts; later
releases wrote these under the same number, so that 2 may have them. Until format 4 the users' heads
were in one tensor, and the users' names in config.json.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hydra_llm.history import in_order
from hydra_llm.model.heads import Head, latest_time
from hydra_llm.model.heads.kernel import pack
from hydra_llm.model.laplace import LaplacePosterior
from hydra_llm.model.persistence import USERS_FORMAT, BundleFiles

# prefixes of tensors' names in format 1 (regular expressions), and now
RENAMED = {r"combiner\.": "interaction.", "evidence_": "side_", r"curvature\.": "posterior."}
RENAMED |= {r"bank\.": "head."}
LEARNED_WITH = {"word_model": False, "fit_labels": "llm"}
LEARNED_WITH |= {"head_prior": "isotropic", "reranker_check": "llm"}
"""How bundles were learned whose settings do not say."""
FORGOTTEN = "\0forgotten-"  # prefix of the name in the row of a forgotten user


def upgraded(files: BundleFiles) -> BundleFiles:
    """The files in the present format; KeyError, TypeError or ValueError if they are broken."""
    config, records = files.config, files.records
    if config["format"] >= USERS_FORMAT:
        return files
    if config["format"] < 3:
        config = {**config, "settings": {**LEARNED_WITH, **config["settings"]}}
    records = {**records, **{user: [] for user in config.get("without_records", ())}}
    files = replace(files, config=config, records=records)
    return _of_format_1(files) if config["format"] == 1 else _of_format_4(files)


def _of_format_4(files: BundleFiles) -> BundleFiles:
    heads = {
        name: _heads(entry, tensors_of(name, files.tensors))
        for name, entry in files.config["scorers"].items()
    }
    own = ("heads.numbers", "heads.ends")
    parts = {name: name.partition(".")[2] for name in files.tensors}
    shared = {name: value for name, value in files.tensors.items() if parts[name] not in own}
    return replace(files, tensors=shared, heads=heads)


def _heads(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Head]:
    """The heads of one scorer, as views of the numbers of all users; `ends` [U] of each user's."""
    users, ends = entry["users"], tensors["heads.ends"].numpy()
    numbers = tensors["heads.numbers"].numpy()
    if len(users) != len(ends) or (len(ends) and int(ends[-1]) != len(numbers)):
        raise ValueError(f"{len(users)} users, {len(ends)} heads of {len(numbers)} numbers")
    numbers.flags.writeable = False
    untils = [-math.inf if until is None else until for until in entry["until"]]
    starts = [0, *ends[:-1].tolist()]
    rows = zip(users, starts, ends.tolist(), entry["known"], untils, strict=True)
    return {user: Head(numbers[at:end], known, until) for user, at, end, known, until in rows}


def _of_format_1(files: BundleFiles) -> BundleFiles:
    config: dict[str, Any] = {**files.config, "scorers": {}}
    tensors: dict[str, Tensor] = {}
    all_heads: dict[str, dict[str, Head]] = {}
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
        config["scorers"][name], all_heads[name] = entry, heads
        tensors |= {f"{name}.{key}": value for key, value in _shared(entry, own).items()}
    config["use_reranker"] = reranker_helps(config["report"])
    return replace(files, config=config, tensors=tensors, heads=all_heads)


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
