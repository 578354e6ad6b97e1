"""From statistics to scales: names, dtypes and the record of how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ckptq.calibrate.scales import Record, Scales, source_fingerprint
from ckptq.calibrate.statistics import Statistics
from ckptq.checkpoint.open import Checkpoint
from ckptq.models.attention import KEY_PROJECTIONS
from ckptq.models.modules import read_layout
from ckptq.spec import torch_dtype
from ckptq.text.samples import Samples


def scales_of(
    ckpt: Checkpoint,
    statistics: Statistics,
    classes: Mapping[str, str],
    samples: Samples,
    batch_size: int,
) -> Scales:
    """A scale for every point, in the dtype of its module's weights.

    NVFP4's global scales of inputs are float32, which engines read.
    """
    made = statistics.wanted.to_json()
    dtypes = weight_dtypes(ckpt)
    observer, input_observer = dict(made["observer"]), dict(made["input_observer"])
    return Scales(
        tensors={
            statistics.scale_name(point): statistics.scale(
                point, dtype_of(dtypes, point.rpartition(".")[0])
            )
            for point in statistics.points
        },
        statistics={
            f"{point}_{key}": stats[key].clone()
            for point, stats in statistics.points.items()
            for key in ("amin", "amax")
        },
        made=Record(
            model=ckpt.name,
            source_fingerprint=source_fingerprint(ckpt),
            strategy=statistics.wanted.strategy,
            observer=observer.pop("name"),
            observer_arguments=observer,
            input_observer=input_observer.pop("name"),
            text=_name(samples.source),
            samples=len(samples.token_ids),
            tokens=sum(map(len, samples.token_ids)),
            seq_len=samples.seq_len,
            batch_size=batch_size,
            seed=samples.seed,
            token_digest=samples.digest,
            attention=dict(sorted(classes.items())),
        ),
    )


def weight_dtypes(ckpt: Checkpoint) -> dict[str, torch.dtype]:
    """Module -> the dtype of its weights, dequantized if they are quantized, as the plan has it.

    Of an attention module that of its keys' projection. Norms, RoPE's frequencies and stored scales
    may well have another.
    """
    found: dict[str, torch.dtype] = {}
    linears = read_layout(ckpt).linears.values()
    for linear in sorted(linears, key=lambda linear: linear.projection not in KEY_PROJECTIONS):
        module = linear.name
        while module and module not in found:
            found[module] = torch_dtype(linear.weight.spec.dtype)
            module = module.rpartition(".")[0]
    return found


def dtype_of(dtypes: Mapping[str, torch.dtype], module: str) -> torch.dtype:
    """One expert of a fused tensor has no weight of its own: then that of the experts around it."""
    while module not in dtypes:
        module, dot, _ = module.rpartition(".")
        assert dot, "a point belongs to a module that has weights around it"
    return dtypes[module]


def _name(text: str) -> str:
    """For a file its name, not its path, so that the output does not depend on it."""
    return Path(text).name if Path(text).exists() else text
