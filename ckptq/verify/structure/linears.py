"""Linears against the config: which are quantized, and with which tensors.

Headers only. Rules of vLLM's loader are those of its compressed-tensors code (0.32).
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import CONFIG
from ckptq.engines.vllm import ignores, means_by_name, means_every_linear
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import EXPERT, SCALES, Module, Subject


def check_linears(subject: Subject) -> Iterator[Finding]:
    """Whether each Linear matches its group, or `ignore`."""
    if not subject.declared.present:
        yield from _undeclared(subject)
        return
    for module in subject.modules.values():
        yield from _state(subject, module)
    yield from _renamed_experts(subject)
    yield from _unmatched_groups(subject)
    yield from _fused_sets(subject)
    yield from _experts_alike(subject)
    yield from _projections_alike(subject)


def _undeclared(subject: Subject) -> Iterator[Finding]:
    found = next(_left_of_a_scheme(subject), None)
    if found is not None:
        wanted = "a quantization_config"
        yield finding("no-quantization-config", file=CONFIG, found=found, wanted=wanted)
    else:
        found = "no quantization_config"
        yield finding("not-quantized", file=CONFIG, found=found, wanted="a quantized model")


def _left_of_a_scheme(subject: Subject) -> Iterator[str]:
    """What is stored that only a quantization_config gives a meaning."""
    quantized = [m.name for m in subject.modules.values() if m.quantized]
    if quantized:
        yield f"{len(quantized)} quantized Linears, first {quantized[0]}"
    modules = subject.modules.values()
    linear = [m.tensors[name].name for m in modules for name in SCALES if name in m.tensors]
    scales = [*linear, *(tensor.name for tensor in subject.cache_scales.values())]
    if scales:
        yield f"{len(scales)} scales, first {scales[0]}"


def _state(subject: Subject, module: Module) -> Iterator[Finding]:
    if module.quantized:
        yield from _quantized(subject, module)
        return
    orphans = [local for local in SCALES if local in module.tensors]
    targeted = module.group is not None and module.kept is None
    for local in orphans:
        if not targeted:
            tensor = module.tensors[local]
            found = f"{tensor.spec} beside an unquantized weight"
            yield finding("orphan-scale", tensor, found=found, wanted="no such tensor")
    if targeted:
        yield _unquantized(subject, module)
    elif module.group is not None and _transformers_waits(subject, module):
        found = f"unquantized ({module.kept}) and not in ignore"
        wanted = "an entry in ignore"
        yield finding("not-ignored", module.name, file=CONFIG, found=found, wanted=wanted)


def _quantized(subject: Subject, module: Module) -> Iterator[Finding]:
    found = f"{_codes(module)} on disk"
    if module.kept is not None and not (module.kept == "output head" and _by_name(module)):
        if module.kept == "output head" and module.group is not None:
            found, wanted = f"{found}, targeted by class", "a target that names it"
            yield finding("head-untargeted", module.name, file=CONFIG, found=found, wanted=wanted)
        else:
            wanted = "an unquantized weight"
            yield finding(
                "never-quantized", module, found=f"{found} ({module.kept})", wanted=wanted
            )
    elif ignores(subject.declared, module.name):
        found = f"{found}, and an ignore entry matches it"
        yield finding("ignored-but-quantized", module, found=found, wanted="an unquantized weight")
    elif module.group is None:
        targets = [t for group in subject.declared.linears for t in group.targets]
        wanted = "a group that targets it"
        yield finding("untargeted", module, found=f"{found}, targets are {targets}", wanted=wanted)


def _codes(module: Module) -> str:
    return str(module.codes.spec) if module.codes is not None else "scales without codes"


def _by_name(module: Module) -> bool:
    return module.group is not None and means_by_name(module.group, module.name)


def _unquantized(subject: Subject, module: Module) -> Finding:
    """A weight that engines will read as codes; blames `ignore` if an entry was meant for it."""
    assert module.group is not None
    found = f"{_codes(module)}, targeted by group {module.group.name!r} and not ignored"
    loose = subject.declared.ignored.match_loosely(module.name)
    wanted = "codes and scales, or an ignore entry"
    if not loose:
        return finding("targeted-but-unquantized", module, found=found, wanted=wanted)
    repair = f"write {module.name!r} or 're:.*{module.name.rpartition('.')[2]}' in ignore"
    return finding("ignore-not-honoured", module, found=found, wanted=wanted, repair=repair)


def _transformers_waits(subject: Subject, module: Module) -> bool:
    """transformers expects scales for every nn.Linear that a group targets; embeddings are not
    Linears."""
    assert module.group is not None
    return any(map(means_every_linear, module.group.targets)) and module.kept not in (
        "embedding",
        "norm",
        "router",
    )


def _renamed_experts(subject: Subject) -> Iterator[Finding]:
    """llm-compressor's `oneshot` renames Mixtral's w1, w2, w3; one note for the checkpoint."""
    for name, module in subject.modules.items():
        if module.origin is not None and module.origin.name != name:
            found = f"called {module.origin.name} there"
            wanted = "the source's name"
            yield finding("expert-names", name, file=module.file, found=found, wanted=wanted)
            return


def _unmatched_groups(subject: Subject) -> Iterator[Finding]:
    used = {m.group.name for m in subject.modules.values() if m.group and m.kept is None}
    used |= {m.group.name for m in subject.modules.values() if m.group and _by_name(m)}
    for group in subject.declared.linears:
        where, wanted = f"config_groups.{group.name}", "a Linear's name"
        for target in group.targets:
            if means_every_linear(target) and target != "Linear":
                found = f"target {target!r}"
                yield finding("target-class", where, file=CONFIG, found=found, wanted="'Linear'")
        if group.name not in used and group.targets:
            found = f"targets {list(group.targets)} match no Linear"
            yield finding("target-unmatched", where, file=CONFIG, found=found, wanted=wanted)


def _fused_sets(subject: Subject) -> Iterator[Finding]:
    """The members of a set that vLLM merges must all be there and fall to one group."""
    for name, module in subject.modules.items():
        names = subject.witnesses.fused_set(name, subject.modules)
        if names[0] != name or module.kept is not None:
            continue
        present = [subject.modules[n] for n in names]
        said = {m.name: m.group.name if m.group else "ignored" for m in present}
        states = {m.name: "quantized" if m.quantized else "unquantized" for m in present}
        for states_of in (said, states):
            if len(set(states_of.values())) > 1:
                found = ", ".join(f"{n.rpartition('.')[2]} {s}" for n, s in states_of.items())
                wanted = "the same for all"
                yield finding("fused-set-split", name, file=module.file, found=found, wanted=wanted)
                break


def _experts_alike(subject: Subject) -> Iterator[Finding]:
    """Engines look up the scheme of expert 0 and take it for all."""
    for name, module in subject.modules.items():
        match = EXPERT.match(name)
        if not match or match["index"] == "0":
            continue
        first = subject.modules.get(f"{match['experts']}.0.{match['projection']}")
        if first is None:
            continue
        same_group = (first.group and first.group.name) == (module.group and module.group.name)
        if not same_group or first.quantized != module.quantized:
            found = f"{_codes(module)}, expert 0 has {_codes(first)}"
            wanted = "the same for all"
            yield finding("experts-differ", name, file=module.file, found=found, wanted=wanted)


def _projections_alike(subject: Subject) -> Iterator[Finding]:
    """vLLM refuses experts whose projections have several schemes; it looks at expert 0's."""
    for name, module in subject.modules.items():
        parent, _, projection = name.rpartition(".")
        down = {"gate_proj": "down_proj", "w1": "w2"}.get(projection)
        match = EXPERT.match(name)
        if down is None or match is None or match["index"] != "0":
            continue
        other = subject.modules.get(f"{parent}.{down}")
        if other is None or _said(module) == _said(other):
            continue
        found = f"{down} is {_said(other)}, {projection} {_said(module)}"
        wanted = "one scheme for all projections, which is all that vLLM loads"
        yield finding("experts-differ", other, found=found, wanted=wanted)


def _said(module: Module) -> str:
    """The scheme that engines find for it."""
    group = module.group
    return "unquantized" if group is None else str(module.scheme or group.name)
