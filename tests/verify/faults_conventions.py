"""Faults as a stranger brings them: other tools' conventions, other models' files, half a file."""

from __future__ import annotations

import json
import re

import torch
from safetensors.torch import save_file
from tiny.formats import FORMATS
from verify_checkpoints import FAMILIES, Editor
from verify_faults import ALL, ASYM, Fault, codes, collector, k_proj, mlp, module, q_proj

FAULTS: list[Fault] = []
fault = collector(FAULTS)

LONE_SCALES = ("fp8-tensor", "fp8-static")
"""One scale for a weight does not say which of its rows are zeros."""

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


@fault("scale-wrong", families=ALL, weights=("fp8-channel", "fp8-block", "int8", "int4", "nvfp4"))
def double_a_scale(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = (2 * e.tensors[name].float()).to(e.tensors[name].dtype)
    return name


@fault("scale-wrong", weights=("fp8-channel", "fp8-tensor"))
def scale_to_240_instead_of_448(e):
    """As E4M3 of another range, which some GPUs have, would want it."""
    for name in e.tensors:
        if name.endswith("weight_scale"):
            e.tensors[name] = e.tensors[name] * (448 / 240)
    return q_proj(e)


@fault("scale-wrong", weights=("mxfp8", "mxfp4"), families=("llama", "mixtral"))
def bias_exponents_by_one_more(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = e.tensors[name] + 1
    return name


@fault("scale-wrong", weights=("nvfp4",))
def scale_the_global_scale(e):
    """Found as wrong scales, because with the set's other members nothing is merged here."""
    name = f"{mlp(e)}.weight_global_scale"
    e.tensors[name] = e.tensors[name] * 6
    return mlp(e)


@fault(
    "nibbles-swapped", weights=("int4", "int4-asym", "int4-channel"), families=("llama", "mixtral")
)
def pack_in_the_order_of_autoawq(e):
    for name in e.tensors:
        if name.endswith("weight_packed"):
            word = e.tensors[name]
            e.tensors[name] = sum(
                (word >> 4 * column & 15) << 4 * place for place, column in enumerate(AWQ)
            ).to(torch.int32)
    return mlp(e)


@fault("nibbles-swapped", weights=("int4",), families=("llama", "qwen3-moe"))
def pack_the_last_code_first(e):
    name = codes(e, mlp(e))
    word = e.tensors[name]
    turned = sum((word >> 4 * place & 15) << 4 * (7 - place) for place in range(8))
    e.tensors[name] = turned.to(torch.int32)
    return name


@fault("zero-points-offset", weights=ASYM, families=("llama", "qwen3-moe"))
def store_zero_points_plus_one(e):
    name = f"{mlp(e)}.weight_zero_point"
    b = e.tensors[name].contiguous().view(torch.uint8)
    more = ((b & 15) + 1 & 15) | ((b >> 4) + 1 & 15) << 4
    e.tensors[name] = more.to(torch.uint8).view(torch.int32)
    return name


@fault("zero-points-wrong", weights=ASYM, families=ALL)
def store_zero_points_of_a_symmetric_scheme(e):
    name = f"{mlp(e)}.weight_zero_point"
    e.tensors[name] = torch.full_like(e.tensors[name], -0x77777778)
    return name


@fault("zero-points-of-another", weights=ASYM, families=("llama", "qwen3-moe"))
def give_a_layer_the_zero_points_of_the_next(e):
    name = f"{mlp(e)}.weight_zero_point"
    e.tensors[name] = e.tensors[name.replace("layers.0", "layers.1")].clone()
    return name


@fault("codes-transposed", families=("llama4",), weights=("fp8-channel", "int8"))
def transpose_the_codes_of_a_square_weight(e):
    name = f"{module(e, 'experts.1.down_proj')}.weight"
    turned = e.tensors[name].view(torch.uint8).t().contiguous()
    e.tensors[name] = turned.view(e.tensors[name].dtype)
    return name


@fault("rows-moved", families=("llama4", "qwen3-moe"), weights=("fp8-channel", "int4"))
def take_gate_and_up_for_interleaved(e):
    """Even rows of the fused weight as gate, odd ones as up, as GPT-OSS has them."""
    gate = mlp(e, "gate")
    parts = (gate, gate.replace("gate_proj", "up_proj"))
    for local in (codes(e, gate).rpartition(".")[2], "weight_scale"):
        held = [e.tensors[f"{part}.{local}"] for part in parts]
        both = torch.cat([tensor.view(torch.uint8) for tensor in held])
        for offset, part in enumerate(parts):
            e.tensors[f"{part}.{local}"] = both[offset::2].contiguous().view(held[0].dtype)
    return gate


@fault("rows-moved", weights=("int8",), families=("llama", "mixtral"))
def turn_the_sign(e):
    name = codes(e, mlp(e))
    e.tensors[name] = -e.tensors[name].clamp(min=-127)
    return name


@fault("misplaced", families=("qwen3-moe",), weights=("fp8-channel", "int4"))
def take_an_experts_gate_from_another_layer(e):
    gate = mlp(e, "gate")
    for name in list(e.tensors):
        if name.startswith(f"{gate}."):
            e.tensors[name] = e.tensors[name.replace("layers.0", "layers.1")].clone()
    return gate


@fault("scale-of-another", families=("llama", "mixtral"), weights=("fp8-channel", "int4"))
def take_the_scales_of_the_next_layer(e):
    name = f"{k_proj(e)}.weight_scale"
    e.tensors[name] = e.tensors[name.replace("layers.0", "layers.1")].clone()
    return name


@fault("codes-empty", families=ALL, weights=tuple(w for w in FORMATS if w not in LONE_SCALES))
def lose_the_end_of_a_download(e):
    """The file has its full length, and zeros where nothing arrived."""
    name = codes(e, mlp(e))
    e.tensors[name].view(torch.uint8)[-70:] = 0
    return name


@fault("codes-dtype", families=("llama", "mixtral"))
def store_e5m2(e):
    for name in list(e.tensors):
        if e.tensors[name].dtype == torch.float8_e4m3fn:
            e.tensors[name] = e.tensors[name].float().to(torch.float8_e5m2)
    return mlp(e)


@fault("codes-dtype", weights=("int8",))
def store_unsigned_codes(e):
    name = codes(e, mlp(e))
    e.tensors[name] = (e.tensors[name].to(torch.int16) + 128).to(torch.uint8)
    return name


@fault("quant-method", weights=("fp8-channel", "int4"))
def call_it_fp8(e):
    e.quantization["quant_method"] = "fp8"
    return "quant_method"


@fault("quant-method")
def forget_the_method(e):
    del e.quantization["quant_method"]


@fault("target-class")
def target_the_class_in_small_letters(e):
    e.group["targets"] = ["linear"]


@fault("config-shapes", families=ALL, also=("config-differs",))
def declare_another_vocabulary(e):
    e.config.get("text_config", e.config)["vocab_size"] = 512


@fault("config-differs", families=("llama", "mixtral"))
def declare_more_key_heads(e):
    e.config["num_key_value_heads"] = 4


@fault("names-moved", families=("llama", "mixtral"), also=("target-unmatched",))
def lose_the_prefix(e):
    e.tensors = {re.sub(r"^model\.layers", "layers", name): t for name, t in e.tensors.items()}
    return "layers"


@fault(
    "names-moved",
    families=("llama4",),
    also=("kv-scale-orphan",),
)
def name_layers_as_a_newer_release_does(e):
    old, new = "language_model.model.", "model.language_model."
    e.tensors = {name.replace(old, new): tensor for name, tensor in e.tensors.items()}
    return "layers"


@fault("tied-head")
def tie_a_head_that_is_not_the_embedding(e):
    e.config["tie_word_embeddings"] = True
    return "lm_head"


@fault("config-differs", families=("llama",), also=("layer-missing", "config-shapes"))
def put_another_models_config_beside(e):
    other = FAMILIES["llama"]().config.to_dict() | {"num_hidden_layers": 3, "head_dim": 32}
    e.config = {**e.config, **other, "quantization_config": e.quantization}


def two_shards(e, named, there=None):
    """The norm in a shard of its own, which the index calls `named`."""
    norm = module(e, "norm") + ".weight"
    tensor = e.tensors.pop(norm)
    if there is not None:
        save_file({norm: tensor}, e.folder / there)
    weight_map = {**dict.fromkeys(e.tensors, "model.safetensors"), norm: named}
    text = json.dumps({"weight_map": weight_map})
    (e.folder / "model.safetensors.index.json").write_text(text)
    return norm


@fault("index-mismatch")
def rename_a_shard(e):
    return two_shards(e, "model-00002-of-00002.safetensors", there="model-2.safetensors")


@fault("index-mismatch", also=("tensor-missing",))
def lose_a_shard(e):
    return two_shards(e, "model-00002-of-00002.safetensors")


@fault("index-mismatch", families=ALL)
def seek_a_tensor_in_another_shard(e):
    """The file that holds it is there, and the index sends a loader to the other one."""
    norm = module(e, "norm") + ".weight"
    save_file({norm: e.tensors.pop(norm)}, e.folder / "model-2.safetensors")
    weight_map = dict.fromkeys(e.tensors, "model.safetensors")
    weight_map |= {norm: "model-2.safetensors", codes(e, mlp(e)): "model-2.safetensors"}
    text = json.dumps({"weight_map": weight_map})
    (e.folder / "model.safetensors.index.json").write_text(text)
    return f"{mlp(e)}.weight"


@fault("scale-not-positive", families=("llama", "qwen3-moe"))
def write_a_negative_zero(e: Editor):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name][3] = -0.0
    return name


@fault("scale-not-finite", kv=True, weights=("fp8-channel", "kv"), families=ALL)
def write_nan_for_one_head(e):
    name = e.named("layers.0.self_attn.v_scale")
    e.tensors[name][-1] = float("nan")
    return name


@fault("heads-alike", kv=True, weights=("fp8-channel", "kv"))
def spread_a_layers_scale_over_its_heads(e):
    for name in e.tensors:
        if name.endswith(("q_scale", "k_scale", "v_scale")):
            e.tensors[name] = e.tensors[name].amax().expand_as(e.tensors[name]).clone()


@fault("sparsity", families=("llama", "mixtral"))
def declare_sparsity(e):
    e.quantization["sparsity_config"] = {"format": "dense", "sparsity_structure": "2:4"}
    return "sparsity_config"


@fault("transforms", families=("llama", "mixtral"))
def declare_a_rotation(e):
    apply = [{"targets": ["re:.*o_proj$"], "location": "input"}]
    groups = {"R1": {"type": "hadamard", "apply": apply}}
    e.quantization["transform_config"] = {"config_groups": groups}
    return "transform_config"
