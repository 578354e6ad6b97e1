"""`--engine transformers`: transformers builds its own quantized model and reports what is missing.

Left-over tensors and unfilled parameters are grouped by module; consequences of one cause are
reported once. Tensors that the family ignores are no findings, nor are cache scales outside the
decoder, because towers have no cache, or any where this version of transformers reads none.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.engines.transformers import dtype_clash
from ckptq.models.tree.initialized import asked_in_vain
from ckptq.models.tree.transformers_model import decoder_name, dtype_of, runs_attention_groups
from ckptq.printable import listed
from ckptq.spec import FLOATS, TensorSpec
from ckptq.verify.kinds import finding
from ckptq.verify.report import Asked, EngineRun, Finding

if TYPE_CHECKING:
    from ckptq.models.tree.by_headers import Loaded

CACHE_SCALES = ("q_scale", "k_scale", "v_scale")
HARMLESS = re.compile(r"\.([qkv]_zero_point|q_scale)$|\.lora_\w+(\.|$)")
"""Left over of the source too, or unused: adapter matrices beside a weight, the zero points that
llm-compressor writes beside cache scales, and q scales, which transformers reads only with an
attention group."""

SHARED = "leave the Linears that layers share unquantized (--ignore), or serve it with vLLM"

LONGEST = 240


def ask_transformers(ckpt: Checkpoint) -> Asked:
    """Whether transformers would load the checkpoint whole. Reads headers only."""
    import transformers

    from ckptq.models.tree.by_headers import load_by_headers

    began = time.monotonic()
    places = 0
    remarks: tuple[str, ...] = ()
    findings: tuple[Finding, ...]
    try:
        loaded = load_by_headers(ckpt)
    except MemoryError:
        raise
    except Exception as error:  # any: families and validators of configs raise what they like
        findings = (_refused(f"{type(error).__name__}: {error}"),)
    else:
        places = len(loaded.wanted)
        findings = tuple(_judge(ckpt, loaded))
        if unread_cache_scales(loaded):
            remarks = ("this version reads no scales of the KV cache; vLLM does",)
    run = EngineRun(
        name="transformers",
        version=transformers.__version__,
        real=True,
        places=places,
        seconds=time.monotonic() - began,
        remarks=remarks,
    )
    return Asked(run=run, findings=findings)


def _refused(reason: str, where: str | None = None) -> Finding:
    found = f"transformers: {shorten(reason, LONGEST, placeholder=' ...')}"
    wanted = "a checkpoint that it loads"
    return finding(
        "engine-refuses", where, file=CONFIG if where is None else None, found=found, wanted=wanted
    )


def _judge(ckpt: Checkpoint, loaded: Loaded) -> Iterator[Finding]:
    """Causes first; their consequences are not repeated."""
    absent = lacking(loaded)
    over = left_over(loaded)
    other = unlike(loaded)
    failed = {place.rpartition(".")[0] for place in loaded.errors}
    if failed and _attention_first(loaded):
        lost = f"{len(failed)} expert modules not loaded, first {min(failed)}"
        found = f"a group without weights before the group of Linears; {lost}"
        wanted = "groups of Linears first"
        yield finding(
            "attention-group-first", "config_groups", file=CONFIG, found=found, wanted=wanted
        )
    else:
        for place, error in loaded.errors.items():
            yield _refused(error, place)
    yield from _unmatched_attention(loaded)
    yield from _attention_that_does_not_run(loaded)
    formats = {group.format or _declared(loaded).format for group in _groups(loaded).values()}
    if clash := dtype_clash(formats, dtype_of(loaded.model.config)):
        yield _refused(clash, "dtype")
    for linear in asked_in_vain(loaded.model):
        reason = (
            f"{type(loaded.model).__name__} initializes itself through the weight of this Linear, "
            "which is packed: loading ends in AttributeError"
        )
        yield _refused(reason, linear)
    for module in [m for m in {**absent, **over, **other} if m not in failed]:
        yield from _module(ckpt, loaded, module, absent, over, other)


def _module(
    ckpt: Checkpoint,
    loaded: Loaded,
    module: str,
    without: Mapping[str, list[str]],
    over: Mapping[str, list[str]],
    other: Mapping[str, list[str]],
) -> Iterator[Finding]:
    """All faults of one module, as one finding if one cause explains them."""
    absent = without.get(module, [])
    cache = [local for local in absent if local in CACHE_SCALES]
    absent = [local for local in absent if local not in cache]
    for local in cache:
        found = "transformers: no tensor fills it; uninitialised memory is used"
        yield finding("engine-default", f"{module}.{local}", found=found, wanted="the stored scale")
    extra = over.get(module, [])
    if absent and _stored_plain(loaded, module, extra):
        yield _not_ignored(loaded, module)
        return
    unlike_here = other.get(module, [])
    repair: str | None
    if module in loaded.tied and (absent or unlike_here):
        found = "transformers: its weight is another layer's, but the scales are not"
        wanted, repair = "a weight of its own, or an unquantized one", SHARED
        yield finding("engine-unfilled", module, found=found, wanted=wanted, repair=repair)
        return
    if absent:
        held = f"; left over: {listed(extra)}" if extra else ""
        found = f"transformers: no tensor for {listed(absent)}{held}"
        wanted, repair = "a tensor for every parameter", _elsewhere(ckpt, module)
        yield finding("engine-unfilled", module, found=found, wanted=wanted, repair=repair)
        return
    if any(_holds_codes(loaded, place) for place in unlike_here):
        found = "transformers builds it unquantized, but codes are stored"
        yield finding("never-quantized", module, found=found, wanted="an unquantized weight")
        return
    for place in unlike_here:
        found = f"transformers: {loaded.found[place]}"
        wanted = str(loaded.wanted[place])
        yield finding("engine-shape", place, file=_file(ckpt, place), found=found, wanted=wanted)
    if extra:
        found = f"transformers has no parameters for {listed(extra)}"
        repair = _elsewhere(ckpt, module)
        yield finding(
            "engine-left-over", module, found=found, wanted="no such tensors", repair=repair
        )


def _elsewhere(ckpt: Checkpoint, module: str) -> str | None:
    """What helps where the checkpoint holds a module's experts, in a format for which transformers
    has no place: the same conversion would give the same again."""
    below = re.compile(rf"{re.escape(module)}\.\d+\..*\.(weight|weight_packed)$")
    if any(below.match(name) for name in ckpt.tensors):
        return (
            "serve it with vLLM, or use another scheme for experts: transformers holds none in this"
        )
    return None


def _not_ignored(loaded: Loaded, module: str) -> Finding:
    """A Linear that is built quantized and stored, or tied, as it is."""
    repair = f'add "{module}" to quantization_config.ignore'
    if module in loaded.tied:
        found = "transformers builds it quantized, but it is tied to the embedding"
        wanted = "an entry in ignore"
        return finding(
            "tied-head-not-ignored", module, file=CONFIG, found=found, wanted=wanted, repair=repair
        )
    found = "transformers builds it quantized, but it is stored unquantized"
    wanted = "an entry in ignore under this name"
    return finding(
        "engine-not-ignored", module, file=CONFIG, found=found, wanted=wanted, repair=repair
    )


def _stored_plain(loaded: Loaded, module: str, extra: list[str]) -> bool:
    """Whether a module that is built quantized has the weight of an unquantized one."""
    scheme = getattr(submodule(loaded, module), "quantization_scheme", None)
    if scheme is None or scheme.weights is None:
        return False
    weight = loaded.found.get(f"{module}.weight")
    plain = weight is not None and weight.dtype in FLOATS
    return plain or module in loaded.tied or f"{module}.weight" in extra


def _attention_first(loaded: Loaded) -> bool:
    """Whether the group that transformers takes for the experts' quantizes no weights."""
    from transformers.integrations.compressed_tensors import get_experts_scheme

    config = _declared(loaded)
    if config is None or not config.config_groups:
        return False
    return get_experts_scheme(config).weights is None


def _unmatched_attention(loaded: Loaded) -> Iterator[Finding]:
    """A group for q, k and v whose class the model does not have."""
    classes = {type(module).__name__ for module in loaded.model.modules()}
    for name, group in _groups(loaded).items():
        strangers = [t for t in group.targets if not t.startswith("re:") and t not in classes]
        if group.weights is None and strangers:
            found = f"transformers: no module of class {strangers[0]}"
            wanted = "the class of its attention"
            yield finding(
                "target-unmatched", f"config_groups.{name}", file=CONFIG, found=found, wanted=wanted
            )


def _attention_that_does_not_run(loaded: Loaded) -> Iterator[Finding]:
    if runs_attention_groups(loaded.model):
        return
    for name, group in _groups(loaded).items():
        if group.weights is None and group.input_activations is not None:
            reason = (
                f"{type(loaded.model).__name__} has only eager attention, which "
                "compressed-tensors does not hook into: the forward pass ends in KeyError"
            )
            yield _refused(reason, f"config_groups.{name}")


def _declared(loaded: Loaded) -> Any:
    """What compressed-tensors has read in config.json; None for other makers' quantizers."""
    return getattr(getattr(loaded.quantizer, "compressor", None), "quantization_config", None)


def _groups(loaded: Loaded) -> Mapping[str, Any]:
    config = _declared(loaded)
    return config.config_groups if config is not None else {}


def lacking(loaded: Loaded) -> dict[str, list[str]]:
    """Module -> its parameters that nothing fills."""
    found: dict[str, list[str]] = defaultdict(list)
    decoder = decoder_name(loaded.model)
    for place in sorted(loaded.missing):
        module, _, local = place.rpartition(".")
        if local not in CACHE_SCALES or _under(module, decoder):
            found[module].append(local)
    return found


def left_over(loaded: Loaded) -> dict[str, list[str]]:
    """The nearest existing module -> tensors under it without a parameter.

    Whole layers and branches that transformers does not build (multi-token prediction, towers of a
    text-only save) are left over of the source too, and not counted.
    """
    decoder = decoder_name(loaded.model)
    roots = {"", loaded.model.base_model_prefix, decoder, f"{decoder}.layers"}
    modules = {name for name, _ in loaded.model.named_modules()}
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(loaded.left_over - unread_cache_scales(loaded)):
        owner = name.rpartition(".")[0]
        while owner and owner not in modules:
            owner = owner.rpartition(".")[0]
        if owner not in roots and not HARMLESS.search(name):
            found[owner].append(name)
    return found


def unread_cache_scales(loaded: Loaded) -> frozenset[str]:
    """Scales of a cache that config.json declares, where this version of transformers gives none
    of its modules a place for one, as 5.24 does."""
    config = _declared(loaded)
    declared = config is not None and config.kv_cache_scheme is not None
    if not declared or any(_is_cache_scale(place) for place in loaded.wanted):
        return frozenset()
    return frozenset(filter(_is_cache_scale, loaded.left_over))


def _is_cache_scale(name: str) -> bool:
    return name.rpartition(".")[2] in CACHE_SCALES


def unlike(loaded: Loaded) -> dict[str, list[str]]:
    """Module -> places filled with another shape, or with codes where a float should be."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, wanted in loaded.wanted.items():
        held = loaded.found.get(place)
        if place.endswith(".weight_zero_point"):
            continue  # compressed-tensors packs none on the meta device, and takes what is loaded
        if held is not None and place not in loaded.missing and not _fits(held, wanted):
            found[place.rpartition(".")[0]].append(place)
    return found


def _holds_codes(loaded: Loaded, place: str) -> bool:
    """Whether codes are where a float should be."""
    return loaded.wanted[place].dtype in FLOATS and loaded.found[place].dtype not in FLOATS


def _fits(held: TensorSpec, wanted: TensorSpec) -> bool:
    floats = held.dtype in FLOATS and wanted.dtype in FLOATS
    integers = held.dtype in ("I32", "I64") and wanted.dtype == "I64"
    return held.shape == wanted.shape and (held.dtype == wanted.dtype or floats or integers)


def _under(module: str, decoder: str) -> bool:
    return not decoder or module.startswith(f"{decoder}.")


def submodule(loaded: Loaded, name: str) -> object:
    try:
        return loaded.model.get_submodule(name)
    except AttributeError:
        return None


def _file(ckpt: Checkpoint, name: str) -> str | None:
    return ckpt.tensors[name].file.name if name in ckpt.tensors else None
