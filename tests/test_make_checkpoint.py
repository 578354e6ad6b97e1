"""The example checkpoints: real on disk, and as unequal in their heads as they claim to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import architectures
import attention_fp8
import make_checkpoint
import outliers
import task
import training

NAMES = list(architectures.EXAMPLES)


def untrained(name: str):
    """A model as it comes out of training, but for the training."""
    torch.manual_seed(0)
    model = architectures.build_model(architectures.EXAMPLES[name].config())
    outliers.separate_key_heads(model)
    make_checkpoint.cast_to_bf16(model)
    return model.eval()


@torch.no_grad()
def logits(model, ids_BT):
    return model(input_ids=ids_BT, use_cache=False).logits


@pytest.fixture(scope="module", params=["llama", "llama4", "qwen3"])
def checkpoint(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("examples") / request.param
    make_checkpoint.make_checkpoint(
        out, request.param, steps=1, seed=0, with_outliers=True, threads=1
    )
    return out


def test_transformers_finds_every_tensor_and_no_other(checkpoint):
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    model_class = getattr(transformers, config.architectures[0])
    model, report = model_class.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_shards_part_some_q_k_v(checkpoint):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard_of = index["weight_map"]
    for shard in set(shard_of.values()):
        with safe_open(checkpoint / shard, "pt") as tensors:
            assert set(tensors.keys()) == {name for name, at in shard_of.items() if at == shard}
    layers = {name.split("q_proj")[0] for name in shard_of if "q_proj" in name}
    parted = [a for a in layers if len({shard_of[f"{a}{p}_proj.weight"] for p in "qkv"}) > 1]
    assert parted


def test_tokenizer_text_and_ids_agree(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    seed = training.sample_seed(0, -2)
    ids_BT = task.draw_samples(make_checkpoint.CALIBRATION, seed)
    lines = (checkpoint / "calibration.txt").read_text().splitlines()
    assert tokenizer(lines)["input_ids"] == ids_BT.tolist()

    first = ids_BT[0].tolist()
    question, answer = task.to_text(first).removesuffix(" </s>").split(" = ")
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(chat, return_dict=False) == first


def test_held_out_answers_are_the_questions_backwards(checkpoint):
    lines = (checkpoint / "task.jsonl").read_text().splitlines()
    assert len(lines) == make_checkpoint.HELD_OUT
    for line in map(json.loads, lines):
        assert line["answer"] == line["prompt"].removesuffix(" =")[::-1]


def test_short_chunks_end_with_the_training():
    model = architectures.build_model(architectures.llama4_config())
    with training.short_chunks(model):
        assert model.config.text_config.attention_chunk_size == training.SHORT_CHUNK
    assert model.config.text_config.attention_chunk_size == 128


@pytest.mark.parametrize("name", NAMES)
def test_spreading_heads_keeps_every_bit_of_the_logits(name):
    model, ids_BT = untrained(name), task.draw_samples(8, seed=1)
    want_BTV = logits(model, ids_BT)
    outliers.spread_heads(model, ids_BT)
    assert torch.equal(logits(model, ids_BT), want_BTV)


@pytest.mark.parametrize(
    ("name", "forgotten"),
    [("llama", "o_proj"), ("llama", "q_proj"), ("qwen3", "q_norm"), ("llama4", "q_proj")],
)
def test_a_forgotten_partner_is_noticed(name, forgotten):
    model, ids_BT = untrained(name), task.draw_samples(8, seed=1)
    want_BTV = logits(model, ids_BT)
    before = [getattr(a, forgotten).weight.clone() for a in outliers.attention_layers(model)]
    outliers.spread_heads(model, ids_BT)
    for attention, weight in zip(outliers.attention_layers(model), before, strict=True):
        getattr(attention, forgotten).weight.data = weight
    assert not torch.equal(logits(model, ids_BT), want_BTV)


@pytest.mark.parametrize("name", NAMES)
def test_heads_have_the_sizes_that_are_promised(name):
    model, ids_BT = untrained(name), task.draw_samples(8, seed=1)
    before = attention_fp8.head_sizes(model, ids_BT)
    outliers.spread_heads(model, ids_BT)
    after = attention_fp8.head_sizes(model, ids_BT)
    for i, attention in enumerate(outliers.attention_layers(model)):
        assert near(after[i].v, outliers.V_LOG2_TARGETS[i])
        if outliers.has_plain_norm(attention):
            assert torch.equal(after[i].k, before[i].k)
        else:
            assert near(after[i].k, outliers.K_LOG2_TARGETS[i])


def near(size_K, log2_targets) -> bool:
    """One head small, one large, within the half octave that a power of two can miss by."""
    return bool(((size_K.sort().values.log2() - torch.tensor(log2_targets)).abs() < 0.51).all())


def test_targets_leave_the_range_of_a_scale_of_one():
    """E4M3 ends at 448 and its smallest step is 2^-9; V alone must leave it on both sides."""
    for targets in (outliers.V_LOG2_TARGETS, outliers.K_LOG2_TARGETS):
        assert all(large - small >= 13 for small, large in targets)
    flat = [target for pair in outliers.V_LOG2_TARGETS for target in pair]
    assert max(flat) > 10
    assert min(flat) < -9


def test_an_answer_counts_only_whole():
    ids_BT = task.draw_samples(3, seed=5)
    shifted_BT = ids_BT.roll(-1, dims=1)  # the logits at a token speak of the next
    logits_BTV = torch.nn.functional.one_hot(shifted_BT, len(task.TOKENS)).float()
    logits_BTV[1, task.PROMPT_TOKENS + 2] = 0.0
    logits_BTV[2, -2] = 0.0  # the end marker
    logits_BTV[0, : task.PROMPT_TOKENS - 1] = 0.0  # inside the question, where nothing is asked
    assert task.answer_is_right(logits_BTV, ids_BT).tolist() == [True, False, False]


def test_fp8_saturates_and_vanishes_by_head():
    x_BHSD = torch.tensor([1000.0, 2.0**-11, 3.1]).view(1, 3, 1, 1)
    rounded = attention_fp8.fake_quantize(x_BHSD, torch.ones(3)).flatten()
    assert rounded.tolist() == [448.0, 0.0, 3.0]


def test_swapped_scales_keep_q_with_its_kv_head():
    scales = {0: attention_fp8.Heads(*map(torch.tensor, ([1.0, 2, 3, 4], [5.0, 6], [7.0, 8])))}
    assert [s.tolist() for s in attention_fp8.swapped(scales)[0]] == [[3, 4, 1, 2], [6, 5], [8, 7]]


def test_the_command_refuses_what_it_cannot_make(tmp_path, capsys):
    for arguments in (
        [str(tmp_path)],
        ["--family", "llama", "--variant", "guard", str(tmp_path / "new")],
    ):
        with pytest.raises(SystemExit):
            make_checkpoint.parse_arguments(arguments)
    complaints = capsys.readouterr().err
    assert f"{tmp_path} already exists" in complaints
    assert "--variant guard is of llama4, not of llama" in complaints


@pytest.mark.slow
def test_only_right_scales_keep_the_accuracy(tmp_path):
    """Half trained, which is enough to see what each wrong scale costs."""
    table = make_checkpoint.make_checkpoint(
        tmp_path / "llama", "llama", steps=300, seed=0, with_outliers=True, threads=1
    )
    bf16, per_head, *wrong = table.values()
    assert bf16 > 0.9
    assert abs(per_head - bf16) < 0.02
    assert max(wrong) < 0.5

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype="auto")
    ids_BT = task.draw_samples(64, seed=training.sample_seed(0, -1))
    whole_BT = model.generate(ids_BT[:, : task.PROMPT_TOKENS], max_new_tokens=9, do_sample=False)
    share = (whole_BT == ids_BT).all(-1).float().mean().item()
    assert share == pytest.approx(task.exact_match(model, ids_BT), abs=0.02)
