"""An encoder with its weights in bfloat16, or by a graph of int8 (onnx_encoder.py).

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

from hydra_llm.extras import require

Precision = Literal["fp32", "bf16", "int8"]
log = logging.getLogger(__name__)


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """The model, or a copy in bfloat16; int8 is of the graph alone. MissingExtra where int8 is not
    installed.
    """
    if precision == "int8":
        require("onnx", "encoder_precision=int8")
    if precision != "bf16":
        return model
    if not has_fast_bf16():
        log.warning("this processor has no matrix instructions of bfloat16: fp32 is faster")
    return copy.deepcopy(model).to(torch.bfloat16)


def fastest() -> Precision:
    """In which this processor encodes most texts a second."""
    return "bf16" if has_fast_bf16() else "fp32"


@cache
def has_fast_bf16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than of fp32. On x86 that takes
    AMX: AVX512-BF16 has the throughput of fp32's own instructions, and was 1.4 times as slow.
    """
    ops: Any = torch.ops.mkldnn
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86 and hasattr(torch.cpu, "_is_amx_tile_supported"):
        return bool(torch.cpu._is_amx_tile_supported())
    return bool(ops._is_mkldnn_bf16_supported())  # on x86 also where they are emulated
