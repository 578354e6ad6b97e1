"""Every kind of finding: its code, whether it is a fault, what it means, and what mends it.

The codes are an interface: scripts and tests compare them. `repair` may be made more precise where
a finding is made.
"""

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
    ("index-mismatch", "index and shards disagree", "write the index anew"),
    ("total-size", "the index's total_size is not the sum of the tensors", "write the index anew"),
    ("side-file-missing", "a file that serving needs is only in the source", "copy it from there"),
    ("config-differs", "the architecture in config.json is not the source's", "restore the field"),
    ("vocabulary", "tokens have other ids than they should", "restore the tokenizer's files"),
    ("config-shapes", "config.json is of another model than the tensors", "restore the field"),
    ("tokenizer-differs", "the same text becomes other tokens", "copy tokenizer.json again"),
    ("stray-weights", "vLLM loads it too, and the last one counts", "delete it"),
    ("marks-contradict", "shards say different things of their RoPE order", AGAIN),
) + _notes(
    ("stray-shard", "a safetensors file that the index does not name", "delete it"),
    ("side-file-differs", "a side file differs from the source's", "compare the two"),
    ("config-note", "a field of config.json differs from the source's", "compare the two"),
    ("not-quantized", "nothing is quantized here", "run `ckptq quantize`"),
    ("transforms", "engines rotate what they multiply, which verify does not judge", "none"),
)

CONFIG = _faults(
    ("no-quantization-config", "quantized tensors, and a config that does not say so", AGAIN),
    ("quant-method", "engines take it for another tool's", 'set it to "compressed-tensors"'),
    ("status", "transformers computes NaN without it", 'set quantization_status to "compressed"'),
    (
        "config-groups-missing",
        "vLLM refuses per-head scales without the key",
        "add config_groups, {} if there is no group",
    ),
    ("group-invalid", "compressed-tensors refuses the field", "correct config.json"),
    ("sparsity", "vLLM refuses sparse checkpoints", "remove sparsity_config"),
    ("format", "engines find no scheme for the layers", "set the group's format"),
    ("actorder", "vLLM no longer supports it", "quantize with actorder static"),
    ("attention-target", "vLLM takes the group for one of Linears", "name the attention class"),
    ("kv-scheme", "vLLM refuses or misreads the KV-cache scheme", "correct kv_cache_scheme"),
    ("pattern-invalid", "a pattern that does not compile", "correct config.json"),
    ("target-unmatched", "a group that quantizes nothing", "correct its targets"),
)

LINEARS = _faults(
    ("ignored-but-quantized", "quantized on disk, ignored by the config", "remove it from ignore"),
    ("never-quantized", "engines build this module unquantized", "ignore it, and convert again"),
    ("head-untargeted", "vLLM does not take the output head for a Linear", "target re:.*lm_head"),
    ("untargeted", "quantized on disk, and no group targets it", "target it in config_groups"),
    (
        "targeted-but-unquantized",
        "engines would read a weight as codes, or wait for scales",
        "add it to ignore, or quantize it",
    ),
    (
        "ignore-not-honoured",
        "vLLM's ignore takes whole names and patterns anchored at the start, no class names",
        "write full module names, or re:.*NAME",
    ),
    ("fused-set-split", "vLLM merges these into one matrix", "quantize them alike"),
    ("experts-differ", "engines look at expert 0 only", "quantize all experts alike"),
    ("expert-missing", "engines serve uninitialised memory for it", AGAIN),
    ("expert-layouts-mixed", "vLLM cannot read fused and separate experts", AGAIN),
    ("layer-missing", "config.json promises more decoder layers", AGAIN),
    ("weight-missing", "no codes for a Linear", AGAIN),
    ("scale-missing", "engines compute with a placeholder", AGAIN),
    ("zero-point-missing", "engines compute with zero", AGAIN),
    ("input-scale-missing", "engines compute with a placeholder", "calibrate static activations"),
    ("global-scale-missing", "engines compute with a placeholder", AGAIN),
    ("orphan-scale", "a scale of a weight that is not quantized", "remove the tensor"),
    ("zero-point-extra", "engines refuse it with a symmetric scheme", "remove the tensor"),
    ("input-scale-extra", "engines refuse it with dynamic activations", "remove the tensor"),
    ("g-idx", "vLLM no longer reads activation order", "quantize with actorder static"),
    ("tensor-unknown", "engines refuse a tensor that no module has", "remove the tensor"),
    ("codes-dtype", "codes of another format than declared", "correct the group's format"),
    ("codes-shape", "codes of another shape than the weight's", AGAIN),
    ("codes-transposed", "the weight is stored as [in, out]", AGAIN),
    ("group-size", "scales of another group size than declared", "correct group_size"),
    ("strategy", "scales of another strategy than declared", "correct strategy"),
    ("scale-shape", "engines refuse the shape", AGAIN),
    ("scale-dtype", "engines do not read scales of this dtype", AGAIN),
    ("zero-point-shape", "zero points of another shape or packing", AGAIN),
    ("zero-point-packing", "zero points are packed along the columns, not the rows", AGAIN),
    ("tensor-missing", "the source has it", AGAIN),
    ("names-moved", "layers have other names than the source's", "rename the tensors"),
    ("tensor-extra", "the source does not have it", "remove the tensor"),
    ("copy-spec", "an unquantized tensor of another dtype or shape", AGAIN),
    ("tied-head", "engines serve the embedding in its place", "untie it, or leave it out"),
    ("block-rows", "vLLM merges only whole blocks of rows", "quantize it per channel"),
    (
        "block-columns",
        "engines quantize activations in whole groups only",
        "leave it unquantized, or quantize it per channel",
    ),
    ("rope-block-scales", "engines that permute q/k cannot move them", "use per channel for q/k"),
    (
        "rope-zero-points",
        "vLLM permutes q/k weights and not their packed zero points",
        "use a symmetric scheme for q/k, or `ckptq permute --to half-split --only zero-points`",
    ),
    ("rope-order-mixed", "weights in one RoPE order, scales in the other", "see the marks"),
    ("input-scale-split", "vLLM refuses experts whose gate and up differ", "use the larger"),
) + _notes(
    ("shape-missing", "transformers cannot unpack without weight_shape", AGAIN),
    ("not-ignored", "left alone here, but transformers waits for its scales", "add it to ignore"),
    ("expert-names", "transformers silently leaves these experts random", "use the source's names"),
    ("target-class", "vLLM takes it for Linear, transformers for nothing", "write Linear"),
    ("rope-order", "for engines that do not permute; vLLM would permute again", "none"),
    ("fused-scales-differ", "vLLM requantizes the set to the largest", "share one scale"),
)

CACHE = _faults(
    ("kv-scheme-missing", "scales on disk that engines ignore", "declare kv_cache_scheme"),
    ("kv-scale-missing", "vLLM uses 1.0 without a word", "`ckptq calibrate`, then convert again"),
    ("q-scale-missing", "vLLM uses 1.0, transformers NaN", "`ckptq calibrate`, then convert again"),
    ("kv-scale-shape", "not one scale for each head, or not one", AGAIN),
    ("kv-heads-differ", "vLLM loads no scales per head for this layer", "calibrate per tensor"),
    ("shared-cache-scale", "it reads another layer's cache with a scale of its own", AGAIN),
    ("kv-scale-dtype", "engines do not read scales of this dtype", AGAIN),
    ("vision-scale", "crashes vLLM; text never calibrates it", "remove the tensor"),
    ("kv-scale-orphan", "no attention layer here", "remove the tensor"),
    ("no-attention", "a KV-cache scheme for a model without attention", "remove the scheme"),
) + _notes(
    ("q-scale-absent", "FP8 attention backends quantize queries with 1.0", "`ckptq calibrate`"),
    ("latent-cache", "latent attention caches no heads; its scales are not checked", "none"),
)

VALUES = _faults(
    ("scale-not-finite", "NaN or Inf in a scale", AGAIN),
    ("scale-not-positive", "a scale that is zero or negative", AGAIN),
    (
        "scale-uninitialised",
        "memory that nothing was written to, as llm-compressor 0.14 leaves in q_scale",
        "`ckptq calibrate`, then convert again",
    ),
    (
        "scale-implausible",
        "weights beyond any model's: reciprocals, or another unit",
        "store dequantization multipliers",
    ),
    ("scales-all-one", "a placeholder: nothing was calibrated", "calibrate"),
    (
        "input-scale-implausible",
        "activations beyond any model's: reciprocals, or another unit",
        "calibrate static activations",
    ),
    ("codes-nan", "an E4M3 code that is NaN", AGAIN),
    ("codes-range", "codes that the declared bits cannot hold", "correct num_bits"),
    (
        "rows-empty",
        "rows of zeros in an embedding, as an interrupted download leaves",
        "fetch the file again",
    ),
    (
        "codes-empty",
        "rows of zero bytes, as an interrupted download leaves",
        "fetch the file again",
    ),
    ("padding", "bits behind the last packed code are set", AGAIN),
    ("zero-point-range", "zero points that no code reaches", AGAIN),
    ("weight-shape-value", "weight_shape does not say the weight's shape", AGAIN),
    ("not-finite", "NaN or Inf in an unquantized tensor", AGAIN),
) + _notes(
    ("scale-signed", "scales of both signs, as AutoRound writes them", "none"),
    ("heads-alike", "declared per head, and one number for all heads", "calibrate per head"),
    ("scale-outlier", "10,000 times the scales of the other layers", "look at the layer"),
)

ROUND_TRIP = _faults(
    ("copy-differs", "not the source's bytes", "copy it again"),
    ("codes-corrupt", "a few codes are not the nearest: damaged after writing", AGAIN),
    ("scale-corrupt", "a few scales are not those the codes were made with", AGAIN),
    ("weight-wrong", "does not stand for the source's weight", AGAIN),
    ("scale-wrong", "the codes are right, the scales are others", AGAIN),
    ("scale-clips", "the scales clip the weight", "use the plain minimum and maximum"),
    ("scale-inverted", "scales are reciprocals: divisors, not multipliers", "store 1 / scale"),
    ("scale-permuted", "scales in the other RoPE order than the weights", "permute the scales"),
    ("codes-permuted", "weights in the other RoPE order than their scales", "permute the weights"),
    ("rows-permuted", "weights and scales in the other RoPE order", "permute the checkpoint"),
    ("zero-points-permuted", "zero points in the other RoPE order", "permute the zero points"),
    ("scale-of-another", "scales of another module", "exchange the scales"),
    ("codes-of-another", "codes of another module", "exchange the codes"),
    ("exchanged", "two modules stand in each other's place", "exchange them"),
    ("experts-permuted", "experts in another order than the source's", AGAIN),
    ("misplaced", "a copy of another module", AGAIN),
    ("heads-swapped", "whole heads are in another order", AGAIN),
    ("experts-transposed", "the expert was cut out without its transpose", AGAIN),
    ("scale-shifted", "scales are shifted by one row or group", AGAIN),
    ("scale-transposed", "the grid of scales is transposed", AGAIN),
    ("nibbles-swapped", "4-bit codes are packed in another order", AGAIN),
    ("bytes-swapped", "the bytes of packed words are in another order", AGAIN),
    ("codes-offset", "codes lack the offset of their format, or have one too many", AGAIN),
    ("zero-points-wrong", "scales and codes are right, the zero points are others", AGAIN),
    ("zero-points-of-another", "zero points of another module", "exchange the zero points"),
    ("rows-moved", "its rows are the source's, in other places", AGAIN),
    ("zero-points-offset", "zero points in another tool's convention", AGAIN),
    ("other-source", "not a quantization of this source", "give the source it was made from"),
    ("columns-unbalanced", "columns are rescaled, and nothing before them undoes it", AGAIN),
    (
        "decoder-disagrees",
        "ckptq decodes this kind of weight otherwise than the library that defines it",
        "do not use the checkpoint, and report it with the tensor's format",
    ),
    ("stale-shard", "a whole shard of other weights, as from another run", "convert it again"),
) + _notes(
    ("norm-rounded", "a norm of 1 + w that llm-compressor took apart and put back", "none"),
    ("rounded-twice", "divided in the weight's dtype, as llm-compressor does on CPUs", "none"),
    ("scale-differs", "scales of another observer than the plain minimum and maximum", "none"),
    ("codes-not-nearest", "codes that GPTQ or a like method chose", "none"),
    ("columns-rescaled", "columns are rescaled, as AWQ and SmoothQuant do", "none"),
    ("low-snr", "every code is right, but the format suits this weight badly", "finer groups"),
)

ATTENTION = _faults(
    ("head-saturates", "q, k or v of this head is clipped", "calibrate on more text"),
    ("heads-exchanged", "scales of heads stand in each other's place", "exchange them"),
    ("kv-exchanged", "k and v scales stand in each other's place", "exchange them"),
    ("cache-scale-inverted", "scales are reciprocals", "store 1 / scale"),
    ("cache-scale-of-another", "scales of another layer", "exchange the scales"),
    ("cache-scale-wrong", "scales have nothing to do with what passes", "calibrate again"),
) + _notes(
    ("cache-scale-factor", "all scales are off by one number, or other text", "calibrate again"),
)

ENGINE = _faults(
    ("arrives-wrong", "what the engine makes of it is not the source's", "mend what else is found"),
    ("engine-refuses", "the engine does not load it", "use another scheme or engine"),
    ("engine-default", "the engine uses its placeholder", "store the scale"),
    ("engine-unfilled", "parameters of the engine's model that no tensor fills", AGAIN),
    ("engine-partly-filled", "a merged parameter lacks a part, or an expert", AGAIN),
    ("engine-left-over", "the engine's model has no place for these tensors", AGAIN),
    ("engine-shape", "not the shape or dtype of the engine's parameter", AGAIN),
    (
        "engine-not-ignored",
        "the engine builds this module quantized, and it is stored unquantized",
        "add it to ignore",
    ),
    (
        "tied-head-not-ignored",
        "transformers makes a quantized Linear of a tied head, without a scale",
        "add it to ignore",
    ),
    (
        "attention-group-first",
        "transformers takes the first group that names a class for the experts'",
        "move the attention group behind the groups of Linears",
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
