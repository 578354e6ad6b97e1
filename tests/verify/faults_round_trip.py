"""Faults that only the source shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from tiny.formats import FORMATS
from verify_checkpoints import HEAD_DIM, HEADS, Editor
from verify_faults import (
    ALL,
    ASYM,
    MOE,
    NIBBLES,
    PER_ROW,
    ROPE_WEIGHTS,
    Fault,
    codes,
    collector,
    k_proj,
    locals_of,
    mlp,
    module,
    q_proj,
    swap,
    turn,
)

from ckptq.permute.effect import Part
from ckptq.quantize.formats import quantize
from ckptq.recipes.args import Args
from ckptq.rope_order import RopeOrder

FAULTS: list[Fault] = []
fault = collector(FAULTS)


@fault("codes-corrupt", weights=tuple(FORMATS), families=ALL)
def flip_a_bit_of_the_codes(e):
    name = codes(e, mlp(e))
    bits = e.tensors[name].view(torch.uint8)
    bits[5, 7] ^= 1
    return name


@fault("scale-corrupt", weights=("fp8-channel", "int8", "int4", "int4-channel"), families=ALL)
def flip_a_bit_of_a_scale(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name].view(torch.int16)[2, 0] ^= 1 << 6
    return name


@fault(
    "scale-inverted",
    families=ALL,
    weights=("fp8-channel", "fp8-tensor", "fp8-block", "int8", "int4", "int4-channel"),
)
def invert_scales(e):
    for name in e.tensors:
        if name.endswith("weight_scale"):
            e.tensors[name] = 1 / e.tensors[name]
    return mlp(e)


@fault("scale-inverted", weights=("nvfp4",))
def invert_the_global_scale(e):
    name = f"{mlp(e)}.weight_global_scale"
    e.tensors[name] = 1 / e.tensors[name]
    return mlp(e)


@fault("scale-shifted", weights=(*PER_ROW, "mxfp8"), families=("llama", "mixtral"))
def shift_scales_by_a_row(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = e.tensors[name].view(torch.uint8).roll(
        1, 0).view(e.tensors[name].dtype) if e.tensors[name].dtype not in (
        torch.bfloat16,) else e.tensors[name].roll(1, 0)  # fmt: skip
    return name


@fault("scale-shifted", weights=("int4",), families=("llama", "qwen3-moe"))
def shift_scales_by_a_group(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = e.tensors[name].roll(1, 1)
    return name


@fault("scale-permuted", families=("llama4", "llama"), weights=ROPE_WEIGHTS)
def permute_only_the_scales(e):
    to = RopeOrder.HALF_SPLIT if "text_config" in e.config else RopeOrder.INTERLEAVED
    turn(e, (Part.SCALES,), to)
    return q_proj(e)


@fault("codes-permuted", families=("llama4", "llama"), weights=ROPE_WEIGHTS)
def permute_only_the_weights(e):
    to = RopeOrder.HALF_SPLIT if "text_config" in e.config else RopeOrder.INTERLEAVED
    turn(e, (Part.WEIGHTS,), to)
    return k_proj(e)


@fault("rows-permuted", families=("llama4", "llama"),
       weights=(*ROPE_WEIGHTS, "fp8-tensor"))  # fmt: skip
def permute_all(e):
    to = RopeOrder.HALF_SPLIT if "text_config" in e.config else RopeOrder.INTERLEAVED
    turn(e, tuple(Part), to)
    return q_proj(e)


@fault("zero-points-permuted", weights=ASYM)
def permute_only_the_zero_points(e):
    turn(e, (Part.ZERO_POINTS,), RopeOrder.INTERLEAVED)
    return f"{q_proj(e)}.weight_zero_point"


@fault("exchanged", families=ALL,
       weights=("fp8-channel", "fp8-tensor", "int8", "int4", "mxfp4", "nvfp4"))  # fmt: skip
def exchange_k_and_v(e):
    k, v = k_proj(e), k_proj(e).replace("k_proj", "v_proj")
    for name in locals_of(e, k):
        swap(e, name, name.replace(k, v))
    return k


@fault("exchanged", families=ALL, weights=("fp8-channel", "int4", "int4-asym"))
def exchange_gate_and_up(e):
    gate, up = mlp(e, "gate"), mlp(e, "up")
    for name in locals_of(e, gate):
        swap(e, name, name.replace(gate, up))
    return gate


@fault("exchanged", families=("llama",), weights=("fp8-channel", "int8", "int4", "fp8-block"))
def exchange_layers(e):
    for name in locals_of(e, mlp(e)):
        swap(e, name, name.replace("layers.0", "layers.1"))
    return mlp(e)


@fault("scale-of-another", families=ALL, weights=("fp8-channel", "int8", "int4", "int4-channel"))
def give_k_the_scales_of_v(e):
    k = f"{k_proj(e)}.weight_scale"
    e.tensors[k] = e.tensors[k.replace("k_proj", "v_proj")].clone()
    return k


@fault("scale-of-another", families=("llama", "qwen3-moe"), weights=("fp8-channel", "int4"))
def exchange_scales_of_layers(e):
    name = f"{q_proj(e)}.weight_scale"
    swap(e, name, name.replace("layers.0", "layers.1"))
    return name


@fault("codes-of-another", families=("llama", "llama4"), weights=("fp8-channel", "int4"))
def give_k_the_codes_of_v(e):
    k = codes(e, k_proj(e))
    e.tensors[k] = e.tensors[k.replace("k_proj", "v_proj")].clone()
    return k


@fault("misplaced", families=("llama",), weights=("fp8-channel", "int4", "mxfp8"))
def copy_v_over_k(e):
    k = k_proj(e)
    for name in locals_of(e, k):
        e.tensors[name] = e.tensors[name.replace("k_proj", "v_proj")].clone()
    return k


@fault("experts-permuted", families=MOE, weights=("fp8-channel", "int8", "int4", "int4-asym"))
def reorder_the_experts(e):
    before = dict(e.tensors)
    for name in before:
        match = re.match(r"(.*layers\.1\..*experts\.)(\d)(\..*)", name)
        if match:
            e.tensors[name] = before[f"{match[1]}{(int(match[2]) + 1) % 4}{match[3]}"]
    return "experts"


@fault("experts-transposed", families=("llama4",), weights=("fp8-channel", "int4"))
def forget_the_transpose(e):
    """As cutting Llama-4's fused experts along the wrong axis does where they are square."""
    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.checkpoint.read import Files
    from ckptq.models.modules import read_layout
    from ckptq.models.weight_rows import weight_rows

    source = Path((e.folder.parent / "source").read_text())
    name = module(e, "experts.1.down_proj")
    view = read_layout(open_checkpoint(source)).linears[name].weight
    with Files() as files:
        weight = weight_rows(files, view)(0, 128).t().contiguous()
    scheme = Args.read(e.group["weights"]).weight_scheme(e.group["format"], stored=True)
    for local, tensor in quantize(weight, scheme).items():
        e.tensors[f"{name}.{local}"] = tensor
    return name


@fault("heads-swapped", families=("llama", "llama4"),
       weights=("fp8-channel", "int8", "int4", "int4-channel"))  # fmt: skip
def swap_two_heads(e):
    name = q_proj(e)
    for local in (codes(e, name), f"{name}.weight_scale"):
        tensor = e.tensors[local].view(torch.uint8).unflatten(0, (HEADS, HEAD_DIM))
        turned = tensor[[1, 0, 2, 3]].flatten(0, 1).contiguous()
        e.tensors[local] = turned.view(e.tensors[local].dtype)
    return name


@fault("heads-swapped", families=("llama", "llama4"), weights=("fp8-channel", "int4"))
def swap_the_scales_of_two_heads(e):
    name = f"{q_proj(e)}.weight_scale"
    e.tensors[name] = e.tensors[name].unflatten(0, (HEADS, HEAD_DIM))[[0, 2, 1, 3]].flatten(0, 1)
    return name


@fault("nibbles-swapped", weights=NIBBLES, families=("llama", "mixtral"))
def pack_the_high_nibble_first(e):
    for name in e.tensors:
        if name.endswith("weight_packed"):
            b = e.tensors[name].contiguous().view(torch.uint8)
            e.tensors[name] = ((b & 15) << 4 | b >> 4).view(e.tensors[name].dtype)
    return mlp(e)


@fault("codes-offset", weights=("int4", "int4-asym"), families=("llama", "mixtral"))
def pack_signed_codes(e):
    name = codes(e, mlp(e))
    e.tensors[name] = (e.tensors[name].view(torch.uint8) ^ 0x88).view(torch.int32)
    return name


@fault("zero-points-offset", weights=ASYM, families=("llama", "mixtral"))
def store_zero_points_less_one(e):
    name = f"{mlp(e)}.weight_zero_point"
    b = e.tensors[name].contiguous().view(torch.uint8)
    less = ((b & 15) - 1 & 15) | ((b >> 4) - 1 & 15) << 4
    e.tensors[name] = less.to(torch.uint8).view(torch.int32)
    return name


@fault("weight-wrong", weights=("fp8-channel", "int4", "int8", "fp8-tensor"), families=ALL)
def write_noise(e):
    name = codes(e, mlp(e))
    generator = torch.Generator().manual_seed(3)
    b = e.tensors[name].view(torch.uint8)
    noise = torch.randint(0, 0x7E, b.shape, dtype=torch.uint8, generator=generator)
    e.tensors[name] = noise.view(e.tensors[name].dtype)
    return name


@fault("total-size")
def lie_about_the_size(e):
    index = {"metadata": {"total_size": 1},
             "weight_map": dict.fromkeys(e.tensors, "model.safetensors")}  # fmt: skip
    (e.folder / "model.safetensors.index.json").write_text(json.dumps(index))


@fault("index-mismatch")
def name_a_tensor_that_is_not_there(e):
    index = {"weight_map": dict.fromkeys([*e.tensors, "ghost.weight"], "model.safetensors")}
    (e.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return "ghost.weight"


@fault("ignore-not-honoured", families=("llama",), also=("copy-differs",))
def ignore_by_class_name(e):
    e.quantization["ignore"].append("LlamaAttention")
    return unquantize_attention(e)


@fault("ignore-not-honoured", families=("llama",), also=("copy-differs",))
def ignore_by_an_unanchored_pattern(e):
    e.quantization["ignore"].append("re:self_attn")
    return unquantize_attention(e)


def unquantize_attention(e: Editor) -> str:
    for name in list(e.tensors):
        if ".self_attn." in name and name.endswith("weight"):
            e.tensors[name] = e.tensors[name].bfloat16()
        elif ".self_attn." in name:
            del e.tensors[name]
    return "self_attn"
