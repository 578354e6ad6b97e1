"""Repairs of what stands in the wrong place: rows in another RoPE order, weights exchanged.

Bytes move and stay what they are, so that codes which calibration chose are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ckptq.mend.case import Case
from ckptq.mend.repair import Change, Made, Outcome, Repair, Told
from ckptq.mend.tensors.from_source import make_again
from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Effect, Move, Part
from ckptq.permute.targets import plan_permutation
from ckptq.rope_order import RopeOrder
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip.undo import source_order
from ckptq.verify.structure.rope_readers import order_of
from ckptq.verify.subject import CODES, SCALES

WHOLE = "the weight of "
"""How a finding begins that says whose weight stands in a place."""


def move_rows(case: Case, finding: Finding) -> Outcome | None:
    """The parts of a projection that stand in the other order than their source."""
    name = (finding.tensor or "").rpartition(".")[0]
    order = source_order(case.subject)
    if order_of(case.subject, Part.WEIGHTS) is not order or "ckptq permute" not in finding.repair:
        return make_again(case, finding)
    words = finding.repair.strip("`").split()
    parts = [part for part in Part if part in words] or list(Part)
    effects = plan_permutation(case.draft.ckpt, skip_unfit=True)
    mine = {f"{name}.{local}": effects.get(f"{name}.{local}") for local in (*CODES, *SCALES)}
    changes = _moved(case, mine, parts, order)
    if not changes:
        return make_again(case, finding)
    said = f"{' and '.join(parts)} put into {order} order, in which the source is"
    return Repair(code=finding.code, where=name, said=said, changes=changes)


def unite_orders(case: Case, finding: Finding) -> Outcome | None:
    """Scales that a mark says are in the other order than the weights, put into the weights'."""
    order = order_of(case.subject, Part.WEIGHTS)
    effects = plan_permutation(case.draft.ckpt, skip_unfit=True)
    changes = _moved(case, effects, [Part.SCALES], order)
    if not changes or order is not RopeOrder(case.subject.family.rope):
        return make_again(case, finding)
    said = f"scales of q and k put into {order} order, in which their weights are; mark removed"
    return Repair(code=finding.code, where=None, said=said, changes=changes, unmarked=True)


def remove_marks(case: Case, finding: Finding) -> Outcome | None:
    """Marks that contradict each other say nothing, and the source says which order is right: what
    stands in the other one is a finding of its own."""
    if case.source is None:
        said = "the marks say two things, and only the source shows which is true"
        return Told(code=finding.code, where=None, needs="source", said=said)
    said = "marks of a RoPE order removed: q and k are compared with the source as they stand"
    return Repair(code=finding.code, where=None, said=said, unmarked=True)


def _moved(
    case: Case, effects: Mapping[str, Effect | None], parts: list[Part], order: RopeOrder
) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name, effect in effects.items():
        stored = case.draft.ckpt.tensors.get(name)
        if stored is None or effect is None or effect.move is Move.KEPT or effect.part not in parts:
            continue
        make = partial(permute_tensor, effect=effect, to=order)
        changes[name] = Made(spec=stored.spec, inputs=(stored,), make=make)
    return changes


def exchange(case: Case, finding: Finding) -> Outcome | None:
    """Two Linears that hold each other's codes and scales, of the same shapes."""
    name, other = finding.tensor or "", finding.found.removeprefix(WHOLE)
    modules = case.subject.modules
    if name not in modules or other not in modules or not finding.repair.startswith("exchange"):
        return make_again(case, finding)
    mine, theirs = modules[name].tensors, modules[other].tensors
    if {n: t.spec for n, t in mine.items()} != {n: t.spec for n, t in theirs.items()}:
        return make_again(case, finding)
    original = case.draft.original.tensors
    changes: dict[str, Change] = {
        f"{name}.{local}": original[f"{other}.{local}"]
        for local in mine
        if local != "bias" and f"{other}.{local}" in original
    }
    said = f"exchanged with {other}"
    return Repair(code=finding.code, where=name, said=said, changes=changes)
