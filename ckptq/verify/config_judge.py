"""Problems of a `quantization_config`, by the rules of the engines that read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.engines.vllm import kv_scheme_faults, loads_with_plain_inputs
from ckptq.errors import PlanError, SourceError
from ckptq.quantize.weight_scheme import FORMATS
from ckptq.recipes.declared import Declared, read_declared
from ckptq.recipes.scheme import A_PATTERN, Group
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding


def judge_config(ckpt: Checkpoint) -> tuple[Declared, list[Finding]]:
    """The config's declarations, as far as readable, and their problems.

    Raises SourceError for a quantization method other than compressed-tensors.
    """
    found: list[Finding] = []
    declared = read_declared(ckpt, lambda *problem: found.append(_unread(*problem)))
    if not declared.present:
        return declared, []
    found[:0] = _around(ckpt, declared)
    for group in declared.groups:
        found += _attention_group(group, declared) if group.is_attention else _group(group)
    found += _cache(declared, {one.tensor for one in found})
    return replace(declared, groups=tuple(map(_in_order, declared.groups))), found


def _unread(field: str, found: object, wanted: str) -> Finding:
    if field.startswith("kv_cache_scheme"):
        return _wrong("kv-scheme", field, found, wanted)
    return _wrong(
        "pattern-invalid" if wanted.startswith(A_PATTERN) else "group-invalid", field, found, wanted
    )


def _around(ckpt: Checkpoint, declared: Declared) -> Iterator[Finding]:
    """Fields beside the groups. vLLM 0.32 no longer supports sparsity; llm-compressor writes
    rotations; without config_groups vLLM refuses per-head scales."""
    config, method = declared.config, declared.method
    # ModelOpt writes groups too
    other = method == "modelopt" or (
        method != "compressed-tensors" and "config_groups" not in config
    )
    if other:
        said = "missing" if method is None else repr(str(method)[:80])
        raise SourceError(
            f"{ckpt.path / CONFIG}: quant_method is {said}; only compressed-tensors is read, "
            "which `ckptq quantize --scheme repack` makes of other makers' checkpoints"
        )
    if method != "compressed-tensors":
        yield _wrong("quant-method", "quant_method", method, '"compressed-tensors"')
    if (status := config.get("quantization_status")) != "compressed":
        yield _wrong("status", "quantization_status", status, '"compressed"')
    for code, field in (("sparsity", "sparsity_config"), ("transforms", "transform_config")):
        if config.get(field):
            yield _wrong(code, field, config[field], "none")
    if config.get("config_groups") is None:
        yield _wrong("config-groups-missing", "config_groups", None, "an object, even {}")


def _group(group: Group) -> Iterator[Finding]:
    where = f"config_groups.{group.name}"
    for field, value in sorted(group.unknown.items()):
        yield _wrong("group-invalid", f"{where}.{field}", value, "no such field")
    if not group.targets:
        yield _wrong("group-invalid", f"{where}.targets", None, "a list of names")
    if group.weights is None:
        yield _wrong("group-invalid", f"{where}.weights", None, "an object")
        return
    readable = _in_order(group)
    if readable is not group:
        order = group.weights.actorder
        yield _wrong("actorder", f"{where}.weights.actorder", order, "static or null")
    if group.format not in (*FORMATS, "naive-quantized"):
        choice = f"one of {', '.join(FORMATS)}"
        yield _wrong("format", f"{where}.format", group.format, choice)
        return
    if group.input_activations is None and not loads_with_plain_inputs(group):
        wanted = "pack-quantized, which vLLM requires for weight-only integers"
        yield _wrong("format", f"{where}.format", group.format, wanted)
    if group.weights.odd:
        return
    try:
        readable.weight_scheme(stored=True)
    except PlanError as error:
        wanted = f"weights that {group.format} can hold"
        yield _wrong("group-invalid", f"{where}.weights", str(error), wanted)


def _in_order(group: Group) -> Group:
    """The group without activation order, which engines do not read; one finding reports it."""
    if group.weights is None or group.weights.actorder not in ("group", "dynamic"):
        return group
    return replace(group, weights=replace(group.weights, actorder=None))


def _attention_group(group: Group, declared: Declared) -> Iterator[Finding]:
    """vLLM recognizes such a group by its single target, a class name; its scheme must match the
    cache."""
    where, targets = f"config_groups.{group.name}", list(group.targets)
    if len(targets) != 1 or targets[0].startswith("re:") or not targets[0].endswith("Attention"):
        wanted = 'one class name that ends in "Attention"'
        yield _wrong("attention-target", f"{where}.targets", targets, wanted)
    kv, inputs = declared.kv_cache_scheme, group.input_activations
    if kv is None:
        wanted = "the attention group's; without it vLLM keeps the cache unquantized"
        yield _wrong("kv-scheme-missing", "kv_cache_scheme", None, wanted)
    elif inputs is not None:
        for field in ("num_bits", "type", "strategy", "symmetric"):
            found, said = kv.said(field), inputs.said(field)
            if found != said and None not in (found, said):
                wanted = f"{said!r}, as in {where}"
                yield _wrong("kv-scheme", f"kv_cache_scheme.{field}", found, wanted)


def _cache(declared: Declared, told: Collection[str | None]) -> Iterator[Finding]:
    """Fields of the cache scheme that vLLM does not support."""
    kv = declared.kv_cache_scheme
    if kv is None or "kv_cache_scheme" in told:
        return
    for field, value, choice in kv_scheme_faults(kv):
        said = " or ".join(map(repr, choice))
        if f"kv_cache_scheme.{field}" not in told:
            yield _wrong("kv-scheme", f"kv_cache_scheme.{field}", value, said)


def _wrong(code: str, field: str, found: object, wanted: str) -> Finding:
    said = "nothing" if found is None else str(found)[:200]
    return finding(code, field, file=CONFIG, found=said, wanted=wanted)
