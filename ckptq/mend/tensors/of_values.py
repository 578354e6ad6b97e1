"""Repairs of values without a source: each keeps what the codes mean, or says by how much not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.mend.case import Case
from ckptq.mend.config.edit import edited
from ckptq.mend.repair import Change, Made, Outcome, Repair, Told
from ckptq.mend.tensors import arithmetic_of_repairs as compute
from ckptq.mend.tensors.from_source import make_again
from ckptq.quantize.stored import scale_shape, stored
from ckptq.recipes.edited import fold_heads as fold_scheme
from ckptq.spec import TensorSpec, spec_of
from ckptq.verify.report import Finding
from ckptq.verify.subject import Module

if TYPE_CHECKING:
    from torch import Tensor

FUSED = ("weight_global_scale", "input_global_scale", "input_scale")
"""Scales of which one serves a whole fused set."""


def made(
    stored: StoredTensor, make: Callable[[Tensor], Tensor], spec: TensorSpec | None = None
) -> Made:
    """A tensor computed from one stored tensor, of its spec unless another is given."""
    return Made(spec=spec or stored.spec, inputs=(stored,), make=make)


def _module(case: Case, finding: Finding) -> Module | None:
    name = finding.tensor or ""
    modules = case.subject.modules
    return modules.get(name) or modules.get(name.rpartition(".")[0])


def turn_codes(case: Case, finding: Finding) -> Outcome | None:
    """Codes [C, R] of a weight that is not square; with a source, converted again."""
    module = _module(case, finding)
    codes = module.codes if module is not None else None
    if case.source is not None or codes is None or len(set(codes.spec.shape)) == 1:
        return make_again(case, finding)
    spec = TensorSpec(codes.spec.dtype, codes.spec.shape[::-1])
    return _one(finding, codes, made(codes, compute.transposed, spec), "transposed")


def turn_scales(case: Case, finding: Finding) -> Outcome | None:
    """A grid of scales [G, R]."""
    module = _module(case, finding)
    scale = module.tensors.get("weight_scale") if module is not None else None
    if case.source is not None or scale is None or module is None or module.scheme is None:
        return make_again(case, finding)
    codes = module.codes
    if codes is not None and module.scheme.strategy == "channel" and _stands_on_side(codes, scale):
        return turn_codes(case, replace(finding, tensor=codes.name))
    R, G = scale_shape(module.shape or (1, 1), module.scheme)
    if scale.spec.shape != (G, R) or R == G:
        return make_again(case, finding)
    spec = TensorSpec(scale.spec.dtype, (R, G))
    return _one(finding, scale, made(scale, compute.transposed, spec), "transposed")


def _stands_on_side(codes: StoredTensor, scale: StoredTensor) -> bool:
    """Whether unpacked codes have as many columns as there are scales of rows."""
    shape = codes.spec.shape
    whole = codes.name.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1]
    return whole and scale.spec.shape == (shape[1], 1)


def convert_codes(case: Case, finding: Finding) -> Outcome | None:
    """E5M2 in the place of E4M3, and bytes in the place of int8."""
    module = _module(case, finding)
    codes = module.codes if module is not None else None
    if case.source is not None or codes is None or module is None or module.scheme is None:
        return make_again(case, finding)
    wanted = stored(TensorSpec("BF16", module.shape or (1, 1)), module.scheme)
    spec = wanted.get(module.scheme.codes)
    if codes.spec.dtype == "F8_E5M2" and spec is not None and spec.dtype == "F8_E4M3":
        said = "E5M2 codes stored as E4M3: the same values, below 2^-6 rounded"
        return _one(finding, codes, made(codes, compute.e4m3_of_e5m2, spec), said)
    if codes.spec.dtype == "U8" and spec is not None and spec.dtype == "I8" and _offset(codes):
        said = "codes stored 128 too high lowered by 128"
        return _one(finding, codes, made(codes, compute.signed_codes, spec), said)
    return make_again(case, finding)


def _offset(codes: StoredTensor) -> bool:
    """Whether bytes lie around 128, as codes raised by 128 do, and not at both ends."""
    distance = (read_tensor(codes).float() - 127.5).abs()
    return bool((distance < 64).float().mean() > 0.75)


def repack_zero_points(case: Case, finding: Finding) -> Outcome | None:
    """Zero points packed along the columns."""
    module = _module(case, finding)
    zeros = module.tensors.get("weight_zero_point") if module is not None else None
    if case.source is not None or zeros is None or module is None or module.scheme is None:
        return make_again(case, finding)
    R, G = scale_shape(module.shape or (1, 1), module.scheme)
    bits = module.scheme.num_bits
    if 32 % bits:
        return make_again(case, finding)
    make = partial(compute.zero_points_along_rows, groups=G, bits=bits)
    spec = TensorSpec("I32", (ceil(R * bits / 32), G))
    return _one(finding, zeros, made(zeros, make, spec), "packed along the rows")


def invert_scales(case: Case, finding: Finding) -> Outcome | None:
    """Reciprocals, where 1 / scale is plausible and the scale is not."""
    module = _module(case, finding)
    scale = module.tensors.get("weight_scale") if module is not None else None
    if case.source is not None or scale is None or module is None:
        return make_again(case, finding)
    change = made(scale, compute.reciprocal)
    if not _plausible(change):
        return make_again(case, finding)
    return _one(finding, scale, change, "1 / scale stored: the scales were reciprocals")


def _plausible(change: Made) -> bool:
    """Whether most scales are below 1, as those of any weight are; what verify calls implausible is
    far above."""
    with Files() as files:
        value = change.tensor(files).float()
    return bool((value > 0).all() and value.isfinite().all() and value.median() < 1.0)


def write_shape(case: Case, finding: Finding) -> Outcome | None:
    """`weight_shape` of a packed weight, from its codes and scales."""
    module = _module(case, finding)
    if module is None or module.shape is None:
        return make_again(case, finding)
    make = partial(compute.shape_of, *module.shape)
    change = Made(spec=spec_of(make()), inputs=(), make=make)
    name = f"{module.name}.weight_shape"
    said = f"written: {list(module.shape)}"
    return Repair(code=finding.code, where=name, said=said, changes={name: change})


def share_scales(case: Case, finding: Finding) -> Outcome | None:
    """One number for a set that engines merge.

    NVFP4's global scales become the smallest, and group scales take the ratio; of input scales the
    largest is what engines take.
    """
    name, _, local = (finding.tensor or "").rpartition(".")
    members = case.subject.witnesses.fused_set(name, case.subject.modules)
    held = [
        case.subject.modules[n].tensors[local]
        for n in members
        if local in case.subject.modules[n].tensors
    ]
    if local not in FUSED or not held:
        return Told(code=finding.code, where=finding.tensor, needs="convert", said=finding.repair)
    if local == "weight_global_scale":
        return _share_global(case, finding, members, held)
    pick = compute.most_of if local == "input_scale" else compute.least_of
    changes: dict[str, Change] = {
        tensor.name: Made(spec=tensor.spec, inputs=(tensor, *held), make=partial(_in_shape, pick))
        for tensor in held
    }
    said = "the whole set has the scale that clips none of its inputs"
    return Repair(code=finding.code, where=finding.tensor, said=said, changes=changes)


def _in_shape(pick: Callable[..., Tensor], own_1: Tensor, *all_1: Tensor) -> Tensor:
    """One of all, in the shape and dtype of its own."""
    return pick(*all_1).to(own_1.dtype).reshape(own_1.shape)


def _share_global(
    case: Case, finding: Finding, members: Iterable[str], held: list[StoredTensor]
) -> Repair | Told:
    changes: dict[str, Change] = {}
    worst = 0.0
    with Files() as files:
        for name in members:
            tensors = case.subject.modules[name].tensors
            own, scale = tensors.get("weight_global_scale"), tensors.get("weight_scale")
            if own is None or scale is None:
                return Told(
                    code=finding.code, where=name, needs="source", said="a global scale is missing"
                )
            inputs = (scale, own, *held)
            change = Made(spec=scale.spec, inputs=inputs, make=compute.shared_group_scales)
            error = Made(spec=scale.spec, inputs=inputs, make=compute.rounding_error)
            worst = max(worst, float(error.tensor(files)))
            changes[scale.name] = change
            changes[own.name] = Made(
                spec=own.spec, inputs=(own, *held), make=partial(_in_shape, compute.least_of)
            )
    said = (
        "one global scale for the set, codes untouched; group scales took the ratio, and are "
        f"rounded by {worst:.2%} (root mean square)"
    )
    return Repair(code=finding.code, where=finding.tensor, said=said, changes=changes)


def drop_order(case: Case, finding: Finding) -> Outcome | None:
    """A g_idx that says what no g_idx says: columns in order."""
    tensor = case.draft.ckpt.tensors.get(finding.tensor or "")
    if tensor is None:
        return make_again(case, finding)
    order = read_tensor(tensor).long()
    if len(order) > 1 and not bool((order.diff() >= 0).all()):
        return make_again(case, finding)
    changes: Mapping[str, Change] = {tensor.name: None}
    said = "removed: it names the groups in the order of the columns"
    return Repair(code=finding.code, where=tensor.name, said=said, changes=changes)


def fold_heads(case: Case) -> Repair | None:
    """One cache scale per layer instead of one per head: the largest, which clips none."""
    changes: dict[str, Change] = {}
    for tensor in case.subject.cache_scales.values():
        if tensor.spec.numel > 1:
            spec = TensorSpec(tensor.spec.dtype, (1,))
            changes[tensor.name] = made(tensor, compute.largest, spec)
    if not changes:
        return None

    config = next((r.config for r in edited(case, "", "", fold_scheme)), None)
    said = f"{len(changes)} cache scales per head folded to one per layer, the largest"
    return Repair(code="kv-heads-differ", where=None, said=said, config=config, changes=changes)


def _one(finding: Finding, tensor: StoredTensor, change: Change, said: str) -> Repair:
    return Repair(code=finding.code, where=tensor.name, said=said, changes={tensor.name: change})
