"""`re:` patterns of recipes and checkpoints, with the meaning of Python's `re` and a limit on time.

A pattern that a stranger's config.json holds may take longer than the universe on one name
(`(a|aa)+$`), and `re` cannot be stopped. Engines that take linear time by design (RE2) know neither
lookaheads nor backreferences, and llm-compressor's recipes are full of the former
(`^(?!.*lm_head).*`). The `regex` module, on which transformers depends already, takes a time limit
and means the same, but for three extensions: fuzzy counts (`x{e}`), POSIX classes and flags. The
last `re` refuses, and it is asked first; the others are escaped (`_plain`). A test compares the two
on random patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter

import regex

from ckptq.errors import SourceError

LONGEST = 10_000
"""Characters of a pattern."""

SECONDS = 1.0
"""For one name; what people write takes a microsecond."""

NOTICED = 0.001
"""Seconds from which on a match counts as slow."""

SLOW_SECONDS = 2.0
"""For all slow matches of a pattern together."""

SHORT = 512
"""Characters of a name on which two repetitions take no more than a millisecond."""

REPEAT = re.compile(r"(?<!\()[*+?{]")
REPEATED_GROUP = re.compile(r"\)[*+?{]")

TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?:\}|(?!\d*,?\d*\}))", re.DOTALL)


class BadPattern(ValueError):
    """Not a regular expression."""


class Pattern:
    """One compiled pattern; matching it ends."""

    def __init__(self, text: str) -> None:
        """BadPattern for what `re` does not take either."""
        if len(text) > LONGEST:
            raise BadPattern(f"{len(text):,} characters; expected at most {LONGEST:,}")
        try:
            self._quick = re.compile(text)
            self._limited = regex.compile(_plain(text))
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise BadPattern(str(error) or type(error).__name__) from error
        self.text = text
        self._simple = len(REPEAT.findall(text)) <= 2 and not REPEATED_GROUP.search(text)
        self._spent = 0.0

    def match(self, name: str) -> bool:
        """Whether it matches from the start of the name on; SourceError where that does not end."""
        if self._simple and len(name) <= SHORT:
            return self._quick.match(name) is not None
        return self._run(self._limited.match, name)

    def search(self, name: str) -> bool:
        """The same anywhere in the name."""
        return self._run(self._limited.search, name)

    def _run(self, how: Callable[..., object], name: str) -> bool:
        began = perf_counter()
        try:
            found = how(name, timeout=SECONDS) is not None
        except TimeoutError as error:
            raise self._too_slow(name) from error
        took = perf_counter() - began
        self._spent += took if took > NOTICED else 0.0
        if self._spent > SLOW_SECONDS:
            raise self._too_slow(name)
        return found

    def _too_slow(self, name: str) -> SourceError:
        return SourceError(
            f"pattern {self.text[:200]!r} takes more than {SECONDS:g} s on names like "
            f"{name[:100]!r}; avoid nested repetitions"
        )


@lru_cache(maxsize=4096)
def compiled(entry: str) -> Pattern | None:
    """The pattern of an entry that begins with `re:`, or BadPattern; None for a plain name."""
    return Pattern(entry.removeprefix("re:")) if entry.startswith("re:") else None


def _plain(text: str) -> str:
    """The same for the `regex` module: braces that count nothing, and brackets in brackets, are
    letters."""

    def escaped(token: re.Match[str]) -> str:
        found = token[0]
        if found[0] == "{":
            return "\\" + found
        if found[0] != "[":
            return found
        inner = re.sub(r"\\.|\[", lambda m: "\\[" if m[0] == "[" else m[0], found[1:], flags=re.S)
        return "[" + inner

    return TOKEN.sub(escaped, text)
