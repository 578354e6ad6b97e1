from dataclasses import replace

import pytest
import torch
from evaluate_models import HEAD_DIM, HEADS, KV_HEADS, kl_by_torch, plain_logits, plain_model
from test_evaluate_compare import ROWS, TEXT, with_weights

from ckptq.errors import UsageError
from ckptq.evaluate.caches.kv_cache import (
    MODES,
    KVCache,
    Maxima,
    declared_cache,
    parse_cache,
)
from ckptq.evaluate.caches.simulated import Scales, cut_toward_zero, effective, simulated
from ckptq.evaluate.result import Thresholds
from ckptq.evaluate.run import evaluate
from ckptq.recipes.load import load_scheme


def qkv(outliers: bool = False):
    generator = torch.Generator().manual_seed(9)
    shapes = ((2, HEADS, 16, HEAD_DIM), *((2, KV_HEADS, 16, HEAD_DIM),) * 2)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    for x in made if outliers else ():
        x[..., 5] *= 40
    return [x.bfloat16() for x in made]


def through(name: str, outliers: bool = False, **changes) -> list[float]:
    """Relative error of q, k and v after a cache of this kind."""
    before, after = qkv(outliers), qkv(outliers)
    maxima = Maxima()
    maxima.see("attn", dict(zip("qkv", before, strict=True)), (16, 16))
    cache = KVCache(**{**_fields(name), **changes})
    simulated(cache, Scales(cache, maxima, lambda path: path))("attn", *after)
    return [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(after, before, strict=True)
    ]


def _fields(name):
    cache = parse_cache(name, None)
    return {"mode": cache.mode, "rotation": cache.rotation, "scales": cache.scales}


def test_fewer_bits_are_worse():
    """The order of vLLM's own table: 16 bits >= 8 bits >= INT4 >= INT2."""
    v = {mode: through(mode)[2] for mode in MODES if mode != "bf16"}
    eight = max(v[m] for m in MODES if m.startswith(("fp8", "int8")))
    assert v["int8-per-token-head"] < v["fp8-per-token-head"] < 0.05
    assert eight < v["int4-per-token-head"] < v["int2-per-token-head"] < 0.5


def test_static_caches_round_q_and_the_others_leave_it_alone():
    assert all(error > 0.01 for error in through("fp8-per-head"))
    assert through("int8-per-token-head")[0] == 0.0


@pytest.mark.parametrize("mode", ["int4-per-token-head", "int2-per-token-head"])
def test_rotation_spreads_an_outlier_channel(mode):
    gain = through(f"{mode}-unrotated", outliers=True)[1] / through(mode, outliers=True)[1]
    assert gain > 1.3
    assert through(f"{mode}-unrotated")[1] / through(mode)[1] < 1.3


def test_scales_are_used_as_vllm_uses_them():
    stored = {"q": torch.tensor([1.0, 4.0, 2.0, 3.0]).view(4, 1, 1), "k": torch.tensor([5.0, 6.0])}
    per_head = effective("fp8-per-head", stored, 4, 2)
    assert per_head["q"].tolist() == [4.0, 4.0, 3.0, 3.0]
    assert (per_head["k"].tolist(), per_head["v"].tolist()) == ([5.0, 6.0], [1.0, 1.0])
    per_tensor = effective("fp8-per-tensor", stored, 4, 2)
    assert (per_tensor["q"].tolist(), per_tensor["k"].tolist()) == ([4.0] * 4, [6.0] * 2)
    assert effective("fp8-scale-1", stored, 4, 2)["k"].tolist() == [1.0, 1.0]


def cached(model, change):
    """transformers' attention with k and v changed on their way in, by its own interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(
            module, *change(module.layer_idx, query, key, value), *args, **kwargs
        )

    AttentionInterface.register("cached", attend)
    AttentionMaskInterface.register("cached", sdpa_mask)
    model.set_attn_implementation("cached")
    return model


def fp8(x_BHSD, scale_H):
    scale_H11 = scale_H.float().flatten().view(-1, 1, 1)
    code = (x_BHSD.float() / scale_H11).clamp(-448, 448).to(torch.float8_e4m3fn)
    return (code.float() * scale_H11).to(x_BHSD.dtype)


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_a_checkpoint_s_scales_per_head_are_used_in_every_layer(saved, family):
    source, ckpt = saved(family), saved(family, "kv-fp8-per-head")
    row = evaluate(ckpt, TEXT, source=source).rows[0]
    assert (row.kv_cache, row.scales) == ("fp8-per-head", "checkpoint")
    scales = declared_cache(ckpt).scales
    prefix = next(iter(scales)).split("layers.")[0]

    def change(index, q, k, v):
        held = scales[f"{prefix}layers.{index}.self_attn"]
        q_scale = held["q"].flatten().view(KV_HEADS, -1).amax(1).repeat_interleave(2)
        return fp8(q, q_scale), fp8(k, held["k"]), fp8(v, held["v"])

    reference, output = plain_model(source.path), cached(with_weights(source, ckpt), change)
    kl = [kl_by_torch(plain_logits(reference, r)[:-1], plain_logits(output, r)[:-1]) for r in ROWS]
    assert row.measures.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-12)


def test_per_head_beats_per_tensor_beats_nothing(saved):
    """V's heads differ by 2^16, which no single FP8 scale holds."""
    names = ["fp8-per-head", "fp8-per-tensor", "fp8-scale-1", "bf16"]
    found = evaluate(saved("llama"), TEXT, caches=names)
    kl = {row.kv_cache: row.measures.kl for row in found.rows}
    assert kl["bf16"] == 0.0
    assert 0 < 5 * kl["fp8-per-head"] < kl["fp8-per-tensor"]
    assert 5 * kl["fp8-per-head"] < kl["fp8-scale-1"]
    assert found.rows[0].scales == "this text"


def test_scales_of_this_text_are_those_of_calibrating_on_it(saved):
    source = saved("llama")
    tried = evaluate(source, TEXT, schemes=[load_scheme("kv-fp8-per-head")]).rows[0]
    by_name = evaluate(source, TEXT, caches=["fp8-per-head"]).rows[0]
    assert tried.outcome == by_name.outcome


def test_a_checkpoint_that_lacks_its_scales_runs_with_1(saved):
    ckpt = saved("llama", "kv-fp8-per-head")
    lost = {n: t for n, t in ckpt.tensors.items() if not n.endswith("_scale")}
    assert declared_cache(ckpt).mode == "fp8-per-head"
    assert declared_cache(replace(ckpt, tensors=lost)).mode == "fp8-scale-1"
    assert declared_cache(saved("llama", "w4a16")).mode == "bf16"


def test_scales_of_the_other_strategy_are_not_made_up(saved):
    per_head, per_tensor = saved("llama", "kv-fp8-per-head"), saved("llama", "kv-fp8-per-tensor")
    assert parse_cache("fp8-per-tensor", per_head).origin == "its largest head"
    assert parse_cache("fp8-per-head", per_tensor).origin == "this text"
    assert parse_cache("fp8-per-tensor", per_tensor).origin == "checkpoint"
    for wrong in ("fp8", "int4_per_token_head", "fp8-per-head-unrotated"):
        with pytest.raises(UsageError, match="--kv-cache"):
            parse_cache(wrong, None)


def test_bits_of_a_value_count_its_share_of_scales_and_zero_points():
    found = {name: parse_cache(name, None).bits(64) for name in MODES}
    assert found == {
        "bf16": 16,
        "fp8-per-tensor": 8,
        "fp8-per-head": 8,
        "fp8-scale-1": 8,
        "int8-per-token-head": 8 + 32 / 64,
        "fp8-per-token-head": 8 + 32 / 64,
        "int4-per-token-head": 4 + (32 + 8) / 64,
        "int2-per-token-head": 2 + 32 / 64,
    }


def test_heads_that_are_not_packed_are_refused():
    for name in ("int4-per-token-head", "int2-per-token-head-unrotated"):
        with pytest.raises(UsageError, match=f"--kv-cache {name}: .* multiple of 8; .* is 12"):
            parse_cache(name, None).bits(12)
    assert parse_cache("int8-per-token-head", None).bits(12) == 8 + 32 / 12


def test_the_smallest_cache_of_those_within_the_limits_is_named(saved):
    words = ("bf16", "int8-per-token-head", "int4-per-token-head")
    found = evaluate(saved("llama"), TEXT, caches=words, thresholds=Thresholds(max_kl=10))
    assert found.recommended.kv_cache == "int4-per-token-head"
    closest = evaluate(saved("llama"), TEXT, caches=words, thresholds=Thresholds(max_kl=1e-12))
    assert closest.recommended.kv_cache == "bf16"


def test_what_is_cut_toward_zero_is_the_largest_code_below():
    """Against a search through all codes, for values of every size E4M3 has, and beyond."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    generator = torch.Generator().manual_seed(3)
    spread = 2.0 ** torch.randint(-12, 11, (4000,), generator=generator)
    x = torch.randn(4000, generator=generator).mul(spread).float()
    below = codes[torch.searchsorted(codes, x.abs().clamp(max=448), right=True) - 1]
    found = cut_toward_zero(x.view(1, 1, -1, 1), torch.ones(1)).flatten()
    assert torch.equal(found, below.copysign(x))
    scaled = cut_toward_zero(x.view(1, 1, -1, 1) * 0.25, torch.tensor([0.25])).flatten()
    assert torch.equal(scaled, found * 0.25)
