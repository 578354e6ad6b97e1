"""Which modules `targets` or `ignore` match: the one place where names are matched.

An entry is a whole name, or `re:` and a pattern that is anchored at the start and open at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ckptq.patterns import BadPattern, Pattern, compiled


@dataclass(frozen=True, slots=True)
class Names:
    """A list of entries, ready to be asked."""

    exact: frozenset[str]
    patterns: tuple[Pattern, ...]

    def match(self, *names: str) -> bool:
        """Whether a module with these names is matched."""
        return any(n in self.exact or any(p.match(n) for p in self.patterns) for n in names)

    def match_loosely(self, module: str) -> bool:
        """Whether it would match unanchored patterns or class names."""
        lowered = module.replace("_", "").lower()
        classes = (e for e in self.exact if "." not in e and e[:1].isupper())
        return any(p.search(module) for p in self.patterns) or any(
            word in lowered for entry in classes for word in _words(entry)
        )


def read_names(entries: Iterable[str]) -> Names:
    """Sort entries; a pattern that does not compile matches nothing (`broken` finds it)."""
    exact, patterns = set(), []
    for entry in entries:
        try:
            pattern = compiled(entry)
        except BadPattern:
            continue
        if pattern is None:
            exact.add(entry)
        else:
            patterns.append(pattern)
    return Names(frozenset(exact), tuple(patterns))


def broken(entry: str) -> str | None:
    """Why an entry is not a valid pattern; None if it is one, or a plain name."""
    try:
        compiled(entry)
    except BadPattern as error:
        return str(error)
    return None


def _words(class_name: str) -> list[str]:
    """ "LlamaAttention" -> ["attn"], "LlamaMLP" -> ["mlp"]: what its modules are called on disk."""
    last = re.findall(r"[A-Z][a-z0-9]+|[A-Z]+(?![a-z])", class_name)[-1:]
    return [{"attention": "attn"}.get(word.lower(), word.lower()) for word in last]
