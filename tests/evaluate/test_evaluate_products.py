"""Products of codes by kernels beside the same of decoded weights and rounded inputs.

Both mean the same, and the second rounds weights and inputs to bf16 once more than the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from evaluate_models import rows_of

from ckptq.evaluate.linears import coded_product
from ckptq.evaluate.linears.coded_parameter import parts_of
from ckptq.evaluate.linears.coded_product import input_codes, product_of
from ckptq.evaluate.linears.inputs import InputScheme, input_scheme
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.quantize.coded import Coded
from ckptq.quantize.dispatch import dequantize, quantize
from ckptq.quantize.formats import needs_statistic, statistic
from ckptq.recipes.load import load_scheme

NEAR = 2**-8
"""Of a product, by norm: half of what bf16 rounds off, for inputs and for weights."""

LAYERS = 0.03
"""Of the relative error of hidden states after each layer."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = ["fp8-dynamic", "fp8-static", "w8a8", "fp8-block", "w4a16"]
SCHEMES += ["w4a16-asym", "w4a16-channel", "w4a16-g32"]
TEXT = Text(tuple(Line(tuple(row)) for row in rows_of((9, 7))), "test")


@pytest.fixture
def kernels(monkeypatch):
    """Codes are multiplied, as on a GPU, by kernels, interpreted where there is none; what went
    through is counted."""
    monkeypatch.setattr("ckptq.evaluate.run.codes_multiply", lambda _device: True)
    seen: Counter[str] = Counter()
    for name in ("_w8a8", "_fp8_block", "_w4a16"):
        monkeypatch.setattr(coded_product, name, counted(seen, name, vars(coded_product)[name]))
    return seen


def counted(seen, name, function):
    def call(*args):
        seen[name] += 1
        return function(*args)

    return call


def randoms(shape, seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def coded(scheme: str, shape=(200, 256), seed=1) -> tuple[Coded, InputScheme | None]:
    """A weight [N, C] in a scheme, and the scheme's rounding of inputs."""
    group = next(each for each in load_scheme(scheme).groups if each.weights is not None)
    weights = group.weight_scheme()
    w_NC = randoms(shape, seed)
    shared = statistic(w_NC, weights) if needs_statistic(weights) else None
    rule = None if group.inputs is None else input_scheme(group.inputs, scheme)
    if rule is not None and rule.static:
        rule = replace(rule, scale=0.01, static=False)
    return Coded(quantize(w_NC, weights, shared), weights, shape), rule


def simulated(x, weight: Coded, rule: InputScheme | None):
    w_NC = dequantize(weight.tensors, weight.scheme, weight.shape, x.dtype)
    return torch.nn.functional.linear(x if rule is None else rule.round(x), w_NC)


def distance(found, wanted) -> float:
    found, wanted = found.double().flatten(), wanted.double().flatten()
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_of_codes_is_that_of_decoded_weights_and_rounded_inputs(kernels, scheme):
    weight, rule = coded(scheme)
    x = randoms((2, 5, 256), 4) * 10
    product = product_of(weight.scheme, rule, x.dtype)
    wanted = simulated(x, weight, rule).flatten(0, 1)
    assert distance(product(x, rule, weight, input_codes), wanted) < NEAR
    scale = weight.tensors["weight_scale"].clone()
    scale[0] *= 2
    broken = replace(weight, tensors={**weight.tensors, "weight_scale": scale})
    assert distance(product(x, rule, broken, input_codes), wanted) > 4 * NEAR


@pytest.mark.parametrize(
    "rule",
    [
        InputScheme("float"),
        InputScheme("int"),
        InputScheme("float", group=128),
        InputScheme("float", scale=0.02),
        InputScheme("int", scale=0.1),
    ],
    ids=str,
)
def test_codes_of_an_input_are_those_that_rounding_multiplies_back(kernels, rule):
    x = randoms((3, 4, 200), 2) * 5
    x[1, 2] = 0
    code_TC, scale = input_codes(rule, x)
    spread = scale.repeat_interleave(rule.group or 200, 1)[:, :200]
    back = (code_TC.float() * spread).to(x.dtype).view(x.shape)
    assert torch.equal(back, rule.round(x))
    assert not torch.equal((code_TC.float() * spread * 2).to(x.dtype).view(x.shape), back)


def test_formats_without_a_kernel_are_left_to_the_simulation():
    fp8, rule = coded("fp8-dynamic")
    assert product_of(fp8.scheme, rule, torch.bfloat16) is not None
    assert product_of(fp8.scheme, None, torch.bfloat16) is None
    assert product_of(fp8.scheme, InputScheme("int"), torch.bfloat16) is None
    assert product_of(fp8.scheme, InputScheme("float", group=128), torch.bfloat16) is None
    for scheme in ("mxfp8", "nvfp4", "mxfp4a16", "w8a16"):
        weight, rule = coded(scheme)
        assert product_of(weight.scheme, rule, torch.bfloat16) is None
    int4, _ = coded("w4a16")
    assert product_of(int4.scheme, None, torch.float32) is None


def expert(number: int, *names: str, seed=0) -> dict[str, Coded]:
    return {
        f"m.experts.{number}.{name}": coded("fp8-dynamic", (24, 32), seed=seed + i)[0]
        for i, name in enumerate(names)
    }


def decoded(weight: Coded):
    return dequantize(weight.tensors, weight.scheme, weight.shape, torch.bfloat16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", [("gate_proj", "up_proj"), ("up_proj", "gate_proj")])
def test_experts_are_found_in_their_parameter_however_they_lie(order, transposed):
    experts = [expert(n, "gate_proj", "up_proj", seed=10 * n) for n in (2, 10)]
    names = [[f"m.experts.{n}.{name}" for name in order] for n in (2, 10)]
    matrices = [
        torch.cat([decoded(held[name]) for name in each])
        for held, each in zip(experts, names, strict=True)
    ]
    parameter = torch.stack([m.t() if transposed else m for m in matrices])
    every = experts[0] | experts[1]
    found = parts_of(parameter, every)
    assert found == {
        number * 48 * 32: [every[name] for name in each] for number, each in enumerate(names)
    }
    spoiled = parameter.clone()
    spoiled[1] = parameter[1].roll(1, -2)
    assert parts_of(spoiled, every) is None
    assert parts_of(parameter, experts[0]) is None
    assert parts_of(parameter.roll(1, 0), every) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheme", "products"),
    [
        ("llama", "fp8-dynamic", {"_w8a8"}),
        ("llama", "fp8-static", {"_w8a8"}),
        ("llama", "w8a8", {"_w8a8"}),
        ("llama", "fp8-block", {"_fp8_block"}),
        ("llama", "w4a16", {"_w4a16"}),
        ("llama", "nvfp4", set()),
        ("llama4", "fp8-dynamic", {"_w8a8"}),
        ("mixtral", "w4a16", {"_w4a16"}),
    ],
)
def test_rows_of_codes_are_those_of_the_simulation(
    saved, monkeypatch, request, family, scheme, products
):
    """Layer by layer; and the control is told from both."""
    source = saved(family)
    asked = {"schemes": [load_scheme(scheme)]}
    wanted = evaluate(source, TEXT, **asked)
    seen = request.getfixturevalue("kernels")
    found = evaluate(source, TEXT, device=DEVICE, **asked)
    assert seen.keys() == products
    here, there = found.rows[0].outcome.layers, wanted.rows[0].outcome.layers
    assert here == pytest.approx(there, rel=LAYERS)
    assert found.zero.measures.kl == 0.0
    assert found.control.outcome.layers != pytest.approx(there, rel=4 * LAYERS)


def test_codes_of_a_written_checkpoint_are_multiplied_too(saved, kernels):
    source, ckpt = saved("llama"), saved("llama", "fp8-dynamic")
    found = evaluate(ckpt, TEXT, source=source, device=DEVICE)
    rows = 2 * len(TEXT.lines)  # the checkpoint and its control, of which one layer is spoiled
    assert kernels == {"_w8a8": 7 * (3 * rows - len(TEXT.lines))}
    assert found.control.measures.kl > found.rows[0].measures.kl
