"""Ranges of tiles that make the least error: llm-compressor's MSE observers, a block at a time.

Of the ranges of a `Search` each tile gets the first of those with the least error. Everything is
computed in the dtype of the weight and in llm-compressor's order (`observers/mse_quant.py`),
because the winner depends on it. Its early stop, when no tile of a weight has improved for
`patience` steps, is left out: a tile's bytes would depend on its neighbours. Unless it would have
stopped, ranges are equal bit for bit, and finite where expanding overflows.

Shape letters: T tiles, L weights of a tile.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ckptq.quantize import scales
from ckptq.quantize.codes import round_to_e2m1
from ckptq.quantize.scratch import Scratch, blocks
from ckptq.quantize.tiles import NonFinite
from ckptq.quantize.weight_scheme import Search, WeightScheme


def best_ranges(
    x: Tensor, scheme: WeightScheme, search: Search, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """The lowest and highest number that each tile's codes are to reach, in its dtype.

    `x` is a weight as `tiles.tiled` shows it; the results are [R, G], or [M, N] for blocks.
    `NonFinite` on NaN or Inf.
    """
    parts = map(_rows_of_tiles, blocks(x, scratch.block_elements))
    found = [_of_block(part, scheme, search, scratch) for part in parts]
    low, high = (torch.cat(each) for each in zip(*found, strict=True))
    return low, high


def extreme_of_best(x: Tensor, scheme: WeightScheme, search: Search, scratch: Scratch) -> Tensor:
    """[2]: the extremes of the best ranges of all tiles, with 0 between them.

    Only tiles that could hold them are searched: a range shrinks to the last share at most.
    """
    tiles = _rows_of_tiles(x).flatten(0, -2)
    largest = tiles.abs().amax(-1)
    if not largest.isfinite().all():
        raise NonFinite("NaN or Inf")
    chosen = tiles[largest >= largest.max() * search.shares[-1]]
    low, high = _of_block(chosen, scheme, search, scratch)
    return torch.stack((low.amin().clamp(max=0), high.amax().clamp(min=0)))


def _rows_of_tiles(x: Tensor) -> Tensor:
    """[R, G, L], or [M, N, H * W] of blocks: each tile one row of memory."""
    return x if x.ndim == 3 else x.transpose(1, 2).flatten(-2)


def _of_block(
    x_TL: Tensor, scheme: WeightScheme, search: Search, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    low, high = x_TL.amin(-1), x_TL.amax(-1)
    if not (low.isfinite() & high.isfinite()).all():
        raise NonFinite("NaN or Inf")
    largest = torch.finfo(low.dtype).max
    low, high = (x.mul_(search.expand).clamp_(-largest, largest) for x in (low, high))
    best_low, best_high = low.clone(), high.clone()
    least = torch.full_like(low, largest)
    for share in search.shares:
        lower, higher = low * share, high * share
        error = _error(x_TL, *_candidate(lower, higher, scheme), scheme, search.norm, scratch)
        better = error < least
        least = torch.where(better, error, least)
        best_low = torch.where(better, lower, best_low)
        best_high = torch.where(better, higher, best_high)
    return best_low, best_high


def _candidate(low: Tensor, high: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a range, as `calculate_qparams` has them without a global scale."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if not scheme.symmetric:
        return scales.asymmetric(low, high, scheme.num_bits)
    amax = torch.maximum(-low, high)
    if scheme.scale_dtype == "uint8":
        return scales.mx_scale(scales.mx_exponent(amax, scheme.num_bits)).to(low.dtype), None
    most = scales.E2M1_MAX if scheme.strategy == "tensor_group" else scheme.half_range
    return scales.symmetric(amax, most), None


def _error(
    x_TL: Tensor,
    scale_T: Tensor,
    zero_point_T: Tensor | None,
    scheme: WeightScheme,
    norm: float,
    scratch: Scratch,
) -> Tensor:
    """[T]: the sum of |dequantized - x|^norm of each tile, every operation rounded to the dtype."""
    held = scratch.tensor("searched", x_TL.shape, x_TL.dtype)
    q = torch.div(x_TL, scale_T[..., None], out=held)
    if zero_point_T is not None:
        q.add_(zero_point_T[..., None].to(q.dtype))
    _round(q, scheme, scratch)
    if zero_point_T is not None:
        q.sub_(zero_point_T[..., None].to(q.dtype))
    q.mul_(scale_T[..., None]).sub_(x_TL).abs_()
    return _power(q, norm, scratch).sum(-1)


def _round(q: Tensor, scheme: WeightScheme, scratch: Scratch) -> None:
    """To the nearest number that a code stands for, in place; ties to even."""
    if scheme.type == "int":
        q.clamp_(-(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1).round_()
    elif scheme.num_bits == 8:
        q.clamp_(-scales.E4M3_MAX, scales.E4M3_MAX).copy_(q.to(torch.float8_e4m3fn))
    else:
        round_to_e2m1(q, scratch.tensor("step", q.shape, q.dtype))


def _power(q: Tensor, norm: float, scratch: Scratch) -> Tensor:
    """q ** norm for q >= 0, in place where it can be; dtypes of 16 bits look it up, as their
    numbers are few and torch's pow takes longer than all else."""
    if q.itemsize != 2 or q.device.type != "cpu":
        return q.pow_(norm)
    index = scratch.tensor("power", (q.numel(),), torch.int32)
    index.copy_(q.view(torch.int16).flatten())
    powers = scratch.tensor("powers", (q.numel(),), q.dtype)
    return torch.index_select(_powers(q.dtype, norm), 0, index, out=powers).view(q.shape)


@cache
def _powers(dtype: torch.dtype, norm: float) -> Tensor:
    """Of every number that is not negative, by its bits."""
    return torch.arange(1 << 15, dtype=torch.int16).view(dtype).pow(norm)
