"""The probabilities of choices from an answer's first token, which endpoints tell as `logprobs`.

    P(choice) ∝ Σ P(token) over the likely first tokens that the choice begins with

A token that several choices begin with counts for each in equal parts, unless it is one of them. A
choice that no token stands for gets half of the least probable token's share: it may be that much.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 20  # tokens that OpenAI tells at most


def probabilities(
    tokens: Sequence[tuple[str, float]], choices: Sequence[str]
) -> Mapping[str, float]:
    """Of each choice, from (token, log-probability); empty where no token begins one."""
    shares = dict.fromkeys(choices, 0.0)
    for token, log in tokens:
        begun = _begun(token, choices)
        for choice in begun:
            shares[choice] += math.exp(log) / len(begun)
    if not any(shares.values()):
        return {}
    least = math.exp(min(log for _, log in tokens)) / 2
    filled = {choice: share or least for choice, share in shares.items()}
    total = sum(filled.values())
    return {choice: share / total for choice, share in filled.items()}


def told_tokens(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likely first tokens in one choice of an answer, as OpenAI's format has them."""
    try:
        tokens = choice["logprobs"]["content"][0]["top_logprobs"]
        return [(str(token["token"]), float(token["logprob"])) for token in tokens]
    except (KeyError, IndexError, TypeError, ValueError):
        return []


def _begun(token: str, choices: Sequence[str]) -> list[str]:
    """The choices that a token begins; only those that it is, if there are some."""
    start = token.strip().casefold()
    if not start:
        return []
    whole = [choice for choice in choices if choice.casefold() == start]
    return whole or [choice for choice in choices if choice.casefold().startswith(start)]
