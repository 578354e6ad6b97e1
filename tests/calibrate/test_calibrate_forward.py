"""The layer-by-layer forward is transformers' forward, to the last bit."""

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from calibrate_models import FAMILIES, VOCAB, samples_of
from families.sources import save
from tiny.rows import token_rows

from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.forward.layerwise import open_model
from ckptq.forward.record import Recorder
from ckptq.forward.skeleton import build_skeleton
from ckptq.forward.source import CheckpointWeights
from ckptq.text.samples import Batch

LENGTHS = [24, 17, 9, 24, 24, 24]
"""With a batch size of 3: one batch that is padded, one that is not."""


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return list(samples_of(token_rows(LENGTHS)).batches(3))


def plain(ckpt, batches):
    """Hidden states before each layer and logits of transformers' own forward, per batch."""
    model_class = getattr(transformers, ckpt.config["architectures"][0])
    implementation = "sdpa" if model_class._supports_sdpa else "eager"
    model = model_class.from_pretrained(ckpt.path, attn_implementation=implementation).eval()
    with torch.no_grad():
        outs = [
            model(
                input_ids=batch.input_ids_BS,
                attention_mask=batch.mask_BS,
                output_hidden_states=True,
                use_cache=False,
            )
            for batch in batches
        ]
    return [out.hidden_states for out in outs], [out.logits for out in outs]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_plain_forward_to_the_last_bit(saved, batches, family):
    ckpt = saved(family)
    want_hidden, want_logits = plain(ckpt, batches)
    model = open_model(ckpt)
    stream = model.embed(batches)
    for index in range(len(model.layer_names)):
        for got, want in zip(stream.hidden_BSE, want_hidden, strict=True):
            assert torch.equal(got, want[index]), f"before layer {index}"
        model.run_layer(index, stream)
    for got, want in zip(model.head(stream), want_logits, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_one_layer_has_weights_at_a_time(saved, batches, family):
    model = open_model(saved(family))

    def loaded() -> set[str]:
        parameters = model.skeleton.model.named_parameters()
        return {name for name, parameter in parameters if not parameter.is_meta}

    stream = model.embed(batches)
    assert not loaded()
    for index, name in enumerate(model.layer_names):
        seen: list[set[str]] = []

        def look(layer, batch, seen=seen):
            seen.append(loaded())
            return nullcontext()

        model.run_layer(index, stream, look)
        assert seen
        assert all(each.startswith(name + ".") for each in seen[0])
        assert not loaded()


def test_a_wrong_weight_is_noticed(saved, batches):
    """The first test can fail: with one weight of the last layer changed, it does."""
    ckpt = saved("llama")

    class Nudged(CheckpointWeights):
        def load(self, names):
            tensors = super().load(names)
            for name, tensor in tensors.items():
                if name.endswith("layers.3.mlp.down_proj.weight"):
                    tensor[0, 0] = tensor.abs().max() * 2
            return tensors

    _, want_logits = plain(ckpt, batches)
    model = open_model(ckpt, weights=Nudged(ckpt))
    stream = model.embed(batches)
    for index in range(len(model.layer_names)):
        model.run_layer(index, stream)
    assert not torch.equal(next(model.head(stream)), want_logits[0])


def test_missing_weight_is_named(saved, batches):
    ckpt = saved("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    fewer = {key: tensor for key, tensor in ckpt.tensors.items() if key != name}
    model = open_model(replace(ckpt, tensors=fewer))
    stream = model.embed(batches)
    model.run_layer(0, stream)
    with pytest.raises(SourceError, match=name.replace(".", r"\.")):
        model.run_layer(1, stream)


def test_wrong_shape_is_named(saved, batches):
    ckpt = saved("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    other = ckpt.tensors["model.layers.0.self_attn.q_proj.weight"]
    model = open_model(replace(ckpt, tensors={**ckpt.tensors, name: other}))
    with pytest.raises(SourceError, match=r"k_proj\.weight.*\[64, 64\].*\[32, 64\]"):
        model.run_layer(0, model.embed(batches))


def test_model_that_works_between_layers_is_refused(saved, batches):
    """Doubling the hidden states between two layers would go unnoticed layer by layer."""
    model = open_model(saved("llama"))
    last = list(model.skeleton.layers.values())[-1]
    last.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(PlanError, match="between decoder layers 2 and 3"):
        model.embed(batches)


def test_model_without_attention_heads_is_refused(tmp_path):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=VOCAB)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="MambaForCausalLM has no attention heads"):
        open_model(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"architectures": "x"}, r"config\.json: transformers cannot read it"),
        ({"dtype": {"a": 1}}, r"config\.json: "),
        ({"num_key_value_heads": 0}, r"config\.json: transformers makes no LlamaForCausalLM of it"),
        ({"hidden_act": "none"}, r"config\.json: transformers makes no LlamaForCausalLM of it"),
    ],
)
def test_a_config_that_transformers_refuses_is_named(saved, tmp_path, odd, said):
    """Its own errors are of many classes."""
    shutil.copytree(saved("llama").path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    with pytest.raises(SourceError, match=said):
        build_skeleton(open_checkpoint(tmp_path / "model"), torch.device("cpu"))


def test_attention_classes_of_a_models_own_are_refused(tmp_path):
    config = transformers.FalconConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB
    )
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="FalconForCausalLM has attention classes of its own"):
        open_model(open_checkpoint(tmp_path))


@pytest.mark.parametrize("family", ["falcon", "gptj", "mamba"])
def test_attention_that_nobody_looks_at_may_be_a_models_own(tmp_path, family):
    """The layers make what the whole model does."""
    source = save(family, tmp_path)
    model = open_model(open_checkpoint(source), attention=False)
    ids = torch.arange(3, 19)[None]
    stream = model.embed([Batch(ids, torch.ones_like(ids), (16,))])
    for index in range(len(model.layer_names)):
        model.run_layer(index, stream)
    [found] = model.head(stream)
    whole = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        assert torch.equal(found, whole(ids, use_cache=False).logits)


def test_unknown_architecture_is_named(saved):
    ckpt = saved("llama")
    config = {**ckpt.config, "architectures": ["NoSuchForCausalLM"]}
    (ckpt.path / "config.json").rename(ckpt.path / "config.kept")
    try:
        (ckpt.path / "config.json").write_text(json.dumps(config))
        with pytest.raises(SourceError, match="NoSuchForCausalLM"):
            build_skeleton(replace(ckpt, config=config), torch.device("cpu"))
    finally:
        (ckpt.path / "config.kept").replace(ckpt.path / "config.json")


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_the_checkpoint_runs_only_when_trusted(saved, batches, tmp_path, monkeypatch):
    source = saved("llama")
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    changes = {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": own}
    path = shutil.copytree(source.path, tmp_path / "own")
    (path / "config.json").write_text(json.dumps({**source.config, **changes}))
    (path / "own.py").write_text(REMOTE)
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    ckpt = open_checkpoint(path)
    with pytest.raises(SourceError, match="custom code"):
        open_model(ckpt)
    model, plain_model = open_model(ckpt, trust_remote_code=True), open_model(source)
    assert type(model.skeleton.model).__name__ == "OwnForCausalLM"
    stream, want = model.embed(batches), plain_model.embed(batches)
    model.run_layer(0, stream)
    plain_model.run_layer(0, want)
    assert torch.equal(stream.hidden_BSE[0], want.hidden_BSE[0])


def test_a_source_that_cannot_be_read_back_is_refused(saved):
    ckpt = saved("llama")
    config = {**ckpt.config, "quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(PlanError, match="quantized with 'hqq', which ckptq cannot read"):
        open_model(replace(ckpt, config=config))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (lambda hidden: hidden, True),
        (lambda hidden: hidden[:, slice(-0, None)], True),  # all positions, as Gemma-4 takes them
        (lambda hidden: hidden[:, -1:], False),
        (lambda hidden: hidden + 0, False),
    ],
)
def test_a_layer_is_given_all_that_the_one_before_it_returns(given, taken):
    recorder = Recorder("Model", 3, lambda hidden: hidden)
    hidden = given(recorder(torch.ones(1, 4, 8)))
    if taken:
        recorder(hidden)
        return
    with pytest.raises(PlanError, match="changes the hidden states between decoder layers 0 and 1"):
        recorder(hidden)
