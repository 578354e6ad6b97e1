"""What the FP8 and INT8 kernels mean: search the value table, in float64.

Scales are those of llm-compressor: the absolute maximum over half the range, in the source's dtype,
eps where that is zero. Codes are the nearest to x / scale, divided in fp32, ties to even. The
kernels round bits instead of searching, so that the two cannot share a mistake.

Shape letters: R rows (output channels, tokens), C columns, G x K the grid of scales, E experts,
T tokens, H heads, D head dimension.
"""

from itertools import product

import torch
from torch import Tensor

HALF_RANGE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.5}
"""By what the absolute maximum is divided: 127.5 for INT8, whose codes are -128 to 127."""

_SUBNORMALS = [m * 2.0**-9 for m in range(8)]
_NORMALS = [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
E4M3 = torch.tensor(_SUBNORMALS + _NORMALS[:-1], dtype=torch.float64)  # the last would be NaN
_MIDPOINTS = (E4M3[1:] + E4M3[:-1]) / 2


def nearest_e4m3(x: Tensor) -> Tensor:
    """The E4M3 value nearest to x, ties to the even code, 448 at most.

    Example: 17 lies halfway between 16 (code 0x58) and 18 (code 0x59) and becomes 16.
    """
    magnitude = x.double().abs().clamp(max=448).contiguous()
    midpoints = _MIDPOINTS.to(x.device)
    code = torch.bucketize(magnitude, midpoints)  # a tie lands on the lower code
    tie = torch.isin(magnitude, midpoints)
    code += tie & (code % 2 == 1)  # and moves up when that is odd
    code = code.to(torch.uint8) | torch.signbit(x).to(torch.uint8) << 7
    return code.view(torch.float8_e4m3fn)


def nearest_int(x: Tensor, low: int, high: int) -> Tensor:
    """The integer (int8) nearest to x, ties to even, within [low, high]. Example: -2.5 -> -2."""
    clamped = x.double().clamp(low, high)
    below = clamped.floor()
    above = clamped - below
    up = (above > 0.5) | ((above == 0.5) & (below % 2 == 1))
    return (below + up).to(torch.int8)


def scale_of(amax: Tensor, half_range: float) -> Tensor:
    """amax / half_range rounded to amax's dtype; that dtype's eps where it comes out as zero."""
    scale = (amax.double() / half_range).float().to(amax.dtype)
    return scale.masked_fill(scale == 0, torch.finfo(amax.dtype).eps)


def spread(scale_GK: Tensor, tile: tuple[int, int], rows: int, columns: int) -> Tensor:
    """Repeat each scale over the tile of rows x columns that it covers: [G, K] -> [R, C].

    Example: [2, 1] over tiles (128, 300) gives 200 rows and 300 columns when asked for them.
    """
    row_R = torch.arange(rows, device=scale_GK.device) // tile[0]
    col_C = torch.arange(columns, device=scale_GK.device) // tile[1]
    return scale_GK[row_R][:, col_C]


def quantize_static(
    x_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int], dtype: torch.dtype = torch.float8_e4m3fn
) -> Tensor:
    """Codes [R, C] under given scales, each covering a tile of rows x columns."""
    ratio_RC = x_RC.float() / spread(scale_GK, tile, *x_RC.shape).float()
    if dtype == torch.int8:
        return nearest_int(ratio_RC, -128, 127)
    return nearest_e4m3(ratio_RC)


def quantize_rows(x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [R, 1]."""
    return quantize_blocks(x_RC, dtype, (1, x_RC.shape[1]))


def quantize_blocks(
    x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """Codes [R, C] and scales [ceil(R / 128), ceil(C / 128)]."""
    grid = [-(-n // side) for n, side in zip(x_RC.shape, block, strict=True)]
    amax_GK = x_RC.new_zeros(grid)
    for g, k in product(*map(range, grid)):
        x_BL = x_RC[g * block[0] :, k * block[1] :][: block[0], : block[1]]
        amax_GK[g, k] = x_BL.abs().amax()
    scale_GK = scale_of(amax_GK, HALF_RANGE[dtype])
    return quantize_static(x_RC, scale_GK, block, dtype), scale_GK


def dequantize(code_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int]) -> Tensor:
    """code * scale in the scale's dtype, [R, C]."""
    product_RC = code_RC.double() * spread(scale_GK, tile, *code_RC.shape).double()
    return product_RC.float().to(scale_GK.dtype)
