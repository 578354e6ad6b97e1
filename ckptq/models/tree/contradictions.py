"""Tensors of other shapes than transformers' model of config.json has. Headers only.

The tensors go through transformers' own conversion (`by_headers`), which renames, transposes and
merges them, so that what is compared is what its parameters would become.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ckptq.checkpoint.open import Checkpoint
from ckptq.models.family import LAYER
from ckptq.models.tree.by_headers import Loaded, Specs, load_by_headers
from ckptq.models.tree.holes import is_named
from ckptq.models.tree.parameters import sources_of_parameters
from ckptq.models.tree.transformers_model import decoder_name
from ckptq.numbered import starred

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A parameter, the first on disk of all that differ in their numbers alone."""

    tensors: tuple[str, ...]
    """What makes it, on disk."""
    found: Shape
    wanted: Shape

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - 1} more make" if len(self.tensors) > 1 else " is"
        return f"{self.tensors[0]}{more} {list(self.found)} (expected {list(self.wanted)})"


def contradictions(ckpt: Checkpoint, plain: Specs) -> list[Contradiction]:
    """Of the decoder, its embedding and its output head; `plain` are the tensors of the unquantized
    model. Towers are left to the engines.

    Nothing where the class is not the one that config.json names, or transformers has none.
    """
    try:
        loaded = load_by_headers(ckpt, lambda wanted: _unlike_layers(plain, wanted))
    except MemoryError:
        raise
    except Exception:  # any: families and validators of configs raise what they like
        return []
    if not is_named(loaded.model):
        return []
    unlike: dict[tuple[str, Shape], str] = {}
    for place in _of_decoder(loaded):
        shape = loaded.found[place].shape
        if place not in loaded.missing and shape != loaded.wanted[place].shape:
            unlike.setdefault((starred(place), shape), place)
    made = sources_of_parameters(loaded.model, plain) if unlike else {}
    return [
        Contradiction(made[place], loaded.found[place].shape, loaded.wanted[place].shape)
        for place in unlike.values()
        if place in made
    ]


def _of_decoder(loaded: Loaded) -> Iterator[str]:
    decoder, head = decoder_name(loaded.model), loaded.model.get_output_embeddings()
    heads = [name for name, module in loaded.model.named_modules() if module is head]
    inside = tuple(f"{name}." if name else "" for name in (decoder, *heads))
    yield from (place for place in loaded.wanted if place.startswith(inside))


def _unlike_layers(plain: Specs, wanted: Specs) -> Specs:
    """Without the tensors of layers that an earlier one is like, on disk and in the model: merging
    all experts of DeepSeek-V3 takes half a minute."""
    kinds: defaultdict[str, set[tuple[bool, str, Shape]]] = defaultdict(set)
    for side in (plain, wanted):
        for name, spec in side.items():
            if match := LAYER.match(name):
                place = match["prefix"], name[match.end() :]
                kinds[match["index"]].add((side is plain, ".".join(place), spec.shape))
    first: dict[frozenset[tuple[bool, str, Shape]], str] = {}
    for index, kind in kinds.items():
        first.setdefault(frozenset(kind), index)
    kept = set(first.values())
    return {
        name: spec
        for name, spec in plain.items()
        if (match := LAYER.match(name)) is None or match["index"] in kept
    }
