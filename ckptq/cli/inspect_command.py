"""`ckptq inspect`."""

from __future__ import annotations

from ckptq.cli.options import (
    Json,
    Model,
    Revision,
)
from ckptq.show import console


def inspect(path: Model, revision: Revision = None, json: Json = False) -> None:
    """Show what is in a checkpoint: schemes, layers, sizes, scales. Reads headers only."""
    from ckptq.inspect import inspect as look
    from ckptq.show.results import show_inspection

    found = look(path, revision)
    for line in found.not_carried:
        console.note(line)
    show_inspection(found, json)
