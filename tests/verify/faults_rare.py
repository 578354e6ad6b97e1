"""Faults of all sorts that people seldom make."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file
from verify_faults import ALL, MOE, Fault, codes, collector, k_proj, mlp

FAULTS: list[Fault] = []
fault = collector(FAULTS)


@fault("stray-shard")
def leave_an_old_shard(e):
    save_file({"old.weight": torch.zeros(2)}, e.folder / "model-00001-of-00002.safetensors")


@fault("stray-weights")
def leave_other_weights_beside(e):
    """Where no index says which file counts."""
    name = next(n for n in e.tensors if n.endswith("norm.weight"))
    save_file({name: e.tensors[name] * 2}, e.folder / "older.safetensors")
    return name


@fault("expert-layouts-mixed", families=("llama4",), also=("tensor-unknown",))
def leave_fused_experts_beside(e):
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    e.tensors[name] = torch.zeros(4, 128, 256).bfloat16()
    return name


@fault("input-scale-missing", weights=("fp8-static",), families=ALL)
def drop_an_input_scale(e):
    name = f"{mlp(e)}.input_scale"
    del e.tensors[name]
    return name


@fault("input-scale-extra", families=("llama", "mixtral"))
def add_an_input_scale(e):
    name = f"{mlp(e)}.input_scale"
    e.tensors[name] = torch.ones(1).bfloat16()
    return name


@fault("input-scale-split", weights=("fp8-static",), families=MOE)
def calibrate_gate_and_up_apart(e):
    name = next(n for n in sorted(e.tensors) if re.search(r"experts\.1\.(up_proj|w3)\.input", n))
    e.tensors[name] = e.tensors[name] * 2
    return "experts.1"


@fault("fused-scales-differ", weights=("fp8-static",))
def calibrate_q_and_k_apart(e):
    e.tensors[f"{k_proj(e)}.input_scale"] *= 2
    return "q_proj.input_scale"


@fault("fused-scales-differ", weights=("nvfp4",), also=("scale-wrong", "weight-wrong"))
def give_k_another_global_scale(e):
    e.tensors[f"{k_proj(e)}.weight_global_scale"] *= 1.5
    return "q_proj.weight_global_scale"


@fault("codes-shape", weights=("fp8-channel", "int4"), families=("llama", "llama4"))
def cut_codes_short(e):
    name = codes(e, mlp(e))
    e.tensors[name] = e.tensors[name].view(torch.uint8)[:, :-4].contiguous().view(
        e.tensors[name].dtype)  # fmt: skip
    return name


@fault("block-rows", weights=("fp8-block",), also=("strategy", "scale-shape", "weight-wrong"))
def declare_blocks_of_96_rows(e):
    e.group["weights"]["block_structure"] = [96, 64]
    return "k_proj"


@fault("block-columns", weights=("fp8-block",), families=("llama", "mixtral"))
def declare_activations_in_groups_of_96_columns(e):
    eights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    e.group["input_activations"] = eights | {"strategy": "group", "group_size": 96}
    return "model.layers.0."


@fault("shape-missing", weights=("int4",))
def drop_a_weight_shape(e):
    name = f"{mlp(e)}.weight_shape"
    del e.tensors[name]
    return name


@fault("not-ignored", families=("llama",))
def ignore_nothing(e):
    e.quantization["ignore"] = []
    return "lm_head"


@fault("expert-names", families=("mixtral",), weights=("fp8-channel", "int4"))
def rename_experts_as_oneshot_does(e):
    names = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    for name in list(e.tensors):
        for old, new in names.items():
            if old in name:
                e.tensors[name.replace(old, new)] = e.tensors.pop(name)


@fault("kv-scale-dtype", kv=True)
def store_a_cache_scale_as_an_integer(e):
    name = e.named("layers.0.self_attn.v_scale")
    e.tensors[name] = e.tensors[name].to(torch.int32)
    return name


@fault("no-attention", kv=True, weights=("kv",), also=("kv-scale-orphan", "tensor-missing"))
def take_the_attention_away(e):
    for name in list(e.tensors):
        if ".self_attn." in name and not name.endswith("_scale"):
            del e.tensors[name]


@fault("q-scale-absent", kv=True, weights=("kv",), families=("llama", "llama4"))
def calibrate_no_queries(e):
    for name in list(e.tensors):
        if name.endswith("q_scale"):
            del e.tensors[name]


@fault("zero-point-range", weights=("int4-bytes",))
def write_a_zero_point_out_of_range(e):
    name = f"{mlp(e)}.weight_zero_point"
    e.tensors[name][0, 0] = 100
    return name


@fault("scale-outlier", kv=True, families=("llama",))
def calibrate_one_layer_far_off(e):
    name = e.named("layers.1.self_attn.k_scale")
    e.tensors[name] = e.tensors[name] * 2e-5
    return name
