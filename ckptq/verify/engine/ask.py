"""`--engine`: asks the engine itself if it is available, and reports if it is not."""

from __future__ import annotations

from pathlib import Path

from ckptq.verify.engine.by_table import foreseen
from ckptq.verify.report import Asked, EngineRun
from ckptq.verify.subject import Subject


def ask_engine(subject: Subject, name: str, vllm_python: Path | None) -> Asked:
    """How the engine would load names, shapes and dtypes. Reads headers only.

    vLLM runs in the environment of `vllm_python`; without one its table is used, which notes what
    it has not seen."""
    if name == "transformers":
        from ckptq.verify.engine.transformers import ask_transformers

        return ask_transformers(subject.ckpt)
    if vllm_python is not None:
        from ckptq.verify.engine.vllm import ask_vllm

        return ask_vllm(subject.ckpt, vllm_python)
    return Asked(run=_simulated(name), findings=tuple(foreseen(subject)))


def _simulated(name: str) -> EngineRun:
    return EngineRun(name=name, version=None, real=False, places=0, seconds=0.0, remarks=())
