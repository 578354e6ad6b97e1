"""KV-cache and attention scales against the KV scheme and the model's heads. Headers only."""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import CONFIG
from ckptq.models.heads import by_side
from ckptq.spec import FLOATS
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject


def check_cache(subject: Subject) -> Iterator[Finding]:
    """Every attention layer has the scales that the scheme needs, and no other module has any."""
    yield from _orphans(subject)
    declared = subject.declared
    if declared.kv_strategy is None:
        if subject.cache_scales and declared.present and not declared.has_attention_group:
            first = next(iter(subject.cache_scales.values()))
            found = f"{len(subject.cache_scales)} scales and no kv_cache_scheme"
            wanted = "a kv_cache_scheme, or no scales"
            yield finding("kv-scheme-missing", first, found=found, wanted=wanted)
        return
    if not subject.attention:
        found = "no k_proj in any decoder layer"
        wanted = "attention layers"
        yield finding("no-attention", "kv_cache_scheme", file=CONFIG, found=found, wanted=wanted)
    for module in subject.attention:
        yield from _layer(subject, module)
    yield from _queries(subject)
    yield from _alike(subject)


def _orphans(subject: Subject) -> Iterator[Finding]:
    for (module, _), tensor in subject.cache_scales.items():
        if module in subject.attention:
            continue
        tower = any(word in module for word in ("vision", "visual", "audio", "image"))
        code, wanted = (
            "vision-scale" if tower else "kv-scale-orphan",
            "scales on decoder attention only",
        )
        yield finding(code, tensor, found=str(tensor.spec), wanted=wanted)


def _layer(subject: Subject, module: str) -> Iterator[Finding]:
    latent = subject.attention[module] == "latent"
    if latent and subject.declared.kv_strategy == "attn_head":
        found, wanted = "strategy attn_head", "strategy tensor"
        yield finding("latent-per-head", module, file=CONFIG, found=found, wanted=wanted)
        return
    owner = subject.cache_owners.get(module)
    for which in "kv":
        tensor = subject.cache_scales.get((module, which))
        if tensor is not None:
            yield from _shape(subject, module, which, tensor)
            continue
        reads = f", and reads the cache of {owner} with it" if owner else ""
        found = f"no such tensor: vLLM silently uses 1.0{reads}"
        wanted = f"{owner}.{which}_scale" if owner else _wanted(subject, module, which)
        yield finding("kv-scale-missing", f"{module}.{which}_scale", found=found, wanted=wanted)


def _alike(subject: Subject) -> Iterator[Finding]:
    """vLLM 0.33 asserts as many scales per head in every layer as the config has heads."""
    if subject.declared.kv_strategy != "attn_head":
        return
    for module, kind in subject.attention.items():
        heads = subject.heads_in(module) if kind == "heads" else None
        if heads != subject.heads and heads is not None and subject.heads is not None:
            found = f"{heads[0]} query and {heads[1]} key/value heads"
            wanted = f"{subject.heads[0]} and {subject.heads[1]}, as in config.json"
            yield finding("kv-heads-differ", module, file=CONFIG, found=found, wanted=wanted)


def _queries(subject: Subject) -> Iterator[Finding]:
    """q scales: all layers, or none where the scheme is the cache's alone."""
    layers = [m for m, kind in subject.attention.items() if kind == "heads"]
    missing = [m for m in layers if (m, "q") not in subject.cache_scales]
    if missing == layers and layers and not subject.declared.has_attention_group:
        found = f"none of {len(layers)} layers has one"
        wanted = _wanted(subject, layers[0], "q")
        yield finding("q-scale-absent", f"{layers[0]}.q_scale", found=found, wanted=wanted)
        missing = []
    for module in missing:
        wanted = _wanted(subject, module, "q")
        yield finding("q-scale-missing", f"{module}.q_scale", found="no such tensor", wanted=wanted)
    for module in layers:
        if module not in missing and (module, "q") in subject.cache_scales:
            yield from _shape(subject, module, "q", subject.cache_scales[module, "q"])


def wanted_count(subject: Subject, module: str, which: str) -> int | None:
    """Number of scales of q, k or v; None if the config does not give the heads."""
    if subject.declared.kv_strategy == "tensor":
        return 1
    heads = subject.heads_in(module)
    return by_side(heads)[which] if heads is not None else None


def _wanted(subject: Subject, module: str, which: str) -> str:
    count = wanted_count(subject, module, which)
    if subject.declared.kv_strategy == "tensor":
        return "one scale [1]"
    return f"one scale per head [{count}, 1, 1]"


def _shape(subject: Subject, module: str, which: str, tensor: StoredTensor) -> Iterator[Finding]:
    count = wanted_count(subject, module, which)
    per_head = subject.declared.kv_strategy == "attn_head"
    right = tensor.spec.shape == (count, 1, 1) if per_head else tensor.spec.numel == 1
    if count == 1:
        right = tensor.spec.numel == 1
    if count is not None and not right:
        found = str(tensor.spec)
        yield finding("kv-scale-shape", tensor, found=found, wanted=_wanted(subject, module, which))
    if tensor.spec.dtype not in FLOATS:
        yield finding("kv-scale-dtype", tensor, found=str(tensor.spec), wanted=" or ".join(FLOATS))
