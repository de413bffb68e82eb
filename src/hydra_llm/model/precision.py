"""An encoder with its weights in fewer bits: bfloat16, or int8.

Features of two precisions are not the same features: the encoder's digest differs, so no cache
mixes them, and a bundle names the one that it was learned with.
Letters: T tokens, I inputs, O outputs of a layer.
"""

import copy
import logging
import platform
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hydra_llm.errors import SettingsError

Precision = Literal["fp32", "bf16", "int8"]
ROWS = 256  # tokens that a layer multiplies at once: with their products they stay in the cache
log = logging.getLogger(__name__)


class Int8Linear(nn.Module):
    """A linear layer of int8 weights with a scale per output. Each token has a scale of its own, so
    that a text's vector does not depend on the texts that are encoded beside it.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        rounded = torch.round(weight / scale[:, None]).to(torch.int8)
        self.register_buffer("weight", rounded.T.contiguous())  # [I, O]
        self.register_buffer("scale", scale)  # [O]
        own: Tensor | None = layer.bias  # torch calls it a Tensor, also where there is none
        self.register_buffer("bias", torch.zeros(len(weight)) if own is None else own.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O]."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [self._multiplied(part) for part in rows.split(ROWS)]
        return torch.cat(parts).view(*x.shape[:-1], -1)

    def _multiplied(self, rows: Tensor) -> Tensor:
        """rows [T, I] → [T, O]."""
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        sums = torch._int_mm(torch.round(rows / scale).to(torch.int8), self.weight)
        return sums.float().mul_(scale).mul_(self.scale).add_(self.bias)


def in_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """The model, or a copy in fewer bits. SettingsError: this torch cannot multiply int8."""
    if precision == "fp32":
        return model
    if precision == "bf16":
        if not has_bf16():
            log.warning("this processor has no bfloat16 instructions: fp32 is faster than bf16")
        return copy.deepcopy(model).to(torch.bfloat16)
    if not hasattr(torch, "_int_mm"):
        fix = "pip install -U torch, or take fp32"
        lack = f"encoder_precision=int8 needs a newer torch than {torch.__version__}"
        raise SettingsError(f"{lack}: {fix}")
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Int8Linear(layer))
    return model


@cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 by instructions of its own."""
    ops: Any = torch.ops.mkldnn
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86 and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(ops._is_mkldnn_bf16_supported())  # on x86 also where they are emulated
