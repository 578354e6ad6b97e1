"""Which module a target or an `ignore` entry means, decided as vLLM's loader decides it.

An entry is a whole name, or `re:` and a pattern that is anchored at the start and open at the end.
Layers that vLLM fuses are looked up under the fused name too. Class names count in targets, never
in `ignore`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ckptq.engines.vllm import common_merged_name
from ckptq.patterns import BadPattern, Pattern, compiled


@dataclass(frozen=True, slots=True)
class Names:
    """A list of entries, ready to be asked."""

    exact: frozenset[str]
    patterns: tuple[Pattern, ...]
    broken: tuple[str, ...]
    """Patterns that are no regular expressions."""

    def match(self, module: str) -> bool:
        """Whether the module itself, or the layer that it is fused into, is meant by name."""
        return any(self._named(name) for name in (module, common_merged_name(module)) if name)

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


def _words(class_name: str) -> list[str]:
    """ "LlamaAttention" -> ["attn"], "LlamaMLP" -> ["mlp"]: what its modules are called on disk."""
    last = re.findall(r"[A-Z][a-z0-9]+|[A-Z]+(?![a-z])", class_name)[-1:]
    return [{"attention": "attn"}.get(word.lower(), word.lower()) for word in last]
