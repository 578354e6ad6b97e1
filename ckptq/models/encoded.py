"""Linears that a checkpoint stores quantized: their schemes, and their dequantized rows.

Reads compressed-tensors checkpoints of every format that ckptq writes, and FP8 as DeepSeek and
Mistral ship it (`quant_method: fp8`, one scale per block or tensor, named
`weight_scale_inv` although it is a multiplier).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.checkpoint.read import Files, read_range, read_tensor
from ckptq.engines.vllm import group_of
from ckptq.errors import PlanError, SourceError
from ckptq.models.readable import check_readable
from ckptq.quantize.stored import quantum_specs, row_quantum, stored_span
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.declared import Declared, declared
from ckptq.spec import TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Take = Callable[[StoredTensor], "Tensor"]
"""Gives a stored tensor that is in memory, on any device; it is not to be written to."""

CODES = ("weight_packed", "weight")
SCALE = "weight_scale"
CONFIG_KEYS = ("quantization_config", "compression_config")
FOREIGN_NAMES = {"weight_scale_inv": SCALE}
"""Names that other tools give to compressed-tensors' tensors."""

HALF_MOST = 65504

READABLE = ("compressed-tensors", "fp8")

LOCAL = (
    *("weight", "weight_packed", SCALE, "weight_zero_point", "weight_shape"),
    *("weight_global_scale", *FOREIGN_NAMES),
)

BELONGS_TO_SCHEME = re.compile(
    r".*\.(input_scale|activation_scale|input_zero_point|input_global_scale|output_scale"
    r"|[qkv]_scale|[qkv]_zero_point|kv_scale)$"
)
"""Tensors without a meaning once the weights are dequantized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A quantized Linear on disk: its stored tensors by local name, and its scheme."""

    name: str
    tensors: Mapping[str, StoredTensor] = field(hash=False)
    scheme: WeightScheme
    spec: TensorSpec
    """Of the weight [R, C] once it is dequantized."""
    index: None = None
    streams: ClassVar[bool] = True
    slab_bytes: ClassVar[int] = 0
    """As for a `View`: its rows are runs of bytes, and it is not part of a 3-D tensor."""

    @property
    def written(self) -> TensorSpec:
        return self.spec

    @property
    def stored(self) -> StoredTensor:
        """The tensor that holds the codes: what an error message names."""
        return next(self.tensors[name] for name in CODES if name in self.tensors)

    @property
    def slab(self) -> tuple[StoredTensor, None]:
        return self.stored, None

    @property
    def shape(self) -> tuple[int, int]:
        R, C = self.spec.shape
        return R, C

    @property
    def quantum(self) -> int:
        """Runs of rows must start at a multiple of this."""
        return row_quantum(self.scheme)

    def dims(self, local: str) -> int:
        """Dimensions of a stored tensor; one that has a single one has no rows of its own."""
        return len(quantum_specs(self.scheme, self.shape[1])[local].shape)

    def span(self, local: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a stored tensor that hold rows start..stop of the weight."""
        return stored_span(local, self.scheme, self.shape[1], start, stop)

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        """Everything stored for rows start..stop; start is a multiple of the quantum."""
        held = {}
        for local, tensor in self.tensors.items():
            if self._has_rows(local):
                held[local] = read_range(files, tensor, *self.span(local, start, stop))
            else:
                held[local] = self._lone(local, read_tensor(tensor, files))
        return held

    def whole(self, take: Take) -> dict[str, Tensor]:
        """As `read` of all rows, from stored tensors that `take` has."""
        taken = {local: take(tensor) for local, tensor in self.tensors.items()}
        return {n: t if self._has_rows(n) else self._lone(n, t) for n, t in taken.items()}

    def _has_rows(self, local: str) -> bool:
        return self.dims(local) > 1 and self.tensors[local].spec.numel > 1

    def _lone(self, local: str, tensor: Tensor) -> Tensor:
        """A single number in as many dimensions as a scale of this scheme has."""
        return tensor.reshape(-1, *(1,) * (self.dims(local) - 1))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_encoded(ckpt: Checkpoint) -> dict[str, Encoded]:
    """Module name -> its quantized weight, for all that the checkpoint stores quantized.

    Empty for an unquantized checkpoint. PlanError for an unsupported method or scheme.
    """
    config = ckpt.quantization_config
    if config is None:
        _refuse_odd_config(ckpt)
        return {}
    if config.get("quant_method") not in READABLE:
        raise PlanError(_unreadable(ckpt, config))
    indexed = next((name for name in ckpt.tensors if name.endswith("weight_g_idx")), None)
    if indexed:
        raise PlanError(
            f"{ckpt.path}: {indexed}: groups in activation order (g_idx) are not supported"
        )
    dtype, said = _weight_dtype(ckpt), declared(ckpt)
    found = {}
    for module, tensors in _modules(ckpt):
        scheme = _scheme(ckpt, said, module, tensors[SCALE])
        spec = TensorSpec(dtype, _shape(module, tensors, scheme))
        check_readable(module, tensors, scheme, spec, said if said.is_fp8 else None)
        found[module] = Encoded(name=module, tensors=tensors, scheme=scheme, spec=spec)
    return found


def decode_rows(files: Files, encoded: Encoded, start: int, stop: int) -> Tensor:
    """Rows start..stop of the weight, dequantized, [stop - start, C]; `start` on the quantum."""
    return decode(encoded, encoded.read(files, start, stop), stop - start)


def decode(encoded: Encoded, parts: Mapping[str, Tensor], rows: int) -> Tensor:
    """What these stored tensors of so many rows stand for, [rows, C], on their device.

    SourceError for what float16 cannot hold.
    """
    from ckptq.quantize.dispatch import dequantize

    shape = (rows, encoded.shape[1])
    w_RC = dequantize(parts, encoded.scheme, shape, torch_dtype(encoded.spec.dtype))
    if encoded.spec.dtype == "F16" and not w_RC.isfinite().all():
        raise SourceError(
            f"{encoded.stored.file}: tensor {encoded.stored.name!r} decodes to weights beyond "
            f"{HALF_MOST}, the float16 maximum (config.json's dtype), or its scales are not finite"
        )
    return w_RC


def _modules(ckpt: Checkpoint) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Modules that have a weight scale, each with its tensors by local name."""
    for name in ckpt.tensors:
        module, _, local = name.rpartition(".")
        if FOREIGN_NAMES.get(local, local) != SCALE:
            continue
        tensors = {
            FOREIGN_NAMES.get(part, part): ckpt.tensors[f"{module}.{part}"]
            for part in LOCAL
            if f"{module}.{part}" in ckpt.tensors
        }
        if not any(code in tensors for code in CODES):
            raise SourceError(f"{ckpt.path}: found {name} but no {module}.weight")
        yield module, tensors


def _scheme(ckpt: Checkpoint, said: Declared, module: str, scale: StoredTensor) -> WeightScheme:
    group = group_of(said, module)
    if group is None:
        raise SourceError(
            f"{ckpt.path}: {module} has a weight_scale, but no config group targets it"
        )
    scheme = group.weight_scheme(stored=True)
    if said.is_fp8 and scheme.strategy == "tensor" and scale.spec.numel != 1:
        raise SourceError(
            f"{scale.file}: tensor {scale.name!r} is {scale.spec}, but config.json has no "
            "weight_block_size; expected that field, or one scale for the tensor"
        )
    return scheme


def _unreadable(ckpt: Checkpoint, config: Mapping[str, Any]) -> str:
    return (
        f"{ckpt.path}: quantized with {config.get('quant_method')!r}, which ckptq cannot read; "
        "supported: compressed-tensors, and FP8 with one scale per block or tensor "
        "(quant_method fp8)"
    )


def _shape(
    module: str, tensors: Mapping[str, StoredTensor], scheme: WeightScheme
) -> tuple[int, int]:
    """[R, C] of the weight, from the shapes of what is stored."""
    code = next(tensors[name] for name in CODES if name in tensors)
    if len(code.spec.shape) != 2:
        raise SourceError(f"{code.file}: {code.name} is {code.spec}, expected a matrix")
    rows, columns = code.spec.shape
    if "weight_packed" not in tensors:
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


def unquantized_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model without its quantization, wherever that stands."""
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(plain.get("text_config"), dict):
        text = plain["text_config"]
        plain["text_config"] = {k: value for k, value in text.items() if k not in CONFIG_KEYS}
    return plain
