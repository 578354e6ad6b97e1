"""All experts of a layer in one tensor, quantized by ModelOpt, as Llama-4 has them.

Codes are `<name>`, beside them flat names: `<name>_weight_scale`, `<name>_weight_scale_2`,
`<name>_input_scale`. FP8 has codes [E, C, O] and one scale, or [E]; NVFP4 has pairs of codes
[E, C / 2, O] along the inputs, E4M3 scales [E, C / 16, O] and one multiplier, or [E]. So vLLM reads
them (models/llama4.py, `load_moe_expert_weights`; mllama4.py).

Shape letters: E experts, O outputs, C inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import Files, read_range, read_tensor
from ckptq.errors import SourceError
from ckptq.models.quantized.encoded_weight import Encoded, Take
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import FLOATS, TensorSpec, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

SCALE, SECOND, INPUT = "_weight_scale", "_weight_scale_2", "_input_scale"
GROUP = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedModelOpt(Encoded):
    """All experts of a layer. As a matrix it has rows [E * C] and columns [O], and is read by whole
    experts."""

    fused: ClassVar[bool] = True

    @property
    def experts(self) -> int:
        return self.stored.spec.shape[0]

    @property
    def written(self) -> TensorSpec:
        R, O = self.spec.shape
        return TensorSpec(self.spec.dtype, (self.experts, R // self.experts, O))

    @property
    def plain(self) -> str:
        return self.name

    @property
    def quantum(self) -> int:
        return self.spec.shape[0] // self.experts

    def read(self, files: Files, start: int, stop: int) -> dict[str, Tensor]:
        first, last = start // self.quantum, -(-stop // self.quantum)
        return {
            local: read_range(files, tensor, first, last)
            if tensor.spec.numel >= self.experts > 1
            else read_tensor(tensor, files)
            for local, tensor in self.tensors.items()
        }

    def whole(self, take: Take) -> dict[str, Tensor]:
        return {local: take(tensor) for local, tensor in self.tensors.items()}

    def decoded(self, parts: Mapping[str, Tensor], rows: int) -> Tensor:
        """[rows, O], of rows / C experts."""
        import torch

        O, dtype = self.spec.shape[1], torch_dtype(self.spec.dtype)
        count = rows // self.quantum
        code = parts.get("weight_packed", parts.get("weight"))
        assert code is not None
        made = torch.empty((count, self.quantum, O), dtype=dtype, device=code.device)
        for expert in range(count):
            made[expert] = self._expert(parts, expert)
        return made.view(rows, O)

    def _expert(self, parts: Mapping[str, Tensor], expert: int) -> Tensor:
        """[C, O], rounded once, from float32."""
        import torch

        from ckptq.quantize.codes import as_numbers

        scale = parts["weight_scale"]
        if "weight" in self.tensors:
            code = parts["weight"][expert]
            return as_numbers(code, torch.float32).mul_(_one(scale, expert))
        values = _pairs(parts["weight_packed"][expert]).unflatten(0, (-1, GROUP))
        second = _one(parts["weight_scale_2"], expert)
        return (values * (scale[expert].float() * second)[:, None]).flatten(0, 1)


def _one(scale: Tensor, expert: int) -> Tensor:
    """That of an expert, or the one of all."""
    flat = scale.float().reshape(-1)
    return flat[expert if len(flat) > 1 else 0]


def _pairs(code: Tensor) -> Tensor:
    """[C / 2, O] pairs of E2M1 codes, the first input low -> their values [C, O]."""
    from ckptq.quantize.codes import decode_e2m1

    return decode_e2m1(code).unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 1)


def read_fused(
    ckpt: Checkpoint, dtype: str, fp8: WeightScheme, nvfp4: WeightScheme
) -> Iterator[tuple[str, FusedModelOpt]]:
    """(name of the unquantized tensor, its experts). SourceError for tensors that do not fit."""
    for name, codes in ckpt.tensors.items():
        scale = ckpt.tensors.get(name + SCALE)
        if scale is None or len(codes.spec.shape) != 3:
            continue
        found = {"weight_scale": scale, "weight_scale_2": ckpt.tensors.get(name + SECOND)}
        found["input_scale"] = ckpt.tensors.get(name + INPUT)
        beside = {local: tensor for local, tensor in found.items() if tensor is not None}
        E, half, O = codes.spec.shape
        if codes.spec.dtype == "F8_E4M3":
            _check(scale, E)
            tensors, scheme, C = {"weight": codes} | beside, fp8, half
        elif codes.spec.dtype == "U8":
            tensors, scheme, C = {"weight_packed": codes} | beside, nvfp4, 2 * half
            _check_fp4(name, tensors, TensorSpec("F8_E4M3", (E, C // GROUP, O)))
        else:
            raise _odd(codes, "F8_E4M3 or U8 codes")
        spec = TensorSpec(dtype, (E * C, O))
        yield name, FusedModelOpt(name=name, tensors=tensors, scheme=scheme, spec=spec)


def _check_fp4(name: str, tensors: Mapping[str, StoredTensor], wanted: TensorSpec) -> None:
    second = tensors.get("weight_scale_2")
    if tensors["weight_scale"].spec != wanted:
        raise _odd(tensors["weight_scale"], str(wanted))
    if second is None:
        raise SourceError(f"{tensors['weight_packed'].file}: found {name} but no {name}{SECOND}")
    _check(second, wanted.shape[0])


def _check(scale: StoredTensor, experts: int) -> None:
    if scale.spec.numel not in (1, experts) or scale.spec.dtype not in FLOATS:
        raise _odd(scale, f"one scale, or one for each of {experts} experts")


def _odd(tensor: StoredTensor, wanted: str) -> SourceError:
    return SourceError(f"{tensor.file}: tensor {tensor.name!r} is {tensor.spec}; expected {wanted}")
