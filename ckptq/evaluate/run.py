"""`ckptq evaluate` as one function: which models and caches to run, and their results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptq.checkpoint.open import Checkpoint
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import CkptqError, UsageError
from ckptq.evaluate.caches.kv_cache import KVCache, declared_cache, parse_cache
from ckptq.evaluate.compare import Comparison, Outcome
from ckptq.evaluate.linears.coded_product import codes_multiply
from ckptq.evaluate.linears.inputs import InputScheme, declared_inputs
from ckptq.evaluate.outside.engine import EngineRow, EngineRun, engine_row, in_vllm
from ckptq.evaluate.result import Evaluation, FailedRow, Row, Thresholds
from ckptq.evaluate.text import Text
from ckptq.evaluate.variant import Track, Variant
from ckptq.evaluate.watching import Watching
from ckptq.evaluate.weights.schemes import SchemeWeights, planned_cache, planned_inputs
from ckptq.forward.decoded import DecodedWeights, weights_of
from ckptq.forward.layerwise import LayerwiseModel, open_model
from ckptq.forward.reader import Reader
from ckptq.forward.source import WeightSource
from ckptq.models.encoded import read_encoded
from ckptq.models.heads import config_head_dim, config_heads
from ckptq.models.modules import read_layout
from ckptq.plan.make import make_plan
from ckptq.progress import Begin, silent
from ckptq.quantize.coded import Coded, Keep
from ckptq.recipes.scheme import Recipe

NOTHING = Thresholds()

Codes = dict[str, Coded]
"""Linear -> its codes, of the layer that is loaded."""


def check_compared(
    ckpt: Checkpoint, source: Checkpoint | None, caches: Sequence[str], schemes: Sequence[Recipe]
) -> None:
    """UsageError if there is nothing to compare a checkpoint with."""
    if source is None and not caches and not schemes:
        raise UsageError(
            f"{ckpt.path}: nothing to compare with: use --source for a quantized checkpoint, "
            "--kv-cache or --schemes for one that is not"
        )


def evaluate(
    ckpt: Checkpoint,
    text: Text,
    *,
    source: Checkpoint | None = None,
    caches: Sequence[str] = (),
    schemes: Sequence[Recipe] = (),
    thresholds: Thresholds = NOTHING,
    batch_size: int | None = None,
    device: str = "cpu",
    vllm_python: Path | None = None,
    ranks: Ranks = ALONE,
    begin: Begin = silent,
) -> Evaluation:
    """Compare a quantized checkpoint, caches or schemes with the unquantized model on some text.

    With `source`, `ckpt` is the quantized checkpoint: its row has its config's
    cache, and each of `caches` adds one. Without, `ckpt` is compared with itself: once for each of
    `caches`, and once for each of `schemes`, whose weights are quantized in memory.

    `batch_size` is how many lines pass at a time; None is one, and on a GPU as many neighbours of
    the same length as fill it.

    `vllm_python` is an interpreter with vLLM: source and checkpoint run there as well.

    Of several `ranks` each runs its share of the batches on its device, and all get all results:
    those of a single process, as far as its device computes the same.

    Memory: one layer of one model at a time (with `schemes`, beside that layer as it is stored,
    which is read once for all of them), its logits in chunks, and the hidden states of all text for
    every row: rows * tokens * hidden_size * 2 bytes in bf16.
    """
    check_compared(ckpt, source, caches, schemes)
    began = time.monotonic()
    base = ckpt if source is None else source
    bench = _Bench(base, Reader(device, keep=bool(schemes)), ranks)
    if source is not None:
        bench.add_output(ckpt, caches)
    else:
        bench.add_caches(caches)
    for recipe in schemes:
        bench.add_scheme(recipe)
    if vllm_python is not None:
        bench.add_engine(vllm_python, text, ckpt)
    outcomes, failed = bench.run(text, batch_size, begin)
    lost = [draft for draft in bench.drafts if draft.variant.name in failed]
    rows = [draft.row(outcomes) for draft in bench.drafts if draft not in lost]
    if not rows:
        raise next(iter(failed.values()))
    return Evaluation(
        source=bench.source.row(outcomes),
        rows=tuple(rows),
        failed=tuple(
            draft.failed(failed) for draft in bench.drafts if draft.variant.name in failed
        ),
        zero=bench.zero.row(outcomes),
        control=bench.control.row(outcomes),
        text=text.source,
        samples=len(text.lines),
        engines=bench.engines(text, outcomes),
        thresholds=thresholds,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A row before it is measured."""

    variant: Variant
    weights: str
    nbytes: int
    cache_bits: float
    quantized: SchemeWeights | None = None

    def row(self, outcomes: Mapping[str, Outcome]) -> Row:
        return Row(
            weights=self.weights,
            kv_cache=self.variant.cache.name,
            scales=self.variant.cache.origin,
            nbytes=self.nbytes,
            cache_bits=self.cache_bits,
            snr_db=self.quantized.snr_db if self.quantized is not None else None,
            outcome=outcomes[self.variant.name],
        )

    def failed(self, errors: Mapping[str, CkptqError]) -> FailedRow:
        cache, error = self.variant.cache.name, str(errors[self.variant.name])
        return FailedRow(weights=self.weights, kv_cache=cache, error=error)


@dataclass
class _Bench:
    """Builds the tracks of one evaluation."""

    base: Checkpoint
    reader: Reader
    """Of `base`: the source and every scheme are made of what it reads once."""
    ranks: Ranks
    drafts: list[_Draft] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._layers = read_layout(self.base).num_layers
        self.source = self._draft(Variant(name="source"), self.base)
        self.zero = self._draft(Variant(name="zero"), self.base)
        self.control = self._draft(Variant(name="control", spoiled=True), self.base)
        self._engines: list[tuple[_Draft, EngineRun]] = []
        self._tracks: list[tuple[LayerwiseModel, list[Variant], Codes]] = []
        weights = weights_of(self.base, self.reader)
        self._track(weights, [self.source.variant, self.zero.variant], {})

    def add_output(self, ckpt: Checkpoint, caches: Sequence[str]) -> None:
        """The quantized checkpoint: with its own cache, with others, and spoiled."""
        inputs = declared_inputs(ckpt, read_encoded(ckpt))
        variants = [self._variant(ckpt.name, declared_cache(ckpt), inputs)]
        variants += [self._variant(ckpt.name, parse_cache(name, ckpt), inputs) for name in caches]
        self.drafts += [self._draft(variant, ckpt) for variant in _distinct(variants)]
        first = self.drafts[0].variant
        spoiled = Variant(name="control", cache=first.cache, inputs=inputs, spoiled=True)
        self.control = self._draft(spoiled, ckpt)
        every = [draft.variant for draft in self.drafts]
        codes: Codes = {}
        reader = Reader(self.reader.device)
        weights = DecodedWeights(ckpt, self.base, reader, self._keep(codes))
        self._track(weights, [*every, spoiled], codes)

    def add_caches(self, caches: Sequence[str]) -> None:
        """Caches under the unquantized weights, and the control: those weights spoiled."""
        variants = [self._variant("source", parse_cache(name, self.base), {}) for name in caches]
        self.drafts += [self._draft(variant, self.base) for variant in _distinct(variants)]
        every = [draft.variant for draft in self.drafts]
        self._tracks[0][1].extend([*every, self.control.variant])

    def add_scheme(self, recipe: Recipe) -> None:
        """A scheme, quantized in memory layer by layer."""
        plan = make_plan(self.base, recipe)
        codes: Codes = {}
        weights = SchemeWeights(self.base, plan, self.reader, self._keep(codes))
        variant = self._variant(recipe.name, planned_cache(plan), planned_inputs(plan))
        draft = replace(
            self._draft(variant, self.base),
            weights=recipe.name,
            nbytes=plan.write_bytes,
            quantized=weights,
        )
        self.drafts.append(draft)
        self._track(weights, [variant], codes)

    def add_engine(self, python: Path, text: Text, ckpt: Checkpoint) -> None:
        """Source and checkpoint in vLLM, to be compared with the same caches in ckptq."""
        self._engines.append((self.source, in_vllm(python, self.base, text)))
        if ckpt is self.base:
            return
        first, run = self.drafts[0], in_vllm(python, ckpt, text)
        cache = first.variant.cache
        if run.holds(cache) != cache:
            variant = replace(first.variant, name="as in the engine", cache=run.holds(cache))
            self._tracks[1][1].append(variant)
            first = replace(first, variant=variant)
        self._engines.append((first, run))

    def engines(self, text: Text, outcomes: Mapping[str, Outcome]) -> tuple[EngineRow, ...]:
        """The source, whose gap is the difference between engines, then the checkpoint."""
        source = outcomes[self.source.variant.name]
        return tuple(
            engine_row(draft.weights, run, text, outcomes[draft.variant.name], source)
            for draft, run in self._engines
            if draft.variant.name in outcomes
        )

    def run(
        self, text: Text, batch_size: int | None, begin: Begin
    ) -> tuple[dict[str, Outcome], Mapping[str, CkptqError]]:
        """Outcomes by row, and why the others ended."""
        tracks = [Track(*each) for each in self._tracks]
        layout = read_layout(self.base)
        own = {f"{name}.weight": (name,) for name in layout.linears}
        if batch_size is None and self.reader.device.type == "cpu":
            batch_size = 1
        needed = {draft.variant.name for draft in (self.source, self.zero, self.control)}
        watching = Watching(
            source=self.source.variant,
            rows=[row for track in tracks for row in track.variants],
            needed=needed,
            consumed={**own, **layout.consumed},
            ranks=self.ranks,
        )
        comparison = Comparison(tracks, text, watching, batch_size, self.ranks, self.reader.release)
        return comparison.run(begin), watching.failed

    def _track(self, weights: WeightSource, variants: list[Variant], codes: Codes) -> None:
        model = open_model(self.base, str(self.reader.device), weights)
        self._tracks.append((model, variants, codes))

    def _keep(self, codes: Codes) -> Keep | None:
        """What weights of a row do with their codes: they are kept where they are multiplied."""
        return codes.__setitem__ if codes_multiply(self.reader.device) else None

    def _draft(self, variant: Variant, ckpt: Checkpoint) -> _Draft:
        config = self.base.text_config
        heads, _ = config_heads(config) or (1, 1)
        bits = variant.cache.mean_bits(config_head_dim(config, heads), self._layers)
        return _Draft(variant=variant, weights=ckpt.name, nbytes=ckpt.nbytes, cache_bits=bits)

    def _variant(self, weights: str, cache: KVCache, inputs: Mapping[str, InputScheme]) -> Variant:
        return Variant(name=f"{weights} / {cache.name}", cache=cache, inputs=inputs)


def _distinct(variants: Sequence[Variant]) -> list[Variant]:
    """The checkpoint's own cache may be requested by name too: run it once."""
    found: dict[str, Variant] = {}
    for variant in variants:
        found.setdefault(variant.name, variant)
    return list(found.values())
