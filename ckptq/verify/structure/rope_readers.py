"""Whether engines that permute q/k rows while loading can permute these tensors. Headers only.

vLLM and SGLang permute Llama-4's q_proj and k_proj (ckptq.rope_order): weights, packed weights
and scales of more than one element; not packed zero points, and block scales cannot follow.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import CONFIG
from ckptq.errors import PlanError, SourceError
from ckptq.models.family import LAYER
from ckptq.permute import marks
from ckptq.permute.effect import Move, Part
from ckptq.permute.targets import plan_permutation
from ckptq.rope_order import RopeOrder
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.structure.geometry import well_typed
from ckptq.verify.subject import Module, Subject

TURNED = ("q_proj", "k_proj")


def read_marks(subject: Subject) -> marks.Marks:
    """The marks of the checkpoint. Raises SourceError where its files contradict each other."""
    metadata = {header.file.name: header.metadata for header in subject.ckpt.headers}
    return marks.read(subject.ckpt.config, metadata)


def order_of(subject: Subject, part: Part) -> RopeOrder:
    """The order of a part: its mark, else the family's published order."""
    try:
        marked = read_marks(subject).get(part)
    except SourceError:
        marked = None
    return marked or RopeOrder(subject.family.rope)


def check_rope(subject: Subject) -> Iterator[Finding]:
    """Marks that agree, and q/k formats that loading can permute."""
    try:
        found = read_marks(subject)
    except SourceError as error:
        yield finding("marks-contradict", found=str(error)[:300], wanted="one mark in all files")
        return
    orders = {part: order_of(subject, part) for part in Part}
    if orders[Part.WEIGHTS] is not orders[Part.SCALES] and _scales_move(subject):
        said, wanted = repr(marks.dump(found)), "weights and scales in one order"
        repair = f"`ckptq permute CKPT OUT --to {orders[Part.WEIGHTS]} --only scales`"
        yield finding("rope-order-mixed", file=CONFIG, found=said, wanted=wanted, repair=repair)
    elif orders[Part.WEIGHTS] is not RopeOrder(subject.family.rope):
        wanted = f"{subject.family.rope} for vLLM and transformers"
        yield finding(
            "rope-order", file=CONFIG, found=f"marked {marks.dump(found)!r}", wanted=wanted
        )
    if subject.family.rope == "interleaved":
        yield from _formats(subject, orders)


def _scales_move(subject: Subject) -> bool:
    """Whether any scale of q/k is indexed by row; a single scale has no order."""
    try:
        effects = plan_permutation(subject.ckpt, skip_unfit=True) if well_typed(subject) else {}
    except PlanError:
        return True
    scales = [e for e in effects.values() if e.part is Part.SCALES]
    return not effects or any(e.move is not Move.KEPT for e in scales)


def turned_modules(subject: Subject) -> list[Module]:
    """q_proj and k_proj of the decoder layers."""
    prefix, _ = subject.layers
    return [
        module
        for name, module in subject.modules.items()
        if (match := LAYER.match(name))
        and match["prefix"] == prefix
        and name.rpartition(".")[2] in TURNED
    ]


def _formats(subject: Subject, orders: dict[Part, RopeOrder]) -> Iterator[Finding]:
    for module in turned_modules(subject):
        scheme = module.scheme
        if not module.quantized or scheme is None:
            continue
        scale = module.tensors.get("weight_scale")
        if scheme.block_structure and scale is not None and scale.spec.numel > 1:
            wanted = "scales per row or per tensor"
            yield finding("rope-block-scales", module, found=f"{scheme}", wanted=wanted)
        asymmetric = not scheme.symmetric and scheme.format == "pack-quantized"
        if asymmetric and orders[Part.ZERO_POINTS] is not RopeOrder.HALF_SPLIT:
            wanted = "no packed zero points in interleaved order"
            yield finding("rope-zero-points", module, found=f"{scheme}", wanted=wanted)
