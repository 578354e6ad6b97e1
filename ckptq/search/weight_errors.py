"""What one set in one scheme costs, from the weights alone: their relative squared error.

HIGGS's linearity theorem (Malinovskii et al., "Pushing the Limits of Large Language Model
Quantization via the Linearity Theorem", NAACL 2025, arXiv 2411.17525): where errors are small, the
expected loss rises by the sum over Linears of a_l * t_l, t_l = |Q(W_l) - W_l|^2 / |W_l|^2, with a
factor a_l that does not depend on how W_l was quantized. Here a_l is 1; of the experts of a layer,
each of which sees a part of the tokens, it is 1 for all experts of a projection together. Rounding
of inputs does not show.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ckptq.evaluate.weights.noise import squares
from ckptq.evaluate.weights.schemes import SchemeWeights
from ckptq.forward.reader import Reader
from ckptq.models.experts import experts_of
from ckptq.models.weight_rows import stored_of, whole_weight
from ckptq.search.candidates import Candidates, LinearSet

if TYPE_CHECKING:
    from torch import Tensor


class WeightErrors:
    """Reads the weights of one set at a time, once for all schemes."""

    def __init__(self, candidates: Candidates, device: str) -> None:
        self._candidates = candidates
        self._reader = Reader(device, keep=True)
        self._layout = next(iter(candidates.plans.values())).layout

    def measure(self, each: LinearSet, schemes: Collection[str]) -> dict[str, float]:
        """Scheme -> the sum of the relative squared errors of its Linears. SourceError names a
        weight that holds NaN or Inf."""
        weights = {
            scheme: SchemeWeights(self._candidates.ckpt, plan, self._reader)
            for scheme, plan in self._candidates.plans.items()
            if scheme in schemes and scheme in each.nbytes
        }
        views = [self._layout.linears[name].weight for name in each.linears]
        self._reader.begin([stored for view in views for stored in stored_of(view)])
        share = dict(_shares(each))
        totals = dict.fromkeys(weights, 0.0)
        for name, view in zip(each.linears, views, strict=True):
            w_RC = whole_weight(self._reader.take, view)
            for scheme, source in weights.items():
                totals[scheme] += share[name] * _error(source, name, w_RC)
        for source in weights.values():
            source.check_finite()
        self._reader.release()
        return totals


def _error(source: SchemeWeights, linear: str, w_RC: Tensor) -> float:
    """|Q(w) - w|^2 / |w|^2 of one Linear; 0 where all of it is 0."""
    import torch

    back_RC = source.quantized(linear, w_RC)
    wide = torch.float64 if w_RC.device.type == "cpu" else torch.float32
    signal, noise = squares(w_RC, back_RC, wide)
    return float(noise / signal) if float(signal) else 0.0


def _shares(each: LinearSet) -> Iterator[tuple[str, float]]:
    """Linear -> its factor."""
    kinds = {name: (experts_of(name), name.rpartition(".")[2]) for name in each.linears}
    counts = Counter(kinds.values())
    for name, kind in kinds.items():
        yield name, 1.0 if kind[0] is None else 1 / counts[kind]
