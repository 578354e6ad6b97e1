"""FP8 caches of latent attention: rows are rounded as in transformers' model with hooks."""

from pathlib import Path

import pytest
import torch
from evaluate_models import kl_by_torch, plain_logits, plain_model
from families.sources import save
from test_evaluate_compare import ROWS, TEXT
from test_evaluate_kv_cache import cached, fp8

from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.evaluate.run import evaluate
from ckptq.recipes.load import load_scheme

POSITIONS = 32
ATTENTION = "model.layers.{}.self_attn"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Checkpoint:
    return open_checkpoint(save("deepseek_v3", tmp_path_factory.mktemp("latent")))


def read_from_fp8(path: Path, scales: list[float]):
    """transformers' model with the latent and the positions rounded, a scale for each layer."""
    held = [torch.tensor([scale]) for scale in scales]

    def change(index, q, k, v):
        turned = fp8(k[..., -POSITIONS:], held[index])
        return q, torch.cat([k[..., :-POSITIONS], turned], -1), v

    model = cached(plain_model(path), change)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.kv_b_proj.register_forward_pre_hook(
            lambda _, given, scale=held[index]: (fp8(given[0], scale),)
        )
    return model


def kl_of(source: Checkpoint, scales: list[float]) -> float:
    reference, output = plain_model(source.path), read_from_fp8(source.path, scales)
    rows = (
        kl_by_torch(plain_logits(reference, r)[:-1], plain_logits(output, r)[:-1]) for r in ROWS
    )
    return torch.cat(list(rows)).mean().item()


def test_rows_are_rounded_with_1(source):
    row = evaluate(source, TEXT, caches=["fp8-scale-1"]).rows[0]
    assert row.measures.kl == pytest.approx(kl_of(source, [1.0] * 4), rel=1e-12)
    assert row.measures.kl > 1e-4


def test_rows_are_rounded_with_the_scales_of_this_text(source):
    largest = [0.0] * 4
    model = plain_model(source.path)
    with torch.no_grad():
        for row in ROWS:
            cache = model(torch.tensor([row]), use_cache=True).past_key_values
            for index, layer in enumerate(cache.layers):
                parts = (layer.keys, layer.values)
                largest[index] = max(largest[index], *(float(part.abs().max()) for part in parts))
    scales = [float(torch.tensor(amax / 448).bfloat16()) for amax in largest]
    found = evaluate(source, TEXT, caches=["fp8-per-tensor"]).rows[0]
    assert found.scales == "this text"
    assert found.measures.kl == pytest.approx(kl_of(source, scales), rel=1e-12)
    by_scheme = evaluate(source, TEXT, schemes=[load_scheme("kv-fp8-per-tensor")]).rows[0]
    assert by_scheme.outcome == found.outcome


@pytest.mark.parametrize("cache", ["fp8-per-head", "int4-per-token-head"])
def test_a_cache_that_latent_attention_does_not_have_is_refused(source, cache):
    (failed,) = evaluate(source, TEXT, caches=[cache, "fp8-scale-1"]).failed
    assert failed.kv_cache == cache
    assert "one row for all heads" in failed.error
