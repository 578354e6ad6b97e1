"""`--rope-order` and `--rope-proof`: the order of q/k rows, and scales that no order can spoil."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, UsageError
from ckptq.models.modules import Layout, Linear
from ckptq.models.weight import Reordered
from ckptq.permute import effect, marks
from ckptq.permute.order import Heads, RopeOrder, Sharing
from ckptq.permute.targets import PROJECTIONS, head_geometry
from ckptq.plan.unit import Part, Proof, Unit


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


def prove_scales(
    ckpt: Checkpoint, layout: Layout, units: Iterable[Unit], sharing: Sharing
) -> Iterator[Unit]:
    """The units with permutation-proof scales for q/k: `--rope-proof`.

    UsageError for a model whose rows no engine permutes, PlanError for scales not per channel.
    """
    if layout.family.rope != "interleaved":
        raise UsageError(
            f"--rope-proof: no engine permutes the rows of {ckpt.config.get('model_type')!r}; "
            "it is for models with interleaved RoPE (Llama-4)"
        )
    heads = head_geometry(ckpt.text_config)
    for unit in units:
        yield replace(unit, parts=tuple(_proved(part, heads, sharing) for part in unit.parts))


def _proved(part: Part, heads: Mapping[str, Heads], sharing: Sharing) -> Part:
    side = PROJECTIONS.get(part.linear.projection)
    if side is None or part.scheme.strategy == "tensor":
        return part
    if part.scheme.strategy != "channel" or not part.scheme.symmetric:
        raise PlanError(
            f"{part.linear.name}: --rope-proof is for scales per channel, not for {part.scheme}"
        )
    return replace(part, proof=Proof(heads[side], sharing))


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
