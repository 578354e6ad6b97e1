"""The codes of what `mend` repairs, and of what it needs for it.

Imports nothing: `verify` proposes the command by these, and `ckptq.mend.registry`, which holds the
repairs, imports torch, a matter of seconds. A test holds the two against each other.
"""

from __future__ import annotations

ALONE = (
    *("total-size", "no-quantization-config", "quant-method", "status"),
    *("config-groups-missing", "sparsity", "group-invalid", "pattern-invalid", "actorder"),
    *("format", "codes-dtype", "block-rows", "block-columns", "attention-target", "kv-scheme"),
    *("kv-scheme-missing", "recipe-differs", "target-unmatched", "untargeted", "target-class"),
    *("tied-head", "ignored-but-quantized", "not-ignored", "expert-names", "scale-shape"),
    *("kv-scale-shape", "kv-scale-missing", "vision-scale", "kv-scale-orphan", "orphan-scale"),
    *("input-scale-extra", "stale-shard", "experts-differ", "stray-weights"),
    *("side-file-missing", "tokenizer-differs", "vocabulary", "codes-transposed"),
    *("zero-point-packing", "scale-implausible", "weight-shape-value", "shape-missing"),
    *("fused-scales-differ", "input-scale-split", "g-idx", "scale-permuted", "codes-permuted"),
    *("rows-permuted", "zero-points-permuted", "rope-order-mixed", "exchanged"),
    *("marks-contradict", "shared-cache-scale"),
)
"""What may be repaired without a source."""

FROM_SOURCE = (
    *("never-quantized", "targeted-but-unquantized", "expert-missing"),
    *("fused-set-split", "layer-missing", "weight-missing", "scale-missing", "zero-point-missing"),
    *("global-scale-missing", "tensor-missing", "copy-spec", "codes-shape", "scale-dtype"),
    *("zero-point-shape", "scale-not-finite", "scale-not-positive", "scales-all-one", "codes-nan"),
    *("scale-uninitialised", "rows-empty", "codes-empty", "padding", "zero-point-range"),
    *("not-finite", "copy-differs", "codes-corrupt", "scale-corrupt", "weight-wrong"),
    *("scale-wrong", "scale-clips", "scale-inverted", "scale-shifted", "scale-transposed"),
    *("scale-of-another", "codes-of-another", "misplaced", "experts-permuted"),
    *("experts-transposed", "heads-swapped", "nibbles-swapped", "bytes-swapped", "codes-offset"),
    *("zero-points-offset", "zero-points-wrong", "zero-points-of-another", "rows-moved"),
    *("head-untargeted", "codes-range", "group-size", "strategy", "ignore-not-honoured"),
)
"""What is made again from the source."""

WITH_SOURCE = (
    *("config-shapes", "config-differs", "names-moved", "tensor-extra", "tensor-unknown"),
    *("zero-point-extra", "expert-layouts-mixed", "index-mismatch"),
)
"""What headers can judge with the source only."""

TEXT = (
    *("kv-scale-missing", "q-scale-missing", "kv-scale-dtype", "kv-scale-shape", "head-saturates"),
    *("input-scale-missing", "input-scale-implausible", "cache-scale-wrong", "heads-exchanged"),
    *("kv-exchanged", "cache-scale-inverted", "cache-scale-of-another", "kv-heads-differ"),
    *("latent-per-head", "latent-scales-differ"),
)
"""What only calibration on text can give."""

NOTES = ("not-ignored", "target-class", "expert-names", "shape-missing", "fused-scales-differ")
"""Notes that are repaired too: what an engine makes of them is no harm only in some."""
