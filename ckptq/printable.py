"""What a checkpoint brought along, as it may be shown: on a terminal, in a log, on a page.

Names, values of a config and paths can hold anything: an escape sequence that clears the screen, a
line break that forges a verdict, a mark that turns the rest of the line around.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from pathlib import Path


def printable(text: str) -> str:
    """One line: what does not print is written as Python writes it, "\\x1b", "\\n", "\\u202e"."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """The same for several lines; all but the first are indented, so that none passes for ours."""
    return "\n  ".join(printable(line) for line in text.splitlines())


def listed(names: Sequence[object], shown: int = 3) -> str:
    """The first of them, and how many more there are: "a, b, c and 4 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def on_page(text: object) -> str:
    """For HTML and SVG, as text or as an attribute's value."""
    return html.escape(printable(str(text)))


def shell_word(path: str | Path) -> str:
    """A path as a word of a command that can be copied."""
    return shlex.quote(str(path))


def size(nbytes: float) -> str:
    """Bytes as people read them: 1_500_000 -> "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
