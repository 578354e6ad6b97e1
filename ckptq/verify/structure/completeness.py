"""Missing and extra tensors, against the source or config.json alone.

Headers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptq.checkpoint.open import CONFIG
from ckptq.engines.vllm import common_set
from ckptq.models.attention import OF_CACHE
from ckptq.models.experts import FUSED_WEIGHT
from ckptq.models.family import LAYER
from ckptq.models.witnesses import read_witnesses
from ckptq.numbered import starred
from ckptq.spec import TensorSpec
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import CODES, EXPERT, SCALES, Module, Subject, tied

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
SHOWN = 8
"""How many missing members one finding lists."""


def check_completeness(subject: Subject) -> Iterator[Finding]:
    """Layers, experts, members of fused sets; with a source, every tensor of it."""
    yield from _layers(subject)
    yield from _experts(subject)
    yield from _expert_layouts(subject)
    yield from _tied_head(subject)
    if subject.source is not None:
        theirs = read_witnesses(subject.source).layers
        if theirs and theirs != subject.layers[0]:
            yield _moved(subject, theirs)
            return
        yield from _missing(subject)
        yield from _extra(subject)
    yield from _siblings(subject)


def _moved(subject: Subject, wanted: str) -> Finding:
    """One finding for a prefix, not one for each tensor under it."""
    ours = subject.layers[0]
    found = f"decoder layers are called {ours}.N" if ours else "no list of decoder layers"
    return finding("names-moved", ours or None, found=found, wanted=f"{wanted}.N, as in the source")


def _layers(subject: Subject) -> Iterator[Finding]:
    prefix, declared = subject.layers
    matches = (LAYER.match(name) for name in subject.ckpt.tensors)
    present = {int(m["index"]) for m in matches if m and m["prefix"] == prefix}
    present = {index for index in present if index < declared}
    if not prefix or len(present) >= declared:
        return
    first = next(i for i in range(len(present) + 1) if i not in present)
    found = f"{len(present)} of {declared} layers, first missing: {first}"
    wanted = f"{subject.family.layers_key} = {declared} layers"
    yield finding("layer-missing", f"{prefix}.{first}", file=CONFIG, found=found, wanted=wanted)


def _experts(subject: Subject) -> Iterator[Finding]:
    """All experts of each layer that holds them one by one."""
    held: dict[str, set[int]] = {}
    for name, module in subject.modules.items():
        match = EXPERT.match(name)
        if match and module.codes is not None:
            held.setdefault(match["experts"], set()).add(int(match["index"]))
    counts = _expert_counts(subject)
    declared = _declared_experts(subject)
    for experts, indices in held.items():
        wanted = counts.get(experts) or declared or max(indices) + 1
        count = wanted - len({i for i in indices if i < wanted})
        if count <= 0:
            continue
        missing = _some(i for i in range(wanted) if i not in indices)
        found = f"{len(indices)} experts, missing {missing}"
        yield finding("expert-missing", experts, found=found, wanted=f"{wanted} experts")


def _expert_counts(subject: Subject) -> dict[str, int]:
    """The source's experts, layer by layer."""
    found: dict[str, set[str]] = {}
    for name in subject.origin.linears if subject.origin is not None else ():
        match = EXPERT.match(name)
        if match:
            found.setdefault(match["experts"], set()).add(match["index"])
    return {experts: len(indices) for experts, indices in found.items()}


def _declared_experts(subject: Subject) -> int | None:
    if subject.origin is not None:
        return None
    counts = (subject.ckpt.text_config.get(key) for key in EXPERT_COUNTS)
    return next((n for n in counts if type(n) is int and 0 < n < 1 << 16), None)


def _some(items: Iterable[int]) -> str:
    shown = [str(item) for item, _ in zip(items, range(SHOWN + 1), strict=False)]
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")


def _expert_layouts(subject: Subject) -> Iterator[Finding]:
    """vLLM's flag for fused experts is sticky: no checkpoint may hold both layouts."""
    fused = [name for name in subject.ckpt.tensors if FUSED_WEIGHT.match(name)]
    single = [name for name in subject.modules if EXPERT.match(name)]
    # an MTP block is another model to vLLM, and stays as it was
    fused, single = (list(filter(subject.witnesses.in_layers, names)) for names in (fused, single))
    if fused and single:
        found = f"fused {fused[0]} beside separate {single[0]}"
        yield finding(
            "expert-layouts-mixed", subject.ckpt.tensors[fused[0]], found=found, wanted="one layout"
        )


def _tied_head(subject: Subject) -> Iterator[Finding]:
    configs, is_tied = (subject.ckpt.text_config, subject.ckpt.config), tied(subject.ckpt)
    for name, module in subject.modules.items():
        head = is_tied and name.rpartition(".")[2] == "lm_head" and module.quantized
        if head and subject.ties(name):
            found = "quantized, although tie_word_embeddings is true"
            yield finding("tied-head", module, found=found, wanted="the embedding's weight")
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in subject.ckpt.tensors}
    untied = not is_tied and any(config.get("tie_word_embeddings") is False for config in configs)
    if untied and "embed_tokens" in names and "lm_head" not in names and _causal(subject):
        found = "no such tensor, and not tied to the embedding"
        wanted = "an output head"
        repair = "set tie_word_embeddings to true, or store the head"
        yield finding("tensor-missing", "lm_head.weight", found=found, wanted=wanted, repair=repair)


def _causal(subject: Subject) -> bool:
    """Whether the model has an output head, and its source does not lack it too."""
    architectures = subject.ckpt.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    source = subject.source
    same = source is not None and source.config.get("tie_word_embeddings") is False
    return isinstance(name, str) and name.endswith("ForCausalLM") and not same


def _missing(subject: Subject) -> Iterator[Finding]:
    """Each tensor of the source, itself or as codes."""
    assert subject.origin is not None
    assert subject.source is not None
    told = {m.origin.name for m in subject.modules.values() if m.origin and m.codes is not None}
    for name in (*subject.origin.others, *_no_matrices(subject, told)):
        yield from _copied(subject, name, subject.source.tensors[name].spec)
    for module in subject.modules.values():
        yield from _left_alone(module)
    for name, weight in subject.decoded.items():
        yield from _copied(subject, name, weight.written)
    gone = [
        linear
        for linear in subject.origin.linears.values()
        if linear.name not in told and linear.weight.stored.name not in subject.ckpt.tensors
    ]
    whole = _whole_experts_gone(subject, {linear.name for linear in gone})
    for linear in gone:
        match = EXPERT.match(linear.name)
        if _untold_tie(subject, linear.name) or (match and _expert_of(linear.name) in whole):
            continue
        if linear.name not in subject.modules:  # else its scales are there: weight-missing
            found = "no such tensor"
            wanted = str(linear.weight.spec)
            yield finding("tensor-missing", f"{linear.name}.weight", found=found, wanted=wanted)


def _no_matrices(subject: Subject, told: set[str]) -> dict[str, None]:
    """Source tensors of Linears that are stored here under the same names but not as Linears: fused
    experts, and tensors with another number of axes."""
    assert subject.origin is not None
    rest = (one for one in subject.origin.linears.values() if one.name not in told)
    names = (linear.weight.stored.name for linear in rest)
    return dict.fromkeys(name for name in names if name in subject.ckpt.tensors)


def _left_alone(module: Module) -> Iterator[Finding]:
    """An unquantized weight has the source's dtype and shape."""
    weight = module.tensors.get("weight")
    if weight is None or module.quantized or module.origin is None:
        return
    if weight.spec != module.origin.weight.spec:
        found = str(weight.spec)
        yield finding("copy-spec", weight, found=found, wanted=str(module.origin.weight.spec))


def _expert_of(name: str) -> str:
    return name.rpartition(".")[0]


def _whole_experts_gone(subject: Subject, gone: set[str]) -> set[str]:
    """Experts without any tensors, which `expert-missing` reports."""
    assert subject.origin is not None
    experts = {_expert_of(name) for name in subject.origin.linears if EXPERT.match(name)}
    kept = {_expert_of(n) for n in subject.origin.linears if n not in gone and EXPERT.match(n)}
    return experts - kept


def _untold_tie(subject: Subject, name: str) -> bool:
    """An output head that is tied to the embedding need not be stored."""
    config = {**subject.ckpt.config, **subject.ckpt.text_config}
    return name.rpartition(".")[2] == "lm_head" and config.get("tie_word_embeddings") is True


def _copied(subject: Subject, name: str, spec: TensorSpec) -> Iterator[Finding]:
    tensor = subject.ckpt.tensors.get(name)
    if tensor is None:
        yield finding("tensor-missing", name, found="no such tensor", wanted=str(spec))
    elif tensor.spec != spec:
        found = str(tensor.spec)
        yield finding("copy-spec", name, file=tensor.file, found=found, wanted=str(spec))


def _extra(subject: Subject) -> Iterator[Finding]:
    """Tensors that neither the source nor any scheme explains."""
    assert subject.source is not None
    for name, tensor in subject.ckpt.tensors.items():
        module, _, local = name.rpartition(".")
        known = subject.modules.get(module)
        of_cache = OF_CACHE.match(name) is not None and local != "kv_scale"
        if name in subject.source.tensors or name in subject.decoded or of_cache:
            continue
        if known is not None and known.origin is not None:
            if local in CODES or local in SCALES:
                continue
            if local == "bias" and known.origin.bias is not None:
                continue
        code = "tensor-extra" if local in (*CODES, *SCALES, "bias") else "tensor-unknown"
        yield finding(code, name, file=tensor.file, found=str(tensor.spec), wanted="no such tensor")


def _siblings(subject: Subject) -> Iterator[Finding]:
    """Members of a fused set that this layer lacks, another layer has, and the source lacks too;
    `_missing` reports the others. What engines do not build may lack what it wants."""
    theirs = subject.source.tensors if subject.source is not None else {}
    templates = {starred(name) for name in subject.modules}
    for name in subject.modules:
        parent, _, projection = name.rpartition(".")
        members = common_set(projection)
        there = [m for m in members if f"{parent}.{m}" in subject.modules]
        if there[:1] != [projection] or not subject.witnesses.in_layers(name):
            continue
        for member in members:
            sibling = f"{parent}.{member}"
            lacking = member not in there and f"{sibling}.weight" not in theirs
            lacking &= not _unneeded(subject, parent, member)
            if lacking and starred(sibling) in templates:
                found = "no such tensor"
                wanted = f"a weight, as beside {name} in other layers"
                yield finding("tensor-missing", f"{sibling}.weight", found=found, wanted=wanted)


def _unneeded(subject: Subject, attention: str, member: str) -> bool:
    """Layers that read another one's cache make no keys and values, nor do layers of latent
    attention among others; some have one for both."""
    latent = subject.attention.get(attention) == "latent"
    if member in ("k_proj", "v_proj") and (latent or attention in subject.cache_owners):
        return True
    return member == "v_proj" and _keys_are_values(subject, attention)


def _keys_are_values(subject: Subject, attention: str) -> bool:
    """Gemma-4's global layers, where the config says so, have no v_proj."""
    config, match = subject.ckpt.text_config, LAYER.match(f"{attention}.")
    types = config.get("layer_types")
    if config.get("attention_k_eq_v") is not True or not match or not isinstance(types, list):
        return False
    return types[int(match["index"]) :][:1] == ["full_attention"]
