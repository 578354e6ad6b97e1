"""What engines compute before a fault, with it, and after `mend`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mend_logits import CASES, Case, Engine, Folders, folders, gap, in_transformers, vllm_with

PYTHON = os.environ.get("VLLM_PYTHON")

QUICK = [case for case in CASES if case.seen and case.weights == "fp8-channel"]


def made(case: Case, good, tmp_path: Path) -> Folders:
    folder, source = good("llama", case.weights, case.kv)
    return folders(case, source, folder, tmp_path)


def check(case: Case, held: Folders, ask: Engine, *, seen: bool) -> None:
    """Mended it computes what it did before; with the fault something else, or nothing."""
    before, broken, mended = (ask(f) for f in (held.good, held.broken, held.mended))
    moved = gap(mended, before)
    assert moved is not None
    assert moved <= (0.01 if case.name in ROUNDED else 0.0)
    if seen:
        harm = gap(broken, before)
        assert harm is None or not harm < 2 * moved + 1e-3


HARMLESS_IN_VLLM = ("ignore-nothing", "drop-a-norm", "flatten-scales-of-heads")
"""It does not quantize a head, fills a norm with ones, which a random model has, and reads the
scales of heads in either shape."""

IN_VLLM = [case for case in CASES if case.weights != "nvfp4" and case.name != "per-tensor"]
"""Those with a kernel on a CPU, and without a repair that is to change what is computed."""

ROUNDED = ("invert-scales", "part-global-scales")
"""Repairs that round: the information is not there any more."""


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_transformers_computes_again_what_it_did(good, tmp_path: Path, case: Case):
    check(case, made(case, good, tmp_path), in_transformers, seen=True)


@pytest.mark.engine
@pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM")
@pytest.mark.parametrize("case", IN_VLLM, ids=lambda case: case.name)
def test_vllm_computes_again_what_it_did(good, tmp_path: Path, case: Case):
    seen = case.name not in HARMLESS_IN_VLLM
    check(case, made(case, good, tmp_path), vllm_with(Path(str(PYTHON))), seen=seen)


def test_a_mended_checkpoint_that_is_not_right_is_noticed(good, tmp_path: Path):
    """The twin: what is compared differs where a single scale does."""
    held = made(CASES[3], good, tmp_path)
    from safetensors.torch import load_file, save_file

    file = held.mended / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("o_proj.weight_scale"))
    tensors[name] *= 4
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AssertionError):
        check(CASES[3], held, in_transformers, seen=True)
