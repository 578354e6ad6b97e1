"""What a checkpoint says of itself twice, and not alike; and what only looks like that."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from verify_checkpoints import Editor, convert, recipe

from ckptq.verify.run import verify


def named(report) -> set[str]:
    return {f.code for f in report.findings}


SIZES = {
    "intermediate_size": (512, "mlp"),
    "vocab_size": (200, "vocab_size"),
    "hidden_size": (256, "norm"),
    "num_attention_heads": (8, "q_proj"),
    "num_key_value_heads": (4, "k_proj"),
    "head_dim": (32, "q_proj"),
}


@pytest.mark.parametrize("weights", ["fp8-channel", "int4", "nvfp4"])
@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_the_tensors_do_not_have(broken, weights, field):
    """Without a source: each size of config.json that shapes tell."""
    value, where = SIZES[field]
    editor, _ = broken("llama", weights)
    editor.config[field] = value
    found = [f for f in verify(editor.save()).findings if f.code == "config-shapes"]
    assert any(where in (f.tensor or "") for f in found), found
    assert len(found) < 20, "of layers that are alike only one is told"


EXPERT_SIZES = {
    ("qwen3-moe", "moe_intermediate_size"): (64, "experts.0.down_proj"),
    ("qwen3-moe", "num_local_experts"): (3, "experts.3."),
    ("mixtral", "num_local_experts"): (2, "experts.2."),
    ("mixtral", "intermediate_size"): (128, "experts.0.w"),
}


@pytest.mark.parametrize("weights", ["fp8-channel", "int4", "nvfp4"])
@pytest.mark.parametrize(("family", "field"), EXPERT_SIZES)
def test_sizes_that_the_experts_do_not_have(broken, weights, family, field):
    value, where = EXPERT_SIZES[family, field]
    editor, _ = broken(family, weights)
    assert field in editor.config
    editor.config[field] = value
    found = [f for f in verify(editor.save()).findings if f.code == "config-shapes"]
    assert any(where in (f.tensor or "") for f in found), found
    assert len(found) < 20, "of experts that are alike only one is told"


@pytest.mark.parametrize(("field", "value"), [("num_local_experts", 5), ("intermediate_size", 64)])
def test_sizes_that_fused_experts_do_not_have(broken, field, value):
    """GPT-OSS with its experts left as they were."""
    editor, source = broken("gpt-oss", "fp8-channel")
    kept = Editor(convert(source, editor.folder.parent / "kept", recipe(
        "fp8-channel", ignore=("re:.*experts.*",)
    )))  # fmt: skip
    assert any(tensor.dim() == 3 for tensor in kept.tensors.values())
    assert named(verify(kept.folder)) == set()
    kept.config[field] = value
    found = [f for f in verify(kept.save()).findings if f.code == "config-shapes"]
    assert any("experts" in (f.tensor or "") for f in found), found


@pytest.mark.parametrize("name", ["foo", "model.extra.weight", "extra.weight"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_tensors_at_the_root_that_nobody_knows(broken, family, name):
    """A note: transformers leaves them out, and another engine may read them."""
    editor, _ = broken(family, "fp8-channel")
    editor.tensors[name] = torch.ones(4, 4).bfloat16()
    report = verify(editor.save())
    assert named(report) <= {"targeted-but-unquantized"}
    assert [n.tensor for n in report.notes if n.code == "tensor-placeless"] == [name]


@pytest.mark.parametrize("name", ["mtp.fc.weight", "score.weight", "model.layers.2.eh_proj.weight"])
def test_parts_of_other_models_are_none_of_them(broken, name):
    editor, _ = broken("llama", "fp8-channel")
    editor.tensors[name] = torch.ones(4, 4).bfloat16()
    assert "tensor-placeless" not in {n.code for n in verify(editor.save()).notes}


def test_layers_that_are_missing_are_told_once(broken):
    editor, _ = broken("llama", "fp8-channel")
    editor.config["num_hidden_layers"] = 4
    found = verify(editor.save()).findings
    assert [f.code for f in found] == ["layer-missing"], found


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize(("rows", "wrong"), [(64, True), (8, False)])
def test_a_table_of_zeros(broken, name, rows, wrong):
    """A few rows are the padding of a vocabulary."""
    editor, _ = broken("llama", "fp8-channel")
    editor.tensors[name] = editor.tensors[name].clone()
    editor.tensors[name][-rows:] = 0
    assert named(verify(editor.save())) == ({"rows-empty"} if wrong else set())


@pytest.mark.parametrize("told", [True, False])
def test_rows_of_garbage_are_no_choice_where_the_recipe_makes_none(broken, told):
    """So much of a weight, and so near, as what a tool that tells nothing may have chosen."""
    editor, source = broken("llama", "int4")
    name = editor.named("gate_proj.weight_packed")
    codes = editor.tensors[name] = editor.tensors[name].clone()
    rows = -(-len(codes) // 100)
    chance = torch.Generator().manual_seed(0)
    shape = codes[:rows].shape
    codes[:rows] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=chance)
    if not told:
        (editor.folder / "recipe.yaml").unlink()
    report = verify(editor.save(), source)
    assert named(report) == ({"codes-corrupt"} if told else set())
    assert told or {"codes-not-nearest"} <= {note.code for note in report.notes}


def test_nan_in_a_config_is_no_difference(sources, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(sources("llama"), source)
    config = json.loads((source / "config.json").read_text())
    more = {"something": float("nan"), "list": [float("nan"), 1]}
    (source / "config.json").write_text(json.dumps(config | more))
    report = verify(convert(source, tmp_path / "out", recipe("fp8-channel")), source)
    assert report.findings == report.notes == ()


def test_fields_of_training_may_differ(broken):
    editor, source = broken("llama", "fp8-channel")
    editor.config |= {"attention_dropout": 0.1, "eos_token_id": [2, 3], "initializer_range": 1.0}
    report = verify(editor.save(), source)
    assert report.findings == ()
    assert {note.code for note in report.notes} == {"config-note"}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_a_norm_that_llm_compressor_took_apart_is_a_note(broken, tmp_path, name):
    """It adds one to norms of 1 + w, and takes it away again, in bf16."""
    editor, source = broken("gemma3", "fp8-channel")
    norm = torch.linspace(-0.3, 0.3, 128).bfloat16()
    kept = tmp_path / "source"
    shutil.copytree(source, kept)
    original = Editor(kept)
    original.tensors[name] = norm
    original.save()
    editor.tensors[name] = (norm + 1) - 1
    report = verify(editor.save(), kept)
    assert not torch.equal(editor.tensors[name], norm)
    assert report.findings == ()
    assert [(note.code, note.tensor) for note in report.notes] == [("norm-rounded", name)]
    editor.tensors[name][5] += 0.1
    assert named(verify(editor.save(), kept)) == {"copy-differs"}


def tokenizer(ids: dict[str, int], indent: int | None = None) -> str:
    added = [{"id": 100, "content": "<s>", "special": True}]
    model = {"type": "BPE", "vocab": ids, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": added, "model": model}, indent=indent)


@pytest.fixture
def told(good, tmp_path):
    """A checkpoint and its source, with a vocabulary in three files."""
    out, source = good("llama", "fp8-channel")
    for folder, name in ((out, "out"), (source, "source")):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 1, "c": 2}))
        (copy / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "c": 2}))
        decoder = {"100": {"content": "<s>", "special": True}}
        (copy / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    return tmp_path / "out", tmp_path / "source"


def test_a_vocabulary_may_be_written_otherwise(told):
    out, source = told
    (out / "tokenizer.json").write_text(tokenizer({"c": 2, "b": 1, "a": 0, "d": 3}, indent=2))
    assert verify(out).findings == ()
    report = verify(out, source)
    assert report.findings == ()
    assert [note.code for note in report.notes] == ["side-file-differs"]


def test_two_tokens_that_are_exchanged(told):
    out, source = told
    (out / "tokenizer.json").write_text(tokenizer({"a": 0, "b": 2, "c": 1}))
    for report in (verify(out), verify(out, source)):
        assert named(report) == {"vocabulary"}
        assert "2 tokens have different ids: 'b' is" in report.findings[0].found
    for folder in told:
        (folder / "vocab.json").unlink()
    assert named(verify(out, source)) == {"vocabulary"}


def test_a_special_token_under_another_id(told):
    out, _ = told
    decoder = {"101": {"content": "<s>", "special": True}}
    (out / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert named(verify(out)) == {"vocabulary"}


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model": 1, "added_tokens": 2}', '{"model": {"vocab": [1, [2]]}}']
)
def test_any_tokenizer_is_read(told, text):
    out, _ = told
    (out / "tokenizer.json").write_text(text)
    (out / "vocab.json").write_text(text)
    assert verify(out).findings == ()


ROPE = {"rope_type": "default", "rope_theta": 5e5}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("field", "value", "codes"),
    [
        ("rms_norm_eps", 0.01, {"config-differs"}),
        ("rms_norm_eps", 1e-6, set()),
        ("rope_parameters", ROPE, {"config-differs"}),
        ("rope_parameters", DEFAULT_ROPE, set()),
    ],
)
def test_a_field_that_got_lost_means_its_default(broken, tmp_path, field, value, codes):
    """And is a fault where that is another model than the source's."""
    editor, source = broken("llama", "fp8-channel")
    original = tmp_path / "source"
    shutil.copytree(source, original)
    config = json.loads((original / "config.json").read_text()) | {field: value}
    (original / "config.json").write_text(json.dumps(config))
    editor.config.pop(field, None)
    report = verify(editor.save(), original)
    assert {one.code for one in report.findings} == codes
    assert codes or "config-note" in {one.code for one in report.notes}
