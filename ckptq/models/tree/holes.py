"""What a source lacks: parameters of transformers' model that other layers have tensors for, and
those of its decoder that no tensor makes at all.

What is outside of the decoder is asked for nowhere, so that text-only saves and layers of other
models (multi-token prediction) lack nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ckptq.models.family import LAYER
from ckptq.numbered import NUMBER, starred, unstarred

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Numbers = tuple[str, ...]
"""Of layers and experts, in a name."""


class Layers(NamedTuple):
    """The list of decoder layers."""

    name: str
    """By transformers' name; "" where it has no such list."""
    stored: str
    """As it is called on disk; "" where no tensor leads into it."""
    number: int


SCALES = re.compile(r"scale|zero_point|qzeros|weight_shape|g_idx|absmax")
"""In names of tensors that stand beside quantized weights, and have no place in the model."""

READERS = re.compile(r"\.(k|v)_(proj|norm)\.\w+$")
"""What a layer that reads another one's cache need not have."""


def numbers_of(name: str) -> Numbers:
    """ "model.layers.3.mlp.experts.17.up_proj" -> ("3", "17")."""
    return tuple(NUMBER.findall(name))


def lacking(
    model: PreTrainedModel, stored: Mapping[str, set[Numbers]], made: Mapping[str, str]
) -> tuple[str, ...]:
    """Names of tensors that are not on disk, and that the model cannot do without.

    `stored` are the patterns on disk with the numbers that each has, `made` the first tensor of
    each pattern with the parameter that it becomes.
    """
    kinds = _kinds(made)
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for parameter in model.state_dict():
        if not _may_be_absent(model, parameter):
            wanted[starred(parameter)].append(parameter)
    found: dict[str, None] = {}
    for kind, patterns in kinds.items():
        if patterns:
            found |= dict.fromkeys(_of_kind(model, wanted[kind], patterns, stored))
    return (*found, *_output_head(model, wanted, stored, made))


def lacking_everywhere(
    model: PreTrainedModel, layers: Layers, filled: Iterable[str], placeless: Iterable[str]
) -> tuple[str, ...]:
    """Weights of the decoder of whose kind there is no tensor: the first of each kind.

    `filled` are parameters that tensors make, one of each kind at least, `placeless` tensors that
    make none. Nothing where the class is not the one that config.json names, or where what is
    missing may be there under a name that transformers does not know. Biases may be left out where
    they are zero.
    """
    from ckptq.models.tree.transformers_model import decoder_name

    there = {starred(parameter) for parameter in filled}
    inside = starred(f"{layers.name}.")
    seen = layers.name and any(kind.startswith(inside) for kind in there)
    if not seen or not is_named(model):
        return ()
    strange = _strange(layers, placeless)
    decoder = decoder_name(model)
    found: dict[str, str] = {}
    for parameter, _ in model.named_parameters():
        kind = starred(parameter)
        if decoder and not parameter.startswith(f"{decoder}."):
            continue
        if kind in there or kind.endswith("bias") or kind.startswith(inside) in strange:
            continue
        if not _may_be_absent(model, parameter):
            found.setdefault(kind, parameter)
    return tuple(found.values())


def _strange(layers: Layers, placeless: Iterable[str]) -> set[bool]:
    """Whether there are tensors without a place in the decoder layers (True), outside of all layers
    (False). Layers of other lists and behind the last one are other models'."""
    found = set()
    for name in placeless:
        match = LAYER.match(name)
        if SCALES.search(name.rpartition(".")[2]):
            continue
        if match is None:
            found.add(False)
        elif match["prefix"] == layers.stored and int(match["index"]) < layers.number:
            found.add(True)
    return found


def _kinds(made: Mapping[str, str]) -> dict[str, list[str]]:
    """Kind of parameter -> patterns of the tensors that make it; none where their numbers are not
    the parameter's, or it is made of several layers' tensors."""
    kinds: dict[str, list[str]] = {}
    for first, parameter in made.items():
        patterns = kinds.setdefault(starred(parameter), [])
        own = numbers_of(parameter)
        if numbers_of(first)[: len(own)] == own:
            patterns.append(starred(first))
    return kinds


def _of_kind(
    model: PreTrainedModel,
    parameters: Iterable[str],
    patterns: list[str],
    stored: Mapping[str, set[Numbers]],
) -> Iterator[str]:
    """A layer has the same patterns as another one, or one too few."""
    inner = {pattern: _by_prefix(stored[pattern], parameters) for pattern in patterns}
    sets = {p: frozenset(n for n in patterns if numbers_of(p) in inner[n]) for p in parameters}
    usual = Counter(found for found in sets.values() if found).most_common(1)
    for parameter, found in sets.items():
        whole = next((other for other in sets.values() if found < other), None)
        if not found and usual:
            whole = usual[0][0]
        for pattern in sorted((whole or found) - found):
            yield unstarred(pattern, numbers_of(parameter), "0")
        for pattern in sorted(found):
            yield from _experts(model, parameter, pattern, inner[pattern])


def _by_prefix(numbers: set[Numbers], parameters: Iterable[str]) -> dict[Numbers, set[Numbers]]:
    """The numbers of a parameter -> what its tensors on disk have beyond them: their expert's."""
    length = next((len(numbers_of(parameter)) for parameter in parameters), 0)
    found: defaultdict[Numbers, set[Numbers]] = defaultdict(set)
    for each in numbers:
        found[each[:length]].add(each[length:])
    return found


def _experts(
    model: PreTrainedModel, parameter: str, pattern: str, inner: Mapping[Numbers, set[Numbers]]
) -> Iterator[str]:
    """Experts that this layer lacks, where they are tensors of their own."""
    own = numbers_of(parameter)
    there = inner[own]
    if any(len(rest) != 1 for rest in there):
        return
    name, _, local = parameter.rpartition(".")
    shape = getattr(model.get_submodule(name), local).shape
    for index in range(shape[0] if len(shape) == 3 else 0):
        if (str(index),) not in there:
            yield unstarred(pattern, (*own, str(index)), "0")


def _output_head(
    model: PreTrainedModel,
    wanted: Mapping[str, list[str]],
    stored: Mapping[str, set[Numbers]],
    made: Mapping[str, str],
) -> Iterator[str]:
    """The one kind that is asked for where no tensor is of it: an output head of its own, of a
    model that config.json names and whose embedding is stored."""
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    parameter = f"{names.get(id(head), '')}.weight"
    absent = head is not None and parameter in wanted and parameter not in made.values()
    if not absent or not is_named(model):
        return
    if f"{names.get(id(embedding), '')}.weight" in made.values():
        yield parameter


def is_named(model: PreTrainedModel) -> bool:
    """Whether config.json names its class."""
    return type(model).__name__ in (model.config.architectures or ())


def _may_be_absent(model: PreTrainedModel, parameter: str) -> bool:
    """Tied to another one, or ignored by its class; keys of layers that read others' caches."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    if parameter in ties or parameter in ties.values():
        return True
    ignored = model._keys_to_ignore_on_load_missing or ()
    if any(re.search(pattern, parameter) for pattern in ignored):
        return True
    shared = getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    return bool(shared) and READERS.search(parameter) is not None
