"""compressed-tensors' presets as recipes, in the layout that vLLM reads.

compressed-tensors infers "int-quantized" for any integer weights whose inputs are quantized too. Of
those below 8 bits vLLM 0.32 reads that layout for W4A8 alone; the others it reads packed (Humming's
WNA8 and WNA4, W4A8 FP8 on Hopper). They get the format spelled out, for llm-compressor as for us.
"""

from __future__ import annotations

from typing import Any

import yaml

from ckptq.errors import UsageError

EMPTY = "UNQUANTIZED"
PACKED = "pack-quantized"


def preset_text(preset: str) -> str:
    """A recipe in llm-compressor's dialect for a preset, named in capitals.

    UsageError for the one that quantizes nothing.
    """
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    if preset == EMPTY:
        raise UsageError(f"scheme {EMPTY} is compressed-tensors' preset that quantizes nothing")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if is_unread(scheme.weights):
        raise UsageError(f"scheme {preset}: vLLM 0.32 has no class that reads weights in FP6")
    if not needs_packing(scheme):
        return _recipe({"targets": ["Linear"], "scheme": preset})
    group = scheme.model_dump(mode="json", exclude_none=True)
    return _recipe({"config_groups": {"group_0": {**_filled(group), "format": PACKED}}})


def preset_names() -> list[str]:
    """Those that are schemes."""
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    return [
        name
        for name, fields in PRESET_SCHEMES.items()
        if name != EMPTY and not is_unread(fields["weights"])
    ]


def is_unread(weights: Any) -> bool:
    """FP6, which came with compressed-tensors 0.20."""
    return bool(weights.type == "float" and weights.num_bits == 6)


def needs_packing(scheme: Any) -> bool:
    """Whether vLLM reads a preset packed, where compressed-tensors would not pack it."""
    weights, inputs = scheme.weights, scheme.input_activations
    if inputs is None or weights.type != "int" or weights.num_bits == 8:
        return False
    return (weights.num_bits, inputs.num_bits, str(inputs.type)) != (4, 8, "int")


def _filled(group: dict[str, Any]) -> dict[str, Any]:
    """Without empty dicts and nulls, which have no effect."""
    return {
        key: _filled(value) if isinstance(value, dict) else value
        for key, value in group.items()
        if value not in ({}, None)
    }


def _recipe(modifier: dict[str, Any]) -> str:
    modifier = {**modifier, "ignore": ["lm_head"]}
    stages = {"quantization_stage": {"quantization_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(stages, sort_keys=False)
