"""What one set in one scheme costs, from the weights alone: their relative squared error.

HIGGS's linearity theorem (Malinovskii et al., "Pushing the Limits of Large Language Model
Quantization via the Linearity Theorem", NAACL 2025, arXiv 2411.17525): where errors are small, the
expected loss rises by the sum over Linears of a_l * t_l, t_l = |Q(W_l) - W_l|^2 / |W_l|^2, with a
factor a_l that does not depend on how W_l was quantized. Here a_l is 1; of the experts of a layer,
each of which sees a part of the tokens, it is 1 for all experts of a projection together. Rounding
of inputs does not show.

A mean over millions of weights does not need all of them: of large Linears, blocks of rows at even
distances are read, the first and the last among them.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby
from typing import TYPE_CHECKING

from ckptq.checkpoint.read import Files
from ckptq.errors import SourceError
from ckptq.evaluate.weights.noise import squares
from ckptq.models.experts import experts_of
from ckptq.models.weight_rows import weight_rows
from ckptq.plan.unit import Plan
from ckptq.quantize.dispatch import dequantize, quantize
from ckptq.quantize.formats import NonFinite, merge_statistic, needs_statistic, statistic
from ckptq.search.candidates import Candidates, LinearSet

if TYPE_CHECKING:
    from torch import Tensor

    from ckptq.quantize.weight_scheme import WeightScheme

ENOUGH = 1 << 22
"""Weights of a projection that are read, of all experts together."""
BLOCK = 128
"""Rows that are read together: scales of blocks span no more."""

Samples = Mapping[str, "Sequence[Tensor]"]
"""Linear -> blocks of its rows, [R, C] each."""


class WeightErrors:
    """Reads the weights of one set at a time, once for all schemes."""

    def __init__(self, candidates: Candidates, device: str) -> None:
        self._candidates, self._device = candidates, device
        self._layout = next(iter(candidates.plans.values())).layout
        self._schemes = {name: dict(_schemes(plan)) for name, plan in candidates.plans.items()}

    def measure(self, each: LinearSet, schemes: Collection[str]) -> dict[str, float]:
        """Scheme -> the sum of the relative squared errors of its Linears. SourceError names a
        weight that holds NaN or Inf."""
        share = dict(_shares(each))
        totals = {s: 0.0 for s in self._schemes if s in schemes and s in each.nbytes}
        for _, linears in groupby(each.linears, key=lambda name: name.rpartition(".")[0]):
            samples = dict(self._samples(list(linears), share))
            for scheme in totals:
                for name, error in self._errors(scheme, samples):
                    totals[scheme] += share[name] * error
        return totals

    def _samples(
        self, linears: Sequence[str], share: Mapping[str, float]
    ) -> Iterator[tuple[str, Sequence[Tensor]]]:
        with Files() as files:
            for name in linears:
                weight = self._layout.linears[name].weight
                R, C = weight.spec.shape
                rows = weight_rows(files, weight)
                starts = block_starts(R, int(ENOUGH * share[name]) // C)
                yield name, [rows(at, min(at + BLOCK, R)).to(self._device) for at in starts]

    def _errors(self, scheme: str, samples: Samples) -> Iterator[tuple[str, float]]:
        """Linear -> its error. Those that share a number, as q, k and v do, take it of all that is
        read of them."""
        schemes = self._schemes[scheme]
        shared: dict[str, Tensor] = {}
        try:
            for name, blocks in samples.items():
                unit, own = schemes[name]
                if needs_statistic(own):
                    found = [statistic(w_RC, own) for w_RC in blocks]
                    known = [shared[unit]] if unit in shared else []
                    shared[unit] = reduce(merge_statistic, [*known, *found])
            for name, blocks in samples.items():
                unit, own = schemes[name]
                yield name, _error(blocks, own, shared.get(unit))
        except NonFinite as error:
            path = self._candidates.ckpt.path
            raise SourceError(f"{path}: tensor of {', '.join(samples)}: {error}") from error


def block_starts(rows: int, enough: int) -> list[int]:
    """Where blocks of `BLOCK` rows begin: all of them, or as many as make about `enough` rows."""
    blocks = -(-rows // BLOCK)
    count = min(blocks, max(2, enough // BLOCK))
    if count == blocks:
        return list(range(0, rows, BLOCK))
    return [index * (blocks - 1) // (count - 1) * BLOCK for index in range(count)]


def _schemes(plan: Plan) -> Iterator[tuple[str, tuple[str, WeightScheme]]]:
    """Linear -> the unit that shares its numbers, and its scheme."""
    for unit in plan.units:
        for part in unit.parts:
            yield part.linear.name, (unit.key, part.scheme)


def _error(blocks: Sequence[Tensor], scheme: WeightScheme, shared: Tensor | None) -> float:
    """|Q(w) - w|^2 / |w|^2 of one Linear; 0 where all of it is 0."""
    import torch

    signal, noise = 0.0, 0.0
    for w_RC in blocks:
        made = quantize(w_RC, scheme, shared)
        back_RC = dequantize(made, scheme, (w_RC.shape[0], w_RC.shape[1]), w_RC.dtype)
        both = torch.stack(squares(w_RC, back_RC, torch.float32)).tolist()
        signal, noise = signal + both[0], noise + both[1]
    return noise / signal if signal else 0.0


def _shares(each: LinearSet) -> Iterator[tuple[str, float]]:
    """Linear -> its factor."""
    kinds = {name: (experts_of(name), name.rpartition(".")[2]) for name in each.linears}
    counts = Counter(kinds.values())
    for name, kind in kinds.items():
        yield name, 1.0 if kind[0] is None else 1 / counts[kind]
