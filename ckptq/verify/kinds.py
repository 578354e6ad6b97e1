"""Every kind of finding: its code, severity, meaning and repair.

The codes are an interface: scripts and tests compare them. A finding may have a more precise
repair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ckptq.verify.report import Finding, Severity

AGAIN = "convert again from the source"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of finding."""

    code: str
    severity: Severity
    meaning: str
    repair: str


def _faults(*rows: tuple[str, str, str]) -> tuple[Kind, ...]:
    return tuple(Kind(code, "fault", meaning, repair) for code, meaning, repair in rows)


def _notes(*rows: tuple[str, str, str]) -> tuple[Kind, ...]:
    return tuple(Kind(code, "note", meaning, repair) for code, meaning, repair in rows)


FILES = _faults(
    ("index-mismatch", "index and shards disagree", "rewrite the index"),
    ("total-size", "the index's total_size is not the sum of the tensors", "rewrite the index"),
    ("side-file-missing", "a file needed for serving exists only in the source", "copy it"),
    ("config-differs", "config.json describes another model than the source", "restore it"),
    ("vocabulary", "tokens have the wrong ids", "restore the tokenizer's files"),
    ("config-shapes", "config.json does not match the tensors", "restore the field"),
    ("tokenizer-differs", "the same text gives different tokens", "copy tokenizer.json again"),
    ("stray-weights", "vLLM loads this file too, and the last one wins", "delete it"),
    ("marks-contradict", "the shards disagree about their RoPE order", AGAIN),
) + _notes(
    ("stray-shard", "a safetensors file that the index does not name", "delete it"),
    ("side-file-differs", "a side file differs from the source's", "compare the two"),
    ("config-note", "a field of config.json differs from the source's", "compare the two"),
    ("not-quantized", "nothing is quantized", "run `ckptq quantize`"),
    ("transforms", "engines apply rotations, which verify does not check", "none"),
)

CONFIG = _faults(
    ("no-quantization-config", "quantized tensors without a quantization_config", AGAIN),
    ("quant-method", "engines read it as another tool's", 'set it to "compressed-tensors"'),
    ("status", "transformers computes NaN without it", 'set quantization_status to "compressed"'),
    (
        "config-groups-missing",
        "vLLM refuses per-head scales without the key",
        "add config_groups, {} if there is no group",
    ),
    ("group-invalid", "compressed-tensors refuses this field", "correct config.json"),
    ("sparsity", "vLLM refuses sparse checkpoints", "remove sparsity_config"),
    ("format", "engines find no scheme for these layers", "set the group's format"),
    ("actorder", "vLLM no longer supports it", "quantize with actorder static"),
    ("attention-target", "vLLM treats the group as one for Linears", "name the attention class"),
    ("kv-scheme", "vLLM refuses or misreads the KV-cache scheme", "correct kv_cache_scheme"),
    ("pattern-invalid", "an invalid regular expression", "correct config.json"),
    ("target-unmatched", "a group that quantizes nothing", "correct its targets"),
    ("recipe-differs", "another scheme than the recipe beside it", "restore the field"),
)

LINEARS = _faults(
    ("ignored-but-quantized", "quantized on disk, ignored by the config", "remove it from ignore"),
    ("never-quantized", "engines never quantize this module", "ignore it, and convert again"),
    ("head-untargeted", "vLLM does not match the output head by class", "target re:.*lm_head"),
    ("untargeted", "quantized on disk, but no group targets it", "target it in config_groups"),
    (
        "targeted-but-unquantized",
        "engines would read a weight as codes, or expect scales",
        "add it to ignore, or quantize it",
    ),
    (
        "ignore-not-honoured",
        "vLLM's ignore matches full names and anchored patterns, but not class names",
        "write full module names, or re:.*NAME",
    ),
    ("fused-set-split", "vLLM merges these into one matrix", "quantize them alike"),
    ("experts-differ", "engines look at expert 0 only", "quantize all experts alike"),
    ("expert-missing", "engines would use uninitialised memory for it", AGAIN),
    ("expert-layouts-mixed", "vLLM cannot read fused and separate experts", AGAIN),
    ("layer-missing", "config.json declares more decoder layers", AGAIN),
    ("weight-missing", "no codes for a Linear", AGAIN),
    ("scale-missing", "engines use a placeholder", AGAIN),
    ("zero-point-missing", "engines use zero", AGAIN),
    ("input-scale-missing", "engines use a placeholder", "calibrate static activations"),
    ("global-scale-missing", "engines use a placeholder", AGAIN),
    ("orphan-scale", "a scale for an unquantized weight", "remove the tensor"),
    ("zero-point-extra", "engines refuse it with a symmetric scheme", "remove the tensor"),
    ("input-scale-extra", "engines refuse it with dynamic activations", "remove the tensor"),
    ("g-idx", "vLLM no longer reads activation order", "quantize with actorder static"),
    ("tensor-unknown", "engines refuse unknown tensors", "remove the tensor"),
    ("codes-dtype", "codes do not match the declared format", "correct the group's format"),
    ("codes-shape", "codes do not match the weight's shape", AGAIN),
    ("codes-transposed", "the weight is stored as [in, out]", AGAIN),
    ("group-size", "scales do not match the declared group size", "correct group_size"),
    ("strategy", "scales do not match the declared strategy", "correct strategy"),
    ("scale-shape", "engines refuse the shape", AGAIN),
    ("scale-dtype", "engines do not read scales of this dtype", AGAIN),
    ("zero-point-shape", "zero points have the wrong shape or packing", AGAIN),
    ("zero-point-packing", "zero points are packed along the columns, not the rows", AGAIN),
    ("tensor-missing", "missing tensors", AGAIN),
    ("names-moved", "layer names differ from the source's", "rename the tensors"),
    ("tensor-extra", "not present in the source", "remove the tensor"),
    ("copy-spec", "an unquantized tensor has another dtype or shape", AGAIN),
    ("tied-head", "engines use the embedding instead", "untie it, or leave it out"),
    ("block-rows", "vLLM merges only whole blocks of rows", "quantize it per channel"),
    (
        "block-columns",
        "engines quantize activations in whole groups only",
        "leave it unquantized, or quantize it per channel",
    ),
    ("rope-block-scales", "engines that permute q/k cannot move them", "quantize q/k per channel"),
    (
        "rope-zero-points",
        "vLLM permutes q/k weights but not their packed zero points",
        "use a symmetric scheme for q/k, or `ckptq permute --to half-split --only zero-points`",
    ),
    ("rope-order-mixed", "weights in one RoPE order, scales in the other", "see the marks"),
    ("input-scale-split", "vLLM refuses experts whose gate and up differ", "use the larger"),
) + _notes(
    (
        "tensor-placeless",
        "transformers leaves them out, and vLLM refuses names that its class does not have",
        "remove them, unless another engine reads them",
    ),
    ("shape-missing", "transformers cannot unpack without weight_shape", AGAIN),
    ("not-ignored", "unquantized here, but transformers expects scales", "add it to ignore"),
    ("expert-names", "transformers silently leaves these experts random", "use the source's names"),
    ("target-class", "vLLM reads it as Linear, transformers ignores it", "write Linear"),
    ("rope-order", "for engines that do not permute; vLLM would permute again", "none"),
    ("fused-scales-differ", "vLLM requantizes the set to the largest scale", "share one scale"),
)

CACHE = _faults(
    ("kv-scheme-missing", "engines ignore the scales on disk", "declare kv_cache_scheme"),
    ("kv-scale-missing", "vLLM silently uses 1.0", "`ckptq calibrate`, then convert again"),
    ("q-scale-missing", "vLLM uses 1.0, transformers NaN", "`ckptq calibrate`, then convert again"),
    ("kv-scale-shape", "expected one scale, or one per head", AGAIN),
    ("kv-heads-differ", "vLLM loads no per-head scales for this layer", "calibrate per tensor"),
    ("shared-cache-scale", "reads another layer's cache with a different scale", AGAIN),
    ("latent-per-head", "latent attention caches one row for all heads", "calibrate per tensor"),
    (
        "latent-scales-differ",
        "one row is cached with k's scale and read as k and v",
        "`ckptq calibrate`, then convert again",
    ),
    ("kv-scale-dtype", "engines do not read scales of this dtype", AGAIN),
    ("vision-scale", "crashes vLLM; text cannot calibrate it", "remove the tensor"),
    ("kv-scale-orphan", "no attention layer here", "remove the tensor"),
    ("no-attention", "a KV-cache scheme for a model without attention", "remove the scheme"),
) + _notes(
    ("q-scale-absent", "FP8 attention backends quantize queries with 1.0", "`ckptq calibrate`"),
)

VALUES = _faults(
    ("scale-not-finite", "NaN or Inf in a scale", AGAIN),
    ("scale-not-positive", "a scale that is zero or negative", AGAIN),
    (
        "scale-uninitialised",
        "uninitialised memory, as llm-compressor 0.14 leaves in q_scale",
        "`ckptq calibrate`, then convert again",
    ),
    (
        "scale-implausible",
        "implausibly large weights: reciprocals, or another unit",
        "store dequantization multipliers",
    ),
    ("scales-all-one", "placeholders: nothing was calibrated", "calibrate"),
    (
        "input-scale-implausible",
        "implausibly large activations: reciprocals, or another unit",
        "calibrate static activations",
    ),
    ("codes-nan", "an E4M3 code that is NaN", AGAIN),
    ("codes-range", "codes outside the declared bits", "correct num_bits"),
    (
        "rows-empty",
        "zero rows in an embedding, as after an interrupted download",
        "download the file again",
    ),
    (
        "codes-empty",
        "rows of zero bytes, as after an interrupted download",
        "download the file again",
    ),
    ("padding", "bits after the last packed code are set", AGAIN),
    ("zero-point-range", "zero points outside the range of codes", AGAIN),
    ("weight-shape-value", "weight_shape differs from the weight's shape", AGAIN),
    ("not-finite", "NaN or Inf in an unquantized tensor", AGAIN),
) + _notes(
    ("scale-signed", "scales of both signs, as AutoRound writes them", "none"),
    ("heads-alike", "declared per head, but equal for all heads", "calibrate per head"),
    ("scale-outlier", "10,000 times the scales of other layers", "check the layer"),
)

ROUND_TRIP = _faults(
    ("copy-differs", "bytes differ from the source", "copy it again"),
    ("codes-corrupt", "a few codes are not the nearest: damage after writing", AGAIN),
    ("scale-corrupt", "a few scales do not match their codes", AGAIN),
    ("weight-wrong", "does not decode to the source's weight", AGAIN),
    ("scale-wrong", "the codes are right, the scales are wrong", AGAIN),
    ("scale-clips", "the scales clip the weight", "use the plain minimum and maximum"),
    ("scale-inverted", "scales are reciprocals: divisors, not multipliers", "store 1 / scale"),
    ("scale-permuted", "scales in the other RoPE order than the weights", "permute the scales"),
    ("codes-permuted", "weights in the other RoPE order than their scales", "permute the weights"),
    ("rows-permuted", "weights and scales in the other RoPE order", "permute the checkpoint"),
    ("zero-points-permuted", "zero points in the other RoPE order", "permute the zero points"),
    ("scale-of-another", "scales of another module", "exchange the scales"),
    ("codes-of-another", "codes of another module", "exchange the codes"),
    ("exchanged", "two modules are exchanged", "exchange them"),
    ("experts-permuted", "experts in another order than the source's", AGAIN),
    ("misplaced", "a copy of another module", AGAIN),
    ("heads-swapped", "whole heads are in another order", AGAIN),
    ("experts-transposed", "the expert was cut out without transposing it", AGAIN),
    ("scale-shifted", "scales are shifted by one row or group", AGAIN),
    ("scale-transposed", "the grid of scales is transposed", AGAIN),
    ("nibbles-swapped", "4-bit codes are packed in another order", AGAIN),
    ("bytes-swapped", "the bytes of packed words are in another order", AGAIN),
    ("codes-offset", "codes lack their format's offset, or have an extra one", AGAIN),
    ("zero-points-wrong", "scales and codes are right, the zero points are wrong", AGAIN),
    ("zero-points-of-another", "zero points of another module", "exchange the zero points"),
    ("rows-moved", "the source's rows are in other places", AGAIN),
    ("zero-points-offset", "zero points in another tool's convention", AGAIN),
    ("other-source", "not a quantization of this source", "pass the source it was made from"),
    ("columns-unbalanced", "columns are rescaled, and nothing compensates", AGAIN),
    (
        "decoder-disagrees",
        "ckptq decodes this weight differently from the library that defines the format",
        "do not use the checkpoint, and report it with the tensor's format",
    ),
    ("stale-shard", "a whole shard of other weights, as from another run", "convert it again"),
) + _notes(
    ("norm-rounded", "a 1 + w norm that llm-compressor rewrote", "none"),
    ("rounded-twice", "divided in the weight's dtype, as llm-compressor does on CPUs", "none"),
    ("scale-differs", "scales from another observer than minimum and maximum", "none"),
    ("codes-not-nearest", "codes chosen by GPTQ or a similar method", "none"),
    ("columns-rescaled", "columns are rescaled, as AWQ and SmoothQuant do", "none"),
    ("low-snr", "every code is right, but the format suits this weight poorly", "finer groups"),
)

ATTENTION = _faults(
    ("head-saturates", "q, k or v of this head is clipped", "calibrate on more text"),
    ("heads-exchanged", "scales of heads are exchanged", "exchange them"),
    ("kv-exchanged", "k and v scales are exchanged", "exchange them"),
    ("cache-scale-inverted", "scales are reciprocals", "store 1 / scale"),
    ("cache-scale-of-another", "scales of another layer", "exchange the scales"),
    ("cache-scale-wrong", "scales do not match the activations", "calibrate again"),
) + _notes(
    (
        "cache-scale-factor",
        "all scales are off by a factor, or the text differs",
        "calibrate again",
    ),
)

ENGINE = _faults(
    ("arrives-wrong", "the loaded weight is not the source's", "fix the other findings"),
    ("engine-refuses", "the engine cannot load it", "use another scheme or engine"),
    ("engine-default", "the engine uses a placeholder", "store the scale"),
    ("engine-unfilled", "no tensor fills these parameters of the engine's model", AGAIN),
    ("engine-partly-filled", "a merged parameter lacks a part or an expert", AGAIN),
    ("engine-left-over", "the engine's model has no place for these tensors", AGAIN),
    ("engine-shape", "shape or dtype differs from the engine's parameter", AGAIN),
    (
        "engine-not-ignored",
        "the engine builds this module quantized, but it is stored unquantized",
        "add it to ignore",
    ),
    (
        "tied-head-not-ignored",
        "transformers quantizes the tied head, for which there is no scale",
        "add it to ignore",
    ),
    (
        "attention-group-first",
        "transformers uses the first group with a class name for experts",
        "move the attention group after the groups of Linears",
    ),
) + _notes(
    ("engine-unseen", "the simulation cannot judge these", "ask the engine itself"),
)

EVERY = (*FILES, *CONFIG, *LINEARS, *CACHE, *VALUES, *ROUND_TRIP, *ATTENTION, *ENGINE)

KINDS: dict[str, Kind] = {kind.code: kind for kind in EVERY}


class Placed(Protocol):
    """A tensor or module that knows its file."""

    @property
    def name(self) -> str: ...
    @property
    def file(self) -> Path | str: ...


def finding(
    code: str,
    where: str | Placed | None = None,
    *,
    file: Path | str | None = None,
    found: str,
    wanted: str,
    repair: str | None = None,
) -> Finding:
    """A finding of a known kind. Example: `finding("status", found="nothing", wanted="...")`.

    A tensor or module brings its own file.
    """
    kind = KINDS[code]
    tensor = where if where is None or isinstance(where, str) else where.name
    if where is not None and not isinstance(where, str):
        file = where.file
    return Finding(
        code=code,
        severity=kind.severity,
        tensor=tensor,
        file=file.name if isinstance(file, Path) else file,
        found=found,
        wanted=wanted,
        repair=repair or kind.repair,
    )
