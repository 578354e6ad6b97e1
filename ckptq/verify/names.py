"""Which module a target or an `ignore` entry means, decided as vLLM's loader decides it.

An entry is a whole name, or `re:` and a pattern that is anchored at the start and open at the end.
Layers that vLLM fuses are looked up under the fused name too. Class names count in targets, never
in `ignore`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ckptq.models.family import FUSED_SETS
from ckptq.patterns import BadPattern, Pattern, compiled

FUSED_NAMES = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "w13",
}
"""What vLLM calls a fused set."""

LINEAR_CLASSES = ("columnparallellinear", "rowparallellinear", "replicatedlinear")
"""vLLM's, in lower case: a target that is a part of one of these means every Linear."""


@dataclass(frozen=True, slots=True)
class Names:
    """A list of entries, ready to be asked."""

    exact: frozenset[str]
    patterns: tuple[Pattern, ...]
    broken: tuple[str, ...]
    """Patterns that are no regular expressions."""

    def match(self, module: str) -> bool:
        """Whether the module itself, or the layer that it is fused into, is meant by name."""
        return any(self._named(name) for name in (module, fused_name(module)) if name)

    def _named(self, name: str) -> bool:
        return name in self.exact or any(p.match(name) for p in self.patterns)

    def match_loosely(self, module: str) -> bool:
        """Whether somebody who writes patterns unanchored, or class names, would mean it."""
        lowered = module.replace("_", "").lower()
        classes = (e for e in self.exact if "." not in e and e[:1].isupper())
        return any(p.search(module) for p in self.patterns) or any(
            word in lowered for entry in classes for word in _words(entry)
        )


def read_names(entries: Iterable[str]) -> Names:
    """Sort entries; a pattern that does not compile is kept aside, not raised."""
    exact, patterns, broken = set(), [], []
    for entry in entries:
        try:
            pattern = compiled(entry)
        except BadPattern:
            broken.append(entry)
            continue
        if pattern is None:
            exact.add(entry)
        else:
            patterns.append(pattern)
    return Names(frozenset(exact), tuple(patterns), tuple(broken))


def means_every_linear(target: str) -> bool:
    """Class names are compared as parts of names, without case, as vLLM does: "Linear"."""
    return bool(target) and any(target.lower() in name for name in LINEAR_CLASSES)


def fused_name(module: str) -> str | None:
    """ "model.layers.0.self_attn.q_proj" -> "model.layers.0.self_attn.qkv_proj"."""
    parent, _, projection = module.rpartition(".")
    for members in FUSED_SETS:
        if projection in members and members in FUSED_NAMES:
            return f"{parent}.{FUSED_NAMES[members]}"
    return None


def _words(class_name: str) -> list[str]:
    """ "LlamaAttention" -> ["attn"], "LlamaMLP" -> ["mlp"]: what its modules are called on disk."""
    last = re.findall(r"[A-Z][a-z0-9]+|[A-Z]+(?![a-z])", class_name)[-1:]
    return [{"attention": "attn"}.get(word.lower(), word.lower()) for word in last]
