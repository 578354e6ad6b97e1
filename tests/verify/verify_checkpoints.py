"""Tiny checkpoints of every family and format, as the converter makes them; an editor for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny.formats import FORMATS, FP8, RARE
from tiny.models import TOKENS, causal, image_tokens, llama4

from ckptq.calibrate.request import ScalesSource
from ckptq.calibrate.scales import Record, Scales
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.output import RunOptions
from ckptq.convert.run import write_quantized
from ckptq.plan.make import make_plan
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group, Recipe
from ckptq.recipes.spelled import spelled

HEADS, KV_HEADS, HEAD_DIM, LAYERS, EXPERTS = 4, 2, 64, 2, 4

TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": 256,
    "vocab_size": 128,
    **TOKENS,
}


TURNS = ["sliding_attention", "full_attention"]
LLAMA4 = TEXT | {
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_local_experts": EXPERTS,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
}
"""A dense and an MoE layer; the experts are square, so that a forgotten transpose shows in no
shape."""
QWEN3_MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
GEMMA4 = {
    "layer_types": TURNS,
    "global_head_dim": 2 * HEAD_DIM,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": TEXT["vocab_size"],
    "hidden_size_per_layer_input": 0,
}
"""The last layer is global: one key/value head of twice the size, whose keys are its values."""
GPT_OSS = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "layer_types": TURNS}

FAMILIES = {
    "llama": partial(causal, "Llama", TEXT),
    "llama4": partial(llama4, LLAMA4, **image_tokens(120, 121, 122)),
    "mixtral": partial(causal, "Mixtral", TEXT, num_local_experts=EXPERTS),
    "qwen3-moe": partial(causal, "Qwen3Moe", TEXT, **QWEN3_MOE),
    "gemma4": partial(causal, "Gemma4", TEXT, **GEMMA4),
}

MORE = {
    # everything has a bias, the experts too
    "gpt-oss": partial(causal, "GptOss", TEXT, **GPT_OSS),
    # calls its activation by a name of its own
    "gemma3": partial(causal, "Gemma3", TEXT, layer_types=TURNS),
    # q, k and v have biases
    "qwen2": partial(causal, "Qwen2", TEXT),
}
"""Families that a few faults need."""

ATTENTION = {
    "LlamaForCausalLM": "LlamaAttention",
    "Llama4ForConditionalGeneration": "Llama4TextAttention",
    "MixtralForCausalLM": "MixtralAttention",
    "Qwen3MoeForCausalLM": "Qwen3MoeAttention",
    "Gemma4ForCausalLM": "Gemma4TextAttention",
    "GptOssForCausalLM": "GptOssAttention",
    "Gemma3ForCausalLM": "Gemma3Attention",
    "Qwen2ForCausalLM": "Qwen2Attention",
}
"""The class that calibration would have found, by architecture."""

KV = FP8 | {"strategy": "attn_head", "observer": "static_minmax"}
PER_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True,
             "dynamic": True}  # fmt: skip
INPUTS = {"fp8-channel": PER_TOKEN,
          **dict.fromkeys(("int8", "int4-bytes"), PER_TOKEN | {"type": "int"}),
          "fp8-static": FP8 | {"strategy": "tensor", "observer": "static_minmax"}}  # fmt: skip


def recipe(weights: str, *, kv: bool = False, ignore: tuple[str, ...] = ()) -> Recipe:
    """Linears in one format; with `kv`, scales of attention and cache per head."""
    format, args = (FORMATS | RARE)[weights]
    linear = Group(
        name="linear",
        targets=("Linear",),
        weights=Args.read(args),
        input_activations=Args.read(INPUTS[weights]) if weights in INPUTS else None,
        format=format,
    )
    attention = Group(
        name="attention",
        targets=("re:.*self_attn$",),
        input_activations=Args.read(KV),
        format="dense",
    )
    made = Recipe(
        name=weights,
        groups=(attention, linear) if kv else (linear,),
        ignore=("lm_head", *ignore),
        kv_cache_scheme=Args.read(KV) if kv else None,
        text="",
    )
    return spelled_out(made)


def spelled_out(made: Recipe) -> Recipe:
    """With the text that stands for it, as a recipe of a user's has."""
    return replace(made, text=spelled(made))


def kv_recipe() -> Recipe:
    """Cache scales only."""
    return spelled_out(Recipe(name="kv", kv_cache_scheme=Args.read(KV), text=""))


def save_source(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = (FAMILIES | MORE)[family]().to(dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}\n")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return folder


def convert(
    source: Path,
    out: Path,
    what: Recipe,
    shard_bytes: int = 1 << 40,
) -> Path:
    """As `ckptq quantize` does, with made-up scales in the place of calibrated ones."""
    ckpt = open_checkpoint(source)
    plan = make_plan(ckpt, what, shard_bytes=shard_bytes)

    needed = plan.attention is not None or plan.inputs
    scales = None
    if needed:
        attention = ATTENTION[ckpt.config["architectures"][0]]
        scales = given(made_up_scales(plan, attention))
    write_quantized(ckpt, plan, out, arguments={}, options=RunOptions(workers=2), scales=scales)
    return out


def given(scales: Scales) -> ScalesSource:
    """As a file of scales is given to a conversion."""
    return ScalesSource(arguments={}, load=lambda folder: scales)


def made_up_scales(plan: Any, attention: str) -> Scales:
    """Different for every head and layer, as real ones are."""
    generator = torch.Generator().manual_seed(1)
    specs = {n: s for unit in plan.units for n, s in unit.scales.items()}
    tensors = {
        name: (0.01 * torch.rand(spec.shape, generator=generator) + 0.001).bfloat16()
        for name, spec in specs.items()
    }
    # what is fused shares its input, and so the scale of it
    parents = {name: name.rsplit(".", 2)[0] for name in tensors if name.endswith("input_scale")}
    first = {parent: name for name, parent in reversed(parents.items())}
    tensors |= {name: tensors[first[parent]].clone() for name, parent in parents.items()}
    made = Record(
        model="tiny", source_fingerprint="", strategy="attn_head", observer="static_minmax",
        input_observer="static_minmax",
        text="", samples=1, tokens=1, seq_len=1, batch_size=1, seed=0, token_digest="",
        attention=dict.fromkeys(plan.attention.scales if plan.attention else (), attention),
    )  # fmt: skip
    return Scales(tensors=tensors, statistics={}, made=made)


@dataclass
class Editor:
    """A checkpoint of one shard in memory, to be changed and written back."""

    folder: Path
    tensors: dict[str, torch.Tensor] = field(init=False)
    config: dict[str, Any] = field(init=False)
    metadata: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        with safe_open(self.folder / "model.safetensors", framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata() or {}
        self.config = json.loads((self.folder / "config.json").read_text())

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def group(self) -> dict[str, Any]:
        """The group of the Linears."""
        return self.quantization["config_groups"]["linear"]

    def named(self, suffix: str) -> str:
        """The one tensor, or the first, whose name ends so."""
        return next(name for name in sorted(self.tensors) if name.endswith(suffix))

    def save(self) -> Path:
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        save_file(tensors, self.folder / "model.safetensors", metadata=self.metadata)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        return self.folder


def copy_of(folder: Path, out: Path) -> Editor:
    shutil.copytree(folder, out)
    return Editor(out)
