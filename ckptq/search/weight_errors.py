"""What one set in one scheme costs, from the weights alone: their relative squared error.

HIGGS's linearity theorem (Malinovskii et al., "Pushing the Limits of Large Language Model
Quantization via the Linearity Theorem", NAACL 2025, arXiv 2411.17525): where errors are small, the
expected loss rises by the sum over Linears of a_l * t_l, t_l = |Q(W_l) - W_l|^2 / |W_l|^2, with a
factor a_l that does not depend on how W_l was quantized. Here a_l is 1; of the experts of a layer,
each of which sees a part of the tokens, it is 1 for all experts of a projection together. Rounding
of inputs does not show.

A model stays what it is where rows are scaled against columns that they meet: heads of v_proj and
o_proj, channels of up_proj and down_proj, norms and what follows. So errors are taken of rows of
length 1, and then relative to each few columns: else a small head could vanish unseen.

A mean over millions of weights does not need all of them: of large Linears, pieces of some rows at
even distances are read, the first and the last among them; of many experts some.

Shape letters: R rows, C columns, G groups of columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING

from ckptq.checkpoint.read import Files
from ckptq.checkpoint.view import View, read_slab, window
from ckptq.errors import SourceError
from ckptq.models.experts import experts_of
from ckptq.models.weight import Weight
from ckptq.models.weight_rows import Rows, rows_of, weight_rows
from ckptq.plan.unit import Plan
from ckptq.quantize.dispatch import dequantize, quantize
from ckptq.quantize.formats import NonFinite, merge_statistic, needs_statistic, statistic
from ckptq.search.candidates import Candidates, LinearSet

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.quantize.weight_scheme import WeightScheme

ENOUGH = 1 << 20
"""Weights of a projection that are read, of all experts together."""
PIECE = 16
"""Rows that lie together, where neither a scheme nor the source has scales of more."""
PIECES = 2
"""Of each Linear that is read, however many experts there are."""
COLUMNS = 16
"""That are weighed together: as many as have one scale in NVFP4."""
EXPERTS = 32
"""Of a layer that are read, at even distances."""


class WeightErrors:
    """Reads the weights of one set at a time, once for all schemes."""

    def __init__(self, candidates: Candidates, device: str) -> None:
        self._candidates, self._device = candidates, device
        self._layout = next(iter(candidates.plans.values())).layout
        self._schemes = {name: dict(_schemes(plan)) for name, plan in candidates.plans.items()}
        self._slab: dict[object, Tensor] = {}
        """The experts that were read last."""

    def measure(self, each: LinearSet, schemes: Collection[str]) -> dict[str, float]:
        """Scheme -> the sum of the relative squared errors of its Linears. SourceError names a
        weight that holds NaN or Inf."""
        picked = _picked(each.linears)
        share = dict(_shares([name for linears in picked for name in linears]))
        totals = {s: 0.0 for s in self._schemes if s in schemes and s in each.nbytes}
        for linears in picked:
            with Files() as files:
                samples = {name: self._sample(files, name, share[name]) for name in linears}
            for scheme in totals:
                for name, error in self._errors(scheme, samples):
                    totals[scheme] += share[name] * error
        return totals

    def places(self, each: LinearSet) -> Iterator[tuple[Weight, int, int]]:
        """What `measure` reads: weights and their rows, from the first to before the last."""
        picked = [name for linears in _picked(each.linears) for name in linears]
        for name, share in _shares(picked):
            for start, stop in self._pieces(name, share):
                yield self._layout.linears[name].weight, start, stop

    def _sample(self, files: Files, linear: str, share: float) -> Tensor:
        """Some of its rows, [R, C]."""
        import torch

        rows = self._rows(files, self._layout.linears[linear].weight)
        return torch.cat([rows(*each) for each in self._pieces(linear, share)]).to(self._device)

    def _rows(self, files: Files, weight: Weight) -> Rows:
        """Gate and up of a transposed expert lie side by side: what holds both is read once."""
        if not isinstance(weight, View) or weight.streams:
            return weight_rows(files, weight)
        if weight.slab not in self._slab:
            self._slab.clear()  # free it before the next is read
            self._slab[weight.slab] = read_slab(files, weight)
        return rows_of(window(self._slab[weight.slab], weight))

    def _pieces(self, linear: str, share: float) -> list[tuple[int, int]]:
        weight = self._layout.linears[linear].weight
        R, C = weight.spec.shape
        height = self._height(linear)
        step = max(weight.quantum, height)
        starts = piece_starts(R, step, int(ENOUGH * share) // C * step // height)
        piece = step if len(starts) * step >= R else height
        return [(start, min(start + piece, R)) for start in starts]

    def _height(self, linear: str) -> int:
        """Rows that some scheme has one scale for."""
        schemes = [found[linear][1] for found in self._schemes.values() if linear in found]
        return max([PIECE, *(s.block_structure[0] for s in schemes if s.block_structure)])

    def _errors(self, scheme: str, samples: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
        """Linear -> its error. Those that share a number, as q, k and v do, take it of all that is
        read of them."""
        schemes = self._schemes[scheme]
        shared: dict[str, Tensor] = {}
        try:
            for name, w_RC in samples.items():
                unit, own = schemes[name]
                if needs_statistic(own):
                    known = [shared[unit]] if unit in shared else []
                    shared[unit] = reduce(merge_statistic, [*known, statistic(w_RC, own)])
            for name, w_RC in samples.items():
                unit, own = schemes[name]
                yield name, _error(w_RC, own, shared.get(unit))
        except NonFinite as error:
            path = self._candidates.ckpt.path
            raise SourceError(f"{path}: tensor of {', '.join(samples)}: {error}") from error


def piece_starts(rows: int, piece: int, enough: int) -> list[int]:
    """Where pieces of so many rows begin: all of them, or as many as make about `enough` rows."""
    pieces = -(-rows // piece)
    count = min(pieces, max(PIECES, enough // piece))
    if count == pieces:
        return list(range(0, rows, piece))
    return [index * (pieces - 1) // (count - 1) * piece for index in range(count)]


def _schemes(plan: Plan) -> Iterator[tuple[str, tuple[str, WeightScheme]]]:
    """Linear -> the unit that shares its numbers, and its scheme."""
    for unit in plan.units:
        for part in unit.parts:
            yield part.linear.name, (unit.key, part.scheme)


def _error(w_RC: Tensor, scheme: WeightScheme, shared: Tensor | None) -> float:
    """|Q(w) - w|^2 / |w|^2 of one Linear, all rows and all groups of columns alike."""
    import torch

    made = quantize(w_RC, scheme, shared)
    back_RC = dequantize(made, scheme, (w_RC.shape[0], w_RC.shape[1]), w_RC.dtype)
    w_RC, tiny = w_RC.float(), torch.finfo(torch.float32).tiny
    size_R1 = w_RC.norm(dim=1, keepdim=True).clamp(min=tiny)
    noise_G = _by_columns((back_RC.float() - w_RC) / size_R1)
    signal_G = _by_columns(w_RC / size_R1)
    return float((noise_G / signal_G.clamp(min=tiny)).mean())


def _by_columns(x_RC: Tensor) -> Tensor:
    """Sums of squares, [G]."""
    from torch.nn.functional import pad

    square_C = x_RC.square().sum(0)
    return pad(square_C, (0, -len(square_C) % COLUMNS)).view(-1, COLUMNS).sum(1)


def _picked(linears: Sequence[str]) -> list[list[str]]:
    """Those that are read, of one module together: all, or those of some experts."""
    modules = [list(g) for _, g in groupby(linears, key=lambda name: name.rpartition(".")[0])]
    last = len(modules) - 1
    if experts_of(linears[0]) is None or last < EXPERTS:
        return modules
    return [modules[index * last // (EXPERTS - 1)] for index in range(EXPERTS)]


def _shares(linears: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Linear -> its factor."""
    kinds = {name: (experts_of(name), name.rpartition(".")[2]) for name in linears}
    counts = Counter(kinds.values())
    for name, kind in kinds.items():
        yield name, 1.0 if kind[0] is None else 1 / counts[kind]
