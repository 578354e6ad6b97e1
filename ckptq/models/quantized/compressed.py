"""Linears that compressed-tensors has quantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import read_tensor
from ckptq.engines.vllm import group_of
from ckptq.errors import PlanError, SourceError
from ckptq.models.quantized.encoded_weight import CODES, Encoded
from ckptq.models.quantized.readable import check_readable
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.declared import Declared, declared
from ckptq.spec import TensorSpec

SCALE, PACKED = "weight_scale", "weight_packed"

LOCAL = (
    *("weight", PACKED, SCALE, "weight_zero_point", "weight_shape"),
    "weight_global_scale",
)


def read_compressed(ckpt: Checkpoint, dtype: str) -> dict[str, Encoded]:
    """Module name -> its quantized weight; `dtype` is the model's.

    PlanError for an unsupported scheme, SourceError for tensors that do not fit theirs.
    """
    indexed = next((name for name in ckpt.tensors if name.endswith("weight_g_idx")), None)
    if indexed:
        raise PlanError(
            f"{ckpt.path}: {indexed}: groups in activation order (g_idx) are not supported"
        )
    said = declared(ckpt)
    found = {}
    for module, tensors in _modules(ckpt):
        scheme = _scheme(ckpt, said, module)
        spec = TensorSpec(dtype, _shape(module, tensors, scheme))
        check_readable(module, tensors, scheme, spec)
        found[module] = Encoded(name=module, tensors=tensors, scheme=scheme, spec=spec)
    return found


def _modules(ckpt: Checkpoint) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Modules that have a weight scale, each with its tensors by local name. SourceError for packed
    codes without one: copied, they would pass for a module that nobody has quantized."""
    for name in ckpt.tensors:
        module, _, local = name.rpartition(".")
        if local == PACKED and f"{module}.{SCALE}" not in ckpt.tensors:
            raise SourceError(f"{ckpt.path}: found {name} but no {module}.{SCALE}")
        if local != SCALE:
            continue
        parts = {part: ckpt.tensors.get(f"{module}.{part}") for part in LOCAL}
        tensors = {part: tensor for part, tensor in parts.items() if tensor is not None}
        if not any(code in tensors for code in CODES):
            raise SourceError(f"{ckpt.path}: found {name} but no {module}.weight")
        yield module, tensors


def _scheme(ckpt: Checkpoint, said: Declared, module: str) -> WeightScheme:
    group = group_of(said, module)
    if group is None:
        raise SourceError(
            f"{ckpt.path}: {module} has a weight_scale, but no config group targets it"
        )
    return group.weight_scheme(stored=True)


def _shape(
    module: str, tensors: Mapping[str, StoredTensor], scheme: WeightScheme
) -> tuple[int, int]:
    """[R, C] of the weight, from the shapes of what is stored."""
    code = next(tensors[name] for name in CODES if name in tensors)
    if len(code.spec.shape) != 2:
        raise SourceError(f"{code.file}: {code.name} is {code.spec}, expected a matrix")
    rows, columns = code.spec.shape
    if PACKED not in tensors:
        return rows, columns
    known = packed_columns(columns, scheme, tensors[SCALE])
    if known is None and "weight_shape" in tensors:
        known = int(read_tensor(tensors["weight_shape"])[1])
    return rows, known or columns * 32 // scheme.num_bits


def packed_columns(words: int, scheme: WeightScheme, scale: StoredTensor | None) -> int | None:
    """Columns behind packed words, where the format or its groups tell them exactly."""
    if scheme.type == "float":
        return 2 * words
    if scheme.group_size and scale is not None and len(scale.spec.shape) == 2:
        columns = scale.spec.shape[1] * scheme.group_size
        if math.ceil(columns * scheme.num_bits / 32) == words:
            return columns
    return None
