"""Calibration on a GPU: the plain forward's bits, the CPU's scales, by the attention kernel."""

import pytest
import torch
import transformers
from calibrate_models import FAMILIES, samples_of
from tiny.rows import token_rows

from ckptq.calibrate.run import calibrate
from ckptq.forward import kernel_attention
from ckptq.forward.layerwise import open_model
from ckptq.plan.attention import AttentionPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = token_rows([24, 24, 13, 7])


@pytest.fixture
def kernel_calls(monkeypatch) -> list[bool]:
    """True for each attention that the kernel took."""
    calls: list[bool] = []
    plain = kernel_attention.fused_attention

    def counted(*args):
        out = plain(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(kernel_attention, "fused_attention", counted)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_plain_forward_to_the_last_bit(saved, family):
    ckpt = saved(family)
    batches = list(samples_of(ROWS).batches(2))
    model_class = getattr(transformers, ckpt.config["architectures"][0])
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    plain = model_class.from_pretrained(ckpt.path, attn_implementation=implementation)
    plain = plain.eval().cuda()
    model = open_model(ckpt, device="cuda")
    stream = model.embed(batches)
    for index in range(len(model.layer_names)):
        model.run_layer(index, stream)
    for batch, logits in zip(batches, model.head(stream), strict=True):
        with torch.no_grad():
            want = plain(
                input_ids=batch.input_ids_BS.cuda(),
                attention_mask=batch.mask_BS.cuda(),
                use_cache=False,
            ).logits
        assert torch.equal(logits, want)


@pytest.mark.parametrize("strategy", ["attn_head", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_are_those_of_the_cpu(saved, kernel_calls, family, strategy):
    """Up to rounding, which grows with the layers of a random model."""
    ckpt = saved(family)
    want = calibrate(
        ckpt, samples_of(ROWS), attention=AttentionPlan(strategy=strategy), batch_size=2
    ).tensors
    got = calibrate(
        ckpt,
        samples_of(ROWS),
        attention=AttentionPlan(strategy=strategy),
        batch_size=2,
        device="cuda",
    ).tensors
    assert all(kernel_calls)
    assert bool(kernel_calls) is (family != "gpt-oss")
    assert got.keys() == want.keys()
    for name, scale in want.items():
        step = 2**-6 if ".layers.0." in name else 0.06
        torch.testing.assert_close(got[name], scale, rtol=step, atol=0)


@pytest.mark.parametrize("strategy", ["attn_head", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_give_the_same_bits(saved, family, strategy):
    """And other samples give others, so that equality is not that of constants."""
    ckpt = saved(family)

    def scales(rows):
        run = {"attention": AttentionPlan(strategy=strategy), "batch_size": 2, "device": "cuda"}
        return calibrate(ckpt, samples_of(rows), **run).tensors

    first, second, other = scales(ROWS), scales(ROWS), scales(token_rows([31, 5]))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
