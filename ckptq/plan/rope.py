"""`--rope-order`: the order of q/k rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError
from ckptq.models.modules import Layout, Linear
from ckptq.models.weight import Reordered
from ckptq.permute import effect, marks
from ckptq.permute.targets import PROJECTIONS, head_geometry
from ckptq.rope_order import Heads, RopeOrder


def read_marks(ckpt: Checkpoint) -> marks.Marks:
    """The orders that the source is marked with; they hold for the output as well."""
    return marks.read(ckpt.config, {h.file.name: h.metadata for h in ckpt.headers})


def half_split(ckpt: Checkpoint, layout: Layout) -> tuple[Layout, marks.Marks]:
    """The layout with every q/k projection reordered, and the marks that say so.

    UsageError where they are in half-split order already, PlanError for q/k with a bias: vectors
    are copied by the pipeline, so `ckptq permute` has to be run on the result instead.
    """
    family = RopeOrder(layout.family.rope)
    now = marks.applied(read_marks(ckpt), RopeOrder.HALF_SPLIT, tuple(effect.Part), family)
    heads = head_geometry(ckpt.text_config)
    linears = {name: _reordered(ckpt, linear, heads) for name, linear in layout.linears.items()}
    return replace(layout, linears=linears), now


def _reordered(ckpt: Checkpoint, linear: Linear, heads: Mapping[str, Heads]) -> Linear:
    side = PROJECTIONS.get(linear.projection)
    if side is None or linear.kept is not None or isinstance(linear.weight, Reordered):
        return linear
    if f"{linear.name}.bias" in ckpt.tensors:
        raise PlanError(
            f"{linear.name}.bias: --rope-order half-split does not move biases; quantize with "
            "--rope-order keep and run `ckptq permute` on the result"
        )
    rows = linear.weight.spec.shape[0]
    if rows != heads[side].rows:
        raise PlanError(
            f"{linear.name}: has {rows} rows, wanted {heads[side].count} heads of "
            f"{heads[side].head_dim}"
        )
    return replace(linear, weight=Reordered(linear.weight, heads[side]))
