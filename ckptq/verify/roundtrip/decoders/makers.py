"""Rows of a source weight in another maker's format, decoded without anything of ckptq's reading.

AutoAWQ by compressed-tensors' own converter. GPTQ, which no library here reads on a CPU, bit by bit
from the format's description; ModelOpt by plain torch.

Shape letters: R rows (out), C columns (in), G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint

Tensors = Mapping[str, StoredTensor]

Decoder = Callable[[Mapping[str, Any], Tensors, int, int], Tensor]
"""(quantization config, stored tensors by local name, start, stop) -> rows of the weight in
float32; `start` is a multiple of 32."""


def gptq(config: Mapping[str, Any], tensors: Tensors, start: int, stop: int) -> Tensor:
    """Codes and zero points are little-endian streams of bits."""
    rows, scale_Gr = stop - start, _columns(tensors["scales"], start, stop)
    bit_rB = _bits_of(_columns(tensors["qweight"], start, stop).t())
    bits = int(config["bits"])
    if "g_idx" in tensors:
        bits = bit_rB.shape[1] // tensors["g_idx"].spec.numel
    code_rC = _numbers(bit_rB, bits)
    word = 32 // bits if 32 % bits == 0 else 32
    end = -(-stop // word) * word
    words_GW = _columns(tensors["qzeros"], start * bits // 32, end * bits // 32)
    zero_Gr = _numbers(_bits_of(words_GW), bits)[:, :rows]
    if str(config.get("checkpoint_format") or "gptq") == "gptq":
        zero_Gr = (zero_Gr + 1) % 2**bits
    if "g_idx" in tensors:
        group_C = _whole(tensors["g_idx"]).long()
    else:
        group_C = torch.arange(code_rC.shape[1]) * len(scale_Gr) // code_rC.shape[1]
    w_rC = (code_rC - zero_Gr.t()[:, group_C]) * scale_Gr.t()[:, group_C]
    return w_rC.float()


def awq(config: Mapping[str, Any], tensors: Tensors, start: int, stop: int) -> Tensor:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    converter = AutoAWQConverter.from_autoawq_config(dict(config))
    qzeros = tensors.get("qzeros")
    code_rC, scale_rG, zero_rG = converter._convert_gemm_module(
        _columns(tensors["qweight"], start // 8, stop // 8),
        _columns(tensors["scales"], start, stop),
        _columns(qzeros, start // 8, stop // 8) if qzeros is not None else None,
    )
    x = code_rC.unflatten(1, (scale_rG.shape[1], -1))
    if zero_rG is not None:
        x = x - zero_rG[..., None]
    return (x * scale_rG[..., None]).flatten(1).float()


def modelopt(_: Mapping[str, Any], tensors: Tensors, start: int, stop: int) -> Tensor:
    """NVFP4 by compressed-tensors' unpacking, FP8 by torch's cast; scales spread by index."""
    second = tensors.get("weight_scale_2")
    codes = tensors["weight_packed"] if second is not None else tensors["weight"]
    code_rC = _rows(codes, start, stop)
    scale = _whole(tensors["weight_scale"]).reshape(tensors["weight_scale"].spec.shape)
    if second is not None:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        columns = code_rC.shape[1] * 2
        code_rC = unpack_fp4_from_uint8(code_rC, stop - start, columns, torch.float32)
        scale = scale.float() * _whole(second)
    elif scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    if scale.numel() == 1:
        return code_rC.float() * scale.float().reshape(1, 1)
    in_blocks = len(scale) != codes.spec.shape[0]
    row_r, column_C = torch.arange(start, stop), torch.arange(code_rC.shape[1])
    row_r = row_r // 128 if in_blocks else row_r
    column_C = column_C // (128 if in_blocks else code_rC.shape[1] // scale.shape[1])
    return code_rC.float() * scale.float()[row_r][:, column_C]


def fp8(_: Mapping[str, Any], tensors: Tensors, start: int, stop: int) -> Tensor:
    """A scale for each row; or FP4 pairs by transformers' reading of MXFP4."""
    scale_rG = _rows(tensors["weight_scale"], start, stop)
    if "weight" in tensors:
        return _rows(tensors["weight"], start, stop).float() * scale_rG.float().reshape(-1, 1)
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    code_rGB = _rows(tensors["weight_packed"], start, stop).view(torch.uint8).unflatten(1, (-1, 16))
    made_Cr: Tensor = _convert_moe_packed_tensors(
        code_rGB[None], scale_rG.view(torch.uint8)[None], dtype=torch.float32
    )[0]
    return made_Cr.t()


def decodes_experts(tensors: Tensors) -> str:
    """Who decodes experts in one tensor: gpt-oss's MXFP4 blocks have 4 dimensions."""
    codes = tensors.get("weight_packed") or tensors["weight"]
    return "transformers" if len(codes.spec.shape) == 4 else DECODERS["modelopt"][0]


def first_expert(tensors: Tensors) -> Tensor:
    """The first [C, O] of experts in one tensor."""
    if decodes_experts(tensors) != "transformers":
        return _of_modelopt(tensors)
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    blocks, scales = (_rows(tensors[part], 0, 1) for part in ("weight_packed", "weight_scale"))
    expert: Tensor = _convert_moe_packed_tensors(blocks, scales)[0]
    return expert.float()


def _of_modelopt(tensors: Tensors) -> Tensor:
    """Scales spread by index over a matrix that is turned for the unpacking of FP4."""
    second = tensors.get("weight_scale_2")
    if second is None:
        scale = _whole(tensors["weight_scale"]).float().reshape(-1)[0]
        return (_rows(tensors["weight"], 0, 1)[0].float() * scale).bfloat16().float()
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    code_Oc = _rows(tensors["weight_packed"], 0, 1)[0].t().contiguous()
    code_OC = unpack_fp4_from_uint8(code_Oc, len(code_Oc), 2 * code_Oc.shape[1], torch.float32)
    scale_OG = _rows(tensors["weight_scale"], 0, 1)[0].t().float()
    scale_OG = scale_OG * _whole(second).float().reshape(-1)[0]
    group_C = torch.arange(code_OC.shape[1]) // (code_OC.shape[1] // scale_OG.shape[1])
    return (code_OC * scale_OG[:, group_C]).t().bfloat16().float()


DECODERS: Mapping[str, tuple[str, Decoder]] = {
    "gptq": ("the description of GPTQ's format", gptq),
    "awq": ("compressed-tensors", awq),
    "fp8": ("transformers", fp8),
    "fbgemm_fp8": ("torch", fp8),
    "modelopt": ("the description of ModelOpt's format", modelopt),
}
"""quant_method -> who decodes, and how."""


def decode_foreign(ckpt: Checkpoint, tensors: Tensors, start: int, stop: int) -> Tensor | None:
    """Rows start..stop of a source weight, in float32; None for a method without a decoder."""
    config = ckpt.quantization_config or {}
    found = DECODERS.get(str(config.get("quant_method")))
    return found[1](config, tensors, start, stop) if found is not None else None


def _bits_of(word: Tensor) -> Tensor:
    """[N, W] int32 -> their bits [N, 32 * W], the lowest first."""
    import numpy as np

    data = word.contiguous().numpy().astype("<i4").view(np.uint8)
    return torch.from_numpy(np.unpackbits(data, axis=1, bitorder="little"))


def _numbers(bit_NB: Tensor, bits: int) -> Tensor:
    """[N, B] bits -> the numbers [N, B / bits] that they spell."""
    count = bit_NB.shape[1] // bits
    place = 2 ** torch.arange(bits, dtype=torch.int32)
    return (bit_NB[:, : count * bits].unflatten(1, (count, bits)).int() * place).sum(-1)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """safetensors' own reader. It takes no path that is not UTF-8, so it gets the open file's."""
    with path.open("rb") as held, safe_open(f"/dev/fd/{held.fileno()}", "pt") as file:
        yield file


def _rows(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    with opened(tensor.file) as file:
        rows: Tensor = file.get_slice(tensor.name)[start:stop]
        return rows


def _columns(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    with opened(tensor.file) as file:
        columns: Tensor = file.get_slice(tensor.name)[:, start:stop]
        return columns


def _whole(tensor: StoredTensor) -> Tensor:
    with opened(tensor.file) as file:
        whole: Tensor = file.get_tensor(tensor.name)
        return whole
