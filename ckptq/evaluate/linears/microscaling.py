"""Activations in groups of 16 or 32 columns under scales of 8 bits, as vLLM 0.32 rounds them.

NVFP4 as its `ref_nvfp4_quant_dequant`, the torch emulation of its FP4 kernels; MXFP8 as its
`_mxfp8_e4m3_quantize_torch`; MXFP4 with the scale of its MX emulation ("even": an amax from 1.75
times a power of two up counts as the next one), which is that of weights.

Shape letters: T tokens and whatever leads, C columns, G groups, g columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptq.quantize.codes import round_to_e2m1
from ckptq.quantize.scales import mx_exponent, mx_scale

E4M3_MAX, E2M1_MAX = 448.0, 6.0
ZERO_SCALE = 1e8
"""What vLLM divides by if a scale is zero, which makes all codes zero."""


def nvfp4(x_TC: Tensor, global_scale: float) -> Tensor:
    """E2M1 in groups of 16 under E4M3 scales under one global scale, there and back."""
    x_TGg = x_TC.unflatten(-1, (-1, 16)).float()
    overall = x_TGg.new_full((), global_scale)
    scale_TG1 = overall * (x_TGg.abs().amax(-1, keepdim=True) * (1 / E2M1_MAX))
    scale_TG1 = scale_TG1.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    factor_TG1 = _reciprocal(scale_TG1 * _reciprocal(overall))
    code_TGg = _e2m1(x_TGg * factor_TG1)
    return (code_TGg * (scale_TG1 / overall)).flatten(-2).to(x_TC.dtype)


def mxfp4(x_TC: Tensor) -> Tensor:
    """E2M1 in groups of 32 under powers of two, there and back."""
    x_TGg = x_TC.unflatten(-1, (-1, 32)).float()
    scale_TG1 = mx_scale(mx_exponent(x_TGg.abs().amax(-1, keepdim=True), 4))
    return (_e2m1(x_TGg / scale_TG1) * scale_TG1).flatten(-2).to(x_TC.dtype)


def mxfp8(x_TC: Tensor) -> Tensor:
    """E4M3 in groups of 32 under the least powers of two that hold them, there and back."""
    x_TGg = x_TC.unflatten(-1, (-1, 32)).float()
    amax_TG1 = x_TGg.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale_TG1 = torch.exp2((amax_TG1 / E4M3_MAX).log2().ceil().clamp(-127, 127))
    code_TGg = (x_TGg / scale_TG1).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (code_TGg * scale_TG1).flatten(-2).to(x_TC.dtype)


def _reciprocal(x: Tensor) -> Tensor:
    return 1.0 / (x + (x == 0) * ZERO_SCALE)


def _e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 number, in new memory."""
    return round_to_e2m1(x.clone(), torch.empty_like(x))
