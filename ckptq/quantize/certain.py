"""Which candidate of a search the CPU would choose, found where weights are: on a GPU.

What a weight contributes to an error is the same on every device, but for float32's powers; the
order in which it is added up is not, and with it the last bits of a sum. So a sum that was added up
here bounds the CPU's from both sides. A tile whose first least is below all others whatever the
order was, is decided; of the others, a tile in a thousand, the CPU gets those candidates that may
have won.

The bounds: rounding to nearest makes each addition of numbers >= 0 wrong by at most 2^-24 of its
result, so a sum is wrong by at most 2^-24 of itself for each addition that a number goes through.
These are at most L - 1 in any order, and at most 128 in torch's up to a million numbers (it adds
chunks of 16, those again in chunks of 16, in up to 64 running sums). Rounding the sum to the dtype
of the weight keeps the order of the bounds.

Shape letters: K candidates, T tiles, L weights of a tile; S undecided tiles, P pairs of a
candidate and an undecided tile.
"""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

from ckptq.kernels.gpu import on_gpu
from ckptq.quantize.scratch import Scratch
from ckptq.quantize.tile_error import errors, powered_errors, powers
from ckptq.quantize.weight_scheme import WeightScheme

AT_ONCE = 1 << 23
"""Weights, and candidates of all their tiles together: about 250 MB on the device."""
UNDECIDED_AT_ONCE = 1 << 22
"""Weights that the CPU gets at a time, counted once for each candidate."""

UNIT = 2.0**-24
DEEPEST = 128
"""Additions that a number goes through in torch's sum of up to a million numbers."""
HERE = 6
"""Roundings of a sum here and of its bounds."""
OF_A_POWER = 8
"""In UNITs, how wrong the CPU's float32 power may be: 4 units in the last place."""


def first_of_least(error_KT: Tensor) -> Tensor:
    """[T]: the first candidate with the least error; 0 where no error is less than the dtype's
    largest number."""
    error_KT.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least_T = error_KT.amin(0)
    turn_K1 = torch.arange(len(error_KT), 0, -1, dtype=torch.int16, device=error_KT.device)[:, None]
    turn_T = ((error_KT == least_T) * turn_K1).amax(0)
    found = least_T < torch.finfo(error_KT.dtype).max
    return (len(error_KT) - turn_T).long() * found


def winners(
    x_TL: Tensor,
    scale_KT: Tensor,
    zero_point_KT: Tensor | None,
    scheme: WeightScheme,
    norm: float,
    scratch: Scratch,
) -> Tensor:
    """[T]: what `first_of_least` chooses of the errors that a CPU computes."""
    sum_KT = _sums(x_TL, scale_KT, zero_point_KT, scheme, norm, scratch)
    _leave_out_repeats(sum_KT, scale_KT, zero_point_KT)
    low_KT, high_KT = _bounds(sum_KT, x_TL)
    winner_T = first_of_least(high_KT)
    least_T = high_KT.amin(0)
    undecided_S = _undecided(low_KT, least_T, winner_T).nonzero()[:, 0]
    for some_S in undecided_S.split(max(UNDECIDED_AT_ONCE // (len(low_KT) * x_TL.shape[1]), 1)):
        x_SL, scale_KS = x_TL[some_S], scale_KT[:, some_S]
        zero_KS = None if zero_point_KT is None else zero_point_KT[:, some_S]
        maybe_KS = low_KT[:, some_S] <= least_T[some_S]
        found_S = _on_cores(x_SL, scale_KS, zero_KS, maybe_KS, scheme, norm)
        winner_T[some_S] = found_S.to(winner_T.device)
    return winner_T


def _sums(
    x_TL: Tensor,
    scale_KT: Tensor,
    zero_point_KT: Tensor | None,
    scheme: WeightScheme,
    norm: float,
    scratch: Scratch,
) -> Tensor:
    """[K, T] float32 or float64: sums of powered errors, each rounded once at most."""
    if on_gpu(x_TL) and x_TL.itemsize == 2:
        from ckptq.kernels.quantize.error_sums import error_sums

        power_N = powers(x_TL.dtype, norm, x_TL.device)
        bits = (scheme.type, scheme.num_bits)
        return error_sums(x_TL.contiguous(), scale_KT, zero_point_KT, power_N, bits)
    zero_points = repeat(None) if zero_point_KT is None else zero_point_KT[..., None]
    sum_KT = x_TL.new_empty(scale_KT.shape, dtype=torch.float64)
    for scale_T1, zero_T1, sum_T in zip(scale_KT[..., None], zero_points, sum_KT, strict=False):
        if x_TL.itemsize == 2:
            error_TL = powered_errors(x_TL, scale_T1, zero_T1, scheme, norm, scratch)
        else:
            single = torch.tensor(norm, dtype=torch.float32).item()  # as the CPU's power takes it
            error_TL = errors(x_TL, scale_T1, zero_T1, scheme, scratch).double().pow_(single)
        torch.sum(error_TL, -1, dtype=torch.float64, out=sum_T)
    return sum_KT


def _leave_out_repeats(sum_KT: Tensor, scale_KT: Tensor, zero_point_KT: Tensor | None) -> None:
    """A candidate with the scale and zero point of the one before does not come before it."""
    again = scale_KT[1:] == scale_KT[:-1]
    if zero_point_KT is not None:
        again &= zero_point_KT[1:] == zero_point_KT[:-1]
    sum_KT[1:].masked_fill_(again, torch.inf)


def _bounds(sum_KT: Tensor, x_TL: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest number that the CPU's sum may be, in the dtype of the weight."""
    length, dtype = x_TL.shape[1], x_TL.dtype
    roundings = HERE + (min(length - 1, DEEPEST) if length <= 1 << 20 else length - 1)
    share = (roundings + OF_A_POWER * (dtype == torch.float32)) * UNIT
    low_KT, high_KT = sum_KT * (1 - share), sum_KT * (1 + share)
    if dtype == torch.float32:
        slack_KT = (sum_KT > 0) * (length * 2.0**-125)  # powers under 2^-126 may be wrong by more
        low_KT, high_KT = low_KT.sub_(slack_KT), high_KT.add_(slack_KT)
    return low_KT.to(dtype), high_KT.to(dtype)


def _undecided(low_KT: Tensor, least_T: Tensor, winner_T: Tensor) -> Tensor:
    """[T]: whether another candidate may be below the winner, or equal to it and before it."""
    turn_K1 = torch.arange(len(low_KT), device=low_KT.device)[:, None]
    rival_KT = (low_KT < least_T) & (turn_K1 != winner_T)
    rival_KT |= (low_KT == least_T) & (turn_K1 < winner_T)
    return rival_KT.any(0) | (least_T >= torch.finfo(least_T.dtype).max)


def _on_cores(
    x_SL: Tensor,
    scale_KS: Tensor,
    zero_point_KS: Tensor | None,
    maybe_KS: Tensor,
    scheme: WeightScheme,
    norm: float,
) -> Tensor:
    """[S] on the CPU: the first of the least errors of those candidates that may have it."""
    k_P, s_P = maybe_KS.nonzero(as_tuple=True)
    zero_P1 = None if zero_point_KS is None else zero_point_KS[k_P, s_P][:, None].cpu()
    x_PL, scale_P1 = x_SL[s_P].cpu(), scale_KS[k_P, s_P][:, None].cpu()
    error_PL = powered_errors(x_PL, scale_P1, zero_P1, scheme, norm, Scratch())
    error_KS = torch.full(maybe_KS.shape, torch.inf, dtype=x_PL.dtype)
    error_KS[k_P.cpu(), s_P.cpu()] = error_PL.sum(-1)
    return first_of_least(error_KS)
