"""GPTQ in our layer-by-layer forward is llm-compressor's oneshot, to the last bit.

In float32, where nothing rounds twice: its compressor divides bfloat16 weights in bfloat16, which
moves some of the 8-bit codes that GPTQ has chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gptq_cases import MOE, ROWS, by_oneshot, converted, each_once, save
from tiny.rows import token_rows
from tiny.tensors import differences, tensors_in

from ckptq.gptq import choose
from ckptq.recipes.load import load_scheme, load_text

SCHEMES = [
    *("w4a16-gptq", "w4a16-g32-gptq", "w8a8-gptq", "nvfp4a16-gptq"),
    *("w4a16-asym-gptq", "w4a16-channel-gptq", "fp8-dynamic-gptq", "w4a16-g32-search-gptq"),
    *("w4a16-g32-imatrix-gptq", "nvfp4a16-imatrix-gptq", "w8a8-imatrix-gptq"),
]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), dtype=torch.float32, num_hidden_layers=2)


@pytest.fixture(scope="session")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return each_once(llama, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_oneshots(
    llama: Path, made: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    ours = tensors_in(made(scheme))
    theirs = by_oneshot(llama, tmp_path / "oneshot", load_scheme(scheme).text)
    assert differences(ours, theirs) == []
    nearest = tensors_in(made(scheme.removesuffix("-gptq")))
    codes = [name for name in ours if name.endswith(("_proj.weight", "_proj.weight_packed"))]
    assert len(codes) == 14
    assert set(codes) <= set(differences(ours, nearest)), "nothing was chosen"


@pytest.mark.parametrize("scheme", ["w4a16-g32-imatrix", "nvfp4a16-imatrix"])
def test_ranges_that_inputs_weigh_are_oneshots(
    llama: Path, made: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    """Without GPTQ no layer sees what quantized ones before it make."""
    theirs = by_oneshot(llama, tmp_path / "oneshot", load_scheme(scheme).text)
    assert differences(tensors_in(made(scheme)), theirs) == []


def test_other_inputs_weigh_otherwise(
    llama: Path, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """The twin."""
    scheme, rows = "w4a16-g32-imatrix", token_rows([48] * 12, seed=8)
    other = tensors_in(converted(llama, tmp_path / "other", scheme, rows))
    changed = differences(tensors_in(made(scheme)), other)
    assert len([name for name in changed if name.endswith("weight_scale")]) == 14


def test_16_bit_weights_with_4_bit_codes_are_oneshots_too(tmp_path: Path) -> None:
    llama = save(tmp_path / "llama", dtype=torch.bfloat16)
    for scheme in ("w4a16-g32-gptq", "nvfp4a16-gptq"):
        ours = tensors_in(converted(llama, tmp_path / scheme, scheme))
        text = load_scheme(scheme).text
        assert differences(ours, by_oneshot(llama, tmp_path / f"{scheme}-1", text)) == []


def test_experts_that_a_router_chose_are_oneshots(tmp_path: Path) -> None:
    moe = save(tmp_path / "moe", "Qwen3Moe", torch.float32, **MOE)
    heard: list[str] = []
    ours = tensors_in(converted(moe, tmp_path / "out", "w4a16-g32-gptq", note=heard.append))
    text = load_scheme("w4a16-g32-gptq").text.replace("- lm_head", "- lm_head\n      - re:.*gate$")
    assert differences(ours, by_oneshot(moe, tmp_path / "oneshot", text)) == []
    assert any("8 of 8 experts were reached, by " in line for line in heard)


OWN = """
quant_stage:
  quant_modifiers:
    GPTQModifier: {targets: [Linear], scheme: W4A16, ignore: [lm_head], %s}
"""


@pytest.mark.parametrize(
    "said",
    ["block_size: 64", "dampening_frac: 0.2", "actorder: null", "actorder: weight"],
)
def test_the_modifiers_own_options_are_obeyed(
    llama: Path, made: Callable[[str], Path], tmp_path: Path, said: str
) -> None:
    text = OWN % said
    ours = tensors_in(converted(llama, tmp_path / "out", load_text("own", text)))
    assert differences(ours, by_oneshot(llama, tmp_path / "oneshot", text)) == []
    if said not in ("actorder: weight", "block_size: 64"):  # the default, and the same sums
        assert differences(ours, tensors_in(made("w4a16-gptq"))) != []


IN_ONE_PASS = """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      config_groups:
        linears:
          targets: [Linear]
          weights: {num_bits: 8, type: float, strategy: channel}
          input_activations:
            {num_bits: 8, type: float, strategy: tensor, dynamic: false, observer: static_minmax}
      kv_cache_scheme:
        {num_bits: 8, type: float, strategy: tensor, dynamic: false, observer: static_minmax}
"""


def test_cache_inputs_and_gptq_in_one_pass_are_oneshots(llama: Path, tmp_path: Path) -> None:
    """Scales are of what the layers see that follow quantized ones."""
    ours = tensors_in(converted(llama, tmp_path / "out", load_text("one", IN_ONE_PASS)))
    theirs = by_oneshot(llama, tmp_path / "oneshot", IN_ONE_PASS)
    ours = {name: tensor for name, tensor in ours.items() if not name.endswith("q_scale")}
    assert differences(ours, theirs) == []
    scales = [name for name in ours if name.endswith(("k_scale", "v_scale", "input_scale"))]
    assert len(scales) == 2 * (2 + 7)
    plain = IN_ONE_PASS.replace("GPTQModifier", "QuantizationModifier")
    apart = tensors_in(converted(llama, tmp_path / "apart", load_text("two", plain)))
    changed = [name for name in differences(ours, apart) if name in scales]
    assert changed
    assert not any(".layers.0." in name for name in changed)


@pytest.mark.parametrize("broken", ["the order of the rows", "a Hessian", "the second run"])
def test_a_difference_in_what_is_computed_is_noticed(
    llama: Path,
    made: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    scheme, rows = "w4a16-g32-gptq", ROWS
    whole = tensors_in(made(scheme))
    if broken == "the order of the rows":
        rows = token_rows([48] * 12, seed=8)
    elif broken == "a Hessian":
        run = choose.choose

        def diagonal(choices: list[choose.Choice], *rest: object) -> object:
            changed = [replace(c, hessian_CC=c.hessian_CC.diag().diag()) for c in choices]
            return run(changed, *rest)

        monkeypatch.setattr("ckptq.gptq.units.choose", diagonal)
    else:
        monkeypatch.setattr("ckptq.gptq.rewritten.Rewritten.rewrite", lambda *_: None)
    other = tensors_in(converted(llama, tmp_path / "other", scheme, rows))
    changed = {name.split(".layers.")[1][0] for name in differences(whole, other)}
    assert changed == ({"1"} if broken == "the second run" else {"0", "1"})
