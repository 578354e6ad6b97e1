"""The control, with the real vLLM (VLLM_PYTHON): each rule of its loader, broken in what was good.

`verify --engine vllm --vllm-python` names each: vLLM's own error, or what its loader left empty.
For what vLLM loads without a word, vLLM itself is run, and does not compute what it computes for
the whole checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families.vllm_cells import warm
from test_control_transformers import repaired
from verify_checkpoints import EXPERTS, Editor, copy_of

from ckptq.verify.run import verify

PYTHON = os.environ.get("VLLM_PYTHON")
GENERATE = Path(__file__).parents[2] / "benchmarks" / "matrix" / "vllm_worker.py"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM"),
]


@dataclass(frozen=True)
class Rule:
    """One way to break a checkpoint, the code that names it, and a part of what is told: of the
    tensor, or of vLLM's error where it has read all tensors before it refuses one."""

    code: str
    where: str
    family: str
    weights: str
    kv: bool
    breaks: Callable[[Editor], None]

    def __str__(self) -> str:
        return f"{self.breaks.__name__}-{self.family}-{self.weights}"


RULES: list[Rule] = []


def rule(code: str, where: str, *kinds: tuple[str, str], kv: bool = False):
    def keep(breaks: Callable[[Editor], None]) -> Callable[[Editor], None]:
        RULES.extend(Rule(code, where, family, weights, kv, breaks) for family, weights in kinds)
        return breaks

    return keep


@rule("engine-refuses", "", ("llama", "fp8-channel"), ("qwen3-moe", "int4"))
def ignores_a_part_of_a_merged_set(e: Editor) -> None:
    e.quantization["ignore"].append(e.named("layers.0.self_attn.q_proj.weight_scale")[:-13])


@rule("engine-refuses", "gate", ("mixtral", "fp8-channel"))
@rule("engine-unfilled", "layers.1.mlp.gate", ("qwen3-moe", "fp8-channel"))
def quantizes_a_router(e: Editor) -> None:
    router = e.named("gate.weight")
    e.tensors[router] = e.tensors[router].to(torch.float8_e4m3fn)
    e.tensors[f"{router}_scale"] = torch.ones(EXPERTS, 1).bfloat16()
    e.quantization["ignore"] = [n for n in e.quantization["ignore"] if not n.endswith("gate")]


@rule("engine-refuses", "lm_head", ("llama", "fp8-channel"), ("llama", "int8"))
def quantizes_the_head_by_class(e: Editor) -> None:
    e.tensors["lm_head.weight_scale"] = torch.ones(128, 1).bfloat16()
    kind = e.tensors[e.named("q_proj.weight")].dtype
    e.tensors["lm_head.weight"] = torch.ones(128, 128).to(kind)
    e.quantization["ignore"] = [n for n in e.quantization["ignore"] if n != "lm_head"]


@rule("engine-refuses", "vision_model", ("llama4", "fp8-channel"))
def quantizes_a_tower(e: Editor) -> None:
    name = e.named("vision_model.model.layers.0.mlp.fc1.weight")
    e.tensors[f"{name}_scale"] = torch.ones(e.tensors[name].shape[0], 1).bfloat16()
    e.tensors[name] = e.tensors[name].to(torch.float8_e4m3fn)
    parent = name.removesuffix(".weight")
    e.quantization["ignore"] = [n for n in e.quantization["ignore"] if n != parent]


@rule("engine-unfilled", "routed_experts", ("llama4", "fp8-channel"), ("llama4", "int8"))
def leaves_fused_experts(e: Editor) -> None:
    prefix = e.named("experts.0.gate_proj.weight").split(".experts.")[0] + ".experts."
    for name in [n for n in e.tensors if n.startswith(prefix)]:
        del e.tensors[name]
    e.tensors[f"{prefix}gate_up_proj"] = torch.randn(EXPERTS, 128, 256).bfloat16()
    e.tensors[f"{prefix}down_proj"] = torch.randn(EXPERTS, 128, 128).bfloat16()


@rule("engine-unfilled", "mlp.down_proj", ("llama", "fp8-channel"), ("llama", "int4"))
def loses_a_scale(e: Editor) -> None:
    del e.tensors[e.named("layers.1.mlp.down_proj.weight_scale")]


@rule("engine-partly-filled", "qkv_proj.weight_scale", ("llama", "int8"), ("mixtral", "int4"))
def loses_a_scale_of_a_merged_set(e: Editor) -> None:
    del e.tensors[e.named("layers.1.self_attn.k_proj.weight_scale")]


@rule("engine-partly-filled", "gate_up_proj.weight", ("llama", "fp8-channel"), ("llama", "int4"))
def loses_a_half(e: Editor) -> None:
    for name in [n for n in e.tensors if "layers.0.mlp.up_proj" in n]:
        del e.tensors[name]


@rule("engine-partly-filled", "w13_weight", ("mixtral", "fp8-channel"), ("qwen3-moe", "int4"))
@rule("engine-partly-filled", "w2_weight", ("llama4", "int8"), ("qwen3-moe", "nvfp4"))
def loses_an_expert(e: Editor) -> None:
    layer = next(n for n in sorted(e.tensors) if ".experts.2." in n).split(".experts.")[0]
    for name in [n for n in e.tensors if n.startswith(f"{layer}.experts.2.")]:
        del e.tensors[name]


@rule("engine-unfilled", "o_proj", ("llama", "int4-asym"))
def loses_zero_points(e: Editor) -> None:
    del e.tensors[e.named("layers.0.self_attn.o_proj.weight_zero_point")]


@rule("engine-shape", "o_proj.weight", ("llama", "fp8-channel"), ("llama", "int8"))
def leaves_a_linear_unquantized(e: Editor) -> None:
    name = e.named("layers.0.self_attn.o_proj.weight")
    e.tensors[name] = torch.randn(e.tensors[name].shape).bfloat16()
    del e.tensors[f"{name}_scale"]


@rule("engine-shape", "o_proj.weight", ("llama", "fp8-channel"))
def ignores_codes(e: Editor) -> None:
    name = e.named("layers.0.self_attn.o_proj.weight")
    del e.tensors[f"{name}_scale"]
    e.quantization["ignore"].append(name.removesuffix(".weight"))


@rule("engine-refuses", "o_proj.weight", ("llama", "fp8-channel"), ("mixtral", "int4"))
def leaves_an_orphan(e: Editor) -> None:
    name = e.named("layers.0.self_attn.o_proj.weight_scale")
    e.quantization["ignore"].append(name.removesuffix(".weight_scale"))


@rule("engine-default", "self_attn.v_scale", ("llama", "fp8-channel"), ("llama4", "int4"), kv=True)
def loses_a_cache_scale(e: Editor) -> None:
    del e.tensors[e.named("layers.1.self_attn.v_scale")]


@rule("kv-scale-shape", "k_scale", ("llama", "fp8-channel"), ("mixtral", "int8"), kv=True)
def has_scales_of_other_heads(e: Editor) -> None:
    """vLLM's loader takes them in any shape; it is verify itself that counts heads."""
    name = e.named("layers.0.self_attn.k_scale")
    e.tensors[name] = torch.cat([e.tensors[name], e.tensors[name][:1]])


@rule("engine-refuses", "stranger", ("llama", "int8"))
def has_a_tensor_of_no_module(e: Editor) -> None:
    e.tensors["model.layers.0.mlp.stranger.weight"] = torch.ones(4, 4).bfloat16()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Asks vLLM, which is imported once."""
    with warm(PYTHON or "", tmp_path_factory.mktemp("vllm")) as python:
        yield lambda folder: verify(folder, headers_only=True, engine="vllm", vllm_python=python)


def test_without_the_warm_one_it_answers_the_same(good, tmp_path, asked):
    whole = repaired(good("llama", "fp8-channel")[0], tmp_path / "whole")
    loses_a_scale(whole)
    folder = whole.save()
    cold = verify(folder, headers_only=True, engine="vllm", vllm_python=Path(PYTHON or ""))
    assert cold.findings
    assert cold.findings == asked(folder).findings


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_broken_rule_is_named(good, tmp_path, asked, rule):
    folder, _ = good(rule.family, rule.weights, rule.kv)
    broken = repaired(folder, tmp_path / "broken")
    rule.breaks(broken)
    found = [f for f in asked(broken.save()).findings if f.code == rule.code]
    assert any(rule.where in (f.tensor or f.found) for f in found), found


WHOLE = [
    *[(family, weights, False) for family in ("llama4", "mixtral", "gemma4")
      for weights in ("fp8-channel", "int8", "int4")],
    *[("llama", weights, False) for weights in
      ("fp8-tensor", "fp8-block", "int4-asym", "int8-packed", "mxfp8", "mxfp4", "nvfp4")],
    ("llama", "fp8-channel", True), ("llama4", "fp8-channel", True), ("qwen3-moe", "kv", False),
]  # fmt: skip


@pytest.mark.parametrize(("family", "weights", "kv"), WHOLE)
def test_what_is_whole_is_loaded_whole(good, tmp_path, asked, family, weights, kv):
    folder, _ = good(family, weights, kv)
    report = asked(repaired(folder, tmp_path / "whole").save())
    assert report.counts == {}
    assert report.engine_run is not None
    assert report.engine_run.real
    assert report.engine_run.places > 10


SILENT = [loses_a_scale, loses_a_scale_of_a_merged_set, loses_a_half, leaves_a_linear_unquantized]


def test_vllm_computes_something_else_where_it_says_nothing(good, tmp_path):
    """Its own check for parameters that were not filled sees nothing of these."""
    whole = repaired(good("llama", "fp8-channel")[0], tmp_path / "whole").save()
    folders = [whole]
    for breaks in SILENT:
        broken = copy_of(whole, tmp_path / breaks.__name__)
        breaks(broken)
        folders.append(broken.save())
    wanted, *found = generated(folders)
    assert "error" not in wanted, wanted
    for breaks, one in zip(SILENT, found, strict=True):
        assert one.get("top") != wanted["top"], breaks.__name__


def generated(folders: list[Path]) -> list[dict]:
    jobs = [
        {"checkpoint": str(folder), "prompts": [list(range(3, 35))], "max_tokens": 4, "top": 10}
        for folder in folders
    ]
    done = subprocess.run(
        [PYTHON or "", GENERATE], input="\n".join(map(json.dumps, jobs)), text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]
