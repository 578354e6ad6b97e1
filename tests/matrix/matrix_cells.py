"""One cell of the matrix: a family in a format, as ckptq and as llm-compressor write it.

llm-compressor is asked twice. `as_a_user_gets_it` is `model_free_ptq` on the whole checkpoint.
`as_it_should_be` is the same arithmetic on Linears that were cut by hand from the source, under
the schemes that our config.json declares: it judges what a user of llm-compressor does not get.

Shape letters: E experts, H hidden, I intermediate, R rows (out), C columns (in).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.rows import write_rows
from tiny.tensors import Tensors, tensors_in
from torch import Tensor

from ckptq.calibrate.request import CalibrationRequest, scales_source
from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.output import RunOptions
from ckptq.convert.run import write_quantized
from ckptq.plan.make import make_plan
from ckptq.progress import silent
from ckptq.recipes.load import load_scheme

FORMATS = (
    "fp8-dynamic",
    "fp8-static",
    "fp8-block",
    "w8a8",
    "w8a16",
    "w4a16",
    "w4a16-g32",
    "w4a16-channel",
    "w4a16-asym",
    "nvfp4a16",
    "mxfp4a16",
    "mxfp8a16",
    "nvfp4",
    "mxfp4",
    "mxfp8",
)

IGNORE = (
    "lm_head",
    "re:.*embed_tokens",
    "re:.*lm_head",
    "re:.*router",
    "re:.*gate$",
    "re:.*vision_model.*",
    "re:.*multi_modal_projector.*",
)
"""What a user has to tell model_free_ptq; ckptq knows it by itself."""

NO_LINEARS = ("re:.*embed_tokens$", r"re:.*layernorm_\w+$")
"""model_free_ptq goes by names that end in "weight"; these are no Linears, nor in a config."""

ROWS, LENGTH = 4, 32
"""Of the calibration data."""


def convert(source: Path, out: Path, format: str, **choices: Any) -> Path:
    """As `ckptq quantize --scheme FORMAT` does; what must be calibrated is, on random tokens."""
    ckpt = open_checkpoint(source)
    plan = make_plan(ckpt, load_scheme(format), **choices)
    text = out.with_name(f"{out.name}-tokens.jsonl")
    write_rows(text, sample_rows())
    wanted = CalibrationRequest(data=str(text), samples=ROWS, seq_len=LENGTH)
    scales = scales_source(ckpt, plan, wanted, None, "cpu", silent)
    write_quantized(
        ckpt, plan, out, arguments={}, scales=scales, options=RunOptions(workers=2, device="cpu")
    )
    return out


def sample_rows() -> list[list[int]]:
    """Enough of them for each expert to see some."""
    return torch.randint(
        3, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)
    ).tolist()


def weights_only(tensors: Mapping[str, Tensor]) -> Tensors:
    """Without the scales that calibration makes."""
    made = (".input_scale", ".input_global_scale")
    return {name: t for name, t in tensors.items() if not name.endswith(made)}


@contextmanager
def division_in_float32() -> Iterator[None]:
    """llm-compressor on a CPU with the arithmetic of its GPU kernel: codes of 16-bit weights come
    from a division in float32."""
    from compressed_tensors.quantization.lifecycle import forward_helpers

    divide = forward_helpers._quantize

    def in_float32(x: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return divide(x.float(), scale.float(), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_helpers, "_quantize", in_float32)
        yield


@contextmanager
def every_fused_set_known() -> Iterator[None]:
    """model_free_ptq with gate/up shared wherever they are, not only below "mlp"."""
    pytest.importorskip("llmcompressor")
    from llmcompressor.entrypoints.model_free import microscale

    known = [sets for sets in microscale._DEFAULT_FUSED_MAPPINGS_LIST if "gate_proj" not in sets[0]]
    gate_up = [r"re:.*gate_proj\.weight$", r"re:.*up_proj\.weight$"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microscale, "_DEFAULT_FUSED_MAPPINGS_LIST", [*known, gate_up])
        yield


def as_a_user_gets_it(source: Path, format: str) -> Tensors:
    """Every tensor that `model_free_ptq` writes for the checkpoint, by the built-in recipe."""
    groups = {
        group.name: {
            "targets": list(group.targets),
            "weights": _patient(group.weights.to_dict()) if group.weights is not None else None,
            "format": group.format,
        }
        for group in load_scheme(format).groups
    }
    return _convert(tensors_in(source), {"config_groups": groups, "ignore": list(IGNORE)})


def _patient(weights: dict[str, Any]) -> dict[str, Any]:
    """llm-compressor's search to its end: tiny weights have too few tiles to keep it going."""
    if "mse" not in str(weights.get("observer")):
        return weights
    arguments = {**weights.get("observer_kwargs", {}), "patience": 10_000}
    return {**weights, "observer_kwargs": arguments}


def as_it_should_be(source: Path, out: Path) -> Tensors:
    """Every tensor of `out`, from the source's Linears and the config of `out`."""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = {
        name: {
            "targets": group["targets"],
            "weights": _patient(group["weights"]),
            "format": group["format"],
        }
        for name, group in config["config_groups"].items()
    }
    declared = {"config_groups": groups, "ignore": [*config["ignore"], *NO_LINEARS]}
    linears = experts_cut(tensors_in(source))
    with every_fused_set_known():
        if any(group["weights"].get("strategy") == "tensor" for group in groups.values()):
            return _convert_as_one_matrix(linears, declared)
        return _convert(linears, declared)


def experts_cut(tensors: Tensors) -> Tensors:
    """Llama-4's fused experts [E, H, 2I] and [E, I, H] as one Linear [R, C] each."""
    cut: Tensors = {}
    for name, tensor in tensors.items():
        experts, _, which = name.rpartition(".")
        if which not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
            cut[name] = tensor
            continue
        for e, w_CR in enumerate(tensor):
            if which == "down_proj":
                cut[f"{experts}.{e}.down_proj.weight"] = w_CR.t().contiguous()
            else:
                half = w_CR.shape[1] // 2
                cut[f"{experts}.{e}.gate_proj.weight"] = w_CR[:, :half].t().contiguous()
                cut[f"{experts}.{e}.up_proj.weight"] = w_CR[:, half:].t().contiguous()
    return cut


FIRST_OF_A_SET = {
    r"(.*)\.q_proj\.weight$": ("q_proj", "k_proj", "v_proj"),
    r"(.*)\.gate_proj\.weight$": ("gate_proj", "up_proj"),
    r"(.*)\.w1\.weight$": ("w1", "w3"),
}


def _convert_as_one_matrix(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """With one scale per tensor, a fused set is quantized as the matrix that vLLM makes of it."""
    members = {
        match[1]: [f"{match[1]}.{name}" for name in names]
        for name in tensors
        for pattern, names in FIRST_OF_A_SET.items()
        if (match := re.match(pattern, name)) and "vision" not in name
    }
    fused = dict(tensors)
    for names in members.values():
        parts = [fused.pop(f"{name}.weight") for name in names]
        fused[f"{names[0]}.weight"] = torch.cat(parts)
    made = _convert(fused, config)
    for names in members.values():
        rows = [tensors[f"{name}.weight"].shape[0] for name in names]
        codes = made.pop(f"{names[0]}.weight").split(rows)
        scale = made[f"{names[0]}.weight_scale"]
        for name, code_RC in zip(names, codes, strict=True):
            made |= {f"{name}.weight": code_RC, f"{name}.weight_scale": scale}
    return made


def _convert(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    from compressed_tensors.quantization import QuantizationConfig

    pytest.importorskip("llmcompressor")
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter

    converter = ModelFreePtqConverter(QuantizationConfig.model_validate(config))
    with division_in_float32():
        made = converter.process(dict(tensors))
    return {name: tensor.detach() for name, tensor in made.items()}


Cell = Callable[[str, str], tuple[Path, Path]]
"""(family, format) -> (source, what ckptq wrote)."""
