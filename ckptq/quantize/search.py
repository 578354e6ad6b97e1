"""Ranges of tiles that make the least error: llm-compressor's MSE observers, a block at a time.

Of the ranges of a `Search` each tile gets the first of those with the least error. Everything is
computed in the dtype of the weight and in llm-compressor's order (`observers/mse_quant.py`),
because the winner depends on it; errors of bf16 weights are looked up where they can be, and on a
GPU `certain` finds what a CPU would choose. llm-compressor's early stop, when no tile of a weight
has improved for `patience` steps, is left out: a tile's bytes would depend on its neighbours.
Unless it would have stopped, ranges are equal bit for bit, and finite where expanding overflows.

Shape letters: K candidates, T tiles, L weights of a tile.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from ckptq.quantize import scales
from ckptq.quantize.certain import AT_ONCE, first_of_least, winners
from ckptq.quantize.error_table import error_table, has_table
from ckptq.quantize.scratch import Scratch, blocks
from ckptq.quantize.tile_error import powered_errors
from ckptq.quantize.tiles import check_finite, extremes
from ckptq.quantize.weight_scheme import Search, WeightScheme


def best_ranges(
    x: Tensor, scheme: WeightScheme, search: Search, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The lowest and highest number that each tile's codes are to reach, in its dtype: 0 or less,
    and 0 or more.

    `x` is a weight as `tiles.tiled` shows it; the results are [R, G], or [M, N] for blocks.
    `NonFinite` on NaN or Inf.
    """
    parts = map(_rows_of_tiles, _parts(x, search, scratch))
    found = [_of_block(part, scheme, search, scratch) for part in parts]
    low, high = (torch.cat(each) for each in zip(*found, strict=True))
    return low, high


def _parts(x: Tensor, search: Search, scratch: Scratch) -> tuple[Tensor, ...]:
    if x.device.type == "cpu":
        return blocks(x, scratch.block_elements)
    tiles = x.shape[0] * x.shape[1 if x.ndim == 3 else 2]
    most = max(tiles * len(search.shares), x.numel())
    return x.split(max(AT_ONCE * len(x) // most, 1))


def extreme_of_best(x: Tensor, scheme: WeightScheme, search: Search, scratch: Scratch) -> Tensor:
    """[2]: the extremes of the best ranges of all tiles, with 0 between them.

    Only tiles that could hold them are searched: a range shrinks to the last share at most.
    """
    tiles = _rows_of_tiles(x).flatten(0, -2)
    largest = tiles.abs().amax(-1)
    check_finite(largest)
    chosen = tiles[largest >= largest.max() * search.shares[-1]]
    low, high = best_ranges(chosen[:, None], scheme, search, scratch)
    return torch.stack((low.amin(), high.amax()))


def _rows_of_tiles(x: Tensor) -> Tensor:
    """[R, G, L], or [M, N, H * W] of blocks: each tile one row of memory."""
    return x if x.ndim == 3 else x.transpose(1, 2).flatten(-2)


def _of_block(
    x: Tensor, scheme: WeightScheme, search: Search, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    x_TL = x.flatten(0, -2)
    low, high = extremes(x_TL, scratch)
    largest = torch.finfo(low.dtype).max
    low, high = (x.mul_(search.expand).clamp_(-largest, largest) for x in (low, high))
    share_K = torch.tensor(search.shares, dtype=_wide(low), device=low.device)
    candidates = _candidates(low, high, share_K[:, None], scheme)
    if _on_cores(x):
        best_T = first_of_least(_errors(x_TL, *candidates, scheme, search.norm, scratch))
    else:
        best_T = winners(x_TL, *candidates, scheme, search.norm, scratch)
    low, high = (_times(x, share_K[best_T]) for x in (low, high))
    return low.view(x.shape[:-1]), high.view(x.shape[:-1])


def _on_cores(x: Tensor) -> bool:
    """Whether errors are added up as a CPU does it: on one, and of float64, which no GPU gets."""
    return x.device.type == "cpu" or x.dtype == torch.float64


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _times(x: Tensor, share: Tensor) -> Tensor:
    """x * share, as torch multiplies by a Python number."""
    return (x.to(share.dtype) * share).to(x.dtype)


def _candidates(
    low_T: Tensor, high_T: Tensor, share_K1: Tensor, scheme: WeightScheme
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [K, T] of all shares of a range, as `calculate_qparams` has them
    without a global scale."""
    if not scheme.symmetric:
        low_KT, high_KT = _times(low_T, share_K1), _times(high_T, share_K1)
        return scales.asymmetric(low_KT, high_KT, scheme.num_bits)
    amax_KT = _times(torch.maximum(-low_T, high_T), share_K1)
    if scheme.scale_dtype == "uint8":
        return scales.mx_scale(scales.mx_exponent(amax_KT, scheme.num_bits)).to(low_T.dtype), None
    most = scales.E2M1_MAX if scheme.strategy == "tensor_group" else scheme.half_range
    return scales.symmetric(amax_KT, most), None


def _errors(
    x_TL: Tensor,
    scale_KT: Tensor,
    zero_point_KT: Tensor | None,
    scheme: WeightScheme,
    norm: float,
    scratch: Scratch,
) -> Tensor:
    """[K, T]: the sum of |dequantized - x|^norm of each tile under each candidate."""
    if has_table(x_TL, scheme):
        table = error_table(scheme, norm)
        column_TL, row_KT = table.columns(x_TL), table.rows(scale_KT, zero_point_KT, scratch)
        if column_TL is not None and row_KT is not None:
            return table.sums(column_TL, row_KT, scratch)
    zero_points = repeat(None) if zero_point_KT is None else zero_point_KT[..., None]
    candidates = zip(scale_KT[..., None], zero_points, strict=False)
    errors = (powered_errors(x_TL, *each, scheme, norm, scratch) for each in candidates)
    return torch.stack([error_TL.sum(-1) for error_TL in errors])
