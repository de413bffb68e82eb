"""The probabilities of choices from an answer's first token, which endpoints tell as `logprobs`.

    P(choice) ∝ Σ P(token) over the likely first tokens that the choice begins with

A token that several choices begin with counts for each in equal parts, unless it is one of them. A
choice that no token stands for gets half of the least probable token's share: it may be that much,
but all of them together no more than the tokens leave.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 20  # tokens that OpenAI tells at most
ENOUGH = 0.5  # with less the answer probably begins with other words, and its label comes later
RAW_BLANKS = str.maketrans("▁ĠĊĉč", "     ")  # of SentencePiece, and of byte-level BPE
LEAST = 1e-9  # of a choice for which the tokens leave nothing: rounding may be all that is missing


def probabilities(
    tokens: Sequence[tuple[str, float]], choices: Sequence[str], *, enough: float = ENOUGH
) -> Mapping[str, float]:
    """Of each choice, from (token, log-probability); empty where the tokens that begin one have
    less than `enough` of the probability together, or none.
    """
    shares = dict.fromkeys(choices, 0.0)
    for token, log in tokens:
        begun = _begun(token, choices)
        for choice in begun:
            shares[choice] += math.exp(log) / len(begun)
    if (mass := sum(shares.values())) <= 0 or mass < enough:
        return {}
    told = [math.exp(log) for _, log in tokens]
    untold = sum(not share for share in shares.values())
    most = max(1 - sum(told), 0.0) / max(untold, 1)
    rest = max(min(min(told) / 2, most), LEAST)
    filled = {choice: share or rest for choice, share in shares.items()}
    total = sum(filled.values())
    return {choice: share / total for choice, share in filled.items()}


def told_tokens(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likely first tokens in one choice of an answer, as OpenAI's format has them; without
    those whose value is no logarithm of a probability.
    """
    try:
        tokens = [*choice["logprobs"]["content"][0]["top_logprobs"]]
    except (KeyError, IndexError, TypeError):
        return []
    read = [token for token in tokens if isinstance(token, Mapping) and "token" in token]
    pairs = [(_text(token), _log(token.get("logprob"))) for token in read]
    return [(token, log) for token, log in pairs if log is not None]


def _text(token: Mapping[str, Any]) -> str:
    """A token's text; of a part of a character by its `bytes`, which surrogates stand for."""
    text, raw = str(token["token"]), token.get("bytes")
    try:
        told = bytes(raw).decode("utf-8", "surrogateescape") if isinstance(raw, list) else ""
    except (TypeError, ValueError):
        told = ""
    return told or text


def _log(value: object) -> float | None:
    """A value that is a finite number of at most 0; None for all else."""
    try:
        log = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return log if math.isfinite(log) and log <= 0 else None


def _begun(token: str, choices: Sequence[str]) -> list[str]:
    """The choices that a token begins; only those that it is, if there are some. One that begins
    none as it is may be a raw token, as some servers tell them.
    """
    return _begun_by(token, choices) or _begun_by(token.translate(RAW_BLANKS), choices)


def _begun_by(text: str, choices: Sequence[str]) -> list[str]:
    text = text.strip()
    if text in choices:  # labels may differ in case alone
        return [text]
    try:
        start = text.casefold().encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold
        return []
    if not start:
        return []
    folded = [(choice, choice.casefold().encode("utf-8", "replace")) for choice in choices]
    whole = [choice for choice, own in folded if own == start]
    return whole or [choice for choice, own in folded if own.startswith(start)]
