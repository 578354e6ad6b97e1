"""What permutation-proof scales cost: signal to noise of q/k with own scales, and shared."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ckptq.checkpoint.read import Files
from ckptq.checkpoint.view import View, read_rows
from ckptq.convert.blocks import blocks
from ckptq.convert.pipeline import share_of
from ckptq.plan.unit import Part, Plan
from ckptq.quantize.dequantize import dequantize
from ckptq.quantize.formats import Share, quantize


@dataclass(frozen=True, kw_only=True, slots=True)
class ProofCost:
    """Decibels over all q/k projections together."""

    own_db: float
    shared_db: float


def proof_cost(plan: Plan) -> ProofCost | None:
    """Reads the q/k weights once more; None where no scale was shared.

    A projection that is dequantized or reordered on its way is left out of the figure.
    """
    parts = [
        p for u in plan.units for p in u.parts if p.proof and isinstance(p.linear.weight, View)
    ]
    if not parts:
        return None
    signal = own = shared = 0.0
    with Files() as files:
        for part in parts:
            view = part.linear.weight
            assert isinstance(view, View)
            for start, stop in blocks((0, view.spec.shape[0]), view.spec, part.quantum):
                w_RC = read_rows(files, view, start, stop)
                signal += float(w_RC.double().square().sum())
                own += _noise(w_RC, part, None)
                shared += _noise(w_RC, part, share_of(part))
    return ProofCost(own_db=_db(signal, own), shared_db=_db(signal, shared))


def _noise(w_RC: Tensor, part: Part, share: Share | None) -> float:
    made = quantize(w_RC, part.scheme, share=share)
    made["weight_scale"] = made["weight_scale"].double()
    back_RC = dequantize(made, part.scheme, tuple(w_RC.shape))
    return float((back_RC - w_RC.double()).square().sum())


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf
