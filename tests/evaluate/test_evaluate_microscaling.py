"""NVFP4, MXFP4 and MXFP8 activations against arithmetic written down another way.

Shape letters: T tokens, C columns, G groups, g columns of a group.
"""

from dataclasses import replace

import pytest
import torch
from evaluate_models import plain_model
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate_compare import ROWS, TEXT, with_weights
from test_evaluate_inputs import _kl

from ckptq.errors import PlanError
from ckptq.evaluate.linears.inputs import InputScheme, declared_inputs, input_scheme
from ckptq.evaluate.linears.microscaling import mxfp4, mxfp8, nvfp4
from ckptq.evaluate.run import evaluate
from ckptq.models.encoded import read_encoded
from ckptq.recipes.load import load_scheme

CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def torch_rows(seed: int, rows: int = 6, columns: int = 64) -> torch.Tensor:
    """Tokens whose sizes differ by powers of two."""
    generator = torch.Generator().manual_seed(seed)
    x_TC = torch.randn(rows, columns, generator=generator)
    return x_TC * 2.0 ** torch.randint(-12, 12, (rows, 1), generator=generator)


def nearest_code(x: float) -> float:
    """By looking at all codes; of two as near, the one with the even index."""
    by_distance = [
        ((abs(x) - code.item()) ** 2, index % 2, index) for index, code in enumerate(CODES)
    ]
    code = CODES[min(by_distance)[2]].item()
    return -code if x < 0 else code


def vllms_nvfp4(x_TC: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """`ref_nvfp4_quant_dequant` of vLLM 0.32 in its words, codes by looking at all of them."""
    x = x_TC.reshape(len(x_TC), -1, 16)
    vec_max = torch.max(torch.abs(x), dim=-1, keepdim=True)[0].to(torch.float32)
    scale = global_scale * (vec_max * (1 / 6.0))
    scale = torch.clamp(scale, max=448, min=-448).to(torch.float8_e4m3fn).to(torch.float32)
    inverse_global = 1.0 / (global_scale + (global_scale == 0) * 1e8)
    product = scale * inverse_global
    scaled = x.to(torch.float32) * (1.0 / (product + (product == 0) * 1e8))
    clipped = torch.clamp(scaled, -6.0, 6.0)
    codes = torch.tensor([nearest_code(value) for value in clipped.flatten().tolist()])
    return (codes.view(x.shape) * (scale / global_scale)).reshape(x_TC.shape).to(x_TC.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("share", [1.0, 0.25, 8.0])
def test_nvfp4_is_vllms(dtype, share):
    """Under the right global scale, one for larger inputs, one for smaller that saturates."""
    x_TC = torch_rows(1).to(dtype)
    overall = 448.0 * 6.0 / x_TC.float().abs().amax().item() * share
    found, wanted = nvfp4(x_TC, overall), vllms_nvfp4(x_TC, torch.tensor(overall))
    assert torch.equal(found, wanted)
    assert found.dtype == dtype
    assert not torch.equal(nvfp4(x_TC, 1 / overall), wanted)


def test_ties_go_to_the_even_code():
    """Half way between two codes, under scales of one: 448 * 6 / 2688 and amax 6."""
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x_TC = torch.tensor([[*middles, *(-m for m in middles), 6.0, 0.0]])
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert nvfp4(x_TC, 1.0)[0, :14].tolist() == [*wanted, *(-w for w in wanted)]
    assert mxfp4(torch.cat([x_TC, x_TC * 0], -1))[0, :14].tolist() == [
        *wanted,
        *(-w for w in wanted),
    ]


def test_mx_scales_are_powers_of_two_that_fit():
    """Of each group by hand: E2M1 counts an amax from 1.75 * 2^n as 2^(n + 1), E4M3 rounds up."""
    for amax, scale4, scale8 in [
        (6.0, 1.0, 2.0**-6), (7.0, 2.0, 2.0**-6), (6.99, 1.0, 2.0**-6), (448.0, 128.0, 1.0),
        (449.0, 128.0, 2.0), (1.0, 0.25, 2.0**-8), (0.9, 0.25, 2.0**-8),
    ]:  # fmt: skip
        x_TC = torch.linspace(-amax, amax, 32)[None]
        code_g = x_TC[0] / scale4
        wanted = torch.tensor([nearest_code(value) for value in code_g.tolist()]) * scale4
        assert torch.equal(mxfp4(x_TC)[0], wanted), amax
        wanted = (x_TC[0] / scale8).to(torch.float8_e4m3fn).float() * scale8
        assert torch.equal(mxfp8(x_TC)[0], wanted), amax


FINITE = st.floats(width=16, allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, min_size=32, max_size=32))
def test_rounding_keeps_signs_zeros_and_size(values):
    """Zeros stay zeros, nothing grows past its group's largest by more than half a step."""
    x_TC = torch.tensor([values])
    for found in (mxfp4(x_TC), mxfp8(x_TC), nvfp4(x_TC, 448 * 6 / 65504.0)):
        assert found.isfinite().all()
        assert (found * x_TC >= 0).all()
        assert (found[x_TC == 0] == 0).all()
        assert found.abs().amax() <= 1.25 * x_TC.abs().amax()


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("w4a4", "int4")],
)
def test_a_model_is_the_plain_one_with_every_linear_s_input_rounded(saved, scheme, kind):
    source, ckpt = saved("llama"), saved("llama", scheme)
    rules = declared_inputs(ckpt, read_encoded(ckpt))
    assert len(rules) == 7 * 3
    assert {rule.type for rule in rules.values()} == {kind}
    reference, output = plain_model(source.path), with_weights(source, ckpt)
    weights_only = torch.cat([_kl(reference, output, row) for row in ROWS]).mean().item()
    for name, module in output.named_modules():
        if name in rules:
            rounding = rules[name].round
            module.register_forward_pre_hook(lambda m, args, r=rounding: (r(args[0]), *args[1:]))
    both = torch.cat([_kl(reference, output, row) for row in ROWS]).mean().item()
    found = evaluate(ckpt, TEXT, source=source).rows[0].measures
    assert found.kl == pytest.approx(both, rel=1e-12)
    assert both != pytest.approx(weights_only, rel=1e-3)


def test_a_scheme_tried_on_the_source_is_near_the_checkpoint_it_would_make(saved):
    """The global scales are found on the text at hand; those of calibration are rounded to bf16."""
    source, ckpt = saved("llama"), saved("llama", "nvfp4")
    tried = evaluate(source, TEXT, schemes=[load_scheme("nvfp4")]).rows[0].measures
    written = evaluate(ckpt, TEXT, source=source).rows[0].measures
    assert tried.kl == pytest.approx(written.kl, rel=0.2)


@pytest.mark.parametrize(
    "change", [{"group_size": 32}, {"strategy": "group"}, {"num_bits": 8}, {"symmetric": False}]
)
def test_what_is_no_nvfp4_is_refused(change):
    args = load_scheme("nvfp4").groups[0].input_activations
    assert input_scheme(args, "x") == InputScheme("nvfp4", static=True)
    with pytest.raises(PlanError, match="cannot be simulated"):
        input_scheme(replace(args, **change), "x")
