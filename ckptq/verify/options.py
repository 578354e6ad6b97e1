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
