"""An encoder with its weights in bfloat16 (why not int8: docs/method.md).

Features of two precisions are not the same features: the encoder's digest differs, so no cache
mixes them, and a bundle names the one that it was learned with.
"""

import copy
import logging
import platform
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]
log = logging.getLogger(__name__)


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """The model, or a copy in bfloat16."""
    if precision == "fp32":
        return model
    if not has_bf16():
        log.warning("this processor has no bfloat16 instructions: fp32 is faster than bf16")
    return copy.deepcopy(model).to(torch.bfloat16)


@cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 by instructions of its own."""
    ops: Any = torch.ops.mkldnn
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86 and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(ops._is_mkldnn_bf16_supported())  # on x86 also where they are emulated
