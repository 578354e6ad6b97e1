"""What a user of `verify` asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.verify.loaders import Engine

Progress = Callable[[str, int], None]
"""(what was checked, bytes of the checkpoint that are done since the last call)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How much is looked at, and by whom."""

    fast: bool
    engine: Engine | None
    progress: Progress
    ranks: Ranks = ALONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What is run, and for what."""

    attention: bool
    """Whether q, k and v are measured; else only chosen codes are judged."""
    data: str | None = None
    """A file or data set; the built-in corpus, and no codes judged, if none is given."""
    samples: int | None = None
    seq_len: int | None = None
    device: str | None = None
