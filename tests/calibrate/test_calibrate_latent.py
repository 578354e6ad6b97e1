"""Latent attention: one scale for the row that engines cache, under k's name and under v's."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families.sources import save
from safetensors.torch import load_file, save_file
from tiny.rows import write_rows

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, plan_of, quantize
from ckptq.errors import PlanError
from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

TOKENS = [[(7 * i + 3 * j) % 190 + 3 for j in range(16)] for i in range(2)]
CACHING = ("deepseek_v2_lite", "deepseek_v3", "glm4_moe_lite", "axk1")
"""Families whose cache in transformers holds what an engine's does: latent as k, positions as v."""
SPARSE = ("deepseek_v32", "glm_moe_dsa")
"""These cache the keys of all heads."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(family, scheme) -> the output, made once, of text that is made up here."""
    root = tmp_path_factory.mktemp("latent")
    write_rows(root / "rows.jsonl", TOKENS)

    def make(family: str, scheme: str) -> tuple[Path, Path]:
        source, out = save(family, root), root / f"{family}-{scheme}"
        if not out.exists():
            text = CalibrationRequest(data=str(root / "rows.jsonl"), samples=2, seq_len=16)
            quantize(
                QuantizeRequest(model=source, recipe=load_scheme(scheme), out=out, calibration=text)
            )
        return source, out

    return make


def run(source: Path, *, cached: bool = True) -> tuple[torch.nn.Module, list]:
    """transformers' own model, and the caches of each row of the text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    caches = []
    with torch.no_grad():
        for row in TOKENS:
            caches.append(model(torch.tensor([row]), use_cache=cached).past_key_values)
    return model, caches


def over_448(parts: list[torch.Tensor]) -> torch.Tensor:
    """The plain formula, in float64."""
    largest = max(part.double().abs().max().item() for part in parts)
    return torch.tensor([largest / 448], dtype=torch.float64).bfloat16()


def check(out: Path, module: str, parts: list[torch.Tensor]) -> None:
    tensors = load_file(out / "model.safetensors")
    wanted = over_448(parts)
    for which in "kv":
        assert torch.equal(tensors[f"{module}.{which}_scale"], wanted)
    assert f"{module}.q_scale" not in tensors


@pytest.mark.parametrize("family", CACHING)
def test_scale_is_that_of_what_is_cached(quantized, family):
    source, out = quantized(family, "kv-fp8-per-tensor")
    _, caches = run(source)
    for layer in range(4):
        parts = [p for c in caches for p in (c.layers[layer].keys, c.layers[layer].values)]
        assert parts[0].shape[-1] == 128  # the latent
        assert parts[1].shape[-1] == 32  # what has positions
        check(out, f"model.layers.{layer}.self_attn", parts)


@pytest.mark.parametrize("family", SPARSE)
def test_scale_where_transformers_caches_keys(quantized, family):
    source, out = quantized(family, "fp8-per-tensor")
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(4)}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for layer, block in enumerate(model.model.layers):
        norm = block.self_attn.kv_a_layernorm
        norm.register_forward_hook(lambda _, __, latent, at=layer: seen[at].append(latent))
    with torch.no_grad():
        for row in TOKENS:
            cache = model(torch.tensor([row]), use_cache=True).past_key_values
            for layer in range(4):
                seen[layer].append(cache.layers[layer].keys[..., -32:])
    for layer in range(4):
        check(out, f"model.layers.{layer}.self_attn", seen[layer])


def test_what_layers_pass_on_is_given_to_the_next(tmp_path):
    """GLM-5: a layer without an indexer of its own attends to what the one before it chose."""
    config = transformers.AutoConfig.from_pretrained(save("glm_moe_dsa", tmp_path))
    config.indexer_types, config.index_topk = ["full", "shared", "full", "shared"], 4
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    source = tmp_path / "shared"
    model.save_pretrained(source)
    write_rows(tmp_path / "rows.jsonl", TOKENS)
    text = CalibrationRequest(data=str(tmp_path / "rows.jsonl"), samples=2, seq_len=16)
    recipe, out = load_scheme("kv-fp8-per-tensor"), tmp_path / "out"
    quantize(QuantizeRequest(model=source, recipe=recipe, out=out, calibration=text))
    latents: list[torch.Tensor] = []
    model.model.layers[3].self_attn.kv_b_proj.register_forward_pre_hook(
        lambda _, given: latents.append(given[0])
    )
    with torch.no_grad():
        for row in TOKENS:
            cache = model(torch.tensor([row]), use_cache=True).past_key_values
            latents.append(cache.layers[3].keys[..., -32:])
    check(out, "model.layers.3.self_attn", latents)


def test_two_attentions_in_a_layer_and_a_factor_before_the_cache(quantized):
    """LongCat, whose latent is multiplied behind the norm; vLLM folds the factor into the norm."""
    source, out = quantized("longcat_flash", "kv-fp8-per-tensor")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    attention = model.model.layers[2].self_attn[1]
    assert attention.mla_scale_kv_lora > 1
    seen: list[torch.Tensor] = []
    attention.kv_b_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for row in TOKENS:
            cache = model(torch.tensor([row]), use_cache=True).past_key_values
            seen.append(cache.layers[5].values)
    check(out, "model.layers.2.self_attn.1", seen)


def test_linear_attention_beside_it_has_no_scales(quantized):
    _, out = quantized("kimi_linear", "fp8-per-tensor")
    scaled = {n for n in load_file(out / "model.safetensors") if n.endswith(".k_scale")}
    assert scaled == {f"model.layers.{layer}.self_attn.k_scale" for layer in (1, 3)}


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
def test_nothing_is_scaled_per_head(tmp_path, family):
    source = save(family, tmp_path)
    with pytest.raises(PlanError, match=r"one latent for all heads.* use fp8-per-tensor"):
        plan_of(QuantizeRequest(model=source, recipe=load_scheme("fp8-per-head")))


def test_a_latent_of_which_vllm_caches_heads_is_refused(tmp_path):
    source = save("minicpm3", tmp_path)
    with pytest.raises(PlanError, match="vLLM caches k and v heads of this latent attention"):
        plan_of(QuantizeRequest(model=source, recipe=load_scheme("fp8-per-tensor")))


def test_the_plan_says_what_engines_make_of_them(quantized):
    source, _ = quantized("deepseek_v3", "fp8-per-tensor")
    plan = plan_of(QuantizeRequest(model=source, recipe=load_scheme("fp8-per-tensor")))
    assert any("caches with 1.0" in said for said in vllm_doubts(plan))
    assert not list(transformers_doubts(plan))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm_moe_dsa", "kimi_linear"])
def test_transformers_loads_them(quantized, family):
    source, out = quantized(family, "fp8-per-tensor")
    report = verify(out, source, engine="transformers")
    assert (report.findings, report.notes) == ((), ())


def spoiled(out: Path, folder: Path, change) -> Path:
    shutil.copytree(out, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scale_of(layer: int, which: str) -> str:
    return f"model.layers.{layer}.self_attn.{which}_scale"


def test_different_scales_of_one_row_are_found(quantized, tmp_path):
    source, out = quantized("deepseek_v3", "fp8-per-tensor")

    def double(tensors):
        tensors[scale_of(2, "v")] *= 2

    report = verify(spoiled(out, tmp_path / "out", double), source)
    assert [(f.code, f.tensor) for f in report.findings] == [
        ("latent-scales-differ", scale_of(2, "v"))
    ]


def test_a_missing_scale_is_found(quantized, tmp_path):
    source, out = quantized("deepseek_v3", "fp8-per-tensor")

    def drop(tensors):
        del tensors[scale_of(1, "k")]

    report = verify(spoiled(out, tmp_path / "out", drop), source)
    assert [(f.code, f.tensor) for f in report.findings] == [("kv-scale-missing", scale_of(1, "k"))]


def test_a_wrong_scale_is_found_by_running_the_model(quantized, tmp_path):
    source, out = quantized("deepseek_v3", "fp8-per-tensor")
    text = tmp_path / "rows.jsonl"
    write_rows(text, TOKENS)
    right = verify(out, source, attention=True, text=str(text))
    assert right.findings == ()
    assert {h.which for h in right.heads} == {"k", "v"}
    assert all(h.saturated < 1e-3 and h.error < 0.04 for h in right.heads)

    def shrink(tensors):
        for which in "kv":
            tensors[scale_of(3, which)] /= 64

    report = verify(spoiled(out, tmp_path / "out", shrink), source, attention=True, text=str(text))
    assert {(f.code, f.tensor) for f in report.findings} == {
        ("head-saturates", scale_of(3, "k")),
        ("head-saturates", scale_of(3, "v")),
    }
