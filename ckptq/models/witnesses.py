"""What a module is, according to three witnesses; its name alone is not enough.

1. Names and shapes on disk.
2. transformers' own module tree (`models.tree`).
3. The table of what vLLM makes of the architecture (`engines.table`).

A Linear may be quantized if 2 or 3 says that it is one and no witness objects. Everything else
stays unquantized, with a reason; what nobody knows is quantized only if a recipe names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import lru_cache

from ckptq.checkpoint.open import Checkpoint
from ckptq.engines.architecture import Architecture
from ckptq.engines.table import load_table
from ckptq.engines.vllm import common_merged_name, common_set
from ckptq.models.family import LAYER, NEVER_QUANTIZED, count_layers, declared_layers
from ckptq.models.tree.module_tree import ModuleTree, Owner, build_tree, plain_name

HEAD = "output head"
UNKNOWN = "known to neither transformers nor vLLM"
NAMEABLE = (HEAD, UNKNOWN)
"""What a recipe may still quantize with a target that names it."""

BASE_LAYER = ".base_layer"
"""The suffix that PEFT adds to a Linear that it wraps."""


@dataclass(frozen=True, eq=False)
class Witnesses:
    """The witnesses of one checkpoint, and what follows from what they say."""

    tree: ModuleTree | None
    no_tree: str | None
    """Why transformers has no such model."""
    engine: Architecture | None
    architectures: tuple[str, ...]
    layers: str
    """Name of the list of decoder layers on disk; "" where there is none."""
    num_layers: int

    @property
    def silent(self) -> bool:
        """Whether neither transformers nor the engine knows the model."""
        return self.tree is None and self.engine is None

    def why_kept(self, module: str) -> str | None:
        """Why a Linear of this name on disk is never quantized, or None."""
        return why_by_name(module) or self._outside(module) or self._objection(module)

    def in_layers(self, name: str) -> bool:
        """Whether a tensor or module lies in a decoder layer."""
        return self._outside(name) is None

    def _outside(self, module: str) -> str | None:
        if not self.layers:
            return f"{self._model} has no single list of {self.num_layers} decoder layers"
        match = LAYER.match(module + ".")
        if not match or match["prefix"] != self.layers:
            return "outside the decoder layers"
        if int(match["index"]) >= self.num_layers:
            return "multi-token prediction layer"
        return None

    @property
    def _model(self) -> str:
        return self.tree.model_class if self.tree is not None else "the checkpoint"

    def _objection(self, module: str) -> str | None:
        owner = self.owner(module)
        row = self.engine.row(module) if self.engine is not None else None
        fate = row.fate if row is not None else None
        if self.silent:
            return UNKNOWN
        if owner is not None and not owner.is_linear and owner.fused is None:
            return f"a {owner.class_name} in transformers, not a Linear"
        if fate == "plain":
            return "vLLM never quantizes it"
        if fate == "absent":
            return "vLLM does not load it"
        if self.engine is not None and fate is None:
            return f"unknown to vLLM's {self.engine.name}"
        if owner is None and fate != "quantized":
            return f"{self.tree.model_class if self.tree else 'transformers'} has no such module"
        return None

    def owner(self, module: str) -> Owner | None:
        """Whose parameter the weight of a module on disk is in transformers."""
        if self.tree is None:
            return None
        return self.tree.owner(f"{module}.weight") or self.tree.owner(module)

    def fused_set(self, module: str, present: Container[str]) -> tuple[str, ...]:
        """The siblings that the engine merges with it, as far as present, in the engine's order.

        Example: `...self_attn.k_proj` -> its q_proj, k_proj and v_proj.
        """
        stem = module.removesuffix(BASE_LAYER)
        suffix = module[len(stem) :]
        members = tuple(name + suffix for name in self._members(stem))
        return tuple(name for name in members if name in present) or (module,)

    def _members(self, module: str) -> tuple[str, ...]:
        if (engine := self._engine_that_saw(module)) is not None:
            return engine.fused_set(module)
        parent, _, projection = module.rpartition(".")
        return tuple(f"{parent}.{name}" for name in common_set(projection))

    def _engine_that_saw(self, module: str) -> Architecture | None:
        """The table, where it has a row for the module; elsewhere the common names hold."""
        seen = self.engine is not None and self.engine.row(module) is not None
        return self.engine if seen else None

    def merged_name(self, module: str) -> str | None:
        """What the engine calls the fused set of this module; None where it stands alone."""
        return self.engine.merged_name(module) if self.engine is not None else None

    def unquantized(self, quantized: Iterable[str]) -> list[str]:
        """Linears of transformers that stay unquantized, by its own names, in its order.

        `quantized` are names on disk. Also what has no tensor of its own: a tied output head.
        """
        if self.tree is None:
            return []
        done = {self.tree.module(name) for name in quantized}
        return [name for name in self.tree.linears if name not in done]

    def names_of(self, module: str) -> tuple[str, ...]:
        """The names by which engines look up the scheme of a module on disk, its own first."""
        names = [module]
        if self.tree is not None:
            names.append(self.tree.module(module))
        engine = self._engine_that_saw(module)
        if engine is None:
            # a class that the table knows may merge what none of its sources had: the dense layers
            # of a Qwen3-MoE with mlp_only_layers
            merged = common_merged_name(module)
            names += [merged] if merged else []
        elif engine.fate(module) == "quantized":
            engine_name = self._engine_name(engine, module)
            names += [engine_name] if engine_name else []
        return tuple(dict.fromkeys(names))

    def _engine_name(self, engine: Architecture, module: str) -> str | None:
        """The engine's name, unless it finds the module by the names of the parts on disk.

        Towers of vLLM's may be built before it is told of any parts (lfm2_vl.py).
        """
        name = engine.engine_module(module)
        if name is None or engine.experts(module) is not None:
            return None
        parts = engine.packed.get(name.rpartition(".")[2], ())
        by_parts = module.rpartition(".")[2] in parts and self.in_layers(module)
        return None if by_parts else name

    def expert_lookups(self, part: str) -> tuple[str, ...]:
        """The names by which the engine looks up the scheme of the experts that this is a part of.

        `part` is the Linear of one expert, or a tensor of all.
        """
        experts = self.engine.experts(part) if self.engine is not None else None
        return experts.lookups if experts is not None else ()


@lru_cache(maxsize=16)
def read_witnesses(ckpt: Checkpoint, *, table_alone: bool = False) -> Witnesses:
    """Ask all three of them. Headers only; imports transformers.

    `table_alone` does without transformers where the engine's table knows the architecture and
    where its decoder layers are: of models without a KV cache it does not.
    """
    engine = load_table().architecture(_architectures(ckpt))
    if table_alone and engine is not None:
        found = _witnesses(ckpt, None, "not asked", engine)
        if found.layers:
            return found
    built = build_tree(ckpt)
    if isinstance(built, str):
        return _witnesses(ckpt, None, built, engine)
    if not _architectures(ckpt):
        engine = load_table().architecture((built.model_class,))
    return _witnesses(ckpt, built, None, engine)


def _witnesses(
    ckpt: Checkpoint, tree: ModuleTree | None, no_tree: str | None, engine: Architecture | None
) -> Witnesses:
    layers = _layers(ckpt, tree, engine)
    return Witnesses(
        tree=tree,
        no_tree=no_tree,
        engine=engine,
        architectures=_architectures(ckpt) or ((tree.model_class,) if tree is not None else ()),
        layers=layers,
        num_layers=_num_layers(ckpt, tree, layers),
    )


def _architectures(ckpt: Checkpoint) -> tuple[str, ...]:
    named = ckpt.config.get("architectures")
    return tuple(map(str, named)) if isinstance(named, list) else ()


def _layers(ckpt: Checkpoint, tree: ModuleTree | None, engine: Architecture | None) -> str:
    """The list of decoder layers on disk, by the first witness that can name it.

    Without transformers the list whose attention has a cache in the engine. Where the engine does
    not know the model either, the one with most tensors outside of towers; nothing is quantized
    there that a recipe does not name.
    """
    if tree is None:
        return _longest_list(ckpt, lambda name, _: engine is None or _caches(engine, name))
    # a list that nothing on disk leads into is stored under names of somebody else
    return tree.stored_layers or _longest_list(
        ckpt, lambda name, inner: plain_name(inner) in tree.layer_parameters
    )


def _num_layers(ckpt: Checkpoint, tree: ModuleTree | None, layers: str) -> int:
    declared = declared_layers(ckpt)
    if declared is not None:
        return declared
    if tree is not None and tree.num_layers:
        return tree.num_layers
    return count_layers(ckpt.tensors, layers)


def _longest_list(ckpt: Checkpoint, counts: Callable[[str, str], bool]) -> str:
    """The list outside of towers with most tensors that count, by name and name within a layer."""
    found: Counter[str] = Counter()
    for name in ckpt.tensors:
        match = LAYER.match(name)
        if match is None or why_by_name(match["prefix"]):
            continue
        if counts(name, name[match.end() :]):
            found[match["prefix"]] += 1
    return max(found, key=lambda prefix: found[prefix]) if found else ""


def _caches(engine: Architecture, tensor: str) -> bool:
    parent = tensor.rpartition(".")[0].rpartition(".")[0]
    found = engine.attention(parent)
    return found is not None and found.kind in ("heads", "latent")


def why_by_name(module: str) -> str | None:
    """Why a module of this name is never quantized in any family; None where it may be."""
    return next((rule.reason for rule in NEVER_QUANTIZED if rule.pattern.match(module)), None)
