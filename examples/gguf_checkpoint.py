"""A GGUF file of the llama architecture becomes a bf16 Hugging Face checkpoint with its tokenizer.

transformers reads config and weights. Three things it leaves to do: the tokenizer (it swaps BOS and
EOS and splits text as GPT-2 does), the float32 noise in the config's numbers, and a proof. Every
tensor is compared bit for bit with the gguf package's own dequantization, with the rows of q and k
brought back here by other code: llama.cpp stores them in the order of its RoPE.

Shape letters: H heads, D head dim, M hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3
"""GGUF's type of a token that no text contains."""


def convert(file: Path, out: Path) -> int:
    """Write the checkpoint; returns how many tensors were proved.

    ValueError for another architecture, another tokenizer, or a tensor that is not what the gguf
    package makes of it.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{file}: architecture {fields['general.architecture']}, wanted llama")
    tokenizer = build_tokenizer(file, fields)
    model = read_model(file)
    proved = check_weights(reader, fields, model.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return proved


def read_model(file: Path) -> LlamaForCausalLM:
    """The model in bf16, free of the marks of where it comes from."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, local_files_only=True
    )
    config = read.config.to_dict()
    for mark in ("quantization_config", "_name_or_path"):
        config.pop(mark, None)
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))  # 1e-5 as float32
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    return model


def check_weights(
    reader: GGUFReader, fields: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> int:
    """Every tensor of the file equals the model's to the last bit, and the model has no other."""
    from gguf import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    names = {checkpoint_name(tensor.name): tensor for tensor in reader.tensors}
    tied = {"lm_head.weight"} - names.keys()
    if extra := weights.keys() - names.keys() - tied:
        raise ValueError(f"{min(extra)}: not in the GGUF file")
    for name, tensor in names.items():
        stored = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        projection = tensor.name.split(".")[-2]
        if projection in heads:
            stored = half_split_rows(stored, heads[projection])
        if name not in weights or not torch.equal(weights[name], stored.to(torch.bfloat16)):
            raise ValueError(f"{name}: transformers reads other weights than gguf")
    return len(names)


def checkpoint_name(name: str) -> str:
    """The Hugging Face name of a tensor. ValueError where there is none."""
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None or found[2] not in IN_A_LAYER:
        raise ValueError(f"{name}: no tensor of a llama")
    return f"model.layers.{found[1]}.{IN_A_LAYER[found[2]]}.weight"


def half_split_rows(interleaved_HDxM: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's order (0, D/2, 1, D/2 + 1, ...) to Hugging Face's."""
    rows = torch.arange(len(interleaved_HDxM)).view(heads, -1)
    return interleaved_HDxM[torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1).flatten()]


def interleaved_rows(half_split_HDxM: Tensor, heads: int) -> Tensor:
    """The way back: how llama.cpp stores q and k."""
    rows = torch.arange(len(half_split_HDxM)).view(heads, 2, -1)
    return half_split_HDxM[rows.transpose(1, 2).flatten()]


def build_tokenizer(file: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits every digit off, as llama.cpp's `smollm` does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = (fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre"))
    if found != ("gpt2", "smollm"):
        raise ValueError(f"{file}: tokenizer {found[0]} of kind {found[1]}, wanted gpt2 of smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    built = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    built.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    built.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in roles.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
