import json
from dataclasses import replace

import pytest
import torch
from evaluate_models import kl_by_torch, plain_logits, plain_model, rows_of
from safetensors.torch import save_file
from test_evaluate_compare import ROWS, TEXT, with_weights

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.evaluate.linears.inputs import InputScheme, declared_inputs, input_scheme, remembering
from ckptq.evaluate.linears.products import Treatment, products_treated
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.models.encoded import read_encoded
from ckptq.recipes.args import Args
from ckptq.recipes.load import load_scheme


def x_TC(dtype=torch.bfloat16):
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(4)) * 10
    x[2], x[3, 0] = 0, 3000
    return x.to(dtype)


def test_fp8_per_token_is_the_nearest_multiple_of_each_token_s_scale():
    x = x_TC()
    found = InputScheme("float").round(x).float()
    scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()]
    nearest = (x.float() / scale)[..., None].sub(grid).abs().amin(-1) * scale
    error = (found - x.float()).abs()
    assert (error - nearest).abs().le(x.float().abs() * 2**-7).all()
    assert torch.equal(found[2], torch.zeros(256))


def test_int8_per_token_divides_by_127():
    x = x_TC(torch.float32)
    scale = x.abs().amax(1, keepdim=True) / 127
    wanted = torch.where(scale == 0, 0.0, (x / scale).round() * scale)
    torch.testing.assert_close(InputScheme("int").round(x), wanted, rtol=0, atol=1e-5)
    assert torch.equal(InputScheme("int").round(x).abs().amax(1), x.abs().amax(1))


def test_a_group_of_columns_has_a_scale_of_its_own():
    x = x_TC()
    found = InputScheme("float", group=128).round(x)
    for part in (slice(0, 128), slice(128, 256)):
        assert torch.equal(found[:, part], InputScheme("float").round(x[:, part].contiguous()))
    # the outlier of row 3 is in the first group, and the second no longer pays for it
    error = (found - x).float().abs()[3]
    assert error[128:].max() < (InputScheme("float").round(x) - x).float().abs()[3, 128:].max()


def test_the_last_group_may_be_narrower():
    """As vLLM's torch path for FP8 has it; others write blocks that end in half a one."""
    x = x_TC()[:, :192].contiguous()
    found = InputScheme("float", group=128).round(x)
    assert torch.equal(found[:, :128], InputScheme("float").round(x[:, :128].contiguous()))
    assert torch.equal(found[:, 128:], InputScheme("float").round(x[:, 128:].contiguous()))
    assert found.shape == x.shape


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_source_in_fp8_per_tensor_has_its_inputs_rounded_too(tmp_path, scheme):
    module = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{module}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_inv": torch.tensor(0.5),
    }
    if scheme == "static":
        tensors[f"{module}.activation_scale"] = torch.tensor(0.25)
    save_file(tensors, tmp_path / "model.safetensors")
    method = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": None}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": method}))
    ckpt = open_checkpoint(tmp_path)
    found = declared_inputs(ckpt, read_encoded(ckpt))
    assert found == {module: InputScheme("float", scale=0.25 if scheme == "static" else None)}


def test_a_static_scale_saturates():
    found = InputScheme("float", scale=0.5).round(x_TC())
    assert found.abs().max() == 224
    assert torch.equal(found[0], ((x_TC()[0] / 0.5).to(torch.float8_e4m3fn).float() / 2).bfloat16())


def test_one_input_of_several_weights_is_rounded_once():
    rounded, x, rule = remembering(InputScheme.round), x_TC(), InputScheme("float")
    first = rounded(rule, x)
    assert torch.equal(first, rule.round(x))
    assert rounded(rule, x) is first
    assert not torch.equal(rounded(InputScheme("int"), x), first)
    assert rounded(rule, x.clone()) is not first
    first = rounded(rule, x)
    x.mul_(3)  # the same tensor with other numbers
    assert torch.equal(rounded(rule, x), rule.round(x))
    assert not torch.equal(rounded(rule, x), first)


def test_only_products_with_the_weight_or_a_part_of_it_are_changed():
    ruled, other = torch.randn(3, 8, 8), torch.randn(8, 8)
    x, ones = torch.randn(2, 8), torch.ones(2, 8)
    linear = torch.nn.functional.linear
    with products_treated({ruled: Treatment(torch.ones_like)}):
        assert torch.equal(linear(x, ruled[1]), linear(ones, ruled[1]))
        assert torch.equal(x @ ruled[2], ones @ ruled[2])
        assert torch.equal(linear(x, other), x @ other.t())
        stacked = torch.bmm(x.expand(3, 2, 8), ruled)
    assert torch.equal(stacked, torch.bmm(ones.expand(3, 2, 8), ruled))
    assert not torch.equal(linear(x, ruled[1]), linear(ones, ruled[1]))


def rounded_by_hooks(model, ckpt, rounding):
    """Every Linear that is quantized, by transformers' own modules."""
    quantized = read_encoded(ckpt)
    for name, module in model.named_modules():
        if name in quantized:
            module.register_forward_pre_hook(lambda m, args: (rounding(args[0]), *args[1:]))


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w8a8", "fp8-block"])
def test_a_w8a8_model_is_the_plain_one_with_every_linear_s_input_rounded(saved, scheme):
    source, ckpt = saved("llama"), saved("llama", scheme)
    found = evaluate(ckpt, TEXT, source=source).rows[0].measures
    rule = {"fp8-dynamic": ("float", None), "w8a8": ("int", None), "fp8-block": ("float", 128)}
    reference, output = plain_model(source.path), with_weights(source, ckpt)
    weights_only = torch.cat([_kl(reference, output, row) for row in ROWS]).mean().item()
    rounded_by_hooks(output, ckpt, InputScheme(*rule[scheme]).round)
    both = torch.cat([_kl(reference, output, row) for row in ROWS]).mean().item()
    assert found.kl == pytest.approx(both, rel=1e-12)
    assert both != pytest.approx(weights_only, rel=1e-3)


def _kl(reference, output, row):
    return kl_by_torch(plain_logits(reference, row)[:-1], plain_logits(output, row)[:-1])


def test_experts_in_one_tensor_are_rounded_too(saved):
    """Llama-4 multiplies its experts with bmm: what goes into both products is rounded."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    source, ckpt = saved("llama4"), saved("llama4", "fp8-dynamic")
    found = evaluate(ckpt, TEXT, source=source).rows[0].measures
    reference, output = plain_model(source.path), with_weights(source, ckpt)
    rounding = InputScheme("float").round

    def forward(self, hidden_states):
        x_ETH = rounding(hidden_states.view(self.num_experts, -1, self.hidden_size))
        gate, up = torch.bmm(x_ETH, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(rounding(up * self.act_fn(gate)), self.down_proj).view(-1, x_ETH.shape[-1])

    for name, module in output.named_modules():
        if isinstance(module, Llama4TextExperts):
            module.forward = forward.__get__(module)
        elif (
            isinstance(module, torch.nn.Linear)
            and "language_model.model.layers" in name
            and not name.endswith("router")
        ):
            module.register_forward_pre_hook(lambda m, args: (rounding(args[0]), *args[1:]))
    kl = torch.cat([_kl(reference, output, row) for row in ROWS]).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-12)


def test_static_scales_come_from_the_checkpoint(saved):
    ckpt = saved("llama", "fp8-static")
    found = declared_inputs(ckpt, read_encoded(ckpt))
    assert len(found) == 7 * 3
    assert all(rule.scale is not None and rule.scale > 0 for rule in found.values())
    found = declared_inputs(saved("llama", "w4a16"), read_encoded(saved("llama", "w4a16")))
    assert found == {}


def test_static_scales_that_no_checkpoint_gives_are_those_of_calibration_on_this_text(saved):
    """Calibrating on the text and evaluating on it comes to the same, up to the scale's bf16."""
    source, ckpt = saved("llama"), saved("llama", "fp8-static")
    rows = rows_of((20, 20), seed=1)
    text = Text(tuple(Line(tuple(row)) for row in rows), "test")
    tried = evaluate(source, text, schemes=[load_scheme("fp8-static")]).rows[0].measures
    written = evaluate(ckpt, text, source=source).rows[0].measures
    assert tried.kl == pytest.approx(written.kl, rel=0.1)


def test_what_cannot_be_simulated_is_refused(saved):
    with pytest.raises(PlanError, match="cannot be simulated"):
        input_scheme(Args(num_bits=6, dynamic=True, strategy="token"), "x")
    ckpt = saved("llama", "fp8-static")
    lost = {n: t for n, t in ckpt.tensors.items() if not n.endswith("1.mlp.up_proj.input_scale")}
    encoded = read_encoded(ckpt)
    with pytest.raises(SourceError, match=r"1\.mlp\.up_proj: static activations"):
        declared_inputs(replace(ckpt, tensors=lost), encoded)
