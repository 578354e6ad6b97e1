"""What is in a checkpoint, by its headers alone: schemes, layers, sizes, scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint.beside import told_of
from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.models.config_groups import stored_groups
from ckptq.models.family import count_layers, declared_layers
from ckptq.models.heads import config_heads
from ckptq.numbered import starred
from ckptq.permute import marks

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
    kv = config.get("kv_cache_scheme")
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
        groups={name: _describe(group) for name, group in stored_groups(ckpt).items()},
        kv_cache=f"{_args(kv)}" if kv else None,
        rope_order=marks.dump(found) if found else None,
        scales=sum(name.endswith(SCALES) for name in ckpt.tensors),
        kinds=_kinds(ckpt.tensors),
        not_carried=tuple(told_of(ckpt.path, ckpt.beside())),
    )


def _layers(ckpt: Checkpoint) -> int:
    declared = declared_layers(ckpt)
    return count_layers(ckpt.tensors) if declared is None else declared


def _describe(group: Mapping[str, object]) -> str:
    """One config group in a line: what it targets, and how."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    parts = [f"targets {', '.join(map(str, _list(group.get('targets'))))}"]
    parts += [f"weights {_args(weights)}"] if weights else []
    parts += [f"activations {_args(inputs)}"] if inputs else []
    return "; ".join(parts)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _args(args: object) -> str:
    """QuantizationArgs in a few words: "float8 attn_head static"."""
    if not isinstance(args, dict):
        return str(args)
    words = [f"{args.get('type', 'int')}{args.get('num_bits', '?')}", str(args.get("strategy"))]
    words += [f"group {args['group_size']}"] if args.get("group_size") else []
    words += ["asymmetric"] if args.get("symmetric") is False else []
    words += ["dynamic"] if args.get("dynamic") else []
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
