"""A llama that was written to GGUF comes back as the checkpoint that it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import gguf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf")

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he")
HEADS, KV_HEADS, LAYERS, HIDDEN = 4, 2, 2, 64
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def vocabulary() -> list[str]:
    return [*CONTROL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():  # not RoPE's frequencies, which stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return made


def gguf_name(name: str) -> str:
    for theirs, ours in gguf_checkpoint.OUTSIDE_LAYERS.items():
        if name == ours:
            return theirs
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    names = {ours: theirs for theirs, ours in gguf_checkpoint.IN_A_LAYER.items()}
    return f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"


def llama_cpp_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q and k as llama.cpp's converter orders them: its own formula."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model: LlamaForCausalLM, *, pre: str = "smollm") -> None:
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = (weight if heads is None else llama_cpp_rows(weight, heads)).float().numpy()
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request) -> LlamaForCausalLM:
    return tiny_llama(tied=request.param)


def test_every_weight_comes_back_and_computes_the_same(model, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", model)
    proved = gguf_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert proved == 9 * LAYERS + 2 + (not model.config.tie_word_embeddings)

    back, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    weights = back.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    ids = torch.randint(3, model.config.vocab_size, (1, 20))
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


def test_rows_that_are_left_as_llama_cpp_orders_them_are_noticed(model, tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", model)
    monkeypatch.setattr(gguf_checkpoint, "half_split_rows", lambda weight, heads: weight)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.[qk]_proj.*other weights"):
        gguf_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_row_orders_are_each_other_s_inverse_and_llama_cpp_s(heads):
    weight = torch.arange(32.0)[:, None] * torch.ones(3)
    stored = gguf_checkpoint.interleaved_rows(weight, heads)
    assert torch.equal(stored, llama_cpp_rows(weight, heads))
    assert torch.equal(gguf_checkpoint.half_split_rows(stored, heads), weight)
    assert not torch.equal(stored, weight)


def test_config_is_free_of_what_gguf_left_in_it(model, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", model)
    gguf_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "_name_or_path"}
    assert config["rms_norm_eps"] == 1e-5
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is model.config.tie_word_embeddings


def test_the_tokenizer_splits_digits_and_knows_its_special_tokens(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    gguf_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("a the 17") == ["a", "Ġthe", "Ġ", "1", "7"]
    assert tokenizer.decode(tokenizer("Ünder the 17").input_ids) == "Ünder the 17"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    assert [said[0], said[-2]] == [1, 2]


def test_other_tokenizers_and_architectures_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), pre="qwen2")
    with pytest.raises(ValueError, match="gpt2 of kind qwen2, wanted gpt2 of smollm"):
        gguf_checkpoint.convert(tmp_path / "tiny.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_exps\.weight: no tensor of a llama"):
        gguf_checkpoint.checkpoint_name("blk.0.ffn_gate_exps.weight")
