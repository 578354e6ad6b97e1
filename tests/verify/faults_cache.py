"""Faults of attention and cache scales, and of values."""

from __future__ import annotations

import torch
from verify_checkpoints import HEADS
from verify_faults import ALL, Fault, codes, collector, mlp

FAULTS: list[Fault] = []
fault = collector(FAULTS)


@fault("kv-scale-missing", kv=True, families=ALL, weights=("fp8-channel", "kv"))
def drop_a_key_scale(e):
    name = e.named("layers.1.self_attn.k_scale")
    del e.tensors[name]
    return name


@fault("q-scale-missing", kv=True, families=ALL)
def drop_query_scales(e):
    for name in list(e.tensors):
        if name.endswith("q_scale"):
            del e.tensors[name]


@fault("kv-scheme-missing", kv=True, weights=("fp8-channel", "kv"))
def forget_the_cache_scheme(e):
    e.quantization["kv_cache_scheme"] = None


@fault("kv-scheme", kv=True)
def declare_a_four_bit_cache(e):
    e.quantization["kv_cache_scheme"]["num_bits"] = 4


@fault("kv-scheme", kv=True, also=("kv-scale-shape",))
def declare_different_strategies(e):
    e.quantization["kv_cache_scheme"]["strategy"] = "tensor"


@fault("attention-target", kv=True)
def target_attention_by_pattern(e):
    e.quantization["config_groups"]["attention"]["targets"] = ["re:.*self_attn$"]


@fault("kv-scale-shape", kv=True, families=ALL)
def store_a_key_scale_per_query_head(e):
    name = e.named("layers.0.self_attn.k_scale")
    e.tensors[name] = torch.full((HEADS, 1, 1), 0.01).bfloat16()
    return name


@fault("kv-scale-shape", kv=True)
def store_one_query_scale(e):
    name = e.named("layers.0.self_attn.q_scale")
    e.tensors[name] = torch.full((1,), 0.01).bfloat16()
    return name


@fault("vision-scale", kv=True, families=("llama4",), weights=("fp8-channel", "kv"))
def calibrate_the_vision_tower(e):
    name = "vision_model.model.layers.0.self_attn.k_scale"
    e.tensors[name] = torch.full((2, 1, 1), 0.01).bfloat16()
    return name


@fault("kv-scale-orphan", kv=True)
def calibrate_an_mlp(e):
    e.tensors["model.layers.0.mlp.k_scale"] = torch.full((1,), 0.01).bfloat16()
    return "mlp.k_scale"


@fault("scale-not-finite", weights=("fp8-channel", "int8", "int4"), families=ALL)
def write_nan_into_a_scale(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name][3, 0] = float("nan")
    return name


@fault("scale-not-positive", weights=("fp8-channel", "int4"), families=ALL)
def write_a_negative_scale(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name][3, 0] *= -1
    return name


@fault("scale-not-positive", kv=True, families=ALL, weights=("fp8-channel", "kv"))
def write_a_zero_query_scale(e):
    name = e.named("layers.0.self_attn.q_scale")
    e.tensors[name][-1] = 0.0
    return name


@fault("scale-uninitialised", kv=True, families=ALL, weights=("fp8-channel", "kv"))
def leave_query_scales_uninitialised(e):
    name = e.named("layers.0.self_attn.q_scale")
    e.tensors[name][-1] = 1.2e34
    return name


@fault("scales-all-one", kv=True, families=("llama", "llama4"), weights=("fp8-channel", "kv"))
def leave_the_scales_at_one(e):
    for name in e.tensors:
        if name.endswith("v_scale"):
            e.tensors[name] = torch.ones_like(e.tensors[name])
    return "v_scale"


@fault("scales-all-one", weights=("fp8-channel", "int4"), families=ALL)
def leave_weight_scales_at_one(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = torch.ones_like(e.tensors[name])
    return name


@fault("input-scale-missing", weights=("nvfp4",), families=("llama", "mixtral"))
def declare_nvfp4_activations(e):
    e.group["input_activations"] = {**e.group["weights"], "dynamic": "local"}
    return "input_global_scale"


@fault("codes-nan", families=ALL, weights=("fp8-channel", "fp8-tensor", "mxfp8"))
def write_nan_codes(e):
    name = codes(e, mlp(e))
    e.tensors[name].view(torch.uint8)[5, 7] = 0x7F
    return name


@fault("weight-shape-value", weights=("int4",), families=("llama", "mixtral"))
def write_another_shape(e):
    name = f"{mlp(e)}.weight_shape"
    e.tensors[name] = e.tensors[name].flip(0) + 1
    return name


@fault("scale-not-finite", weights=("mxfp8", "mxfp4"))
def write_an_exponent_that_is_nan(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name][0, 0] = 255
    return name
