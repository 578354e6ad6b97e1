"""Scales of static activations: plausible, and similar to those of other layers.

Only running text could show whether they are right; implausible ones are reported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.numbered import starred
from ckptq.quantize.scales import E4M3_MAX
from ckptq.spec import FLOATS
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.values.plausible import check_scale

LOCALS = ("input_scale", "input_global_scale")

LARGEST, SMALLEST = 1e6, 1e-7
"""Of the inputs of a Linear, the largest: behind a norm it is 1 to 1,000, and where it grows, as
before a down projection, 100,000. A Linear that calibration never reached has an epsilon."""

OUTLIER = 1e4
"""Times the median of the same Linear in the other layers."""

FEWEST = 3
"""Layers, without which there is no other that is usual."""

NVFP4_REACH = E4M3_MAX * 6.0
INT8_MAX = 127.0


def check_inputs(linears: Mapping[str, StoredLinear], files: Files) -> Iterator[Finding]:
    """Finite, positive, of a possible size; a note for a layer unlike the others."""
    alike: dict[str, dict[str, tuple[StoredTensor, float]]] = {}
    for linear in linears.values():
        for local in LOCALS:
            tensor = linear.module.tensors.get(local)
            if tensor is None or tensor.spec.dtype not in FLOATS or not tensor.spec.numel:
                continue
            scale = read_tensor(tensor, files)
            wrong = list(check_scale(tensor, scale, (0.0, float("inf"))))
            if wrong:
                yield from wrong
                continue
            reach = _reach(linear, local, float(scale.float().abs().max()))
            yield from _possible(tensor, reach)
            alike.setdefault(starred(tensor.name), {})[tensor.name] = tensor, reach
    for layers in alike.values():
        yield from _outliers(layers)


def _reach(linear: StoredLinear, local: str, scale: float) -> float:
    """The largest input that it was made of; NVFP4's global scale is a divisor."""
    if local == "input_global_scale":
        return NVFP4_REACH / scale
    inputs = linear.module.group.inputs if linear.module.group is not None else None
    return scale * (INT8_MAX if inputs is not None and inputs.type == "int" else E4M3_MAX)


def _possible(tensor: StoredTensor, reach: float) -> Iterator[Finding]:
    low = SMALLEST if tensor.name.endswith("input_global_scale") else 0.0
    if not low <= reach <= LARGEST:
        found = f"inputs up to {reach:.3g}"
        yield finding("input-scale-implausible", tensor, found=found, wanted=f"at most {LARGEST:g}")


def _outliers(layers: Mapping[str, tuple[StoredTensor, float]]) -> Iterator[Finding]:
    if len(layers) < FEWEST:
        return
    middle = median(reach for _, reach in layers.values())
    for tensor, reach in layers.values():
        if reach > middle * OUTLIER:
            wanted = f"near {middle:.3g}, as in the other layers"
            yield finding("scale-outlier", tensor, found=f"inputs up to {reach:.3g}", wanted=wanted)
