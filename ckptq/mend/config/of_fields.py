"""Repairs of config.json by what it says itself, what the tensors show, and what engines accept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ckptq.engines.vllm import KV_SCHEME, means_every_linear
from ckptq.mend.case import Case
from ckptq.mend.config.attention_class import attention_class
from ckptq.mend.config.edit import edited, with_field, without_field
from ckptq.mend.repair import Repair
from ckptq.quantize.weight_scheme import FORMATS
from ckptq.recipes.args import FIELDS
from ckptq.recipes.edited import attention_groups, groups_of, update_cache
from ckptq.recipes.names import broken
from ckptq.recipes.scheme import PARTS
from ckptq.verify.report import Finding

FP8_CACHE = {field: choice[0] for field, choice in KV_SCHEME.items()}
"""What every engine reads of a cache's scheme, per tensor."""

TYPES = {"F8_E4M3": ("float-quantized", "float"), "I8": ("int-quantized", "int")}
"""Dtype of unpacked codes -> format and type that store them."""

STRATEGIES = ("channel", "tensor", "group", "block")


def set_fields(fields: Mapping[str, Any], case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Fields of the quantization_config that have one right value."""
    said = ", ".join(f'{name} set to "{value}"' for name, value in fields.items())
    yield from edited(case, found[0].code, said, lambda own: own.update(fields))


def add_groups(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The empty object that vLLM asks for."""
    said = "config_groups set to {}"
    yield from edited(case, found[0].code, said, lambda own: own.update(config_groups={}))


def drop_sparsity(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Of weights that are not stored sparse: it says nothing about the bytes."""
    said = (case.draft.ckpt.quantization_config or {}).get("sparsity_config")
    if isinstance(said, dict) and said.get("format") in (None, "dense"):
        text = "sparsity_config removed: the weights are stored dense"
        yield from edited(case, found[0].code, text, lambda own: own.pop("sparsity_config"))


def drop_unknown(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Fields that compressed-tensors does not have."""

    def drop(own: dict[str, Any]) -> None:
        for entry in groups_of(own).values():
            for name in [n for n in entry if n not in ("targets", "format", *PARTS)]:
                del entry[name]
            for part in PARTS:
                args = entry.get(part)
                if isinstance(args, dict):
                    entry[part] = {n: value for n, value in args.items() if n in FIELDS}

    yield from edited(case, found[0].code, "unknown fields of config groups removed", drop)


def drop_broken(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Patterns that do not compile, and so match nothing."""

    def drop(own: dict[str, Any]) -> None:
        for holder, name in ((own, "ignore"), *((g, "targets") for g in groups_of(own).values())):
            if isinstance(holder.get(name), list):
                holder[name] = [e for e in holder[name] if not isinstance(e, str) or not broken(e)]

    yield from edited(case, found[0].code, "patterns that are no patterns removed", drop)


def drop_idle_groups(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Groups that no Linear falls to, beside others."""
    idle = [one.tensor.rpartition("config_groups.")[2] for one in found if one.tensor]
    if len(idle) >= len(case.subject.declared.linears):
        return

    def drop(own: dict[str, Any]) -> None:
        for name in idle:
            own.get("config_groups", {}).pop(name, None)

    yield from edited(case, found[0].code, f"config group {', '.join(idle)} removed", drop)


def drop_actorder(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Of codes without g_idx, which stand in the order of the columns."""
    if any(name.endswith("g_idx") for name in case.draft.ckpt.tensors):
        return

    def drop(own: dict[str, Any]) -> None:
        for entry in groups_of(own).values():
            weights = entry.get("weights")
            if isinstance(weights, dict):
                weights.pop("actorder", None)

    said = "actorder removed: no Linear has a g_idx, so the columns are in order"
    yield from edited(case, found[0].code, said, drop)


def declare_formats(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Each format that there is, for the groups of Linears."""
    for format in FORMATS:
        yield from _in_groups(case, found, f"format set to {format}", {}, format)


def fit_weights(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Strategy, group size or type that the tensors on disk have."""
    for code_dtype, (format, kind) in TYPES.items():
        if any(m.codes is not None and m.codes.spec.dtype == code_dtype for m in _quantized(case)):
            fields = {"type": kind, "num_bits": 8}
            said = f"format set to {format}, type to {kind}, num_bits to 8"
            yield from _in_groups(case, found, said, fields, format)
    for size in sorted(set(_group_sizes(case))):
        fields = {"strategy": "group", "group_size": size}
        yield from _in_groups(case, found, f"group_size set to {size}", fields)
    for strategy in STRATEGIES:
        fields = {"strategy": strategy}
        if strategy in ("channel", "tensor"):
            fields |= {"group_size": None, "block_structure": None}
        if strategy == "block":
            fields |= {"group_size": None, "block_structure": [128, 128]}
        if strategy != "group":
            yield from _in_groups(case, found, f"strategy set to {strategy}", fields)


def _quantized(case: Case) -> Iterator[Any]:
    return (module for module in case.subject.modules.values() if module.quantized)


def _group_sizes(case: Case) -> Iterator[int]:
    for module in _quantized(case):
        scale, shape = module.tensors.get("weight_scale"), module.shape
        if scale is None or shape is None or len(scale.spec.shape) != 2:
            continue
        R, G = scale.spec.shape
        if shape[0] == R and 1 < G < shape[1] and shape[1] % G == 0:
            yield shape[1] // G


def _in_groups(
    case: Case,
    found: Sequence[Finding],
    said: str,
    fields: Mapping[str, Any],
    format: str | None = None,
) -> Iterator[Repair]:
    def change(own: dict[str, Any]) -> None:
        for entry in groups_of(own).values():
            if isinstance(entry.get("weights"), dict):
                whole = {**entry["weights"], **fields}
                entry["weights"] = {k: v for k, v in whole.items() if v is not None}
                entry["format"] = format or entry.get("format")
        if format is not None:
            own["format"] = format

    yield from edited(case, found[0].code, said, change)


def name_attention(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The class name of transformers' attention, as the target of attention groups."""
    if (name := attention_class(case.draft.ckpt)) is None:
        return

    def change(own: dict[str, Any]) -> None:
        for entry in attention_groups(own):
            entry["targets"] = [name]

    yield from edited(case, found[0].code, f"the attention group targets {name}", change)


def cache_of_group(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The attention group's scheme for the cache, which must be the same."""
    group = next((g for g in case.subject.declared.groups if g.is_attention), None)
    if group is not None and group.input_activations is not None:
        scheme = group.input_activations.to_dict()
        said = f"kv_cache_scheme set to that of group {group.name!r}"
        yield from edited(case, found[0].code, said, lambda own: own.update(kv_cache_scheme=scheme))


def cache_of_scales(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """FP8 as every engine reads it, per head or per layer as the scales on disk are."""
    counts = {tensor.spec.numel for tensor in case.subject.cache_scales.values()}
    strategy = "tensor" if counts == {1} else "attn_head"
    scheme = {**FP8_CACHE, "strategy": strategy}
    said = f"kv_cache_scheme set to FP8, {strategy}, as the scales on disk are"
    yield from edited(case, found[0].code, said, lambda own: own.update(kv_cache_scheme=scheme))


def whole_cache_scheme(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Fields of the cache scheme for which engines have one value."""
    lone = {field: choice[0] for field, choice in KV_SCHEME.items() if len(choice) == 1}
    change = partial(update_cache, fields=lone)
    yield from edited(case, found[0].code, "kv_cache_scheme set to static FP8", change)


def write_linear(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The class as transformers spells it."""

    def change(own: dict[str, Any]) -> None:
        for entry in groups_of(own).values():
            targets = entry.get("targets") or []
            entry["targets"] = [
                "Linear" if isinstance(t, str) and means_every_linear(t) else t for t in targets
            ]

    yield from edited(case, found[0].code, 'target written as "Linear"', change)


def target_linears(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Every Linear, where one group is all that there is."""
    if len(case.subject.declared.linears) == 1:
        change = partial(_retarget, targets=["Linear"])
        yield from edited(case, found[0].code, "the group targets Linear", change)


def target_head(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """The output head by its name, because vLLM does not match it by class."""
    tied = any(one.tensor and case.subject.ties(one.tensor) for one in found)
    if len(case.subject.declared.linears) == 1 and not tied:
        change = partial(_retarget, more=["re:.*lm_head"])
        yield from edited(case, found[0].code, "the group targets the output head by name", change)


def _retarget(
    own: dict[str, Any], targets: Sequence[str] | None = None, more: Sequence[str] = ()
) -> None:
    for entry in groups_of(own).values():
        if entry.get("weights") is not None:
            kept = entry.get("targets") or [] if targets is None else targets
            entry["targets"] = [*kept, *more]


def source_fields(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Fields of config.json that describe another model than the source's."""
    if case.source is None:
        return
    config: dict[str, Any] = dict(case.draft.ckpt.config)
    names = [one.tensor for one in found if one.tensor]
    for name in names:
        path = tuple(name.split("."))
        value: Any = case.source.config
        for key in path:
            value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        config = (
            without_field(config, path) if value is _ABSENT else with_field(config, path, value)
        )
    if config != case.draft.ckpt.config:
        said = f"{', '.join(names)} restored from the source"
        yield Repair(code=found[0].code, where=None, said=said, config=config)


_ABSENT = object()


def source_config(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """All of the source's config.json, with the quantization of ours."""
    if case.source is None:
        return
    ours = case.draft.ckpt.config
    kept = {k: ours[k] for k in ("quantization_config", "ckptq") if k in ours}
    config = {**case.source.config, **kept}
    if config != ours:
        said = "config.json restored from the source, with its quantization kept"
        yield Repair(code=found[0].code, where=None, said=said, config=config)


def fit_embedding(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Sizes that the embedding shows: vocab_size and hidden_size."""
    config: dict[str, Any] = dict(case.draft.ckpt.config)
    inside = case.draft.ckpt.text_config is not case.draft.ckpt.config
    done = []
    for one in found:
        size = one.wanted.partition(" in ")[0]
        if one.tensor in ("vocab_size", "hidden_size") and size.isdecimal():
            path = ("text_config", one.tensor) if inside else (one.tensor,)
            config = with_field(config, path, int(size))
            done.append(f"{one.tensor} set to {size}")
    if done:
        said = f"{', '.join(done)}, as the embedding has it"
        yield Repair(code=found[0].code, where=None, said=said, config=config)


def source_tie(case: Case, found: Sequence[Finding]) -> Iterator[Repair]:
    """Whether the output head is the embedding, as the source says."""
    if case.source is None:
        return
    config: dict[str, Any] = dict(case.draft.ckpt.config)
    for path in (("tie_word_embeddings",), ("text_config", "tie_word_embeddings")):
        inner = case.source.config.get("text_config") if len(path) > 1 else case.source.config
        if isinstance(inner, Mapping) and path[-1] in inner:
            config = with_field(config, path, inner[path[-1]])
        elif len(path) == 1:
            config = without_field(config, path)
    if config != case.draft.ckpt.config:
        said = "tie_word_embeddings restored from the source"
        yield Repair(code=found[0].code, where=None, said=said, config=config)
