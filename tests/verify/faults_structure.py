"""Faults of names, shapes and config."""

from __future__ import annotations

import torch
from tiny.formats import FORMATS
from verify_checkpoints import HEAD_DIM, HEADS
from verify_faults import (
    ALL,
    ASYM,
    MOE,
    Fault,
    codes,
    collector,
    locals_of,
    mlp,
    module,
    q_proj,
    turn,
)

from ckptq.permute.effect import Part
from ckptq.quantize.formats import constants, quantize
from ckptq.recipes.args import Args
from ckptq.spec import spec_of

FAULTS: list[Fault] = []
fault = collector(FAULTS)


@fault("scale-missing", weights=tuple(FORMATS), families=ALL)
def drop_a_scale(e):
    name = f"{mlp(e)}.weight_scale"
    del e.tensors[name]
    return name


@fault("weight-missing", weights=("fp8-channel", "int4"), families=ALL)
def drop_codes(e):
    name = codes(e, mlp(e))
    del e.tensors[name]
    return name


@fault("tensor-missing", families=("llama", "llama4"))
def drop_a_norm(e):
    del e.tensors[e.named("model.norm.weight")]


@fault("zero-point-missing", weights=ASYM, families=ALL)
def drop_zero_points(e):
    name = f"{mlp(e)}.weight_zero_point"
    del e.tensors[name]
    return name


@fault("global-scale-missing", weights=("nvfp4",), families=("llama", "mixtral"))
def drop_a_global_scale(e):
    del e.tensors[f"{mlp(e)}.weight_global_scale"]


@fault("zero-point-extra", weights=("int4",), families=("llama",))
def add_a_zero_point(e):
    e.tensors[f"{q_proj(e)}.weight_zero_point"] = torch.zeros(32, 4, dtype=torch.int32)


@fault("g-idx", weights=("int4",), families=("llama", "mixtral"))
def add_g_idx(e):
    e.tensors[f"{q_proj(e)}.weight_g_idx"] = torch.arange(128, dtype=torch.int32)


@fault("tensor-unknown", families=("llama",))
def add_an_unknown_tensor(e):
    e.tensors["model.layers.0.self_attn.surprise"] = torch.ones(2)
    return "surprise"


@fault("tensor-extra", families=("llama",))
def add_a_linear(e):
    e.tensors["model.layers.0.self_attn.extra_proj.weight"] = torch.ones(128, 128).bfloat16()
    e.quantization["ignore"].append("model.layers.0.self_attn.extra_proj")
    return "extra_proj"


@fault("targeted-but-unquantized", families=("llama", "qwen3-moe"), weights=("fp8-channel", "int4"),
       also=("copy-differs",))  # fmt: skip
def leave_a_linear_unquantized(e):
    name = module(e, "layers.0.self_attn.o_proj")
    for local in locals_of(e, name):
        del e.tensors[local]
    e.tensors[f"{name}.weight"] = torch.zeros(128, 256).bfloat16()
    return name


@fault("ignored-but-quantized", families=ALL, weights=("fp8-channel", "int4"),
       also=("experts-differ",))  # fmt: skip
def ignore_a_quantized_linear(e):
    e.quantization["ignore"].append(mlp(e))
    return mlp(e)


@fault("untargeted", families=ALL)
def target_only_attention(e):
    e.group["targets"] = ["re:.*self_attn.*"]
    return mlp(e)


@fault("fused-set-split", families=("llama", "llama4"), also=("ignored-but-quantized",))
def leave_q_out_of_the_set(e):
    e.quantization["ignore"].append(q_proj(e))
    return q_proj(e)


@fault("never-quantized", families=("llama4",))
def quantize_the_router(e):
    name = module(e, "router")
    weight = e.tensors[f"{name}.weight"]
    e.tensors[f"{name}.weight"] = weight.to(torch.float8_e4m3fn)
    e.tensors[f"{name}.weight_scale"] = torch.ones(len(weight), 1).bfloat16()
    return name


@fault("head-untargeted", families=("llama",))
def quantize_the_head_by_class(e):
    weight = e.tensors["lm_head.weight"]
    e.tensors["lm_head.weight"] = (2 * weight).to(torch.float8_e4m3fn)
    e.tensors["lm_head.weight_scale"] = torch.full((len(weight), 1), 0.5).bfloat16()
    e.quantization["ignore"] = []
    return "lm_head"


@fault("orphan-scale", families=("llama",))
def leave_a_scale_behind(e):
    e.tensors["lm_head.weight_scale"] = torch.ones(128, 1).bfloat16()
    return "lm_head.weight_scale"


@fault("no-quantization-config", families=ALL, weights=("fp8-channel", "int4"))
def drop_the_config(e):
    del e.config["quantization_config"]


@fault("config-groups-missing", weights=("kv",), kv=True)
def drop_the_groups(e):
    del e.quantization["config_groups"]


@fault("status")
def forget_the_status(e):
    del e.quantization["quantization_status"]


@fault("format", weights=("fp8-channel", "int4"))
def declare_dense(e):
    e.group["format"] = e.quantization["format"] = "dense"


@fault("group-invalid")
def add_a_field(e):
    e.group["weights"]["wobble"] = 1


@fault("group-invalid")
def declare_outputs_that_are_no_object(e):
    e.group["output_activations"] = -1
    return "output_activations"


@fault("group-invalid", weights=("int4",))
def declare_the_wrong_format(e):
    e.group["format"] = "float-quantized"


@fault("codes-dtype", weights=("fp8-channel",), families=ALL)
def declare_int8_over_fp8(e):
    e.group["format"] = "int-quantized"
    e.group["weights"]["type"] = "int"
    return mlp(e)


@fault("group-size", weights=("int4", "int4-asym"), families=("llama", "llama4"),
       also=("zero-point-shape",))  # fmt: skip
def declare_another_group_size(e):
    e.group["weights"]["group_size"] = 64
    return mlp(e)


@fault("strategy", weights=("fp8-channel", "int8"))
def declare_per_tensor(e):
    e.group["weights"]["strategy"] = "tensor"
    return q_proj(e)


@fault("strategy", weights=("fp8-tensor",))
def declare_per_channel(e):
    e.group["weights"]["strategy"] = "channel"
    return q_proj(e)


@fault("actorder", weights=("int4",))
def declare_activation_order(e):
    e.group["weights"]["actorder"] = "group"


@fault("pattern-invalid")
def write_a_broken_pattern(e):
    e.quantization["ignore"].append("re:*")


@fault("target-unmatched")
def add_a_group_for_nothing(e):
    e.quantization["config_groups"]["other"] = {**e.group, "targets": ["re:.*nothing$"]}


@fault("scale-shape", weights=("fp8-channel", "int8"), families=("llama", "mixtral"))
def flatten_a_scale(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = e.tensors[name].flatten()
    return name


@fault("scale-dtype", weights=("fp8-channel", "int4"))
def store_scales_as_integers(e):
    name = f"{mlp(e)}.weight_scale"
    e.tensors[name] = e.tensors[name].to(torch.int8)
    return name


@fault("codes-transposed", families=("llama", "llama4"), weights=("fp8-channel", "int8"))
def transpose_codes(e):
    name = f"{module(e, 'layers.0.self_attn.o_proj')}.weight"
    e.tensors[name] = e.tensors[name].t()
    return name


@fault("zero-point-packing", weights=ASYM)
def pack_zero_points_along_columns(e):
    name = f"{q_proj(e)}.weight_zero_point"
    e.tensors[name] = torch.zeros(HEADS * HEAD_DIM, 1, dtype=torch.int32)
    return name


@fault("layer-missing", families=("llama", "qwen3-moe"), also=("tensor-missing", "expert-missing"))
def drop_a_layer(e):
    for name in list(e.tensors):
        if ".layers.1." in name:
            del e.tensors[name]


@fault("expert-missing", families=MOE, weights=("fp8-channel", "int4"))
def drop_an_expert(e):
    for name in list(e.tensors):
        if ".experts.2." in name:
            del e.tensors[name]
    return "experts"


@fault("experts-differ", families=MOE, also=("targeted-but-unquantized", "copy-differs"))
def leave_an_expert_unquantized(e):
    for name in list(e.tensors):
        if ".experts.2." in name and name.endswith("weight"):
            e.tensors[name] = e.tensors[name].bfloat16()
        elif ".experts.2." in name:
            del e.tensors[name]
    e.quantization["ignore"].append("re:.*experts.2..*")
    return "experts.2"


@fault("tied-head", also=("never-quantized", "head-untargeted", "config-note"))
def quantize_a_tied_head(e):
    e.config["tie_word_embeddings"] = True
    quantize_the_head_by_class(e)


@fault("config-differs", families=ALL)
def change_the_architecture(e):
    config = e.config.get("text_config", e.config)
    config["rms_norm_eps"] = 0.5


@fault("side-file-missing", families=("llama",))
def lose_the_tokenizer(e):
    (e.folder / "tokenizer.json").unlink()


@fault("copy-differs", families=("llama", "llama4"), weights=("fp8-channel", "int4"))
def change_a_norm(e):
    name = e.named("model.norm.weight")
    e.tensors[name] = e.tensors[name] * 1.5
    return name


@fault("copy-spec")
def change_a_dtype(e):
    e.tensors["model.norm.weight"] = e.tensors["model.norm.weight"].float()
    return "model.norm.weight"


@fault("copy-spec", families=("llama", "llama4"))
def add_an_axis(e):
    name = module(e, "embed_tokens") + ".weight"
    e.tensors[name] = e.tensors[name][None]
    return name


@fault("rope-zero-points", families=("llama4",), weights=ASYM)
def quantize_llama4_queries_asymmetrically(e):
    """Each tensor is right, and vLLM would permute the codes and not the zero points."""
    scheme = Args.read(e.group["weights"]).weight_scheme(e.group["format"], stored=True)
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = module(e, f"layers.0.self_attn.{projection}")
        weight = e.tensors.pop(f"{name}.weight")
        made = quantize(weight, scheme) | constants(spec_of(weight), scheme)
        e.tensors |= {f"{name}.{local}": tensor for local, tensor in made.items()}
        e.quantization["ignore"].remove(name)
    return q_proj(e)


@fault("rope-block-scales", families=("llama4",), weights=("fp8-block",))
def quantize_llama4_queries_by_blocks(e):
    quantize_llama4_queries_asymmetrically(e)
    return q_proj(e)


@fault("rope-order-mixed", families=("llama4",))
def mark_only_the_scales(e):
    e.metadata["ckptq.rope_order"] = "scales=half-split"
    e.config["ckptq"] = {"rope_order": "scales=half-split"}
    turn(e, (Part.SCALES,))


@fault("marks-contradict", families=("llama4",))
def mark_the_shards_alone(e):
    e.metadata["ckptq.rope_order"] = "half-split"
