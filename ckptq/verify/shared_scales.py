"""Which Linears may have scales that rows share, as `quantize --rope-proof` makes them."""

from __future__ import annotations

from collections.abc import Mapping

from ckptq.errors import PlanError
from ckptq.permute.order import Heads
from ckptq.permute.targets import PROJECTIONS, head_geometry
from ckptq.verify.geometry import well_typed
from ckptq.verify.subject import Module, Subject


def sharing_heads(subject: Subject) -> Mapping[str, Heads]:
    """Names of the projections whose rows may share scales -> their heads; none where no engine
    permutes rows."""
    if subject.family.rope != "interleaved" or not well_typed(subject):
        return {}
    try:
        geometry = head_geometry(subject.ckpt.text_config)
    except PlanError:
        return {}
    return {projection: geometry[side] for projection, side in PROJECTIONS.items()}


def heads_of(module: Module, heads: Mapping[str, Heads]) -> Heads | None:
    """The heads of a Linear whose rows may share scales."""
    found = heads.get(module.name.rpartition(".")[2])
    scheme = module.group.scheme if module.group else None
    if found is None or scheme is None or module.shape is None or module.shape[0] != found.rows:
        return None
    return found if scheme.strategy == "channel" and scheme.symmetric else None
