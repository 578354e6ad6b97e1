"""`--rope-proof` end to end, against the plain formulas.

Shape letters: R rows, C columns, H heads, D head_dim.
"""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from convert_cases import Layout, Tensors, convert, recipe_of, save, tensors_in, weights
from torch import Tensor

from ckptq.convert import blocks
from ckptq.errors import PlanError, UsageError
from ckptq.permute.order import Sharing

C, D = 96, 32
HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
HALF_RANGE = {"int8 channel": 127.5, "fp8 channel": 448.0, "int4 channel": 7.5}
TURNED = ("q_proj", "k_proj")


def layout(model_type: str = "llama4_text") -> Layout:
    """Attention of Llama-4: what the permutation moves, and v, which it does not."""
    names = {f"model.layers.{i}.self_attn.{p}": p for i in range(2) for p in HEADS}
    config = {
        "model_type": model_type, "num_hidden_layers": 2, "head_dim": D, "hidden_size": C,
        "num_attention_heads": HEADS["q_proj"], "num_key_value_heads": HEADS["k_proj"],
    }  # fmt: skip
    return Layout(
        config=config,
        tensors={f"{name}.weight": weights(HEADS[p] * D, C) for name, p in names.items()},
        linears={name: lambda t, n=name: t[f"{n}.weight"] for name in names},
        biases={},
    )


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """A block is a head, a run is two."""
    monkeypatch.setattr(blocks, "RUN_ELEMENTS", 2 * D * C)
    monkeypatch.setattr(blocks, "CALL_ELEMENTS", 1)


def largest_of_cycle(amax_R1: Tensor) -> Tensor:
    """Row r of a head comes from row 2r modulo D - 1; the first and the last row stay."""
    made_HD = amax_R1.view(-1, D).clone()
    for r in range(1, D - 1):
        rows = [r * 2**step % (D - 1) for step in range(D)]
        made_HD[:, r] = amax_R1.view(-1, D)[:, rows].amax(1)
    return made_HD.view(-1, 1)


def largest_of_head(amax_R1: Tensor) -> Tensor:
    return amax_R1.view(-1, D).amax(1, keepdim=True).expand(-1, D).reshape(-1, 1)


SHARED = {Sharing.CYCLE: largest_of_cycle, Sharing.HEAD: largest_of_head}


def codes(w_RC: Tensor, scale_R1: Tensor, format: str) -> Tensor:
    quotient_RC = w_RC.float() / scale_R1.float()
    if format == "fp8 channel":
        return quotient_RC.clamp(-448, 448).to(torch.float8_e4m3fn)
    least = -8 if format == "int4 channel" else -128
    return quotient_RC.round().clamp(least, -least - 1).to(torch.int8)


def stored_codes(made: Tensors, name: str) -> Tensor:
    """Unpacked, where they are packed, by compressed-tensors."""
    if f"{name}.weight" in made:
        return made[f"{name}.weight"]
    shape = torch.Size(made[f"{name}.weight_shape"].tolist())
    return unpack_from_int32(made[f"{name}.weight_packed"], 4, shape)


def permuted(x_RN: Tensor) -> Tensor:
    """As vLLM does to a weight while loading."""
    bytes_RN = x_RN.view(torch.uint8) if x_RN.itemsize == 1 else x_RN
    moved = bytes_RN.view(-1, D // 2, 2, x_RN.shape[1]).transpose(1, 2).reshape(bytes_RN.shape)
    return moved.view(x_RN.dtype)


def read_back(made: Tensors, name: str, *, moved: bool = False) -> Tensor:
    """The weight; `moved`: of an engine that permutes codes, and leaves scales where they are."""
    code_RC, scale_R1 = stored_codes(made, name), made[f"{name}.weight_scale"]
    return (permuted(code_RC) if moved else code_RC).double() * scale_R1.double()


@pytest.mark.parametrize("sharing", Sharing)
@pytest.mark.parametrize("format", HALF_RANGE)
def test_codes_and_scales_are_the_plain_formulas(tmp_path, format, sharing):
    torch.manual_seed(0)
    made = layout()
    source = save(tmp_path / "source", made)
    convert(source, tmp_path / "out", recipe_of(format), rope_proof=sharing)
    got = tensors_in(tmp_path / "out")
    for name in made.linears:
        w_RC = made.tensors[f"{name}.weight"]
        amax_R1 = w_RC.abs().amax(1, keepdim=True)
        if name.endswith(TURNED):
            amax_R1 = SHARED[sharing](amax_R1)
        scale_R1 = amax_R1 / HALF_RANGE[format]
        assert torch.equal(got[f"{name}.weight_scale"], scale_R1)
        code_RC = codes(w_RC, scale_R1, format)
        assert torch.equal(stored_codes(got, name).view(torch.int8), code_RC.view(torch.int8))


@pytest.mark.parametrize("sharing", [*Sharing, None])
def test_an_engine_that_forgets_the_scales_is_right_only_if_they_are_shared(tmp_path, sharing):
    torch.manual_seed(0)
    source = save(tmp_path / "source", layout())
    convert(source, tmp_path / "out", recipe_of("int8 channel"), rope_proof=sharing)
    got = tensors_in(tmp_path / "out")
    for name in (f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in TURNED):
        same = torch.equal(read_back(got, name, moved=True), permuted(read_back(got, name)))
        assert same == (sharing is not None)


@pytest.mark.parametrize("format", HALF_RANGE)
def test_the_cost_is_that_of_the_two_checkpoints(tmp_path, format):
    torch.manual_seed(0)
    made = layout()
    source = save(tmp_path / "source", made)
    plain = convert(source, tmp_path / "plain", recipe_of(format))
    cycle = convert(source, tmp_path / "cycle", recipe_of(format), rope_proof=Sharing.CYCLE)
    head = convert(source, tmp_path / "head", recipe_of(format), rope_proof=Sharing.HEAD)
    assert plain.rope_proof is None
    for one, folder in ((cycle, "cycle"), (head, "head")):
        assert one.rope_proof.own_db == pytest.approx(snr_db(made, tensors_in(tmp_path / "plain")))
        assert one.rope_proof.shared_db == pytest.approx(
            snr_db(made, tensors_in(tmp_path / folder))
        )
    assert cycle.rope_proof.own_db > cycle.rope_proof.shared_db > head.rope_proof.shared_db > 5


def snr_db(made: Layout, got: Tensors) -> float:
    """Of all q and k together."""
    signal = noise = 0.0
    for name in (n for n in made.linears if n.endswith(TURNED)):
        w_RC = made.tensors[f"{name}.weight"].double()
        signal += float(w_RC.square().sum())
        noise += float((read_back(got, name) - w_RC).square().sum())
    return 10 * math.log10(signal / noise)


def test_formats_that_have_other_scales_are_refused(tmp_path):
    torch.manual_seed(0)
    source = save(tmp_path / "source", layout())
    for format in ("int4 group", "mxfp4", "nvfp4"):
        with pytest.raises(PlanError, match=r"q_proj: --rope-proof is for scales per channel"):
            convert(source, tmp_path / "out", recipe_of(format), rope_proof=Sharing.CYCLE)


def test_a_scale_of_the_whole_tensor_is_proof_as_it_is(tmp_path):
    torch.manual_seed(0)
    source = save(tmp_path / "source", layout())
    convert(source, tmp_path / "plain", recipe_of("fp8 tensor"))
    convert(source, tmp_path / "proof", recipe_of("fp8 tensor"), rope_proof=Sharing.CYCLE)
    plain, proof = (tensors_in(tmp_path / name) for name in ("plain", "proof"))
    assert plain.keys() == proof.keys()
    assert all(torch.equal(plain[n].view(torch.uint8), proof[n].view(torch.uint8)) for n in plain)


def test_a_model_that_no_engine_permutes_is_refused(tmp_path):
    torch.manual_seed(0)
    source = save(tmp_path / "source", layout("llama"))
    with pytest.raises(UsageError, match=r"'llama'.*Llama-4"):
        convert(source, tmp_path / "out", recipe_of("int8 channel"), rope_proof=Sharing.CYCLE)
