"""What a quantized KV cache does to keys and values, without a cache: quantize and go back.

Plain torch on any device, with the numbers of the kernels; `evaluate` runs a model through it.

Shape letters: B batch, H heads, S positions, D head dimension.
"""

import torch
from torch import Tensor

from ckptq.errors import UsageError
from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_format import FORMATS, Rotation

STATIC = ("fp8_per_tensor", "fp8_per_head")
MODES = (*STATIC, *FORMATS)
"""Names as vLLM's --kv-cache-dtype and the strategies of a KV scheme have them."""


def fake_quantize_kv(
    x_BHSD: Tensor, mode: str, *, scale: Tensor | None = None, rotation: Rotation | None = None
) -> Tensor:
    """Keys or values [B, H, S, D] as they come back from a cache held in `mode`, in their dtype.

    `fp8_per_tensor` wants a calibrated scale of one entry, `fp8_per_head` one of H; the others
    compute theirs per token and head. `rotation` replaces the format's own (INT4 has signs and
    Walsh-Hadamard, INT2 Walsh-Hadamard, the others none).

    Raises UsageError for an unknown mode, a scale that is missing, not wanted or of another size.
    """
    if mode in STATIC:
        if rotation is not None:
            raise UsageError(f"{mode} has no rotation")
        return _static_fp8(x_BHSD, mode, scale)
    if mode not in FORMATS:
        raise UsageError(f"unknown KV-cache mode {mode}; there are {', '.join(MODES)}")
    if scale is not None:
        raise UsageError(f"{mode} computes its scales, it takes none")
    fmt = FORMATS[mode]
    return kv.dequantize(kv.quantize(x_BHSD, fmt, rotation), fmt, rotation).to(x_BHSD.dtype)


def _static_fp8(x_BHSD: Tensor, mode: str, scale: Tensor | None) -> Tensor:
    wanted = 1 if mode == "fp8_per_tensor" else x_BHSD.shape[1]
    if scale is None or scale.numel() != wanted:
        found = "none" if scale is None else list(scale.shape)
        raise UsageError(f"{mode} wants a scale of {wanted} entries, got {found}")
    scale_H11 = scale.float().reshape(-1, 1, 1).to(x_BHSD.device)
    ratio = (x_BHSD.float() / scale_H11).clamp(-448.0, 448.0)
    return (ratio.to(torch.float8_e4m3fn).float() * scale_H11).to(x_BHSD.dtype)
