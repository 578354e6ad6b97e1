"""The result of `mend`: what was done, tensor by tensor, and what is left and needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckptq.show import console

if TYPE_CHECKING:
    from ckptq.mend.run import Done, Mended

NEEDS = {
    "source": "give --source",
    "text": "calibrate on text: `ckptq calibrate`, then convert again",
    "convert": "convert again",
    "choice": "decide yourself",
}

SHOWN = 20
"""Lines of one kind; `--json` has all."""


def show_mended(done: Mended, json: bool) -> None:
    """Repairs by kind, then what is left, then the verdict on what was written."""
    if json:
        console.show_json(done)
        return
    console.show_lines(*_lines(done), _verdict(done))


def _lines(done: Mended) -> Iterator[str]:
    for one in _some(done.repairs):
        yield f"mended {one.code}: {_where(one)}{one.said}"
    yield from _more(done.repairs)
    for one in _some(done.left):
        yield f"left   {one.code}: {_where(one)}{one.said} ({NEEDS[one.needs or 'convert']})"
    yield from _more(done.left)
    for name in done.kept:
        yield f"kept   {name}"


def _some(lines: Sequence[Done]) -> list[Done]:
    """The first few of each kind."""
    seen: dict[str, int] = {}
    shown = []
    for one in lines:
        seen[one.code] = seen.get(one.code, 0) + 1
        if seen[one.code] <= SHOWN:
            shown.append(one)
    return shown


def _more(lines: Sequence[Done]) -> Iterator[str]:
    hidden = len(lines) - len(_some(lines))
    if hidden:
        yield f"       and {hidden} more; --json has all"


def _where(one: Done) -> str:
    return f"{one.where}: " if one.where else ""


def _verdict(done: Mended) -> str:
    if not done.repairs and not done.left and done.before.ok:
        return f"{done.path}: nothing to mend"
    count = f"{len(done.repairs)} repair{'' if len(done.repairs) == 1 else 's'}"
    if done.dry_run:
        return f"{done.path}: {count} to make, {len(done.left)} findings left; nothing was written"
    if done.out is None:
        return f"{done.path}: nothing can be mended with what is here; nothing was written"
    faults = len(done.after.findings) if done.after is not None else 0
    read = "" if done.after is None or not done.after.headers_only else " (headers only)"
    verdict = "right" if not faults else f"{faults} fault{'' if faults == 1 else 's'} left"
    return f"{done.out}: {count}; verify{read}: {verdict}"
