import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny.tensors import tensors_in

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import SourceError
from ckptq.evaluate.weights.noise import squares
from ckptq.evaluate.weights.schemes import SchemeWeights
from ckptq.forward.decoded import DecodedWeights
from ckptq.forward.source import CheckpointWeights
from ckptq.plan.make import make_plan
from ckptq.recipes.load import built_in, load_scheme

SCHEMES = [name for name in built_in() if "kv-" not in name and "per-head" not in name]
FUSED = "language_model.model.layers.1.feed_forward.experts.gate_up_proj"


def equal(found, wanted) -> list[str]:
    """Names of tensors that differ in a bit."""
    assert found.keys() == wanted.keys()
    return [
        name
        for name, tensor in found.items()
        if tensor.dtype != wanted[name].dtype or not torch.equal(tensor, wanted[name])
    ]


def whole(weights):
    return weights.load(weights.names())


@pytest.mark.parametrize("family", ["llama", "llama4", "mixtral"])
def test_every_tensor_of_the_source_comes_back_in_its_shape(saved, family):
    source, ckpt = saved(family), saved(family, "fp8-dynamic")
    decoded, plain = whole(DecodedWeights(ckpt, source)), whole(CheckpointWeights(source))
    assert {k: (t.shape, t.dtype) for k, t in decoded.items()} == {
        k: (t.shape, t.dtype) for k, t in plain.items()
    }
    changed = equal(decoded, plain)
    assert changed
    assert all(re.search(r"(proj|w[123])(\.weight)?$", name) for name in changed)
    for name in changed:
        error = (decoded[name].double() - plain[name].double()).norm() / plain[name].double().norm()
        assert 0.005 < error < 0.05, name


def test_an_expert_lies_where_it_was_cut_out(saved):
    """By hand: codes times scales of gate and up of each expert, turned and side by side."""
    ckpt = saved("llama4", "fp8-dynamic")
    stored = tensors_in(ckpt.path)

    def part(expert: int, name: str) -> torch.Tensor:
        module = f"{FUSED.removesuffix('.gate_up_proj')}.{expert}.{name}"
        code, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
        return (code.to(scale.dtype) * scale).t()

    wanted = [torch.cat([part(e, "gate_proj"), part(e, "up_proj")], -1) for e in range(2)]
    decoded = DecodedWeights(ckpt, saved("llama4")).load([FUSED])[FUSED]
    assert torch.equal(decoded, torch.stack(wanted))
    assert not torch.equal(decoded, torch.stack(wanted[::-1]))


def test_half_split_q_and_k_come_back_in_the_source_s_order(saved):
    source = saved("llama4")
    keep = DecodedWeights(saved("llama4", "w4a16"), source)
    split = saved("llama4", "w4a16", rope_order="half-split")
    assert equal(whole(DecodedWeights(split, source)), whole(keep)) == []
    q_proj = "language_model.model.layers.0.self_attn.q_proj"
    assert not torch.equal(
        tensors_in(split.path)[f"{q_proj}.weight_packed"],
        tensors_in(saved("llama4", "w4a16").path)[f"{q_proj}.weight_packed"],
    )


@pytest.mark.parametrize("family", ["llama", "llama4"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_in_memory_is_the_checkpoint_that_it_would_write(saved, family, scheme):
    source = saved(family)
    plan = make_plan(source, load_scheme(scheme))
    tried = SchemeWeights(source, plan)
    written = saved(family, scheme)
    assert equal(whole(tried), whole(DecodedWeights(written, source))) == []
    assert plan.write_bytes == written.nbytes


def test_the_noise_of_a_scheme_is_that_of_its_weights(saved):
    source = saved("llama")
    tried = SchemeWeights(source, make_plan(source, load_scheme("w4a16")))
    assert tried.snr_db is None
    found, plain = whole(tried), whole(CheckpointWeights(source))
    whole(tried)  # a second load counts nothing twice
    changed = equal(found, plain)
    signal = sum(plain[name].double().square().sum() for name in changed)
    noise = sum((plain[name].double() - found[name].double()).square().sum() for name in changed)
    assert tried.snr_db == pytest.approx(10 * torch.log10(signal / noise).item(), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_noise_from_float32_terms_is_that_of_float64(dtype):
    """What a GPU does; terms in bf16 would be seen."""
    w = torch.randn(300, 400, generator=torch.Generator().manual_seed(2)).to(dtype)
    back = (w.float() * 16).round().div(16).to(dtype)

    def db(wide):
        signal, noise = squares(w, back, wide)
        return 10 * torch.log10(signal / noise).item()

    assert db(torch.float32) == pytest.approx(db(torch.float64), abs=3e-6)
    assert db(torch.bfloat16) != pytest.approx(db(torch.float64), abs=3e-6)


def test_a_quantized_source_decodes_under_its_own_names(saved):
    ckpt = saved("llama", "w4a16")
    alone = DecodedWeights(ckpt)
    assert set(alone.names()) == set(saved("llama").tensors)
    assert equal(whole(alone), whole(DecodedWeights(ckpt, saved("llama")))) == []
    plan = make_plan(ckpt, load_scheme("fp8-dynamic"))
    assert set(SchemeWeights(ckpt, plan).names()) == set(saved("llama").tensors)


def test_a_lost_tensor_is_named(saved, tmp_path):
    ckpt, source = saved("llama4", "fp8-dynamic"), saved("llama4")
    lost = f"{FUSED.removesuffix('.gate_up_proj')}.1.up_proj"
    for file in ckpt.path.glob("*"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            kept = {k: t for k, t in load_file(file).items() if not k.startswith(lost)}
            save_file(kept, tmp_path / file.name, metadata)
        elif file.name == "config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = DecodedWeights(open_checkpoint(tmp_path), source)
    with pytest.raises(SourceError, match=re.escape(f"{lost}.weight")):
        broken.load([FUSED])
