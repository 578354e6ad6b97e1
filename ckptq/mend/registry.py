"""Which finding is repaired how: the one table of `mend`, by the codes of `verify`.

What is wrong is said in `ckptq.verify.kinds` alone. HEADERS are candidates that headers judge,
tried first and in this order, because what they repair hides other faults. VALUES are made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ckptq.mend.case import Case
from ckptq.mend.config import of_fields, of_ignore
from ckptq.mend.config.from_recipe import restore_fields, restore_targets, write_anew
from ckptq.mend.mendable import FROM_SOURCE
from ckptq.mend.repair import Outcome, Repair, Told
from ckptq.mend.tensors import of_names, of_places, of_values
from ckptq.mend.tensors.from_source import copy_file, level_experts, make_again, make_shard_again
from ckptq.mend.trial import Maker, Makers
from ckptq.verify.report import Finding

METHOD = partial(of_fields.set_fields, {"quant_method": "compressed-tensors"})
STATUS = partial(of_fields.set_fields, {"quantization_status": "compressed"})
RECIPE: tuple[Maker, ...] = (restore_fields, restore_targets)
FITTED: tuple[Maker, ...] = (*RECIPE, of_fields.fit_weights)


def write_index(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The index again, by the headers of the shards."""
    where = found[0].file
    if all(one.repair == "rewrite the index" or _is_ghost(case, one) for one in found):
        yield Repair(code=found[0].code, where=where, said="index rewritten", index=True)


def _is_ghost(case: Case, one: Finding) -> bool:
    """A name that no file holds, and that the model does not lack. A file that is missing may hold
    what only the source can give."""
    file, _, held = one.found.removeprefix("index: ").partition("; ")
    known = case.units if case.source is not None else {}
    there = (case.draft.original.path / file).is_file()
    return "no file holds it" in held and there and one.tensor not in known


NAMES: Makers = {"names-moved": (of_names.rename_layers,)}
"""What comes before everything: other names say nothing while these are wrong."""

HEADERS: Makers = {
    "index-mismatch": (write_index,),
    "total-size": (write_index,),
    "no-quantization-config": (write_anew,),
    "quant-method": (METHOD,),
    "status": (STATUS,),
    "config-groups-missing": (*RECIPE, of_fields.add_groups),
    "sparsity": (of_fields.drop_sparsity,),
    "group-invalid": (of_fields.drop_unknown, *RECIPE),
    "pattern-invalid": (of_fields.drop_broken, *RECIPE),
    "actorder": (*RECIPE, of_fields.drop_actorder),
    "format": (*RECIPE, of_fields.declare_formats),
    "codes-dtype": FITTED,
    "group-size": FITTED,
    "strategy": FITTED,
    "block-rows": RECIPE,
    "block-columns": RECIPE,
    "attention-target": (of_fields.name_attention,),
    "kv-scheme": (*RECIPE, of_fields.cache_of_group, of_fields.whole_cache_scheme),
    "kv-scheme-missing": (*RECIPE, of_fields.cache_of_group, of_fields.cache_of_scales),
    "recipe-differs": RECIPE,
    "target-unmatched": (restore_targets, of_fields.drop_idle_groups),
    "untargeted": (restore_targets, of_fields.target_linears),
    "target-class": (of_fields.write_linear,),
    "head-untargeted": (of_fields.target_head,),
    "config-differs": (of_fields.source_fields, of_fields.source_config),
    "config-shapes": (of_fields.source_fields, of_fields.source_config, of_fields.fit_embedding),
    "tied-head": (of_fields.source_tie,),
    "tensor-missing": (of_fields.source_tie,),
    "ignored-but-quantized": (of_ignore.remove_entries,),
    "fused-set-split": (of_ignore.remove_entries,),
    "targeted-but-unquantized": (of_ignore.add_unplanned,),
    "ignore-not-honoured": (of_ignore.add_names,),
    "not-ignored": (of_ignore.add_names,),
    "expert-names": (of_names.rename_experts,),
    "scale-shape": (of_names.reshape_scales,),
    "kv-scale-shape": (of_names.reshape_cache_scales, *RECIPE),
    "kv-scale-missing": (of_names.own_scale,),
    "vision-scale": (of_names.remove_cache_scales,),
    "kv-scale-orphan": (of_names.remove_cache_scales,),
    "orphan-scale": (of_names.remove_orphans,),
    "input-scale-extra": (of_names.remove_few,),
    "zero-point-extra": (of_names.remove_proved,),
    "tensor-extra": (of_names.remove_proved,),
    "tensor-unknown": (of_names.remove_proved,),
    "expert-layouts-mixed": (of_names.remove_proved,),
}
"""Code -> what may repair it."""

Repairer = Callable[[Case, Finding], Outcome | None]


def untie(case: Case, finding: Finding) -> Outcome | None:
    """A head of its own under a config that ties it: as the source says."""
    return next(of_fields.source_tie(case, [finding]), None) or make_again(case, finding)


def leave_out(case: Case, finding: Finding) -> Outcome | None:
    """A file with other weights of the same names: the source shows that the shards hold its own.
    The writer carries no such file."""
    if case.source is None:
        said = f"either this file or the shards hold the weights; {finding.repair}"
        return Told(code=finding.code, where=finding.file, needs="choice", said=said)
    said = "left out: the shards hold the source's tensors"
    return Repair(code=finding.code, where=finding.file, said=said, anew=True)


VALUES: Mapping[str, Repairer] = {
    **dict.fromkeys(FROM_SOURCE, make_again),
    "stale-shard": make_shard_again,
    "experts-differ": level_experts,
    "tied-head": untie,
    "stray-weights": leave_out,
    "side-file-missing": copy_file,
    "tokenizer-differs": copy_file,
    "vocabulary": copy_file,
    "codes-transposed": of_values.turn_codes,
    "scale-shape": of_values.turn_scales,
    "codes-dtype": of_values.convert_codes,
    "zero-point-packing": of_values.repack_zero_points,
    "scale-implausible": of_values.invert_scales,
    "weight-shape-value": of_values.write_shape,
    "shape-missing": of_values.write_shape,
    "fused-scales-differ": of_values.share_scales,
    "input-scale-split": of_values.share_scales,
    "g-idx": of_values.drop_order,
    "scale-permuted": of_places.move_rows,
    "codes-permuted": of_places.move_rows,
    "rows-permuted": of_places.move_rows,
    "zero-points-permuted": of_places.move_rows,
    "rope-order-mixed": of_places.unite_orders,
    "exchanged": of_places.exchange,
    "marks-contradict": of_places.remove_marks,
    "shared-cache-scale": lambda case, one: next(of_names.own_scale(case, [one]), None),
}
"""Code -> its repair; None where there is nothing left to do."""
