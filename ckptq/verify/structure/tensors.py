"""The tensors of each quantized Linear against its scheme: names, dtypes, shapes.

Headers only. Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from ckptq.errors import PlanError
from ckptq.quantize.stored import scale_shape, stored
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import FLOATS, TensorSpec
from ckptq.verify.kinds import AGAIN, finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import CODES, EXPERT, SCALES, Module, Subject

MISSING = {
    "weight": "weight-missing",
    "weight_packed": "weight-missing",
    "weight_scale": "scale-missing",
    "weight_zero_point": "zero-point-missing",
    "weight_shape": "shape-missing",
    "weight_global_scale": "global-scale-missing",
    "input_scale": "input-scale-missing",
    "input_global_scale": "input-scale-missing",
}

EXTRA = {
    "weight_zero_point": "zero-point-extra",
    "input_zero_point": "zero-point-extra",
    "input_scale": "input-scale-extra",
    "input_global_scale": "input-scale-extra",
    "weight_g_idx": "g-idx",
    "g_idx": "g-idx",
}

DTYPE_HINTS = {
    "F8_E5M2": "convert to E4M3: compressed-tensors does not support E5M2 weights",
    "U8": "store signed codes (subtract 128)",
    "I8": 'declare format "int-quantized" and type "int"',
    "F8_E4M3": 'declare format "float-quantized" and type "float"',
}
"""Repair for codes of this dtype."""


def check_tensors(subject: Subject) -> dict[str, tuple[Finding, ...]]:
    """Quantized Linear with a scheme -> the faults of its tensors."""
    return {
        name: tuple(_check_module(module))
        for name, module in subject.modules.items()
        if _comparable(module)
    }


def _comparable(module: Module) -> bool:
    """Whether a scheme determines this module's tensors."""
    return module.quantized and module.scheme is not None


def _check_module(module: Module) -> Iterator[Finding]:
    """The tensors of one quantized Linear against those of its scheme."""
    assert module.group is not None
    scheme = module.scheme
    assert scheme is not None
    if module.codes is None:
        held = ", ".join(sorted(module.tensors))
        yield _missing(module, scheme.codes, f"only {held}")
        return
    wrong = _codes_local(module, scheme)
    if wrong is not None:
        yield wrong
        return
    shape = module.shape
    if shape is None:
        yield finding("codes-shape", module.codes, found=str(module.codes.spec), wanted="a matrix")
        return
    try:
        wanted = stored(TensorSpec(_dtype(module), shape), scheme)
    except PlanError as error:
        fits = f"a shape that {scheme} fits"
        yield finding("group-size", module.codes, found=str(error), wanted=fits)
        return
    if module.group.input_scale is not None:
        wanted[module.group.input_scale] = TensorSpec("F32", (1,))
    yield from _against(module, scheme, wanted)


def _dtype(module: Module) -> str:
    """The dtype of the scales: the source weight's, else what they are, if that is a float."""
    if module.origin is not None:
        return module.origin.weight.spec.dtype
    scale = module.tensors.get("weight_scale")
    return scale.spec.dtype if scale is not None and scale.spec.dtype in FLOATS else "BF16"


def _codes_local(module: Module, scheme: WeightScheme) -> Finding | None:
    """Codes under another name belong to another format."""
    if scheme.codes in module.tensors:
        return None
    local = next(local for local in CODES if local in module.tensors)
    tensor, wanted = module.tensors[local], f"{scheme.codes} of {scheme}"
    return finding("codes-dtype", tensor, found=f"{local} {tensor.spec}", wanted=wanted)


def _against(
    module: Module, scheme: WeightScheme, wanted: dict[str, TensorSpec]
) -> Iterator[Finding]:
    for local, spec in wanted.items():
        tensor = module.tensors.get(local)
        if tensor is None:
            yield _missing(module, local, "no such tensor", str(spec))
        elif local in CODES:
            yield from _check_codes(module, local, tensor.spec, spec)
        elif local == "weight_scale":
            yield from _check_scale(module, scheme, tensor.spec, spec)
        elif local == "weight_zero_point":
            yield from _check_zero_point(module, scheme, tensor.spec, spec)
        elif tensor.spec.numel != spec.numel:
            yield _shape("scale-shape", module, local, tensor.spec, spec)
        elif tensor.spec.dtype not in (("I64", "I32") if local == "weight_shape" else FLOATS):
            yield _shape("scale-dtype", module, local, tensor.spec, spec)
    for local in SCALES:
        if local in module.tensors and local not in wanted and local in EXTRA:
            tensor = module.tensors[local]
            found = str(tensor.spec)
            yield finding(EXTRA[local], tensor, found=found, wanted=f"no such tensor with {scheme}")


def _check_codes(
    module: Module, local: str, found: TensorSpec, wanted: TensorSpec
) -> Iterator[Finding]:
    if found.dtype != wanted.dtype:
        yield _shape("codes-dtype", module, local, found, wanted, DTYPE_HINTS.get(found.dtype))
    elif found.shape == wanted.shape:
        return
    elif local == "weight" and found.shape == wanted.shape[::-1]:
        yield _shape("codes-transposed", module, local, found, wanted)
    else:
        yield _shape("codes-shape", module, local, found, wanted, _cut(module, found))


def _cut(module: Module, found: TensorSpec) -> str | None:
    """A repair if gate and up are halves of the rows of a fused [E, H, 2 I] instead of its
    columns."""
    fused = module.origin.weight.stored.spec.shape if module.origin is not None else ()
    if EXPERT.match(module.name) and len(fused) == 3 and 2 * found.shape[0] == fused[1]:
        return "the fused experts were split along the wrong axis: " + AGAIN
    return None


def _check_scale(
    module: Module, scheme: WeightScheme, found: TensorSpec, wanted: TensorSpec
) -> Iterator[Finding]:
    fixed = scheme.scale_dtype is not None
    if found.dtype != wanted.dtype and (fixed or found.dtype not in FLOATS):
        yield _shape("scale-dtype", module, "weight_scale", found, wanted)
    elif found.shape == wanted.shape or (found.numel == wanted.numel == 1):
        return
    else:
        code, hint = _why_scale(module, scheme, found)
        yield _shape(code, module, "weight_scale", found, wanted, hint)


def _why_scale(module: Module, scheme: WeightScheme, found: TensorSpec) -> tuple[str, str | None]:
    """Which other group size or strategy scales of this shape would fit."""
    shape = module.shape
    assert shape is not None
    R, C = shape
    if found.numel == 1:
        return "strategy", "one scale for the tensor: set strategy to tensor"
    if found.shape == (R, 1):
        return "strategy", "one scale per row: set strategy to channel"
    if len(found.shape) == 2 and found.shape[0] == R and C % found.shape[1] == 0:
        return "group-size", f"scales of groups of {C // found.shape[1]}"
    if len(found.shape) == 2 and found.shape == (ceil(R / 128), ceil(C / 128)):
        return "strategy", "scales of 128x128 blocks: set strategy to block"
    if found.shape == scale_shape(shape, scheme)[::-1]:
        return "scale-shape", "the grid of scales is transposed"
    return "scale-shape", None


def _check_zero_point(
    module: Module, scheme: WeightScheme, found: TensorSpec, wanted: TensorSpec
) -> Iterator[Finding]:
    if found == wanted:
        return
    shape = module.shape
    assert shape is not None
    R, G = scale_shape(shape, scheme)
    along_columns = (R, ceil(G * scheme.num_bits / 32))
    code = "zero-point-shape"
    if scheme.format == "pack-quantized" and found == TensorSpec("I32", along_columns):
        code = "zero-point-packing"
    yield _shape(code, module, "weight_zero_point", found, wanted)


def _missing(module: Module, local: str, found: str, wanted: str | None = None) -> Finding:
    where, wanted = f"{module.name}.{local}", wanted or f"{local} of {module.scheme}"
    return finding(MISSING[local], where, file=module.file, found=found, wanted=wanted)


def _shape(
    code: str,
    module: Module,
    local: str,
    found: TensorSpec,
    wanted: TensorSpec,
    hint: str | None = None,
) -> Finding:
    return finding(code, module.tensors[local], found=str(found), wanted=str(wanted), repair=hint)
