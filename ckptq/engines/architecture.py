"""What an engine makes of the modules of one architecture.

A module is named as on disk, without `.weight`. A fused tensor of experts counts as a module:
`...mlp.experts.gate_up_proj`, `...block_sparse_moe.input_linear`. None always means "never seen".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal

from ckptq.engines.renames import Rename
from ckptq.numbered import NUMBER, starred, unstarred

Fate = Literal["quantized", "plain"]
Kind = Literal["heads", "latent", "state", "other"]

ROOTS = frozenset({"model", "language_model", "text_model", "llm", "thinker", "transformer"})
"""What variants put before the same decoder; a tower is called something else."""

FUSED_EXPERTS = ("gate_up_proj", "down_proj")
"""Tensors [E, ...] of all experts of a layer, as transformers calls them."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the engine makes of one kind of module; `*` stands for layers and experts."""

    engine: str | None
    """Its module, by the name that it looks schemes up with. None: it loads no such thing."""
    fate: str
    """quantized | plain; absent: not loaded; mixed: depends on the config."""
    parameter: str = "weight"
    """Where in that module the tensor lands: w13_weight for the gates and ups of experts."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one layer, one module to the engine."""

    module: str
    """The engine's name: its scheme is looked up by `<module>.0.<name>`."""
    names: tuple[str | None, str | None, str | None]
    """Of an expert's gate, up and down projection. Without a gate: up, None and down."""

    @property
    def lookups(self) -> tuple[str, ...]:
        """The names that `targets` and `ignore` are matched against.

        vLLM refuses experts of which these do not all fall to one scheme. Where there is no gate it
        asks for `0.None`, too, so an `ignore` of names needs that one as well.
        """
        return tuple(f"{self.module}.0.{name}" for name in dict.fromkeys(self.names))


@dataclass(frozen=True, slots=True)
class AttentionModule:
    """An attention of the engine's."""

    module: str
    kind: Kind
    """heads: a cache of k and v per head; latent: MLA; state: Mamba, gated delta and the like."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """One entry of config.json's `architectures`."""

    name: str
    engine_class: str
    sources: tuple[str, ...]
    packed: Mapping[str, tuple[str, ...]]
    """The class's packed_modules_mapping: a merged name -> the parts that `ignore` may name."""
    rows: Mapping[str, Row] = field(repr=False)
    merged: Mapping[str, tuple[str, tuple[str, ...]]] = field(repr=False)
    """Pattern of a part -> the engine's module, and all parts in its order."""
    expert_names: Mapping[str, tuple[str | None, str | None, str | None]]
    attentions: Mapping[str, Kind]
    heads: Mapping[str, str]
    """The engine's output heads: own, tied (to the embedding), or mixed: as the config says."""
    unfilled: frozenset[str]
    """Patterns of the engine's parameters that no tensor of an unquantized source filled."""
    shares_cache: bool
    """Whether some of its layers read another layer's KV cache."""
    refusals: Mapping[str, str]
    """weights, cache -> how its class failed to load them quantized; {} where it loads both."""
    cache_scales: str | None
    """What k's scale is called in an attention on disk: k_scale, attn.k_scale; None: not loaded."""
    rename: Rename = field(repr=False)
    """From a name on disk to the engine's, as it renames `ignore` and targets."""

    def row(self, disk_module: str) -> Row | None:
        """The row of a module, also of one with another prefix than those that were seen."""
        return self._find(starred(disk_module))[1]

    def fate(self, disk_module: str) -> Fate | None:
        """quantized: built with a quantization config. plain: without, whatever a scheme says.

        None for what the table has not seen, for what the engine does not load, and for what
        another config builds otherwise.
        """
        row = self.row(disk_module)
        if row is None or row.fate not in ("quantized", "plain"):
            return None
        return "quantized" if row.fate == "quantized" else "plain"

    def engine_module(self, disk_module: str) -> str | None:
        """Example: "model.layers.0.self_attn.q_proj" -> "model.layers.0.self_attn.qkv_proj".

        Experts' projections give the module of the experts, "model.layers.0.mlp.experts".
        """
        row = self.row(disk_module)
        return _fill(row.engine, disk_module) if row and row.engine else None

    def fused_set(self, disk_module: str) -> tuple[str, ...]:
        """The siblings on disk that the engine merges with it, itself included, in its order.

        Of experts those of one expert: its gate and up. Which of them exist is not known here.
        """
        own, _, local = disk_module.rpartition(".")
        seen, row = self._find(starred(disk_module))
        if seen in self.merged:
            return tuple(f"{own}.{part.rpartition('.')[2]}" for part in self.merged[seen][1])
        names = self.expert_names.get(row.engine, ()) if row and row.engine else ()
        if local in names[:2]:  # of one expert, where only fused tensors were seen
            return tuple(f"{own}.{name}" for name in dict.fromkeys(names[:2]) if name)
        return (disk_module,)

    def merged_name(self, disk_module: str) -> str | None:
        """The engine's name of the merged module, which schemes are looked up with; None: alone.

        None for experts, too: `experts` tells what they are looked up with.
        """
        seen, row = self._find(starred(disk_module))
        if seen not in self.merged or row is None or row.parameter != "weight":
            return None
        return _fill(self.merged[seen][0], disk_module)

    def experts(self, disk_module: str) -> Experts | None:
        """The experts that a projection or a fused tensor belongs to."""
        row = self.row(disk_module)
        module = row.engine if row else None
        if module not in self.expert_names or module is None:
            return None
        return Experts(_fill(module, disk_module), self.expert_names[module])

    def takes_name(self, disk_module: str) -> bool:
        """Whether the engine was seen to load a module of this name, or one that it renames so.

        False for one that `row` finds only by leaving out the words in front of the layers: its
        loader asks for the whole name.
        """
        pattern = starred(disk_module)
        return pattern in self.rows or self._renamed(pattern) in self._renamed_rows

    def leaves_empty(self, parameter: str) -> bool:
        """Whether the engine has such a parameter and no checkpoint of the family fills it."""
        return NUMBER.sub("*", parameter) in self.unfilled

    def attention(self, disk_parent: str) -> AttentionModule | None:
        """The attention whose projections lie in this module: "model.layers.0.self_attn"."""
        found = self._attention_of(starred(disk_parent))
        return AttentionModule(_fill(found[0], disk_parent), found[1]) if found else None

    @cache  # noqa: B019  tables live as long as the process
    def _find(self, pattern: str) -> tuple[str, Row | None]:
        """The pattern in the table that this one means, and its row."""
        if pattern in self.rows:
            return pattern, self.rows[pattern]
        for name in (self._renamed(pattern), _squeezed(pattern)):
            if name in self._also_known:
                seen = self._also_known[name]
                return seen, self.rows[seen]
        row = self._expert_row(self._renamed(pattern)) or self._expert_row(_squeezed(pattern))
        return pattern, row

    def _renamed(self, pattern: str) -> str:
        name = self.rename(pattern.replace("*", "0") + ".weight")
        return starred(name.removesuffix(".weight"))

    def _expert_row(self, engine_name: str) -> Row | None:
        """Of an expert's projection where only fused tensors were seen, and the other way round."""
        parent, _, projection = engine_name.rpartition(".")
        named = parent.removesuffix(".*")
        module = named if named in self.expert_names else self._experts_squeezed.get(named)
        if module is None:
            return None
        names = self.expert_names[module] if named != parent else FUSED_EXPERTS
        if projection not in names:
            return None
        return Row(module, "quantized", "w2_weight" if projection == names[-1] else "w13_weight")

    @cached_property
    def _experts_squeezed(self) -> Mapping[str, str]:
        """The engine's experts by their names without a prefix."""
        return {_squeezed(module): module for module in self.expert_names}

    @cached_property
    def _renamed_rows(self) -> frozenset[str]:
        """What the engine calls the patterns seen."""
        return frozenset(map(self._renamed, self.rows))

    @cached_property
    def _also_known(self) -> Mapping[str, str]:
        """Other names of the patterns seen: after the engine's renaming, and without a prefix."""
        names: dict[str, str | None] = {}
        for pattern in self.rows:
            for name in {self._renamed(pattern), _squeezed(pattern)} - {pattern}:
                names[name] = pattern if name not in names else None  # of two, none
        return {name: pattern for name, pattern in names.items() if pattern}

    @cache  # noqa: B019
    def _attention_of(self, parent: str) -> tuple[str, Kind] | None:
        engine_parents = {
            _parent(row.engine)
            for name in self._children.get(parent, ())
            if (row := self.rows[name]).engine
        }
        for inner in engine_parents:
            for module, kind in self.attentions.items():
                steps = module.removeprefix(inner).strip(".").split(".")
                if module == inner or (
                    module.startswith(inner + ".") and len(set(steps)) == 1 and kind != "state"
                ):
                    return module, kind
        return None

    @cached_property
    def _children(self) -> Mapping[str, list[str]]:
        children: dict[str, list[str]] = {}
        for pattern in self.rows:
            children.setdefault(_parent(pattern), []).append(pattern)
        return children


def _fill(pattern: str, name: str) -> str:
    """Put the first numbers of a name in the place of a pattern's `*`."""
    return unstarred(pattern, NUMBER.findall(name))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _squeezed(pattern: str) -> str:
    """Without the words that only say "the language model" in front of the first number."""
    head, star, tail = pattern.partition(".*")
    kept = [word for word in head.split(".") if word not in ROOTS]
    return ".".join(kept) + star + tail
