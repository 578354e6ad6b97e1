"""The page of a report: one file that opens anywhere, without scripts or network access."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ckptq.printable import on_page

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667085; --line: #d0d5dd; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #98a2b3; --line: #3a4048; --page: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
.said td, td:first-child { white-space: normal; overflow-wrap: anywhere; }
.said td:first-child, .said td:last-child { overflow-wrap: normal; }
td.n, th.n { text-align: right; padding: 3px 0 3px 14px; }
.soft { color: var(--soft); } .bad { color: #d92d20; } .good { color: #079455; }
code { font: 12px ui-monospace, monospace; }
svg { width: 100%; max-width: 62rem; height: auto; margin-top: 0.6rem; background: #fff; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """The whole page around sections of HTML; the title is text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{on_page(title)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(sections)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: int) -> str:
    """Text in cells; the last `numbers` columns are right-aligned."""
    first = len(head) - numbers
    classes = ["n" if index >= first else "" for index in range(len(head))]
    top = "".join(f'<th class="{c}">{on_page(h)}</th>' for c, h in zip(classes, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{c}">{breakable(str(value))}</td>'
            for c, value in zip(classes, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def breakable(name: str) -> str:
    """Escaped, with line breaks allowed after dots."""
    return re.sub(r"\.(?=[a-z])", ".<wbr>", on_page(name))
