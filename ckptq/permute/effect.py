"""What a RoPE row permutation does to each stored tensor, from its name and shape.

Every tensor that a q/k projection or an attention module may have gets a rule here. A tensor with
no rule, or with an ambiguous shape, is refused by name, never skipped. Imports no torch, so that a
plan can be made from headers.

Shape letters: R rows of the projection (heads x head_dim), C columns, G groups of columns, H heads,
D head_dim, W words of 32 bits. Names and shapes are those of compressed-tensors 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil

from ckptq.errors import PlanError
from ckptq.rope_order import Heads, keeps_blocks
from ckptq.spec import TensorSpec


class Part(StrEnum):
    """The parts of a projection that `permute --only` can name."""

    WEIGHTS = "weights"
    SCALES = "scales"
    ZERO_POINTS = "zero-points"


class Move(StrEnum):
    """How a tensor is changed."""

    KEPT = "kept"
    ROWS = "rows"
    """Its leading dimensions are the rows: gather them."""
    PACKED_ROWS = "packed rows"
    """int32 words that each hold several rows: unpack, gather, pack."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What happens to one tensor, and why."""

    move: Move
    part: Part
    why: str
    heads: Heads
    """Geometry of the rows that move: all heads', or one head's where heads share a tensor."""
    bits: int = 0
    """Width of a code, for packed rows."""

    def on_rows(self, count: int) -> Effect:
        """The same for a run of whole heads out of a tensor's rows."""
        return replace(self, heads=replace(self.heads, count=count // self.heads.head_dim))


@dataclass(frozen=True, slots=True)
class Projection:
    """A q_proj or k_proj, or the q, k or v side of an attention module.

    `name` is the full module name and only serves messages. `block` is block_structure of the
    weights' scheme, (rows, columns); `bits` their num_bits, needed only where shapes are ambiguous.
    """

    name: str
    heads: Heads
    block: tuple[int, int] | None = None
    bits: int | None = None


Rule = Callable[[str, TensorSpec, Projection], Effect]


def effect_on(local: str, spec: TensorSpec, projection: Projection) -> Effect:
    """What the permutation does to tensor `local` ("weight_scale", ...) of a q/k projection.

    Raises PlanError for a name without a rule and for a shape that does not fit the heads.
    """
    if local not in PROJECTION_RULES:
        raise PlanError(
            f"{projection.name}.{local}: {spec} is no tensor of a q/k projection whose rows "
            f"ckptq knows how to permute (known: {', '.join(sorted(PROJECTION_RULES))})"
        )
    return PROJECTION_RULES[local](local, spec, projection)


def effect_on_attention(local: str, spec: TensorSpec, sides: Mapping[str, Projection]) -> Effect:
    """What the permutation does to tensor `local` ("k_scale", ...) of an attention module.

    `sides` has a Projection for "q" and for "k", named after the attention module. Tensors of v
    are never touched, because RoPE does not apply to v. Raises PlanError as `effect_on` does.
    """
    side = "q" if local.startswith("q_") else "k"
    if local not in ATTENTION_RULES:
        raise PlanError(
            f"{sides['q'].name}.{local}: {spec} is no tensor of an attention module that ckptq "
            f"knows how to permute (known: {', '.join(sorted(ATTENTION_RULES))})"
        )
    return ATTENTION_RULES[local](local, spec, sides[side])


def _kept(part: Part, why: str) -> Rule:
    def rule(local: str, spec: TensorSpec, projection: Projection) -> Effect:
        return Effect(Move.KEPT, part, why, projection.heads)

    return rule


def _rows(part: Part, rank: int) -> Rule:
    def rule(local: str, spec: TensorSpec, projection: Projection) -> Effect:
        rows = projection.heads.rows
        if len(spec.shape) != rank or spec.shape[0] != rows:
            raise PlanError(
                f"{projection.name}.{local}: found {spec}, expected {rank} dimensions with "
                f"{rows} rows ({projection.heads.count} heads of {projection.heads.head_dim})"
            )
        return Effect(Move.ROWS, part, "indexed by output row", projection.heads)

    return rule


def _grid(part: Part) -> Rule:
    """Quantization parameters: one for all, one per row, per row and group, or per block."""

    def rule(local: str, spec: TensorSpec, projection: Projection) -> Effect:
        heads = projection.heads
        if spec.numel == 1:
            return Effect(Move.KEPT, part, "one for the whole tensor", heads)
        if spec.shape[0] == heads.rows:
            return Effect(Move.ROWS, part, "per output row", heads)
        return _block(local, spec, projection, part)

    return rule


def _block(local: str, spec: TensorSpec, projection: Projection, part: Part) -> Effect:
    heads, name = projection.heads, f"{projection.name}.{local}"
    if projection.block is None:
        raise PlanError(
            f"{name}: {spec} is neither one value nor one for each of {heads.rows} rows; for "
            "block scales, config.json must give the block_structure"
        )
    block_rows = projection.block[0]
    if len(spec.shape) != 2 or spec.shape[0] != ceil(heads.rows / block_rows):
        raise PlanError(
            f"{name}: {spec} does not fit {heads.rows} rows in blocks of {block_rows}: "
            f"expected {ceil(heads.rows / block_rows)} rows of blocks"
        )
    if not keeps_blocks(heads, block_rows):
        raise PlanError(
            f"{name}: the permutation moves rows between blocks of {block_rows} rows, because a "
            f"head has {heads.head_dim}; block scales cannot follow. Quantize q/k per channel"
        )
    return Effect(Move.KEPT, part, f"each block of {block_rows} rows keeps its rows", heads)


def _zero_point(local: str, spec: TensorSpec, projection: Projection) -> Effect:
    heads = projection.heads
    packed = spec.dtype == "I32" and spec.numel != 1 and spec.shape[0] != heads.rows
    if not packed:
        return _grid(Part.ZERO_POINTS)(local, spec, projection)
    bits = _packed_bits(local, spec, projection)
    why = f"per output row, {bits}-bit codes packed along the rows"
    return Effect(Move.PACKED_ROWS, Part.ZERO_POINTS, why, heads, bits)


def _packed_bits(local: str, spec: TensorSpec, projection: Projection) -> int:
    """Width of the codes: the only one for which the rows fill that many words."""
    rows, words = projection.heads.rows, spec.shape[0]
    fits = [b for b in range(1, 9) if ceil(rows * b / 32) == words]
    if projection.bits is not None:
        fits = [b for b in fits if b == projection.bits]
    if len(fits) != 1 or len(spec.shape) != 2:
        found = f"{projection.name}.{local}: {spec}"
        if fits:
            raise PlanError(
                f"{found} may hold {rows} codes of {fits} bits; give num_bits in the config"
            )
        wanted = f" of {projection.bits} bits" if projection.bits else ""
        raise PlanError(f"{found} does not hold {rows} packed codes{wanted} a column")
    return fits[0]


def _per_head(part: Part) -> Rule:
    """Parameters of q or k themselves: one for all, one per head, or one per channel."""

    def rule(local: str, spec: TensorSpec, projection: Projection) -> Effect:
        heads = projection.heads
        per_row = _dims(spec) in ([heads.rows], [heads.count, heads.head_dim])
        per_head = spec.numel == 1 or _is_vector(spec, heads.count, lead=True)
        shared = _is_vector(spec, heads.head_dim, lead=False)
        if heads.count == 1 and per_row:
            shared = False
        if [per_row, per_head, shared].count(True) != 1:
            raise PlanError(
                f"{projection.name}.{local}: {spec} is not clearly one value, one for each of "
                f"{heads.count} heads, or one for each of their {heads.head_dim} channels"
            )
        if per_head:
            return Effect(Move.KEPT, part, "the same for all rows of a head", heads)
        if per_row:
            return Effect(Move.ROWS, part, "per channel", heads)
        return Effect(Move.ROWS, part, "per channel, shared by all heads", heads.one)

    return rule


def _dims(spec: TensorSpec) -> list[int]:
    return [size for size in spec.shape if size != 1]


def _is_vector(spec: TensorSpec, length: int, *, lead: bool) -> bool:
    """`length` values along one dimension: the first if `lead`, otherwise the last."""
    return _dims(spec) == [length] and spec.shape[0 if lead else -1] == length


_INPUT = "belongs to the input side"

PROJECTION_RULES: dict[str, Rule] = {
    "weight": _rows(Part.WEIGHTS, rank=2),
    # int32 [R, W] words or uint8 [R, C / 2] FP4 pairs: packed along the columns, so rows are whole
    "weight_packed": _rows(Part.WEIGHTS, rank=2),
    "bias": _rows(Part.WEIGHTS, rank=1),
    "weight_scale": _grid(Part.SCALES),
    "weight_scale_inv": _grid(Part.SCALES),
    "weight_zero_point": _zero_point,
    "weight_global_scale": _kept(Part.SCALES, "one for the whole tensor"),
    "weight_scale_2": _kept(Part.SCALES, "one for the whole tensor"),
    "weight_shape": _kept(Part.WEIGHTS, "the permutation keeps the shape"),
    "weight_g_idx": _kept(Part.WEIGHTS, "indexed by input column"),
    "input_scale": _kept(Part.SCALES, _INPUT),
    "input_global_scale": _kept(Part.SCALES, _INPUT),
    "input_zero_point": _kept(Part.ZERO_POINTS, _INPUT),
    # scales of the projection's output: ModelOpt stores those of q and k here
    "q_scale": _per_head(Part.SCALES),
    "k_scale": _per_head(Part.SCALES),
    "output_scale": _per_head(Part.SCALES),
    "output_zero_point": _per_head(Part.ZERO_POINTS),
}

ATTENTION_RULES: dict[str, Rule] = {
    "q_scale": _per_head(Part.SCALES),
    "k_scale": _per_head(Part.SCALES),
    "v_scale": _kept(Part.SCALES, "RoPE does not apply to v"),
    "q_zero_point": _per_head(Part.ZERO_POINTS),
    "k_zero_point": _per_head(Part.ZERO_POINTS),
    "v_zero_point": _kept(Part.ZERO_POINTS, "RoPE does not apply to v"),
    "sinks": _kept(Part.WEIGHTS, "one per head"),
    # frequencies count pairs, and pair i is pair i in both orders
    "rotary_emb.inv_freq": _kept(Part.WEIGHTS, "indexed by rotated pair"),
    # normalisation of q and k before RoPE has one weight per channel
    "q_norm.weight": _per_head(Part.WEIGHTS),
    "k_norm.weight": _per_head(Part.WEIGHTS),
}
