"""From tensor names to Linear modules: which there are, where their weights lie, what must stay.

Fused 3-D experts are split into one Linear per expert, named as vLLM and transformers both load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.view import View
from ckptq.models.encoded import BELONGS_TO_SCHEME, read_encoded
from ckptq.models.family import (
    FUSED_SETS,
    LAYER,
    NEVER_QUANTIZED,
    Family,
    FusedExperts,
    family_of,
)
from ckptq.models.weight import Weight
from ckptq.spec import FLOATS

FUSED_WEIGHT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<which>gate_up_proj|down_proj)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One Linear [R, C]: its name in the output, and where its parts lie in the source."""

    name: str
    weight: Weight
    bias: View | None = None
    """Only where it has to be cut out of a fused tensor; a bias of its own is simply copied."""
    kept: str | None = None
    """Why it is never quantized; None where a recipe may decide."""

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def projection(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """All that a checkpoint holds: Linears, and the rest with the reason why it is copied."""

    family: Family
    linears: Mapping[str, Linear]
    others: Mapping[str, str]
    """Tensor name -> reason, for tensors that belong to no Linear's weight."""
    consumed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Source tensor -> the Linears that are cut out of it."""
    layers: str = ""
    """Name of the list of decoder layers: "model.layers"."""
    num_layers: int = 0
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Tensor name -> reason, for what means nothing once a quantized source is dequantized."""


def read_layout(ckpt: Checkpoint) -> Layout:
    """Sort a checkpoint's tensors into Linears and others, from headers and config alone."""
    family = family_of(ckpt.config)
    layers, num_layers = decoder_layers(ckpt)
    linears: dict[str, Linear] = {}
    others: dict[str, str] = {}
    consumed: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, str] = {}
    for module, weight in read_encoded(ckpt).items():
        kept = why_kept(module, layers, num_layers)
        linears[module] = Linear(name=module, weight=weight, kept=kept)
        consumed |= dict.fromkeys((t.name for t in weight.tensors.values()), (module,))
    for name, stored in ckpt.tensors.items():
        if name in consumed:
            continue
        if ckpt.quantization_config is not None and BELONGS_TO_SCHEME.match(name):
            dropped[name] = "dropped: belongs to the quantization of the source"
            continue
        found = list(_linears_in(ckpt, family, stored, layers, num_layers))
        for linear in found:
            linears[linear.name] = linear
        if found:
            consumed[name] = tuple(linear.name for linear in found)
        elif not _is_fused_bias(family, ckpt, name):
            others[name] = _why_no_linear(name, stored)
    return Layout(
        family=family,
        linears=linears,
        others=others,
        consumed=consumed,
        layers=layers,
        num_layers=num_layers,
        dropped=dropped,
    )


def decoder_layers(ckpt: Checkpoint) -> tuple[str, int]:
    """Name and length of the list of decoder layers, e.g. ("language_model.model.layers", 48).

    The list with most tensors that lies in no tower; ("", 0) where there is none.
    """
    counts: dict[str, int] = {}
    for name in ckpt.tensors:
        match = LAYER.match(name)
        if match and not _never(match["prefix"]):
            counts[match["prefix"]] = counts.get(match["prefix"], 0) + 1
    if not counts:
        return "", 0
    prefix = max(counts, key=lambda p: counts[p])
    declared = ckpt.text_config.get(family_of(ckpt.config).layers_key)
    if isinstance(declared, int):
        return prefix, declared
    indices = (LAYER.match(n) for n in ckpt.tensors if n.startswith(prefix + "."))
    return prefix, 1 + max(int(m["index"]) for m in indices if m)


def fused_set(linear: Linear, linears: Mapping[str, Linear]) -> tuple[str, ...]:
    """The siblings that vLLM merges with this Linear, itself included, in vLLM's order.

    Example: `...self_attn.k_proj` -> its q_proj, k_proj and v_proj, as far as they exist.
    """
    for names in FUSED_SETS:
        if linear.projection in names:
            full = (f"{linear.parent}.{name}" for name in names)
            return tuple(name for name in full if name in linears)
    return (linear.name,)


def _linears_in(
    ckpt: Checkpoint, family: Family, stored: StoredTensor, layers: str, num_layers: int
) -> Iterator[Linear]:
    name, shape = stored.name, stored.spec.shape
    fused = FUSED_WEIGHT.match(name)
    if fused and len(shape) == 3 and family.fused_experts and stored.spec.dtype in FLOATS:
        bias = ckpt.tensors.get(f"{name}_bias")
        yield from cut_experts(family.fused_experts, stored, bias)
    elif name.endswith(".weight") and len(shape) == 2 and stored.spec.dtype in FLOATS:
        module = name.removesuffix(".weight")
        yield Linear(name=module, weight=View(stored), kept=why_kept(module, layers, num_layers))


def cut_experts(
    layout: FusedExperts, stored: StoredTensor, bias: StoredTensor | None
) -> Iterator[Linear]:
    """Cut [E, in, out] or [E, out, in], and a bias [E, out], into the Linears of each expert.

    `stored` is named "<experts>.gate_up_proj" or "<experts>.down_proj".
    """
    experts, _, which = stored.name.rpartition(".")
    count, *matrix = stored.spec.shape
    outs = matrix[1] if layout.transposed else matrix[0]
    for expert in range(count):
        for projection, part in _parts(layout, which, outs).items():
            yield Linear(
                name=f"{experts}.{expert}.{projection}",
                weight=View(
                    stored,
                    index=expert,
                    rows=None if layout.transposed else part,
                    columns=part if layout.transposed else None,
                    transposed=layout.transposed,
                ),
                bias=_bias(bias, expert, part) if bias else None,
            )


def _bias(stored: StoredTensor, expert: int, part: range) -> View:
    """The bias [out] of one expert, cut out of [E, outs]."""
    return View(stored, rows=range(expert, expert + 1), columns=part, vector=True)


def _parts(layout: FusedExperts, which: str, outs: int) -> dict[str, range]:
    """Which outputs of a fused tensor belong to which projection."""
    if which == "down_proj":
        return {"down_proj": range(outs)}
    if layout.interleaved:
        return {"gate_proj": range(0, outs, 2), "up_proj": range(1, outs, 2)}
    return {"gate_proj": range(outs // 2), "up_proj": range(outs // 2, outs)}


def _is_fused_bias(family: Family, ckpt: Checkpoint, name: str) -> bool:
    weight = name.removesuffix("_bias")
    return bool(
        family.fused_experts
        and name.endswith("_bias")
        and FUSED_WEIGHT.match(weight)
        and weight in ckpt.tensors
    )


def why_kept(module: str, layers: str, num_layers: int) -> str | None:
    """Why a Linear of this name is never quantized, or None."""
    reason = _never(module)
    if reason:
        return reason
    match = LAYER.match(module + ".")
    if not layers or not match or match["prefix"] != layers:
        return "outside the decoder layers"
    if int(match["index"]) >= num_layers:
        return "multi-token prediction layer"
    return None


def _never(module: str) -> str | None:
    return next((rule.reason for rule in NEVER_QUANTIZED if rule.pattern.match(module)), None)


def _why_no_linear(name: str, stored: StoredTensor) -> str:
    module, _, local = name.rpartition(".")
    if local == "weight" and stored.spec.dtype in FLOATS and len(stored.spec.shape) != 1:
        return f"not a Linear: {len(stored.spec.shape)}-D"
    return _never(module) or ("bias" if local == "bias" else "not a Linear's weight")
