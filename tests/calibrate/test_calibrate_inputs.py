"""Static activation scales: the largest inputs of Linears and experts, and llm-compressor's."""

import pytest
import torch
import transformers
from calibrate_models import samples_of
from calibrate_oneshot import oneshot_inputs
from tiny.rows import token_rows

from ckptq.calibrate.run import calibrate
from ckptq.errors import PlanError, UsageError
from ckptq.forward.linear_inputs import real_tokens

ROWS = token_rows([24] * 4)
FP8, INT8 = 448.0, 127.5
MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def input_scales(ckpt, linears, rows=ROWS, top=FP8, **options) -> dict[str, torch.Tensor]:
    """Linear -> its input scale."""
    options = {"batch_size": 1, "attention": None} | options
    made = calibrate(ckpt, samples_of(rows), inputs=dict.fromkeys(linears, top), **options)
    assert made.attention_class is None
    return {name.removesuffix(".input_scale"): scale for name, scale in made.tensors.items()}


def linears_of(ckpt) -> list[str]:
    """Every Linear of the decoder layers that has a weight of its own on disk."""
    weights = [name for name in ckpt.tensors if ".layers." in name and "norm" not in name]
    weights = [name for name in weights if "vision" not in name and name.endswith("_proj.weight")]
    return [name.removesuffix(".weight") for name in weights]


def plain_largest(ckpt, rows) -> dict[str, torch.Tensor]:
    """Largest |input| of each Linear in transformers' own forward, one sample at a time."""
    model_class = getattr(transformers, ckpt.config["architectures"][0])
    model = model_class.from_pretrained(ckpt.path).eval()
    found: dict[str, torch.Tensor] = {}

    def see(name):
        def hook(module, args):
            amax = args[0].abs().max()
            found[name] = torch.maximum(found.get(name, amax), amax)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(see(name))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    return found


@pytest.mark.parametrize("top", [FP8, INT8])
def test_input_scales_are_the_maxima_of_a_plain_forward(saved, top):
    ckpt = saved("qwen3")
    got, want = input_scales(ckpt, linears_of(ckpt), top=top), plain_largest(ckpt, ROWS)
    assert got.keys() == want.keys() - {"lm_head"}
    for name, scale in got.items():
        assert torch.equal(scale, (want[name] / top).reshape(1)), name


def test_input_scales_are_llm_compressors(saved):
    ckpt = saved("llama")
    want = oneshot_inputs(ckpt, ROWS, as_it_is=True)
    got = input_scales(ckpt, [name.removesuffix(".input_scale") for name in want], eager=True)
    assert len(want) == 28
    for name, scale in want.items():
        assert torch.equal(got[name.removesuffix(".input_scale")], scale), name


def test_expert_input_scales_are_llm_compressors(saved):
    """Equal in the first layer; it sums experts in another order, so later a step is possible."""
    ckpt = saved("mixtral")
    want = {on_disk(n): s for n, s in oneshot_inputs(ckpt, ROWS, as_it_is=False).items()}
    got = input_scales(ckpt, want)
    assert sum("experts" in name for name in want) == 4 * 4 * 3
    for name, scale in want.items():
        torch.testing.assert_close(got[name], scale, rtol=2**-6, atol=0)
        assert torch.equal(got[name], scale) or ".layers.0." not in name, name


def on_disk(name: str) -> str:
    """llm-compressor's name of a Mixtral Linear -> the one that the checkpoint uses."""
    module, _, projection = name.removesuffix(".input_scale").rpartition(".")
    if ".experts." in module:
        projection = MIXTRAL_NAMES[projection]
    return f"{module.replace('.mlp.', '.block_sparse_moe.')}.{projection}"


@pytest.mark.parametrize("family", ["llama4", "qwen3-moe", "gpt-oss"])
def test_every_expert_sees_every_token(saved, family):
    """Against experts computed one by one, from the input that a hook on the plain model sees."""
    ckpt = saved(family)
    model_class = getattr(transformers, ckpt.config["architectures"][0])
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    model = model_class.from_pretrained(ckpt.path, attn_implementation=implementation).eval()
    name, experts = next((n, m) for n, m in model.named_modules() if n.endswith(".experts"))
    seen: list[torch.Tensor] = []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row]))
    x_TF = torch.cat(seen)
    got = input_scales(
        ckpt, [f"{name}.{e}.{p}" for e in range(4) for p in ("gate_proj", "up_proj", "down_proj")]
    )
    for expert in range(4):
        for projection in ("gate_proj", "up_proj"):
            want = x_TF.abs().max() / FP8
            assert torch.equal(got[f"{name}.{expert}.{projection}"], want.reshape(1))
        with torch.no_grad():
            want = inner(family, experts, expert, x_TF).abs().max() / FP8
        torch.testing.assert_close(
            got[f"{name}.{expert}.down_proj"], want.reshape(1), rtol=2**-7, atol=0
        )


def inner(family: str, experts, number: int, x_TF: torch.Tensor) -> torch.Tensor:
    """What the down projection reads, spelled out for each family."""
    weight = experts.gate_up_proj[number]
    if family == "qwen3-moe":
        gate, up = (x_TF @ weight.T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    if family == "llama4":
        gate, up = (x_TF @ weight).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    both = x_TF @ weight + experts.gate_up_proj_bias[number]
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def test_padding_never_counts():
    x_BSF = torch.arange(2 * 3 * 2).reshape(2, 3, 2)
    want = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert torch.equal(real_tokens(x_BSF, [3, 1], "x"), want)
    assert torch.equal(real_tokens(x_BSF.reshape(6, 2), [3, 1], "x"), want)
    twice = real_tokens(torch.cat([x_BSF, x_BSF + 100]).reshape(12, 2), [3, 1], "x")
    assert torch.equal(twice, torch.cat([want, want + 100]))
    with pytest.raises(UsageError, match="x: gets 5 of a batch's 2 x 3 positions"):
        real_tokens(x_BSF.reshape(6, 2)[:5], [3, 1], "x")


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_padded_batches_give_the_scales_of_single_samples(saved, family):
    ckpt = saved(family)
    linears = linears_of(ckpt)
    if family == "llama4":
        experts = "language_model.model.layers.1.feed_forward.experts"
        linears += [f"{experts}.{e}.{p}" for e in range(4) for p in ("up_proj", "down_proj")]
    rows = token_rows([24, 9, 17])
    alone = input_scales(ckpt, linears, rows)
    padded = input_scales(ckpt, linears, rows, batch_size=3)
    for name, scale in alone.items():
        torch.testing.assert_close(padded[name], scale, rtol=2**-6, atol=0)


def test_attention_and_inputs_in_one_pass(saved):
    ckpt = saved("llama")
    linears = linears_of(ckpt)
    both = calibrate(ckpt, samples_of(ROWS), inputs=dict.fromkeys(linears, FP8)).tensors
    attention = calibrate(ckpt, samples_of(ROWS)).tensors
    inputs = input_scales(ckpt, linears, batch_size=8)
    assert both.keys() == attention.keys() | {f"{name}.input_scale" for name in inputs}
    assert all(torch.equal(both[name], attention[name]) for name in attention)
    assert all(torch.equal(both[f"{name}.input_scale"], inputs[name]) for name in inputs)


def test_a_linear_that_is_not_there_is_named(saved):
    with pytest.raises(PlanError, match=r"layers\.9\.mlp\.up_proj received no input"):
        input_scales(saved("llama"), ["model.layers.9.mlp.up_proj"])
