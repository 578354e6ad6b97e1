"""Faults to inject into a good checkpoint: each with the code by which `verify` must name it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from verify_checkpoints import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, WEIGHTS, Editor

from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Move, Part, Projection, effect_on
from ckptq.permute.order import Heads, RopeOrder
from ckptq.quantize.formats import constants, quantize
from ckptq.quantize.scheme import WeightScheme
from ckptq.spec import spec_of

ALL = tuple(FAMILIES)
MOE = ("llama4", "mixtral", "qwen3-moe")
PER_ROW = ("fp8-channel", "int8", "int4", "int4-channel", "int8-packed", "mxfp4", "nvfp4")
GROUPED = ("int4", "int4-asym", "mxfp8", "mxfp4", "nvfp4")
ASYM = ("int4-asym",)
NIBBLES = ("int4", "int4-asym", "int4-channel", "mxfp4", "nvfp4")
MODULES = "model.layers.0.self_attn"


@dataclass(frozen=True)
class Fault:
    """One way to break a checkpoint."""

    name: str
    code: str
    inject: Callable[[Editor], str | None]
    """Breaks it; gives a part of the name of the tensor that must be named."""
    weights: tuple[str, ...] = ("fp8-channel",)
    families: tuple[str, ...] = ("llama",)
    kv: bool = False
    also: tuple[str, ...] = ()
    """Codes that may come along, because one thing that is wrong can be wrong in two ways."""


FAULTS: list[Fault] = []


def fault(code: str, **options):
    def keep(inject: Callable[[Editor], str | None]) -> Callable[[Editor], str | None]:
        name = inject.__name__.replace("_", "-")
        FAULTS.append(Fault(name=name, code=code, inject=inject, **options))
        return inject

    return keep


def q_proj(e: Editor, layer: int = 0) -> str:
    return module(e, f"layers.{layer}.self_attn.q_proj")


def k_proj(e: Editor) -> str:
    return module(e, "layers.0.self_attn.k_proj")


def module(e: Editor, suffix: str) -> str:
    """The language model's module of this name."""
    found = (n.rpartition(".")[0] for n in e.tensors if "vision" not in n)
    return next(name for name in found if name.endswith(suffix))


def mlp(e: Editor, projection: str = "down") -> str:
    """A Linear of an MLP that is not fused with others, or of expert 1."""
    names = {"down": ("down_proj", "w2"), "gate": ("gate_proj", "w1"), "up": ("up_proj", "w3")}
    pattern = rf".*(mlp|feed_forward|experts\.1)\.({'|'.join(names[projection])})\.weight_scale$"
    return next(n for n in sorted(e.tensors) if re.match(pattern, n)).removesuffix(".weight_scale")


def codes(e: Editor, name: str) -> str:
    packed = f"{name}.weight_packed"
    return packed if packed in e.tensors else f"{name}.weight"


def locals_of(e: Editor, name: str) -> list[str]:
    return [n for n in e.tensors if n.rpartition(".")[0] == name]


def swap(e: Editor, a: str, b: str) -> None:
    e.tensors[a], e.tensors[b] = e.tensors[b], e.tensors[a]


# names, shapes, config


@fault("scale-missing", weights=tuple(WEIGHTS), families=ALL)
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
    scheme = WeightScheme.from_args(e.group["weights"], e.group["format"], stored=True)
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


# attention and cache


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


# values


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
    e.tensors[name][1] = 0.0
    return name


@fault("scale-uninitialised", kv=True, families=ALL, weights=("fp8-channel", "kv"))
def leave_query_scales_uninitialised(e):
    name = e.named("layers.0.self_attn.q_scale")
    e.tensors[name][1] = 1.2e34
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


# round trip


@fault("codes-corrupt", weights=tuple(WEIGHTS), families=ALL)
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


def turn(e: Editor, parts: tuple[Part, ...], to: RopeOrder = RopeOrder.HALF_SPLIT) -> None:
    """Put some parts of all q and k into another RoPE order, as somebody's tool might."""
    sides = (("q_proj", Heads(HEADS, HEAD_DIM)), ("k_proj", Heads(KV_HEADS, HEAD_DIM)))
    for name in list(e.tensors):
        for projection, heads in sides:
            parent, _, local = name.rpartition(".")
            if not parent.endswith(projection) or "vision" in name:
                continue
            effect = effect_on(local, spec_of(e.tensors[name]), Projection(parent, heads, bits=4))
            if effect.part in parts and effect.move is not Move.KEPT:
                e.tensors[name] = permute_tensor(e.tensors[name], effect, to)


ROPE_WEIGHTS = ("fp8-channel", "int8", "int4", "int4-channel", "mxfp4", "nvfp4")


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
    from ckptq.verify.stored_linear import source_rows

    source = Path((e.folder.parent / "source").read_text())
    name = module(e, "experts.1.down_proj")
    view = read_layout(open_checkpoint(source)).linears[name].weight
    with Files() as files:
        weight = source_rows(files, view)(0, 128).t().contiguous()
    scheme = WeightScheme.from_args(e.group["weights"], e.group["format"], stored=True)
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


# rarer ones


@fault("stray-shard")
def leave_an_old_shard(e):
    save_file({"old.weight": torch.zeros(2)}, e.folder / "model-00001-of-00002.safetensors")


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
