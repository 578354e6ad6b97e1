"""Tensors outside any scheme must equal the source byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, bytes_of, read_into, read_tensor
from ckptq.checkpoint.view import View
from ckptq.models.encoded import Encoded
from ckptq.models.weight import Weight
from ckptq.models.weight_rows import weight_rows
from ckptq.quantize.tiles import BITS
from ckptq.spec import FLOATS, torch_dtype
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip.tally import same_bytes
from ckptq.verify.roundtrip.undo import Undo
from ckptq.verify.subject import CODES, SCALES, Subject

CHUNK = 1 << 22
FAST_BYTES = 1 << 16

EMPTY = 0.25
"""Share of zero rows in an embedding: more than padding and unused tokens explain."""

TABLES = ("embedding", "output head")


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """What became of some bytes of a copied tensor."""

    name: str
    nbytes: int
    different: int
    """Bytes that differ from the source's."""
    not_finite: int = 0
    zeros: int = 0
    """Elements that are zero; counted where there is no source."""
    through_one: int = 0
    """Of these, bytes of a norm that is stored as (w + 1) - 1, rounded to its dtype."""


def pairs(subject: Subject) -> Iterator[tuple[StoredTensor, StoredTensor | Weight]]:
    """Unquantized tensors of the checkpoint with their counterpart in the source, specs equal."""
    if subject.origin is None or subject.source is None:
        return
    for name, tensor in subject.ckpt.tensors.items():
        module, _, local = name.rpartition(".")
        known = subject.modules.get(module)
        if known is not None and known.quantized and local in (*CODES, *SCALES):
            continue  # judged together, also where the source has scales of its own
        original = subject.source.tensors.get(name)
        if original is not None and original.spec == tensor.spec:
            yield tensor, original
        elif name in subject.decoded and subject.decoded[name].written == tensor.spec:
            yield tensor, subject.decoded[name]
        elif known is not None and known.origin is not None:
            weight = {"weight": known.origin.weight, "bias": known.origin.bias}.get(local)
            if weight is not None and _same(weight, tensor):
                yield tensor, weight


def _same(view: Weight, tensor: StoredTensor) -> bool:
    """A bias is cut out of its fused tensor as one row [1, R], and stored as [R]."""
    spec = view.spec
    shape = spec.shape[1:] if len(tensor.spec.shape) == 1 else spec.shape
    return (spec.dtype, shape) == (tensor.spec.dtype, tensor.spec.shape)


def copy_tasks(
    subject: Subject, files: Files, undo: Undo, fast: bool
) -> Iterator[Callable[[], Copy]]:
    """Tasks that compare chunk by chunk; views and permuted tensors are held whole."""
    for tensor, original in pairs(subject):
        if isinstance(original, StoredTensor) and tensor.name not in undo:
            for start in _starts(tensor.nbytes, fast):
                count = min(FAST_BYTES if fast else CHUNK, tensor.nbytes - start)
                yield partial(_chunk, tensor, original, files, start, count)
        elif isinstance(original, Encoded) and original.fused:
            for start in _starts_of_rows(original, fast):
                yield partial(_decoded, tensor, original, files, start)
        else:
            weight = View(original) if isinstance(original, StoredTensor) else original
            yield partial(_whole, tensor, weight, files, undo)


def _starts_of_rows(weight: Encoded, fast: bool) -> list[int]:
    starts = list(range(0, weight.spec.shape[0], weight.quantum))
    return sorted({starts[0], starts[-1]}) if fast else starts


def _decoded(tensor: StoredTensor, weight: Encoded, files: Files, start: int) -> Copy:
    """One expert of a tensor of all."""
    theirs = weight_rows(files, weight)(start, start + weight.quantum).contiguous()
    ours, row_bytes = torch.empty_like(theirs), weight.spec.nbytes // weight.spec.shape[0]
    read_into(files, tensor, start * row_bytes, bytes_of(ours))
    a, b = (torch.frombuffer(bytes_of(t), dtype=torch.uint8) for t in (ours, theirs))
    different = 0 if same_bytes(a, b) else int((a != b).sum())
    return Copy(name=tensor.name, nbytes=ours.nbytes, different=different)


def _starts(nbytes: int, fast: bool) -> list[int]:
    if not fast:
        return list(range(0, nbytes, CHUNK))
    return sorted({0, max(nbytes - FAST_BYTES, 0)}) if nbytes else []


def _chunk(
    tensor: StoredTensor, original: StoredTensor, files: Files, start: int, count: int
) -> Copy:
    ours, theirs = torch.empty(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
    read_into(files, tensor, start, bytes_of(ours))
    read_into(files, original, start, bytes_of(theirs))
    different = 0 if same_bytes(ours, theirs) else int((ours != theirs).sum())
    norm = "norm" in tensor.name and len(tensor.spec.shape) == 1 and tensor.spec.dtype in FLOATS
    through = different if different and norm and _through_one(ours, theirs, tensor) else 0
    return Copy(name=tensor.name, nbytes=count, different=different, through_one=through)


def _through_one(ours: Tensor, theirs: Tensor, tensor: StoredTensor) -> bool:
    """Whether adding and subtracting 1 explains the difference, as llm-compressor does with norms
    that multiply by 1 + w (Gemma, Qwen3-Next)."""
    dtype = torch_dtype(tensor.spec.dtype)
    return same_bytes(ours, ((theirs.view(dtype) + 1) - 1).view(torch.uint8))


def _whole(tensor: StoredTensor, weight: Weight, files: Files, undo: Undo) -> Copy:
    ours = undo.restore(tensor.name, read_tensor(tensor, files))
    if len(weight.stored.spec.shape) == 1:
        theirs = read_tensor(weight.stored, files)
    else:
        theirs = weight_rows(files, weight)(0, weight.spec.shape[0]).contiguous()
    a, b = (torch.frombuffer(bytes_of(t), dtype=torch.uint8) for t in (ours, theirs))
    different = 0 if same_bytes(a, b) else int((a != b).sum())
    return Copy(name=tensor.name, nbytes=tensor.nbytes, different=different)


def judge_copy(subject: Subject, copy: Copy) -> Iterator[Finding]:
    """A copy that differs; a note if only by rounding."""
    if copy.different and copy.different == copy.through_one:
        found = "the source's (w + 1) - 1, rounded"
        wanted = "the source's bytes"
        yield finding("norm-rounded", subject.ckpt.tensors[copy.name], found=found, wanted=wanted)
    elif copy.different:
        found = f"{copy.different} of {copy.nbytes} bytes differ"
        wanted = "the source's bytes"
        yield finding("copy-differs", subject.ckpt.tensors[copy.name], found=found, wanted=wanted)


def finite_tasks(subject: Subject, files: Files, fast: bool) -> Iterator[Callable[[], Copy]]:
    """The only check of an unquantized tensor without a source."""
    for tensor in subject.ckpt.tensors.values():
        module = subject.modules.get(tensor.name.rpartition(".")[0])
        if tensor.spec.dtype in FLOATS and (module is None or not module.quantized):
            for start in _starts(tensor.nbytes, fast):
                count = min(FAST_BYTES if fast else CHUNK, tensor.nbytes - start)
                yield partial(_finite, tensor, files, start, count)


def _finite(tensor: StoredTensor, files: Files, start: int, count: int) -> Copy:
    size = tensor.spec.itemsize
    start, count = start // size * size, count // size * size
    data = torch.empty(count // size, dtype=torch_dtype(tensor.spec.dtype))
    read_into(files, tensor, start, bytes_of(data))
    # bit patterns without their sign order as the numbers do, and torch is faster at integers
    bits = data.view(BITS[size])
    bits &= torch.iinfo(bits.dtype).max
    infinite = torch.tensor(torch.inf, dtype=data.dtype).view(bits.dtype)
    bad = int((bits >= infinite).count_nonzero()) if bits.numel() and bits.amax() >= infinite else 0
    zeros = bits.numel() - int(bits.count_nonzero())
    return Copy(name=tensor.name, nbytes=count, different=0, not_finite=bad, zeros=zeros)


def judge_finite(subject: Subject, copy: Copy) -> Iterator[Finding]:
    """NaN or Inf in a norm, an embedding, an unquantized weight; a table that is half zeros."""
    tensor = subject.ckpt.tensors[copy.name]
    if copy.not_finite:
        yield finding(
            "not-finite", tensor, found=f"{copy.not_finite} NaN or Inf", wanted="finite numbers"
        )
    module = subject.modules.get(copy.name.rpartition(".")[0])
    share = copy.zeros / max(tensor.spec.numel, 1)
    table = module is not None and module.kept in TABLES and len(tensor.spec.shape) == 2
    if table and share > EMPTY:
        found = f"{share:.0%} zeros"
        wanted = "a row for every token"
        yield finding("rows-empty", tensor, found=found, wanted=wanted)
