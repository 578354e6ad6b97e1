"""Faults by which a checkpoint contradicts itself, its config or its vocabulary; packing mistakes
that are made in all Linears alike."""

from __future__ import annotations

import re

import torch
from verify_faults import ALL, Fault, codes, collector, mlp, module, q_proj

FAULTS: list[Fault] = []
fault = collector(FAULTS)


def drop(e, pattern: str) -> str:
    gone = sorted(name for name in e.tensors if re.fullmatch(pattern, name))
    for name in gone:
        del e.tensors[name]
    return gone[0]


@fault("tensor-missing", families=ALL, alone=True)
def drop_the_final_norm(e):
    return drop(e, r"(.*\.)?model\.norm\.weight")


@fault("tensor-missing", weights=("fp8-channel", "int4"), families=("qwen2", "gpt-oss"), alone=True)
def drop_the_biases_of_attention(e):
    return drop(e, r".*self_attn\.._proj\.bias")


@fault("tensor-missing", weights=("fp8-channel", "int4"), families=("qwen2",), alone=True)
def drop_one_bias(e):
    return drop(e, r".*layers\.1\.self_attn\.k_proj\.bias")


@fault("tensor-missing", families=("gpt-oss",), alone=True)
def drop_the_biases_of_experts(e):
    return drop(e, r".*\.experts\..*bias")


@fault("tensor-missing", families=("gpt-oss",), alone=True)
def drop_sinks(e):
    return drop(e, r".*\.sinks")


@fault("tensor-missing", families=("gpt-oss",), alone=True)
def drop_the_biases_of_routers(e):
    return drop(e, r".*router\.bias")


@fault("tensor-unknown", families=ALL, alone=True)
def add_a_tensor_to_a_linear(e):
    name = f"{q_proj(e)}.gamma"
    e.tensors[name] = torch.ones(4).bfloat16()
    return name


@fault("tensor-unknown", families=("llama", "gemma4"), alone=True)
def add_a_norm(e):
    name = f"{q_proj(e).rpartition('.')[0]}.inner_norm.gamma"
    e.tensors[name] = torch.ones(4).bfloat16()
    return name


@fault("tensor-extra", weights=("fp8-channel", "int4"), families=("llama", "mixtral"), alone=True)
def add_a_bias(e):
    name = f"{q_proj(e)}.bias"
    e.tensors[name] = torch.zeros(256).bfloat16()
    return name


def declare(e, also: str | None = None, **fields: object) -> str | None:
    e.config.update(fields)
    return also


SIZES = ("config-differs", "config-shapes", "layer-missing", "tensor-missing", "never-quantized")


@fault("config-differs", weights=("fp8-channel", "int4", "nvfp4"), also=SIZES)
def declare_another_intermediate_size(e):
    return declare(e, "intermediate_size", intermediate_size=512)


@fault("config-differs", also=SIZES)
def declare_more_query_heads(e):
    return declare(e, "num_attention_heads", num_attention_heads=8)


@fault("config-differs", families=("gemma3", "gemma4"))
def change_gemmas_activation(e):
    return declare(e, "hidden_activation", hidden_activation="silu")


@fault("config-differs", families=("gemma3",))
def change_what_queries_are_divided_by(e):
    return declare(e, "query_pre_attn_scalar", query_pre_attn_scalar=128)


@fault("config-differs", families=("llama",))
def write_nan_into_the_config(e):
    return declare(e, "rms_norm_eps", rms_norm_eps=float("nan"))


@fault(
    "input-scale-implausible", weights=("fp8-static",), families=("llama", "mixtral"), alone=True
)
def write_input_scales_a_million_times_too_large(e):
    for name in [n for n in e.tensors if n.endswith("input_scale")]:
        e.tensors[name] = e.tensors[name] * 1e6
    return "input_scale"


@fault("input-scale-implausible", weights=("fp8-static",), families=("llama",), alone=True)
def write_one_input_scale_a_million_times_too_large(e):
    name = f"{mlp(e)}.input_scale"
    e.tensors[name] = torch.full_like(e.tensors[name], 0.01 * 1e6)
    return name


@fault("codes-range", weights=("int8",), families=("llama", "mixtral"), alone=True)
def declare_four_bits(e):
    e.group["weights"]["num_bits"] = 4
    return mlp(e)


@fault("untargeted", weights=("fp8-channel", "int4"), families=("mixtral",), alone=True)
def target_experts_by_names_they_do_not_have(e):
    e.group["targets"] = ["re:.*experts.*_proj$", "re:.*self_attn.*_proj$"]
    return "experts"


@fault("kv-scale-shape", kv=True, families=("llama", "llama4", "qwen3-moe"), alone=True)
def flatten_scales_of_heads(e):
    return reshape(e, -1)


@fault("kv-scale-shape", kv=True, families=("llama", "llama4", "qwen3-moe"), alone=True)
def put_heads_on_the_second_axis(e):
    return reshape(e, 1, -1, 1)


def reshape(e, *shape: int) -> str:
    for name in [n for n in e.tensors if re.search(r"self_attn\.[qkv]_scale$", n)]:
        e.tensors[name] = e.tensors[name].reshape(shape)
    return "k_scale"


def empty_half(e, name: str) -> str:
    table = e.tensors[name].clone()
    table[len(table) // 2 :] = 0
    e.tensors[name] = table
    return name


EMPTY = ("copy-differs", "rows-empty")


@fault("copy-differs", families=("llama", "qwen3-moe"), also=EMPTY)
def lose_half_the_embedding(e):
    return empty_half(e, e.named("embed_tokens.weight"))


@fault("copy-differs", families=("llama",), also=EMPTY)
def lose_half_the_output_head(e):
    return empty_half(e, "lm_head.weight")


def turn(e, order: tuple[int, ...]) -> str:
    for name in [n for n in e.tensors if n.endswith("weight_packed")]:
        word = e.tensors[name].contiguous()
        byte = word.view(torch.uint8).unflatten(1, (-1, 4))[..., list(order)]
        e.tensors[name] = byte.flatten(1).contiguous().view(word.dtype)
    return codes(e, module(e, "self_attn.o_proj"))


PACKED = ("int4", "int4-asym", "int4-channel", "int8-packed")


@fault("bytes-swapped", weights=PACKED, families=("llama", "mixtral"))
def reverse_the_bytes_of_all_words(e):
    return turn(e, (3, 2, 1, 0))


@fault("bytes-swapped", weights=("int4", "int8-packed"))
def exchange_the_halves_of_all_words(e):
    return turn(e, (2, 3, 0, 1))


@fault("codes-offset", weights=("int8",), families=("llama", "mixtral"))
def store_all_codes_128_higher(e):
    for name in [n for n, t in e.tensors.items() if t.dtype == torch.int8]:
        e.tensors[name] = (e.tensors[name].view(torch.uint8) ^ 128).view(torch.int8)
    return codes(e, module(e, "self_attn.o_proj"))


@fault("codes-offset", weights=("int8-packed",))
def pack_all_codes_without_the_offset(e):
    for name in [n for n in e.tensors if n.endswith("weight_packed")]:
        word = e.tensors[name].contiguous()
        e.tensors[name] = (word.view(torch.uint8) ^ 128).view(word.dtype)
    return codes(e, module(e, "self_attn.o_proj"))


@fault("config-differs", families=("llama",))
def add_a_scaling_of_rope(e):
    e.config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    return "rope_scaling"
