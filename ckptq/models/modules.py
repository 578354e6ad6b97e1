"""From tensor names to Linear modules: which exist, where their weights are, which stay
unquantized.

Fused 3-D experts are split into one Linear per expert, named as vLLM and transformers both load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.view import View
from ckptq.models.encoded import BELONGS_TO_SCHEME, Encoded, read_encoded
from ckptq.models.experts import FUSED_WEIGHT, fused_layouts, holds_experts, why_whole
from ckptq.models.family import Family, FusedExperts, family_of
from ckptq.models.weight import Weight
from ckptq.models.witnesses import Witnesses, read_witnesses, why_by_name
from ckptq.spec import FLOATS


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One Linear [R, C]: its name in the output, and where its parts lie in the source."""

    name: str
    weight: Weight
    bias: View | None = None
    """Only if it must be cut out of a fused tensor; a separate bias is simply copied."""
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
    witnesses: Witnesses
    others: Mapping[str, str]
    """Tensor name -> reason, for tensors that belong to no Linear's weight."""
    consumed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Source tensor -> the Linears that are cut out of it."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Tensor name -> reason, for tensors without a meaning once a quantized source is
    dequantized."""

    whole_experts: Mapping[str, str] = field(default_factory=dict)
    """3-D tensors of experts that nothing cuts, without `.weight` -> the reason."""

    decoded: Mapping[str, Encoded] = field(default_factory=dict)
    """Tensor of codes -> the experts that it holds, which are dequantized and stay one tensor."""

    @property
    def layers(self) -> str:
        """Name of the list of decoder layers: "model.layers"."""
        return self.witnesses.layers

    @property
    def num_layers(self) -> int:
        return self.witnesses.num_layers

    def fused_set(self, linear: str) -> tuple[str, ...]:
        """The Linears that the engine merges with this one, itself included."""
        return self.witnesses.fused_set(linear, self.linears)


def read_layout(ckpt: Checkpoint) -> Layout:
    """Sort a checkpoint's tensors into Linears and others, from headers and config alone."""
    witnesses = read_witnesses(ckpt)
    fused = fused_layouts(ckpt, witnesses)
    linears: dict[str, Linear] = {}
    others: dict[str, str] = {}
    consumed: dict[str, tuple[str, ...]] = {}
    dropped: dict[str, str] = {}
    whole: dict[str, str] = {}
    decoded: dict[str, Encoded] = {}
    for module, weight in read_encoded(ckpt).items():
        if weight.fused:
            decoded[weight.stored.name] = weight
            consumed |= dict.fromkeys((t.name for t in weight.tensors.values()), ())
            whole[module] = why_whole(ckpt, witnesses, module) or "experts in one tensor"
            continue
        kept = witnesses.why_kept(module)
        linears[module] = Linear(name=module, weight=weight, kept=kept)
        consumed |= dict.fromkeys((t.name for t in weight.tensors.values()), (module,))
    for name, stored in ckpt.tensors.items():
        if name in consumed:
            continue
        if ckpt.quantization_config is not None and BELONGS_TO_SCHEME.match(name):
            dropped[name] = "dropped: belongs to the quantization of the source"
            continue
        found = list(_linears_in(ckpt, fused, witnesses, stored))
        for linear in found:
            linears[linear.name] = linear
        if found:
            consumed[name] = tuple(linear.name for linear in found)
        elif not _is_fused_bias(fused, ckpt, name):
            others[name] = _why_no_linear(stored)
            if holds_experts(witnesses, stored):
                reason = why_whole(ckpt, witnesses, name)
                others[name] = whole[name.removesuffix(".weight")] = reason
    return Layout(
        family=family_of(ckpt.config),
        linears=linears,
        witnesses=witnesses,
        others=others,
        consumed=consumed,
        dropped=dropped,
        whole_experts=whole,
        decoded=decoded,
    )


def _linears_in(
    ckpt: Checkpoint, fused: Mapping[str, FusedExperts], witnesses: Witnesses, stored: StoredTensor
) -> Iterator[Linear]:
    name, shape = stored.name, stored.spec.shape
    experts = FUSED_WEIGHT.match(name)
    if experts and experts["experts"] in fused:
        bias = ckpt.tensors.get(f"{name}_bias")
        yield from cut_experts(fused[experts["experts"]], stored, bias)
    elif name.endswith(".weight") and len(shape) == 2 and stored.spec.dtype in FLOATS:
        module = name.removesuffix(".weight")
        yield Linear(name=module, weight=View(stored), kept=witnesses.why_kept(module))


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


def _is_fused_bias(fused: Mapping[str, FusedExperts], ckpt: Checkpoint, name: str) -> bool:
    weight = name.removesuffix("_bias")
    experts = FUSED_WEIGHT.match(weight) if name.endswith("_bias") else None
    return experts is not None and experts["experts"] in fused and weight in ckpt.tensors


def _why_no_linear(stored: StoredTensor) -> str:
    local = stored.name.rpartition(".")[2]
    if local == "weight" and stored.spec.dtype in FLOATS and len(stored.spec.shape) != 1:
        return f"not a Linear: {len(stored.spec.shape)}-D"
    by_name = why_by_name(stored.name.rpartition(".")[0])
    return by_name or ("bias" if local == "bias" else "not a Linear's weight")
