"""What ckptq itself knows about families: facts that no witness of `models.witnesses` can give.

Names that match `NEVER_QUANTIZED` stay unquantized in every family; the witnesses decide the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.checkpoint.open import Checkpoint

RopeOrder = Literal["half-split", "interleaved"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedExperts:
    """How one 3-D tensor holds the projections of all experts of a layer.

    `transposed`: stored as [E, in, out], where a Linear is [out, in].
    `interleaved`: gate and up alternate instead of standing one after the other.
    """

    transposed: bool
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What cannot be seen from names and shapes alone."""

    name: str
    model_types: tuple[str, ...] = ()
    rope: RopeOrder = "half-split"
    """Row order of q/k on disk. vLLM permutes an interleaved one while loading."""
    fused_experts: FusedExperts | None = None
    transposed_layers: bool = False
    """Layers store [in, out] (transformers' Conv1D), where a Linear is [out, in]."""
    layers_key: str = "num_hidden_layers"
    """Where the config says how many decoder layers there are."""


FAMILIES = (
    Family(
        name="llama4",
        model_types=("llama4", "llama4_text"),
        rope="interleaved",
        fused_experts=FusedExperts(transposed=True),
    ),
    Family(
        name="gpt-oss",
        model_types=("gpt_oss",),
        fused_experts=FusedExperts(transposed=True, interleaved=True),
    ),
    Family(
        name="qwen3-vl-moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        fused_experts=FusedExperts(transposed=True),
    ),
    Family(name="gpt2", model_types=("gpt2", "openai-gpt"), transposed_layers=True),
    # two attentions a layer, each of which counts as a hidden layer
    Family(name="longcat", model_types=("longcat_flash",), layers_key="num_layers"),
    Family(
        name="qwen3.5-moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
        fused_experts=FusedExperts(transposed=False),
    ),
)

COMMON = Family(name="common")


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a checkpoint's config.json, by its model_type."""
    model_type = config.get("model_type")
    return next((f for f in FAMILIES if model_type in f.model_types), COMMON)


@dataclass(frozen=True, slots=True)
class Rule:
    """A module whose name matches is never quantized, for this reason."""

    pattern: re.Pattern[str]
    reason: str


NEVER_QUANTIZED = tuple(
    Rule(re.compile(pattern), reason)
    for pattern, reason in (
        (
            r"(^|.*\.)(vision_model|vision_tower|visual|vision_embed\w*|image_\w+)(\.|$)",
            "vision tower",
        ),
        (
            r"(^|.*\.)(audio_tower|audio_model|speech_\w+|embed_audio|embed_vision)(\.|$)",
            "audio tower",
        ),
        (r"(^|.*\.)(multi_modal_projector|mm_projector|projector|connector)(\.|$)", "projector"),
        (r"(^|.*\.)(mtp|mtp_\w+|nextn\w*|eh_proj)(\.|$)", "multi-token prediction head"),
        (r".*\.(router|gate|shared_expert_gate|modality_router)(\.\w+)?$", "router"),
        (r"(^|.*\.)lora_\w+(\.|$)", "LoRA adapter"),
        (r".*(norm|layernorm|ln_\w+)\d*$", "norm"),
        (
            r"(^|.*\.)(embed_tokens|wte|wpe|word_embeddings|tok_embeddings|embed_\w+)(\.|$)",
            "embedding",
        ),
        (r"(^|.*\.)(lm_head|output|score|classifier)$", "output head"),
    )
)

LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?(?:layers|h|blocks))\.(?P<index>\d+)\.")


def in_layers(name: str, layers: str) -> re.Match[str] | None:
    """The match of a tensor that lies in the list of this name, with its `index`."""
    match = LAYER.match(name)
    return match if match and match["prefix"] == layers else None


def declared_layers(ckpt: Checkpoint) -> int | None:
    """Number of decoder layers in config.json."""
    declared = ckpt.text_config.get(family_of(ckpt.config).layers_key)
    return declared if isinstance(declared, int) else None


def count_layers(names: Iterable[str], prefix: str | None = None) -> int:
    """Number of layers in the tensor names, for this list or the longest one."""
    found = (LAYER.match(name) for name in names)
    indices = (int(m["index"]) for m in found if m and prefix in (None, m["prefix"]))
    return 1 + max(indices, default=-1)
