"""Sources that headers and config.json show to be wrong, refused before the work.

The result would be as wrong, and engines do not always say so: vLLM leaves memory that no tensor
fills as it is, and cuts heads, experts and rows to the number that config.json has.
"""

from __future__ import annotations

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import SourceError
from ckptq.models.encoded import Encoded
from ckptq.models.family import in_layers
from ckptq.models.modules import Layout
from ckptq.models.tree.contradictions import contradictions
from ckptq.numbered import starred
from ckptq.printable import listed
from ckptq.spec import TensorSpec


def refuse_unsound(ckpt: Checkpoint, layout: Layout) -> None:
    """SourceError for a source that lacks tensors, or has others than its config.json says."""
    _refuse_unsound(ckpt, layout)
    _refuse_more_layers(ckpt, layout)
    _refuse_contradictions(ckpt, layout)


def _refuse_unsound(ckpt: Checkpoint, layout: Layout) -> None:
    """Of a layer, an expert, or its output head."""
    tree = layout.witnesses.tree
    if tree is not None and tree.lacking:
        raise SourceError(
            f"{ckpt.path}: lacks {listed(tree.lacking)}, which transformers' {tree.model_class} "
            "of its config.json needs; download it again, or correct config.json"
        )
    there = {int(m["index"]) for n in ckpt.tensors if (m := in_layers(n, layout.layers))}
    gone = [index for index in range(layout.num_layers) if index not in there]
    if tree is None and layout.layers and gone and "block_configs" not in ckpt.text_config:
        raise SourceError(
            f"{ckpt.path}: has no tensor of {layout.layers}.{gone[0]}; config.json declares "
            f"{layout.num_layers} layers, found {len(there)}"
        )


def _refuse_more_layers(ckpt: Checkpoint, layout: Layout) -> None:
    """Layers behind the last one that have what another one has, no more and no less. Those that
    predict further tokens have projections and norms of their own."""
    tree = layout.witnesses.tree
    if tree is None or not tree.num_layers or tree.num_layers != layout.num_layers:
        return
    kinds: dict[int, set[str]] = {}
    for name in ckpt.tensors:
        if match := in_layers(name, layout.layers):
            kinds.setdefault(int(match["index"]), set()).add(starred(name[match.end() :]))
    inside = [held for index, held in kinds.items() if index < tree.num_layers]
    plain = [i for i, held in kinds.items() if i >= tree.num_layers and held in inside]
    if plain:
        raise SourceError(
            f"{ckpt.path / CONFIG}: declares {tree.num_layers} decoder layers, and the tensors are "
            f"of {max(plain) + 1}: {layout.layers}.{min(plain)} is a layer like the others; "
            "correct config.json, or remove the layers"
        )


def _refuse_contradictions(ckpt: Checkpoint, layout: Layout) -> None:
    found = contradictions(ckpt, _plain(ckpt, layout))
    if found:
        raise SourceError(
            f"{ckpt.path / CONFIG}: is not of these tensors: {listed(found)}, as transformers' "
            f"{layout.witnesses.architectures[0]} of it has them; correct config.json, or take the "
            "one that belongs to the weights"
        )


def _plain(ckpt: Checkpoint, layout: Layout) -> dict[str, TensorSpec]:
    """The tensors of the unquantized model: what is quantized by its own shape."""
    plain = {name: ckpt.tensors[name].spec for name in layout.others}
    for linear in layout.linears.values():
        weight = linear.weight
        if isinstance(weight, Encoded):
            plain[weight.plain] = weight.spec
        else:
            plain[weight.stored.name] = weight.stored.spec
    return plain | {weight.plain: weight.written for weight in layout.decoded.values()}
