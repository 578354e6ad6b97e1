"""Plans of published shapes by headers alone: files of the full size that hold nothing."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import PlanError
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from giants import DEEPSEEK_V3, KIMI_K2, MODELS, latent, make

LAYERS = 4
"""Of 61; all of them take a minute (benchmarks/bench_plans.py)."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("giants")
    make(root / "gpt-oss-120b", MODELS["gpt-oss-120b"])
    make(root / "deepseek-v3", latent(replace(DEEPSEEK_V3, layers=LAYERS)))
    make(root / "kimi-k2", latent(replace(KIMI_K2, layers=LAYERS)))
    return root


def planned(folder: Path, scheme: str):
    return make_plan(open_checkpoint(folder), load_scheme(scheme))


@pytest.mark.parametrize(
    ("name", "dense", "experts", "mtp"), [("deepseek-v3", 3, 256, 1), ("kimi-k2", 1, 384, 0)]
)
@pytest.mark.parametrize("scheme", ["w4a16", "repack"])
def test_every_linear_of_the_decoder_is_quantized(sources, name, scheme, dense, experts, mtp):
    plan = planned(sources / name, scheme)
    attention, mlps = 5 * LAYERS, 3 * (dense + (LAYERS - dense) * (experts + 1))
    assert sum(map(len, plan.groups.values())) == attention + mlps
    further = {n for n in plan.ignore if n.startswith(f"model.layers.{LAYERS}.")}
    assert bool(further) == bool(mtp)


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2"])
def test_the_unquantized_model_has_two_bytes_for_each_code(sources, name):
    ckpt = open_checkpoint(sources / name)
    kept = {n: t for n, t in ckpt.tensors.items() if not n.endswith("_scale_inv")}
    sizes = (2 * t.nbytes if t.spec.dtype == "F8_E4M3" else t.nbytes for t in kept.values())
    assert planned(sources / name, "dequantize").write_bytes == sum(sizes)


def test_experts_in_one_tensor_are_dequantized_or_left(sources):
    folder = sources / "gpt-oss-120b"
    plan = planned(folder, "dequantize")
    written = {name: spec for unit in plan.units for name, spec in unit.writes.items()}
    whole = written["model.layers.35.mlp.experts.gate_up_proj"]
    assert (whole.dtype, whole.shape) == ("BF16", (128, 2880, 5760))
    assert plan.write_bytes > 230e9
    with pytest.raises(PlanError, match="vLLM serves gpt-oss's experts in MXFP4 as they are"):
        planned(folder, "repack")
