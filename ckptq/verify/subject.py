"""The checkpoint under test, sorted: Linears as they are on disk, attention modules, the source's.

Headers only. Shape letters: R rows (out), C columns (in), W words of 32 bits, G groups.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.engines.vllm import group_of
from ckptq.errors import CkptqError
from ckptq.models.attention import (
    AttentionKind,
    attention_kind,
    cache_owners,
    cache_scales,
    layer_index,
)
from ckptq.models.encoded import Encoded, packed_columns
from ckptq.models.family import Family, family_of
from ckptq.models.heads import Heads, config_heads, heads_in, layer_heads
from ckptq.models.modules import Layout, Linear, read_layout
from ckptq.models.witnesses import Witnesses, read_witnesses
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.declared import Declared
from ckptq.recipes.load import load_written
from ckptq.recipes.scheme import Group, Recipe

CODES = ("weight", "weight_packed")
SCALES = (
    *("weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("weight_g_idx", "g_idx", "input_scale", "input_zero_point", "input_global_scale"),
)
"""Tensors beside the codes of a quantized Linear."""

EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)$")

MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""What llm-compressor's `oneshot` calls the experts' projections that Mixtral calls w1, w2, w3."""

RECIPE, RECORD = "recipe.yaml", "ckptq.json"

ORDERED = ("weight", "static")
"""Orders of columns, which GPTQ alone has."""

QUANTIZED = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32")


@dataclass(frozen=True, kw_only=True)
class Module:
    """The stored tensors of one Linear, by local name."""

    name: str
    tensors: Mapping[str, StoredTensor]
    kept: str | None
    """Why engines never quantize it; None if they may."""
    group: Group | None
    """Its config group; None if it is ignored or not targeted."""
    origin: Linear | None
    """The same Linear in the source, where a source is given and has it."""
    chosen: bool = False
    """Whether its codes are said to be chosen, so that they need not be the nearest."""
    rounded: bool = False
    """Whether the recipe that ckptq wrote beside them says that they are the nearest."""
    weighed: bool = False
    """Whether its scales are said to be chosen by its inputs, which nothing here can repeat."""
    refitted: bool = False
    """Whether these were made better afterwards, maybe a few of them only."""
    by_layer: bool = False
    """Whether AutoRound tuned it by what a whole layer makes, to which a row of one Linear may be
    nothing: attention does not see what all its keys have in common."""
    by_all: bool = False
    """Whether tokens with massive activations may have had a say in the codes, for which a row may
    be given up: ckptq leaves them out, others do not."""

    @property
    def scheme(self) -> WeightScheme | None:
        """That of its group; None without a valid one."""
        return self.group.scheme if self.group is not None else None

    @property
    def codes(self) -> StoredTensor | None:
        return self.tensors.get("weight_packed") or self.tensors.get("weight")

    @property
    def quantized(self) -> bool:
        """Whether the codes on disk are of a quantized format; scales alone do not make it so."""
        codes = self.codes
        if codes is None:
            return any(local in self.tensors for local in SCALES)
        return "weight_packed" in self.tensors or codes.spec.dtype in QUANTIZED

    @property
    def file(self) -> str:
        return next(iter(self.tensors.values())).file.name

    @property
    def shape(self) -> tuple[int, int] | None:
        """[R, C] of the weight: the source's, else inferred from the tensors on disk."""
        if self.origin is not None:
            R, C = self.origin.weight.spec.shape
            return R, C
        codes = self.codes
        if codes is None or len(codes.spec.shape) != 2:
            return None
        R, C = codes.spec.shape
        if "weight_packed" not in self.tensors or self.group is None:
            return R, C
        if self.scheme is None:
            return None
        known = packed_columns(C, self.scheme, self.tensors.get("weight_scale"))
        return R, known or C * 32 // self.scheme.num_bits


@dataclass(frozen=True)
class Subject:
    """Everything that the checks look at."""

    ckpt: Checkpoint
    source: Checkpoint | None
    declared: Declared
    quick: bool = False
    """Whether transformers is asked only about architectures that the engine's table lacks."""

    @cached_property
    def family(self) -> Family:
        return family_of(self.ckpt.config)

    @cached_property
    def witnesses(self) -> Witnesses:
        return read_witnesses(self.ckpt, table_alone=self.quick)

    @cached_property
    def layers(self) -> tuple[str, int]:
        """Name and length of the list of decoder layers."""
        return self.witnesses.layers, self.witnesses.num_layers

    @cached_property
    def origin(self) -> Layout | None:
        return read_layout(self.source) if self.source is not None else None

    @cached_property
    def decoded(self) -> Mapping[str, Encoded]:
        """Tensor -> the experts in one tensor of codes, in the source, that it was made of."""
        found = self.origin.decoded.values() if self.origin is not None else ()
        return {weight.plain: weight for weight in found}

    @cached_property
    def heads(self) -> Heads | None:
        """(query heads, key/value heads), as the config says."""
        return config_heads(self.ckpt.text_config)

    def heads_in(self, module: str) -> Heads | None:
        """Those of one attention module."""
        said = layer_heads(self.ckpt.text_config, layer_index(module))
        return heads_in(module, said, self._shapes) if said is not None else None

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {name: m.shape for name, m in self.modules.items() if m.shape is not None}

    @cached_property
    def recipe(self) -> Recipe | None:
        """What ckptq wrote beside the checkpoint, if it is there and can be read."""
        return written_recipe(self.ckpt.path) if self.declared.present else None

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every Linear on disk, quantized or not, in the order of the bytes."""
        return {name: self._module(name, tensors) for name, tensors in self._by_module().items()}

    def _module(self, name: str, tensors: Mapping[str, StoredTensor]) -> Module:
        group = group_of(self.declared, name)
        weights = group.weights if group is not None else None
        refitted = self.recipe is not None and self.recipe.refits
        ours = self.recipe is not None and self.recipe.chooses
        chosen = ours or (weights is not None and weights.actorder in ORDERED)
        return Module(
            name=name,
            tensors=tensors,
            kept=self.witnesses.why_kept(name),
            group=group,
            origin=self._origin(name),
            chosen=chosen,
            rounded=self.recipe is not None and not (chosen or self.recipe.handed_over),
            weighed=(weights is not None and weights.weighed) or refitted,
            refitted=refitted,
            by_layer=self.recipe is not None and self.recipe.tuning is not None,
            by_all=chosen and not ours,
        )

    def _by_module(self) -> dict[str, dict[str, StoredTensor]]:
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.ckpt.tensors.items():
            module, _, local = name.rpartition(".")
            if local in CODES or local in SCALES:
                found.setdefault(module, {})[local] = tensor
        return {name: tensors for name, tensors in found.items() if _is_linear(tensors)}

    def _origin(self, name: str) -> Linear | None:
        if self.origin is None:
            return None
        return self.origin.linears.get(name) or self.origin.linears.get(mixtral_name(name))

    def ties(self, head: str) -> bool:
        """Whether an engine serves the embedding in the place of this output head.

        vLLM builds the decoder of a model with towers from its `text_config`; transformers, which
        alone runs what vLLM has no class for, ties by the whole model's config.
        """
        owner = self.witnesses.owner(head)
        if self.witnesses.engine is None and owner is not None:
            return owner.tied
        configs = (self.ckpt.config, self.ckpt.text_config)
        return any(config.get("tie_word_embeddings") is True for config in configs)

    @cached_property
    def attention(self) -> dict[str, AttentionKind]:
        """Attention modules of the decoder layers, and what they cache."""
        found: dict[str, AttentionKind] = {}
        for name in self.modules:
            kind = attention_kind(name, *self.layers, self.ckpt.text_config)
            parent = name.rpartition(".")[0]
            if kind is not None and found.get(parent) != "latent":
                found[parent] = kind
        return {**found, **dict.fromkeys(self._readers(found), "heads")}

    @cached_property
    def cache_owners(self) -> Mapping[str, str]:
        """Attention module that reads another one's cache -> that one."""
        return self._readers(self.attention)

    def _readers(self, modules: Collection[str]) -> dict[str, str]:
        parents = {name.rpartition(".")[0] for name in self.modules}
        return cache_owners(modules, parents, self.layers[1], self.ckpt.text_config)

    @cached_property
    def cache_scales(self) -> dict[tuple[str, str], StoredTensor]:
        """(attention module, "q" | "k" | "v") -> its scale."""
        return cache_scales(self.ckpt.tensors)


def tied(ckpt: Checkpoint) -> bool:
    """Whether config.json ties the output head to the embedding."""
    return any(c.get("tie_word_embeddings") is True for c in (ckpt.config, ckpt.text_config))


def mixtral_name(name: str) -> str:
    """The Mixtral source's name of a module that `oneshot` has renamed; other names unchanged."""
    match = EXPERT.match(name)
    back = {new: old for old, new in MIXTRAL.items()}
    if match and match["projection"] in back:
        return f"{match['experts']}.{match['index']}.{back[match['projection']]}"
    return name


def _is_linear(tensors: Mapping[str, StoredTensor]) -> bool:
    weight = tensors.get("weight")
    return len(tensors) > 1 or weight is None or len(weight.spec.shape) == 2


def written_recipe(folder: Path) -> Recipe | None:
    """The recipe.yaml that ckptq wrote into a checkpoint; None where that is another tool's, or
    cannot be read."""
    if not all((folder / name).is_file() for name in (RECIPE, RECORD)):
        return None
    try:
        return load_written(folder / RECIPE)
    except CkptqError:
        return None
