"""One family under one scheme: what all tests of the matrix share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, plan_of, quantize
from ckptq.errors import CkptqError
from ckptq.plan.doubts import vllm_doubts
from ckptq.recipes.load import load_scheme

NOISE = {
    "fp8-dynamic": 0.04,
    "fp8-per-head": 0.04,
    "w8a8": 0.02,
    "w4a16-g32": 0.13,
    "nvfp4a16": 0.15,
}
"""Scheme -> the largest relative error of one weight of a normal distribution."""


def cells(families: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every family under FP8, and every twelfth under each other scheme: FULL_MATRIX=1 gives all of
    them, which take half an hour on two cores."""
    others = [scheme for scheme in NOISE if scheme != "fp8-dynamic"]
    for number, family in enumerate(families):
        yield family, "fp8-dynamic"
        for turn, scheme in enumerate(others):
            if os.environ.get("FULL_MATRIX") or number % 12 == 3 * turn:
                yield family, scheme


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a source that was to be quantized."""

    out: Path | None
    """The checkpoint; None where it was refused."""
    refusal: str = ""
    planned: bool = True
    """Whether the plan stood, and what refused came behind it."""
    notes: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    """Why vLLM would not serve it, as the plan says."""


def make(source: Path, scheme: str, out: Path, data: Path) -> Made:
    """Quantize a source with two lines of token ids, or be refused. What else is raised is a
    fault, and goes on."""
    calibration = CalibrationRequest(data=data, samples=2, seq_len=16)
    request = QuantizeRequest(
        model=source, recipe=load_scheme(scheme), out=out, calibration=calibration
    )
    try:
        plan = plan_of(request)
    except CkptqError as error:
        return Made(None, refusal=str(error), planned=False)
    notes: list[str] = []
    told = tuple(vllm_doubts(plan))
    try:
        quantize(request, note=notes.append)
    except CkptqError as error:
        return Made(None, refusal=str(error), notes=tuple(notes), vllm=told)
    return Made(out, notes=tuple(notes), vllm=told)


def write_token_ids(file: Path) -> Path:
    """Calibration data that needs no tokenizer."""
    generator = torch.Generator().manual_seed(0)
    lines = [torch.randint(3, 200, (16,), generator=generator).tolist() for _ in range(2)]
    file.write_text("\n".join(json.dumps({"input_ids": line}) for line in lines))
    return file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers and llm-compressor warn of random weights and missing tokenizers."""
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
