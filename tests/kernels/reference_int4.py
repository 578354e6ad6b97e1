"""What the INT4 kernels mean: groups along a row, eight codes an int32 (pack-quantized).

Scales and zero points follow llm-compressor in the source's dtype, each operation rounded to it;
codes are divided in fp32. Packing is that of compressed-tensors: element i of a run of eight sits
at bits 4i to 4i + 3, offset by 8; weights are packed along a row, zero points along a column.

Shape letters: R rows (output channels), C columns, G groups, L columns in a group,
P packed columns (C / 8, rounded up), Z packed rows (R / 8, rounded up).
"""

import torch
from reference_quantize import nearest_int, scale_of
from torch import Tensor


def pack_columns(code_RC: Tensor) -> Tensor:
    """int8 codes -8 to 7 -> int32 [R, P]. Example: -8 to -1 in a row are 0x76543210."""
    words = []
    for row in code_RC.tolist():
        runs = [row[i : i + 8] for i in range(0, len(row), 8)]
        words.append([sum((code + 8) << 4 * i for i, code in enumerate(run)) for run in runs])
    packed = torch.tensor(words, dtype=torch.int64, device=code_RC.device)
    packed = packed.view(len(code_RC), -(-code_RC.shape[1] // 8))
    return packed.to(torch.uint32).view(torch.int32)


def unpack_columns(packed_RP: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_columns`: int8 codes [R, C]."""
    dense_RP = packed_RP.clone(memory_format=torch.contiguous_format)
    bytes_RB = dense_RP.view(torch.uint8)  # little-endian, two codes a byte
    pairs_RB2 = torch.stack([bytes_RB % 16, bytes_RB // 16], -1)
    return (pairs_RB2.flatten(1).to(torch.int8) - 8)[:, :columns]


def asymmetric_qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (int8, -8 to 7) of ranges that are widened to include zero.

    The zero point uses the scale before eps replaces a zero; 0 / 0 gives zero point 0.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / torch.tensor(15, dtype=low.dtype, device=low.device)
    zero = (-8 - low / scale).nan_to_num(nan=0.0).clamp(-8, 7)
    return scale.masked_fill(scale == 0, torch.finfo(low.dtype).eps), nearest_int(zero, -8, 7)


def quantize_int4(
    x_RC: Tensor, group: int | None = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes [R, P] int32, scales [R, G], packed zero points [Z, G] int32 or None.

    `group` None makes a row one group; else it divides C.
    """
    x_RGL = x_RC.unflatten(1, (-1, group or x_RC.shape[1]))
    if symmetric:
        scale_RG, zero_RG = scale_of(x_RGL.abs().amax(-1), 7.5), None
    else:
        scale_RG, zero_RG = asymmetric_qparams(x_RGL.amin(-1), x_RGL.amax(-1))
    ratio_RGL = x_RGL.float() / scale_RG[..., None].float()
    if zero_RG is not None:
        ratio_RGL += zero_RG[..., None]
    packed_RP = pack_columns(nearest_int(ratio_RGL, -8, 7).flatten(1))
    zero_ZG = None if zero_RG is None else pack_columns(zero_RG.t()).t().contiguous()
    return packed_RP, scale_RG, zero_ZG


def dequantize_int4(
    packed_RP: Tensor, scale_RG: Tensor, columns: int, zero_ZG: Tensor | None = None
) -> Tensor:
    """(code - zero point) * scale in the scale's dtype, [R, C]."""
    code_RC = unpack_columns(packed_RP, columns).double()
    R, G = scale_RG.shape
    if zero_ZG is not None:
        zero_RG = unpack_columns(zero_ZG.t(), R).t()
        code_RC -= zero_RG.double().repeat_interleave(columns // G, 1)
    product_RC = code_RC * scale_RG.double().repeat_interleave(columns // G, 1)
    return product_RC.float().to(scale_RG.dtype)
