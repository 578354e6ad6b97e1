"""`--engine`: asks the engine itself where it can be had, and says where it was not."""

from __future__ import annotations

from pathlib import Path

from ckptq.verify.engine.by_table import foreseen
from ckptq.verify.engine.result import Asked
from ckptq.verify.report import EngineRun
from ckptq.verify.subject import Subject


def ask_engine(subject: Subject, name: str, vllm_python: Path | None) -> Asked:
    """What the engine of this name makes of names, shapes and dtypes. Reads headers only.

    vLLM is asked in the environment of `vllm_python`. Without one its table is, which tells what it
    has not seen.
    """
    if name == "transformers":
        from ckptq.verify.engine.transformers import ask_transformers

        return ask_transformers(subject.ckpt)
    if vllm_python is not None:
        from ckptq.verify.engine.vllm import ask_vllm

        return ask_vllm(subject.ckpt, vllm_python)
    return Asked(run=_simulated(name), findings=tuple(foreseen(subject)))


def _simulated(name: str) -> EngineRun:
    return EngineRun(name=name, version=None, real=False, places=0, seconds=0.0, remarks=())
