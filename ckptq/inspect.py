"""What is in a checkpoint, by its headers alone: schemes, layers, sizes, scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint.beside import told_of
from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.models.family import count_layers, declared_layers
from ckptq.models.heads import config_heads
from ckptq.numbered import starred
from ckptq.permute import marks
from ckptq.recipes.args import Args
from ckptq.recipes.declared import declared
from ckptq.recipes.scheme import Group

SCALES = ("_scale", "_zero_point", "_global_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Tensors that are alike but for the numbers in their names."""

    name: str
    """Numbers replaced by a star: "model.layers.*.self_attn.q_proj.weight"."""
    spec: str
    count: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """One checkpoint at a glance."""

    path: Path
    model_type: str
    architecture: str
    layers: int
    heads: tuple[int, int] | None
    """(query heads, key/value heads)"""
    files: int
    tensors: int
    nbytes: int
    bytes_by_dtype: Mapping[str, int]
    scheme: str
    """Format of the quantization_config, or "unquantized"."""
    groups: Mapping[str, str]
    kv_cache: str | None
    rope_order: str | None
    """The order that `ckptq permute` has marked, if it has."""
    scales: int
    kinds: tuple[Kind, ...]
    not_carried: tuple[str, ...]
    """Files that `quantize` would leave behind, a line for each reason."""


def inspect(source: str | Path, revision: str | None = None) -> Inspection:
    """Open a folder or hub id and describe it; reads headers and config only."""
    ckpt = open_checkpoint(source, revision)
    config = ckpt.quantization_config or {}
    said = declared(ckpt)
    kv = said.kv_cache_scheme
    found = marks.read(ckpt.config, {h.file.name: h.metadata for h in ckpt.headers})
    by_dtype: Counter[str] = Counter()
    for tensor in ckpt.tensors.values():
        by_dtype[tensor.spec.dtype] += tensor.nbytes
    return Inspection(
        path=ckpt.path,
        model_type=str(ckpt.config.get("model_type", "?")),
        architecture=", ".join(map(str, _list(ckpt.config.get("architectures") or "?"))),
        layers=_layers(ckpt),
        heads=config_heads(ckpt.text_config),
        files=len(ckpt.headers),
        tensors=len(ckpt.tensors),
        nbytes=ckpt.nbytes,
        bytes_by_dtype=dict(by_dtype.most_common()),
        scheme=str(config.get("format") or config.get("quant_method") or "unquantized"),
        groups={group.name: _describe(group) for group in said.groups},
        kv_cache=_args(kv) if kv is not None else None,
        rope_order=marks.dump(found) if found else None,
        scales=sum(name.endswith(SCALES) for name in ckpt.tensors),
        kinds=_kinds(ckpt.tensors),
        not_carried=tuple(told_of(ckpt.path, ckpt.beside())),
    )


def _layers(ckpt: Checkpoint) -> int:
    declared = declared_layers(ckpt)
    return count_layers(ckpt.tensors) if declared is None else declared


def _describe(group: Group) -> str:
    """One config group in a line: what it targets, and how."""
    weights, inputs = group.weights, group.input_activations
    parts = [f"targets {', '.join(group.targets)}"]
    parts += [f"weights {_args(weights)}"] if weights is not None else []
    parts += [f"activations {_args(inputs)}"] if inputs is not None else []
    return "; ".join(parts)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _args(args: Args) -> str:
    """In a few words: "float8 attn_head"."""
    words = [f"{args.type}{args.num_bits}", args.strategy]
    words += [f"group {args.group_size}"] if args.group_size else []
    words += ["asymmetric"] if not args.symmetric else []
    words += ["dynamic"] if args.dynamic else []
    return " ".join(words)


def _kinds(tensors: Mapping[str, StoredTensor]) -> tuple[Kind, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for name, tensor in tensors.items():
        key = starred(name), str(tensor.spec)
        counts[key] += 1
        nbytes[key] += tensor.nbytes
    return tuple(
        Kind(name=name, spec=spec, count=count, nbytes=nbytes[name, spec])
        for (name, spec), count in counts.items()
    )
