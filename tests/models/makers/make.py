"""Writes the fixtures beside it: one small Linear in each maker's layout, by that maker's own code.

Run by hand, with the makers' packages importable (`pip install --no-deps`): gptqmodel 7.7.0,
autoawq 0.2.9, nvidia-modelopt 0.47.0. Each case has the stored tensors, and under "dequantized" the
weight that the maker's own code makes of them, [R, C].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

R, C, GROUP = 32, 64, 16
HERE = Path(__file__).parent


def linear(dtype: torch.dtype = torch.float16) -> nn.Linear:
    made = nn.Linear(C, R, bias=False)
    spread = torch.randn(R, 1).exp() * torch.randn(C).exp()
    made.weight.data = (torch.randn(R, C) * spread * 0.02).to(dtype)
    return made


def groups(w_RC: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor]:
    """(scales, zero points) [R, G] of groups of neighbouring columns, as GPTQ finds them."""
    x = w_RC.float().unflatten(1, (-1, GROUP))
    most = 2**bits - 1
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if sym:
        reach = torch.maximum(-low, high)
        low, high = -reach, reach
    scale = ((high - low) / most).half().float()
    zero = torch.full_like(scale, (most + 1) / 2) if sym else (-low / scale).round()
    # the first version of the format cannot hold a zero point of 0
    return scale, zero.clamp(1, most)


def gptq(bits: int, sym: bool, ordered: bool, version: int) -> dict[str, Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    source = linear()
    scale, zero = groups(source.weight.data, bits, sym)
    g_idx = torch.arange(C, dtype=torch.int32) // GROUP
    if ordered:
        g_idx = g_idx[torch.randperm(C)]
    module = TorchLinear(
        bits=bits, group_size=GROUP, sym=sym, desc_act=ordered, in_features=C, out_features=R
    )
    module.pack_original(source, scale, zero, g_idx)
    module.post_init()
    whole = module.dequantize_weight().t().contiguous()
    if version == 1:
        config = QuantizeConfig(bits=bits, group_size=GROUP, sym=sym, desc_act=ordered)
        convert_gptq_v2_to_v1_format_module(module, config)
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {"dequantized": whole, **{name: getattr(module, name).clone() for name in names}}


def gptq_cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    for bits in (2, 3, 4, 8):
        for version in (1, 2):
            for sym in (True, False):
                for ordered in (False, True):
                    name = f"{bits}-bit v{version} {'sym' if sym else 'asym'}"
                    name += " ordered" if ordered else ""
                    yield name, gptq(bits, sym, ordered, version)


def awq_cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    source = linear()
    scale, zero = groups(source.weight.data, 4, False)
    module = WQLinear_GEMM.from_linear(
        source, 4, GROUP, scales=scale.t().contiguous(), zeros=zero.t().contiguous()
    )
    held = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    whole = dequantize_gemm(held["qweight"], held["qzeros"], held["scales"], 4, GROUP)
    yield "gemm", {"dequantized": whole.t().contiguous(), **held}


def modelopt_cases() -> Iterator[tuple[str, dict[str, Tensor]]]:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    for dtype in (torch.bfloat16, torch.float16):
        w_RC = linear(dtype).weight.data
        made, scale, double = NVFP4QTensor.quantize(w_RC.clone(), 16)
        whole = made.dequantize(dtype=dtype, scale=scale, double_scale=double, block_sizes={-1: 16})
        held = {"weight": made._quantized_data, "weight_scale": scale, "weight_scale_2": double}
        yield f"nvfp4 {dtype}".replace("torch.", ""), {"dequantized": whole, **held}
        scales = (w_RC.abs().amax().float() / 448.0, w_RC.abs().amax(1).float() / 448.0)
        for name, scale in zip(("fp8", "fp8 per channel"), scales, strict=True):
            made, _ = FP8QTensor.quantize(w_RC, scale if scale.dim() == 0 else scale[:, None])
            whole = made.dequantize(
                dtype=dtype, scale=scale if scale.dim() == 0 else scale[:, None]
            )
            held = {"weight": made._quantized_data, "weight_scale": scale}
            yield f"{name} {dtype}".replace("torch.", ""), {"dequantized": whole, **held}


def main() -> None:
    torch.manual_seed(0)
    for maker in (gptq_cases, awq_cases, modelopt_cases):
        tensors = {f"{case}.{n}": t.contiguous() for case, held in maker() for n, t in held.items()}
        save_file(tensors, HERE / f"{maker.__name__.removesuffix('_cases')}.safetensors")


if __name__ == "__main__":
    main()
