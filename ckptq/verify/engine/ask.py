"""`--engine`: asks the engine itself where it can be had, and says where it was not."""

from __future__ import annotations

from ckptq.checkpoint.open import Checkpoint
from ckptq.verify.engine.result import Asked
from ckptq.verify.report import EngineRun


def ask_engine(ckpt: Checkpoint, name: str) -> Asked:
    """What the engine of this name makes of names, shapes and dtypes. Reads headers only."""
    if name == "transformers":
        from ckptq.verify.engine.transformers import ask_transformers

        return ask_transformers(ckpt)
    return Asked(run=_simulated(name), findings=())


def asks_itself(name: str) -> bool:
    """Whether the engine itself answers, from headers alone."""
    return name == "transformers"


def _simulated(name: str) -> EngineRun:
    return EngineRun(name=name, version=None, real=False, places=0, seconds=0.0, remarks=())
