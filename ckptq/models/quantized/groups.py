"""What GPTQ and AWQ checkpoints have in common: `qweight`, `qzeros`, `scales` of groups of columns.

Both store matrices with the input channels along the rows: `scales` are [G, R], those of
compressed-tensors [R, G].

Shape letters: R rows (out), C columns (in), G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.quantize.stored import words
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

QWEIGHT = "qweight"

HALVES = ("F16", "BF16", "F32")


def modules_with_qweight(
    ckpt: Checkpoint, wanted: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """(module, its stored tensors by local name). SourceError for one that lacks a wanted one."""
    for name in ckpt.tensors:
        module, _, local = name.rpartition(".")
        if local != QWEIGHT:
            continue
        found = {part: ckpt.tensors.get(f"{module}.{part}") for part in (*wanted, *optional)}
        tensors = {part: tensor for part, tensor in found.items() if tensor is not None}
        for part in wanted:
            if part not in tensors:
                raise SourceError(f"{tensors[QWEIGHT].file}: found {name} but no {module}.{part}")
        yield module, tensors


def group_scheme(bits: int, columns: int, groups: int, symmetric: bool) -> WeightScheme:
    """compressed-tensors' scheme for so many groups of columns; a single one is a channel."""
    size = columns // groups if groups > 1 else None
    return WeightScheme(
        format="pack-quantized",
        num_bits=bits,
        type="int",
        strategy="group" if size else "channel",
        symmetric=symmetric,
        group_size=size,
    )


Value = TypeVar("Value")


def choice(
    ckpt: Checkpoint, field: str, supported: tuple[Value, ...], default: Value | None = None
) -> Value:
    """A field of the quantization config; PlanError for a value that is not supported."""
    found = (ckpt.quantization_config or {}).get(field, default)
    found = found.lower() if isinstance(found, str) else found
    if found not in supported or type(found) is not type(supported[0]):
        raise PlanError(
            f"{ckpt.path / CONFIG}: quantization_config.{field} is {found!r}; supported: "
            f"{', '.join(map(repr, supported))}"
        )
    return cast(Value, found)


def want_shapes(tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """SourceError for a tensor of another shape, or of a dtype that such a tensor cannot have."""
    for local, tensor in tensors.items():
        dtypes = HALVES if local == "scales" else ("I32",)
        wanted = TensorSpec(dtypes[0], shapes[local])
        if tensor.spec.dtype not in dtypes or tensor.spec.shape != wanted.shape:
            raise SourceError(
                f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}; expected "
                f"{' or '.join(dtypes)} [{', '.join(map(str, wanted.shape))}]"
            )


def rows_of_scales(scales_GR: Tensor, start: int, stop: int) -> Tensor:
    """ "weight_scale" [stop - start, G]."""
    return turned(scales_GR[:, start:stop])


def turned(x: Tensor) -> Tensor:
    """[A, B] -> [B, A], dense. In two steps: torch turns what is dense in blocks, five times as
    fast as a part of wider rows."""
    return x.contiguous().t().contiguous()


def check_symmetric(stored: StoredTensor, zero_WG: Tensor, bits: int, rows: int) -> None:
    """SourceError for a zero point that is not the middle, where config.json says that all are.

    vLLM does not read them then, other engines do. `zero_WG` is packed as compressed-tensors packs.
    """
    from ckptq.quantize.packing import unpack_words

    zero_GR = unpack_words(zero_WG.t().contiguous(), bits, rows)
    if zero_GR.any():
        raise SourceError(
            f"{stored.file}: tensor {stored.name!r} has zero points other than "
            f"{2 ** (bits - 1)}, but config.json says that the weights are symmetric"
        )


def words_span(start: int, stop: int, bits: int) -> tuple[int, int]:
    """The int32 words that hold codes start..stop; `start` is where a word begins."""
    return start * bits // 32, words(stop, bits)
