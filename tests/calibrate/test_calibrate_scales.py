"""Scales are the true maxima over 448, and llm-compressor's, to the last bit."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from calibrate_models import HEADS, KV_HEADS, make, samples_of
from calibrate_oneshot import oneshot_attention
from safetensors.torch import load_file, save_file
from tiny.rows import token_rows

from ckptq.calibrate.request import CalibrationRequest, calibrate_plan
from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.errors import PlanError, SourceError, UsageError
from ckptq.forward import tap
from ckptq.plan.attention import AttentionPlan
from ckptq.plan.make import make_plan
from ckptq.progress import silent
from ckptq.recipes.load import load_scheme
from ckptq.spec import spec_of
from ckptq.text.samples import Samples

ROWS = token_rows([24] * 8)


def plain_maxima(ckpt, rows, padding: int = 0) -> dict[str, torch.Tensor]:
    """Largest |q|, |k| and |v| per head, caught at the projections' consumer in a plain forward.

    Works without ckptq: a function of its own, registered with transformers, one sample at a time.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    found: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}

    def spy(module, q, k, v, mask, **kwargs):
        for which, x in zip("qkv", (q, k, v), strict=True):
            key = f"{names[id(module)]}.{which}_scale"
            amax = x.abs().amax((0, 2, 3))
            found[key] = torch.maximum(found.get(key, amax), amax)
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model_class = getattr(transformers, ckpt.config["architectures"][0])
    model = model_class.from_pretrained(ckpt.path, attn_implementation="spy").eval()
    names |= {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row + [0] * padding]), use_cache=False)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama4", "mixtral", "gemma3"])
def test_scales_are_the_maxima_of_a_plain_forward(saved, family):
    ckpt = saved(family)
    scales = calibrate(ckpt, samples_of(ROWS[:3]), batch_size=1).tensors
    want = plain_maxima(ckpt, ROWS[:3])
    assert scales.keys() == want.keys()
    for name, amax in want.items():
        assert torch.equal(scales[name], (amax / 448).reshape(-1, 1, 1)), name


def test_names_and_shapes_are_those_of_the_checkpoint(saved):
    ckpt = saved("gemma3-multimodal")
    scales = calibrate(ckpt, samples_of(ROWS[:2]), batch_size=2)
    modules = {name.rpartition(".")[0] for name in scales.tensors}
    assert modules == {f"language_model.model.layers.{i}.self_attn" for i in range(4)}
    assert all(f"{module}.k_proj.weight" in ckpt.tensors for module in modules)
    for name, scale in scales.tensors.items():
        heads = HEADS if name.endswith("q_scale") else KV_HEADS
        assert scale.shape == (heads, 1, 1)
        assert scale.dtype == torch.bfloat16
    assert scales.attention_class == "Gemma3Attention"


def changed(ckpt: Checkpoint, folder: Path, change, **config) -> Checkpoint:
    """The same checkpoint with other tensors, in one file."""
    shutil.copytree(ckpt.path, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {n: t for f in ckpt.path.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file(change(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**ckpt.config, **config}))
    return open_checkpoint(folder)


def with_frequencies(tensors):
    """As old Llama checkpoints have them: float32, and before the weights of their layer."""
    made = {f"model.layers.{i}.self_attn.a.inv_freq": torch.ones(8) for i in range(4)}
    return {**made, **tensors}


def in_fp8_blocks(tensors):
    """As DeepSeek and Qwen ship FP8: float32 scales of blocks."""
    made = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        w_RC = tensors[name].float()
        scale = w_RC.abs().amax() / 448
        made[name] = (w_RC / scale).to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in w_RC.shape]
        made[f"{name}_scale_inv"] = torch.full(blocks, float(scale))
    return made


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("change", "config"),
    [(with_frequencies, {}), (in_fp8_blocks, {"quantization_config": BLOCKS})],
)
def test_tensors_of_another_dtype_beside_the_weights_change_no_scale(
    saved, tmp_path, change, config
):
    """The scales are those that the plan promises, in the dtype of the weights."""
    ckpt = changed(saved("llama"), tmp_path / "changed", change, **config)
    plan = make_plan(ckpt, load_scheme("fp8-per-head"))
    assert plan.attention is not None
    promised = {n: s for scales in plan.attention.scales.values() for n, s in scales.items()}
    scales = calibrate(ckpt, samples_of(ROWS[:2])).tensors
    assert {name: spec_of(scale) for name, scale in scales.items()} == promised
    if change is with_frequencies:
        wanted = calibrate(saved("llama"), samples_of(ROWS[:2])).tensors
        assert all(torch.equal(scales[name], wanted[name]) for name in wanted)


def test_vision_attention_gets_no_scales(saved):
    scales = calibrate(saved("llama4"), samples_of(ROWS[:2]), batch_size=2)
    assert not [name for name in scales.tensors if "vision" in name]
    assert scales.attention_class == "Llama4TextAttention"


@pytest.mark.parametrize(
    ("family", "strategy", "observer", "as_it_is"),
    [
        ("llama", "tensor", "static_minmax", False),
        ("llama", "attn_head", "static_minmax", False),
        ("qwen3", "attn_head", "static_minmax", False),
        ("llama", "attn_head", "minmax", False),
        ("llama", "attn_head", "static_minmax", True),
    ],
)
def test_scales_are_llm_compressors(saved, family, strategy, observer, as_it_is):
    """All of q, k and v; k and v only where it runs as it is, since its q is uninitialised then."""
    ckpt = saved(family)
    want = oneshot_attention(ckpt, strategy, observer, ROWS, as_it_is)
    caution = nullcontext()
    if observer == "minmax":
        caution = pytest.warns(UserWarning, match="static_minmax")
    with caution:
        made = calibrate(
            ckpt,
            samples_of(ROWS),
            attention=AttentionPlan(strategy=strategy, observer=observer),
            batch_size=1,
            eager=as_it_is,
        ).tensors
    assert made.keys() == want.keys()
    for name, scale in want.items():
        if not (as_it_is and name.endswith("q_scale")):
            assert torch.equal(made[name], scale), name


def test_swapped_heads_are_noticed(saved, tmp_path):
    """Swapping the rows of two V heads swaps their scales, which differ."""
    ckpt = saved("llama")
    model = make("llama")
    rows = model.model.layers[1].self_attn.v_proj.weight.data
    rows.copy_(rows.reshape(KV_HEADS, -1, rows.shape[1]).flip(0).reshape_as(rows))
    model.save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.v_scale"
    here = calibrate(ckpt, samples_of(ROWS[:2])).tensors[name]
    there = calibrate(open_checkpoint(tmp_path), samples_of(ROWS[:2])).tensors[name]
    assert torch.equal(here, there.flip(0))
    assert here[0] * 2 < here[1]


UNEVEN = token_rows([24, 15, 6, 11])


def test_padding_is_never_observed(saved):
    """Padded in one batch or alone, each sample shows the same extremes."""
    ckpt = saved("llama")
    alone = calibrate(ckpt, samples_of(UNEVEN), batch_size=1)
    padded = calibrate(ckpt, samples_of(UNEVEN), batch_size=4)
    for name, scale in alone.tensors.items():
        torch.testing.assert_close(padded.tensors[name], scale, rtol=2**-7, atol=0)


def test_observed_padding_would_change_scales(tmp_path, monkeypatch):
    """The test above can fail: where padding has the largest values, counting it moves a scale."""
    loud = make("llama")
    v_row = loud.model.layers[0].self_attn.v_proj.weight.data[0]
    loud.model.embed_tokens.weight.data[0] = v_row  # the token id that padding has
    loud.save_pretrained(tmp_path)
    ckpt, name = open_checkpoint(tmp_path), "model.layers.0.self_attn.v_scale"
    alone = calibrate(ckpt, samples_of(UNEVEN), batch_size=1).tensors[name]
    masked = calibrate(ckpt, samples_of(UNEVEN), batch_size=4).tensors[name]
    monkeypatch.setattr("ckptq.calibrate.observers._real", lambda x_BHSD, lengths: iter([x_BHSD]))
    counted = calibrate(ckpt, samples_of(UNEVEN), batch_size=4).tensors[name]
    torch.testing.assert_close(masked, alone, rtol=2**-7, atol=0)
    assert counted[0] > 1.5 * alone[0]


def test_halves_of_the_samples_merge_to_the_whole(saved):
    ckpt = saved("llama")
    first, second, whole = (
        calibrate(ckpt, samples_of(rows), batch_size=2).tensors
        for rows in (ROWS[:4], ROWS[4:], ROWS)
    )
    assert all(torch.equal(torch.maximum(first[name], second[name]), whole[name]) for name in whole)


def test_nan_names_the_layer(tmp_path):
    model = make("llama")
    model.model.layers[2].self_attn.k_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"model\.layers\.2\.self_attn\.k is nan"):
        calibrate(open_checkpoint(tmp_path), samples_of(ROWS[:2]))


def test_all_zero_head_gets_the_dtypes_eps(tmp_path):
    model = make("llama")
    model.model.layers[0].self_attn.v_proj.weight.data[:16] = 0
    model.save_pretrained(tmp_path)
    scales = calibrate(open_checkpoint(tmp_path), samples_of(ROWS[:2])).tensors
    assert scales["model.layers.0.self_attn.v_scale"][0] == torch.finfo(torch.bfloat16).eps


def test_attention_past_the_interface_is_an_error(saved, monkeypatch):
    from ckptq.errors import PlanError

    monkeypatch.setattr(tap, "_shown", lambda name, tap, attend, qkv, asked: attend(*qkv))
    with pytest.raises(PlanError, match="cannot be observed"):
        calibrate(saved("llama"), samples_of(ROWS[:2]))


def test_token_outside_the_vocabulary_is_named(saved):
    with pytest.raises(SourceError, match="token id 500 is outside"):
        calibrate(saved("llama"), samples_of([[3, 500]]))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"attention": AttentionPlan(observer="median")}, "median"), ({"batch_size": 0}, "got 0")],
)
def test_wrong_arguments_are_refused(saved, wrong, named):
    with pytest.raises(UsageError, match=named):
        calibrate(saved("llama"), samples_of(ROWS[:1]), **wrong)


def test_record_says_how_they_were_made(saved):
    made = calibrate(saved("llama"), replace(samples_of(ROWS), seed=5), batch_size=4).made
    assert (made.samples, made.tokens, made.seq_len, made.seed) == (8, 8 * 24, 24, 5)
    assert made.token_digest == Samples(tuple(map(tuple, ROWS)), "other", 9, 1).digest
    assert made.attention["model.layers.0.self_attn"] == "LlamaAttention"


def test_attention_that_is_on_disk_and_does_not_run_is_named(saved, tmp_path):
    """A layer that the config hides from the plan's rule: linear attention, said by nobody."""
    shutil.copytree(saved("minimax").path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": [3, 4, 5, 6]}) + "\n")
    ckpt = open_checkpoint(tmp_path / "model")
    plan = make_plan(ckpt, load_scheme("kv-fp8-per-head"))
    blind = make_plan(replace(ckpt, config=config | {"layer_types": None}), plan.recipe)
    wanted = CalibrationRequest(data=str(tmp_path / "rows.jsonl"))
    assert set(calibrate_plan(ckpt, plan, wanted, "cpu", silent).tensors) == {
        name for scales in plan.attention.scales.values() for name in scales
    }
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn did not run as attention"):
        calibrate_plan(ckpt, blind, wanted, "cpu", silent)


def planned(ckpt, scheme):
    return make_plan(ckpt, load_scheme(scheme)).attention


def test_heads_that_are_not_the_plan_s_are_told_after_one_layer(saved, run_layers):
    """JetMoE repeats its keys for each expert before attention sees them."""
    ckpt = saved("jetmoe")
    wanted = planned(ckpt, "fp8-per-head")
    module = "model.layers.0.self_attention"
    assert wanted.scales[module][f"{module}.k_scale"].shape == (KV_HEADS, 1, 1)
    with pytest.raises(PlanError, match=r"layers\.0\.self_attention of JetMoe.* passes 4 heads"):
        calibrate(ckpt, samples_of(ROWS[:2]), attention=wanted)
    assert run_layers == [0]
    wanted = planned(ckpt, "fp8-per-tensor")
    made = calibrate(ckpt, samples_of(ROWS[:2]), attention=wanted).tensors
    assert made.keys() == {name for scales in wanted.scales.values() for name in scales}


@pytest.mark.parametrize("family", ["xglm", "bloom"])
def test_attention_outside_the_interface_is_told_after_one_layer(saved, run_layers, family):
    ckpt = saved(family)
    with pytest.raises(PlanError, match=r"did not run as attention.*weights-only scheme"):
        calibrate(ckpt, samples_of(ROWS[:2]), attention=planned(ckpt, "fp8-per-head"))
    assert run_layers == [0]
