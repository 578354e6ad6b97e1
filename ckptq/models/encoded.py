"""The door to weights that a checkpoint stores quantized, whoever made it.

Each maker's format has a module of its own in `quantized/`, chosen by config.json's `quant_method`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.models.quantized.auto_awq import read_awq
from ckptq.models.quantized.auto_gptq import read_gptq
from ckptq.models.quantized.compressed import packed_columns, read_compressed
from ckptq.models.quantized.encoded_weight import (
    Encoded,
    Held,
    HeldWhole,
    Take,
    decode,
    decode_rows,
)
from ckptq.models.quantized.fp8_scales import read_fp8
from ckptq.models.quantized.modelopt import read_modelopt
from ckptq.models.quantized.mxfp4_blocks import read_mxfp4

__all__ = [
    "BELONGS_TO_SCHEME",
    "Encoded",
    "Held",
    "HeldWhole",
    "Take",
    "decode",
    "decode_rows",
    "packed_columns",
    "read_encoded",
    "unquantized_config",
]

CONFIG_KEYS = ("quantization_config", "compression_config")

BELONGS_TO_SCHEME = re.compile(
    r".*\.(input_scale|activation_scale|(input|activation)_scale_ub|input_zero_point|input_global_scale|output_scale"
    r"|[qkv]_scale|[qkv]_zero_point|kv_scale)$"
)
"""Tensors without a meaning once the weights are dequantized."""

Reader = Callable[[Checkpoint, str], Mapping[str, Encoded]]
"""(checkpoint, the model's dtype) -> its quantized weights by module."""

READERS: Mapping[str, Reader] = {
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "gptq": read_gptq,
    "awq": read_awq,
    "modelopt": read_modelopt,
    "mxfp4": read_mxfp4,
}
"""quant_method -> what reads it."""

REFUSED: Mapping[str, str] = {
    "bitsandbytes": "its codebooks and nested scales fit none of vLLM's other formats",
}
"""quant_method -> why it is not read."""


def read_encoded(ckpt: Checkpoint) -> dict[str, Encoded]:
    """Module name -> its quantized weight, for all that the checkpoint stores quantized. Experts in
    one tensor have that tensor's name.

    Empty for an unquantized checkpoint. PlanError for an unsupported method or scheme, SourceError
    for tensors that do not fit the scheme.
    """
    config = ckpt.quantization_config
    if config is None:
        _refuse_odd_config(ckpt)
        _refuse_undeclared(ckpt)
        return {}
    method = config.get("quant_method")
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise PlanError(_unreadable(ckpt, method))
    return dict(reader(ckpt, _weight_dtype(ckpt)))


def _unreadable(ckpt: Checkpoint, method: object) -> str:
    why = REFUSED.get(method) if isinstance(method, str) else None
    return (
        f"{ckpt.path}: quantized with {method!r}, which ckptq cannot read"
        f"{f' ({why})' if why else ''}; start from the unquantized model, or from one quantized "
        f"with {', '.join(READERS)}"
    )


def _weight_dtype(ckpt: Checkpoint) -> str:
    """The dtype in which the model runs, from its config."""
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    for config in (ckpt.config, ckpt.text_config):
        declared = config.get("dtype", config.get("torch_dtype"))
        if isinstance(declared, str) and declared in names:
            return names[declared]
    return "BF16"


def _refuse_odd_config(ckpt: Checkpoint) -> None:
    """SourceError for a quantization config that is not an object."""
    for holder in (ckpt.config, ckpt.text_config):
        for key in CONFIG_KEYS:
            if holder.get(key):
                raise SourceError(
                    f"{ckpt.path / CONFIG}: {key} is a {type(holder[key]).__name__}, "
                    "expected an object"
                )


UNDECLARED = re.compile(r".*(\.qweight|\.weight_packed|_blocks)$")
"""Tensors that hold nothing but codes."""


def _refuse_undeclared(ckpt: Checkpoint) -> None:
    """SourceError for codes in a checkpoint that does not say how it is quantized."""
    for name, tensor in ckpt.tensors.items():
        if UNDECLARED.match(name) and tensor.spec.dtype in ("I32", "U8"):
            raise SourceError(
                f"{tensor.file}: tensor {name!r} holds {tensor.spec} codes, but {CONFIG} has no "
                "quantization_config that says what they are"
            )


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model without its quantization, wherever that stands."""
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(plain.get("text_config"), dict):
        text = plain["text_config"]
        plain["text_config"] = {k: value for k, value in text.items() if k not in CONFIG_KEYS}
    return plain
