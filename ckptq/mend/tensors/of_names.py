"""Repairs by names, shapes and places alone: what is stored stays, and stands elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptq.checkpoint.header import StoredTensor
from ckptq.mend.case import Case
from ckptq.mend.repair import Change, Repair
from ckptq.models.witnesses import read_witnesses
from ckptq.printable import listed
from ckptq.quantize.stored import stored
from ckptq.spec import FLOATS, TensorSpec
from ckptq.verify.report import Finding
from ckptq.verify.structure.cache_scales import wanted_count
from ckptq.verify.subject import SCALES, mixtral_name

SHOWN = 3


def remove(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Tensors that nothing reads."""
    names = [one.tensor for one in found if one.tensor in case.draft.ckpt.tensors]
    yield from _removed(found[0].code, [name for name in names if name is not None])


def remove_cache_scales(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Scales of modules that have no cache, where others have one: else attention is missing."""
    if case.subject.attention:
        yield from remove(case, found)


def remove_proved(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The same where the source shows that they do not belong."""
    if case.source is not None:
        yield from remove(case, found)


def remove_few(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The same where most Linears do without: else the scheme may be what is wrong."""
    quantized = [m for m in case.subject.modules.values() if m.quantized]
    if case.source is not None or 2 * len(found) < len(quantized):
        yield from remove(case, found)


def remove_orphans(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Scales beside weights in a dtype that needs none."""
    names = []
    for one in found:
        module = case.subject.modules.get((one.tensor or "").rpartition(".")[0])
        codes = module.codes if module is not None else None
        if one.tensor and codes is not None and codes.spec.dtype in FLOATS:
            names.append(one.tensor)
    yield from _removed(found[0].code, names)


def _removed(code: str, names: Sequence[str]) -> Iterator[Repair]:
    if names:
        changes: Mapping[str, Change] = dict.fromkeys(names)
        yield Repair(
            code=code, where=names[0], said=f"{listed(names, SHOWN)} removed", changes=changes
        )


def reshape_scales(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Scales of the right number in the wrong shape: [R] for [R, 1]."""
    changes: dict[str, Change] = {}
    for one in found:
        tensor = case.draft.ckpt.tensors.get(one.tensor or "")
        wanted = _linear_scale(case, one.tensor or "")
        if tensor is not None and wanted is not None and _flat(tensor.spec, wanted):
            changes[tensor.name] = _shaped(tensor, wanted)
    yield from _reshaped(found[0].code, changes)


def reshape_cache_scales(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The same for k, v and q: [H] or [1, H, 1] for [H, 1, 1]."""
    changes: dict[str, Change] = {}
    scales = {tensor.name: key for key, tensor in case.subject.cache_scales.items()}
    for one in found:
        tensor = case.draft.ckpt.tensors.get(one.tensor or "")
        if tensor is None or tensor.name not in scales:
            continue
        count = wanted_count(case.subject, *scales[tensor.name])
        if count is not None and tensor.spec.numel == count:
            per_head = case.subject.declared.kv_strategy == "attn_head"
            changes[tensor.name] = _shaped(tensor, (count, 1, 1) if per_head else (1,))
    yield from _reshaped(found[0].code, changes)


def _reshaped(code: str, changes: Mapping[str, Change]) -> Iterator[Repair]:
    if changes:
        names = list(changes)
        said = f"{listed(names, SHOWN)} reshaped; the values stay"
        yield Repair(code=code, where=names[0], said=said, changes=changes)


def _shaped(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    return replace(tensor, spec=TensorSpec(tensor.spec.dtype, shape))


def _flat(found: TensorSpec, wanted: tuple[int, ...]) -> bool:
    """Whether the shapes differ only in axes of length 1."""
    return [n for n in found.shape if n != 1] == [n for n in wanted if n != 1]


def _linear_scale(case: Case, name: str) -> tuple[int, ...] | None:
    """The shape that a Linear's scheme gives a tensor of it."""
    parent, _, local = name.rpartition(".")
    module = case.subject.modules.get(parent)
    if module is None or module.shape is None or module.scheme is None or local not in SCALES:
        return None
    spec = stored(TensorSpec("BF16", module.shape), module.scheme).get(local)
    return spec.shape if spec is not None else None


def own_scale(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Layers that read another one's cache get the scale that it is written with."""
    changes: dict[str, Change] = {}
    for one in found:
        module, _, local = (one.tensor or "").rpartition(".")
        owner = case.subject.cache_owners.get(module)
        theirs = case.subject.cache_scales.get((owner or "", local[:1]))
        if theirs is not None and one.tensor is not None:
            changes[one.tensor] = theirs
    if changes:
        names = list(changes)
        said = f"{listed(names, SHOWN)}: the scale of the layer whose cache is read"
        yield Repair(code=found[0].code, where=names[0], said=said, changes=changes)


def rename_layers(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The prefix of the decoder layers that the source has, or that the embedding stands under."""
    ours = case.subject.layers[0]
    for theirs in _prefixes(case, found):
        moved = {
            name: theirs + name[len(ours) :]
            for name in case.draft.ckpt.tensors
            if ours and name.startswith(f"{ours}.")
        }
        yield from _renamed(case, found[0].code, moved, f"{ours}.* renamed to {theirs}.*")
        yield from _whole_prefix(case, found[0].code, ours, theirs)


def _whole_prefix(case: Case, code: str, ours: str, theirs: str) -> Iterator[Repair]:
    """The same for everything under the parents: embedding and norm have moved along."""
    mine, other = ours.rpartition(".")[0], theirs.rpartition(".")[0]
    moved = {
        name: other + name[len(mine) :]
        for name in case.draft.ckpt.tensors
        if mine and other and name.startswith(f"{mine}.")
    }
    yield from _renamed(case, code, moved, f"{mine}.* renamed to {other}.*")


def _prefixes(case: Case, found: Sequence[Finding]) -> Iterator[str]:
    if case.source is not None:
        yield read_witnesses(case.source).layers
        return
    names = [n for n in case.draft.ckpt.tensors if n.endswith("embed_tokens.weight")]
    if len(names) == 1:
        parent = names[0].removesuffix(".weight").rpartition(".")[0]
        yield f"{parent}.layers" if parent else "layers"


def rename_experts(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Mixtral's w1, w2, w3, which transformers looks for."""
    moved = {}
    for name in case.draft.ckpt.tensors:
        module, _, local = name.rpartition(".")
        if (back := mixtral_name(module)) != module:
            moved[name] = f"{back}.{local}"
    yield from _renamed(case, found[0].code, moved, "experts renamed to w1, w2, w3")


def _renamed(case: Case, code: str, moved: Mapping[str, str], said: str) -> Iterator[Repair]:
    tensors = case.draft.ckpt.tensors
    moved = {old: new for old, new in moved.items() if old != new}
    if not moved or any(new in tensors and new not in moved for new in moved.values()):
        return
    changes: dict[str, Change] = dict.fromkeys(moved)
    changes |= {new: tensors[old] for old, new in moved.items()}
    yield Repair(code=code, where=None, said=said, changes=changes)
