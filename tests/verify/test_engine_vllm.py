"""Asking vLLM, as far as it goes without one: what cannot be asked, and the counting of writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from verify_checkpoints import copy_of

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import MachineError, UsageError
from ckptq.verify.engine import vllm as ask
from ckptq.verify.engine.vllm_worker import EXTRACT, Feed, Hollow, Writes, kernel_stand_in, script
from ckptq.verify.run import verify

LARGE = (8, 1024, 1024)


def test_a_python_without_vllm_is_refused(good):
    folder, _ = good("llama", "int8")
    with pytest.raises(UsageError, match="has no vLLM"):
        verify(folder, engine="vllm", vllm_python=Path(sys.executable))


def test_a_python_that_is_none_is_refused(good, tmp_path):
    folder, _ = good("llama", "int8")
    with pytest.raises(UsageError, match="cannot be run"):
        verify(folder, engine="vllm", vllm_python=tmp_path / "python")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", "printed nothing and ended with exit code 0"),
        ("exit 5", "printed nothing and ended with exit code 5"),
        ("echo hello", "printed 'hello' and ended with exit code 0"),
        ("echo '{}'", "printed '{}' and ended with exit code 0"),
        ("echo '[1]'", "printed '[1]' and ended with exit code 0"),
    ],
)
def test_a_program_that_is_no_python_is_refused_with_what_it_said(good, tmp_path, script, said):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
    program.chmod(0o755)
    folder, _ = good("llama", "int8")
    with pytest.raises(UsageError, match="from a Python with vLLM") as refused:
        verify(folder, engine="vllm", vllm_python=program)
    assert said in str(refused.value)


def test_what_the_worker_borrows_from_the_extractor_is_there():
    """It is found by path, and only vLLM's environment would notice that it has moved."""
    limits, building = (script(EXTRACT / f"{name}.py") for name in ("limits", "build"))
    assert callable(limits.lift_limits_of_this_machine)
    assert callable(building.register_if_unknown)
    assert callable(building.start_process_groups)
    with pytest.raises(FileNotFoundError):
        script(EXTRACT / "moved.py")


def test_a_crash_is_the_machines_and_its_last_words_are_told(good, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import sys; print('Illegal instruction', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(ask, "WORKER", worker)
    folder, _ = good("llama", "int8")
    with pytest.raises(MachineError, match="exit code 3: Illegal instruction"):
        verify(folder, engine="vllm", vllm_python=Path(sys.executable))


@pytest.mark.parametrize("engine", [None, "transformers"])
def test_vllms_python_goes_with_vllm(good, engine):
    folder, _ = good("llama", "int8")
    with pytest.raises(UsageError, match="applies only to --engine vllm"):
        verify(folder, engine=engine, vllm_python=Path(sys.executable))


def test_headers_alone_ask_vllm_and_do_not_simulate_it(good):
    folder, _ = good("llama", "int8")
    with pytest.raises(UsageError, match="--vllm-python"):
        verify(folder, engine="vllm", headers_only=True)


class Merged(nn.Module):
    """As vLLM merges: q, k and v in one matrix, experts in one tensor, two of which share one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(6, 4))
        self.experts = nn.Parameter(torch.empty(LARGE))
        self.embedding = nn.Parameter(torch.empty(3, 4))
        self.head = self.embedding
        self.scale = nn.Parameter(torch.ones(1))


def watched(*steps) -> dict[str, dict]:
    with Hollow():
        model = Merged()
    assert model.experts.is_meta
    assert not model.qkv.is_meta
    writes = Writes(model)
    with writes, torch.no_grad():
        for step in steps:
            step(model)
    return {one["name"]: one for one in writes.parameters()}


def test_a_part_of_a_merged_matrix_that_nothing_fills():
    def part(start, rows):
        return lambda m: m.qkv.data.narrow(0, start, rows).copy_(torch.ones(rows, 4))

    whole = watched(part(0, 4), part(4, 1), part(5, 1))
    assert whole["qkv"]["filled"] == 24
    lacking = watched(part(0, 4), part(0, 4), part(5, 1))
    assert lacking["qkv"]["filled"] == 20, "a part that is written twice counts once"
    assert lacking["qkv"]["rows"] == [4]


def test_an_expert_that_nothing_fills():
    def expert(index, source=None):
        source = torch.empty(LARGE[1:], device="meta") if source is None else source
        return lambda m: m.experts.data[index].copy_(source)

    found = watched(*(expert(i) for i in range(8) if i != 5))["experts"]
    assert found["filled"] == 7 << 20
    assert found["rows"] == [5]
    assert watched(*(expert(i) for i in range(8)))["experts"]["filled"] == 8 << 20
    half = watched(lambda m: m.experts.data[2].narrow(0, 0, 512).copy_(torch.ones(1)))["experts"]
    assert half["filled"] == 1 << 19


def test_shared_parameters_are_filled_together_and_replaced_ones_whole():
    def replace(m):
        m.scale.data = torch.full((1,), 3.0)

    found = watched(lambda m: m.embedding.data.copy_(torch.ones(3, 4)), replace)
    assert found["head"]["filled"] == found["embedding"]["filled"] == 12
    assert found["scale"]["filled"] == 1
    assert found["qkv"]["filled"] == 0


def test_dtypes_that_went_in_are_kept():
    codes = torch.ones(6, 4).to(torch.float8_e4m3fn)
    assert watched(lambda m: m.qkv.data.copy_(codes))["qkv"]["sources"] == ["float8_e4m3fn"]


def test_a_shape_that_does_not_fit_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="expanded size"):
        watched(lambda m: m.experts.data[0].copy_(torch.empty(1024, 512, device="meta")))


def test_the_checkpoints_tensors_take_no_memory():
    terabyte = Feed([["w", "bfloat16", [1 << 20, 1 << 19]], ["s", "float8_e4m3fn", [2, 2]]])
    (_, large), (_, small) = list(terabyte)
    assert large.is_meta
    assert small.float().tolist() == [[1, 1], [1, 1]]


def test_a_kernels_stand_in_has_a_name_called_or_not():
    """vLLM keeps the class that it chose and logs its name."""
    assert kernel_stand_in().__name__ == "StandIn"
    assert kernel_stand_in(3, partition=4).__name__ == "StandIn"


def found_in(folder: Path, parameter: str, dtype: str = "float32"):
    one = {"name": parameter, "dtype": dtype, "shape": [4], "filled": 0, "rows": [], "sources": []}
    return [f.code for f in ask._judge(open_checkpoint(folder), [one])]


def test_scales_of_static_inputs_are_asked_for_only_where_inputs_are_quantized(good):
    """vLLM makes them for NVFP4 experts of weights alone, too; nothing reads them there."""
    scale = "model.layers.0.mlp.experts.routed_experts.w13_input_global_scale"
    weights_alone, _ = good("qwen3-moe", "nvfp4")
    inputs_too, _ = good("llama", "fp8-channel")
    assert found_in(weights_alone, scale) == []
    assert found_in(inputs_too, scale) == ["engine-unfilled"]
    assert found_in(weights_alone, scale.replace("input", "weight")) == ["engine-unfilled"]


def test_what_vllm_leaves_empty_of_the_source_as_well_is_no_fault(good, tmp_path):
    bias = "model.layers.0.attention.query_layernorm.bias"
    theirs = copy_of(good("llama", "int8")[0], tmp_path / "bailing")
    theirs.config["architectures"] = ["BailingMoeV2ForCausalLM"]
    assert found_in(theirs.save(), bias) == []
    assert found_in(theirs.folder, bias.replace("bias", "weight")) == ["engine-unfilled"]
    assert found_in(good("llama", "int8")[0], bias) == ["engine-unfilled"]
