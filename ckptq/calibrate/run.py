"""Calibration as one function: run the model layer by layer and compute scales from its values.

The model is observed unquantized, as llm-compressor does. Only attention inside the decoder layers
is observed: text never reaches a vision tower, so its scales would be meaningless.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ckptq import __version__
from ckptq.autoround.layer_tuner import LayerTuner
from ckptq.calibrate.divided import check_observers, merged
from ckptq.calibrate.journal import Journal
from ckptq.calibrate.observers import Observer, make_observer
from ckptq.calibrate.result import scales_of
from ckptq.calibrate.scales import Scales, source_fingerprint
from ckptq.calibrate.seen import check_seen
from ckptq.calibrate.statistics import Statistics, Wanted
from ckptq.checkpoint.identity import State, check_unchanged, lasting
from ckptq.checkpoint.open import Checkpoint
from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import PlanError, UsageError
from ckptq.forward.decoded import weights_of
from ckptq.forward.latent import Latents
from ckptq.forward.layerwise import LayerwiseModel, Watch, open_model
from ckptq.forward.linear_inputs import Inputs
from ckptq.forward.reader import Reader
from ckptq.forward.tap import Tap, tapped
from ckptq.gptq.layers import LayerQuantizer
from ckptq.kernels.attention.maxima import Maxima
from ckptq.models.refusals import WEIGHTS_ALONE
from ckptq.plan.attention import AttentionPlan
from ckptq.text.samples import Batch, Samples

Progress = Callable[[int, int], None]
"""(layers done, layers in all)"""

NOTHING: Mapping[str, float] = {}

PER_HEAD = AttentionPlan()
"""A scale for every head of every attention layer, whichever these are."""


def calibrate(
    ckpt: Checkpoint,
    samples: Samples,
    *,
    attention: AttentionPlan | None = PER_HEAD,
    inputs: Mapping[str, float] = NOTHING,
    input_observer: str = "static_minmax",
    batch_size: int = 8,
    device: str = "cpu",
    eager: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
    journal: Path | None = None,
    ranks: Ranks = ALONE,
    quantizer: LayerQuantizer | LayerTuner | None = None,
) -> Scales:
    """Scales for q, k and v of every attention layer: [H, 1, 1] for "attn_head", [1] for "tensor".
    Of latent attention for k and v, both that of the row that it caches.

    `inputs` asks for scales of what goes into Linears too, [1] each: names on disk, with what the
    largest input becomes (448 for FP8, 127.5 for INT8; 448 * 6 for NVFP4, whose global scale is
    that by which inputs are multiplied).

    The modules that `attention` has scales for have to show their q, k and v, of as many heads:
    PlanError after the first layer that does otherwise. None leaves attention out.

    `eager` runs attention as llm-compressor 0.14.0.1 does while it calibrates, for equal bits; its
    newer sources use SDPA, as is done here by default.

    One decoder layer's weights are in memory at a time, and the hidden states of all samples:
    samples * seq_len * hidden_size * 2 bytes in bf16 (8 GB for 512 samples of 2048 tokens at 4096).

    Raises PlanError for a model that has no attention heads or cannot be run layer by layer,
    SourceError where weights are missing or the activations of a layer are not finite.

    With a `journal` folder an interrupted run resumes, and gives identical bytes; UsageError if the
    folder belongs to a run with another source, samples or arguments.

    With `ranks` every process runs its share of the batches, and all get the merged scales. They
    have one journal, which any number of processes can resume from. With a `quantizer` every
    process runs all batches, and that divides the weights.

    A `quantizer` quantizes every layer once it has run. If the layer then runs `again`, it has the
    weights that the quantizer chooses, and the next is given what they make of the samples.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    observed = attention or PER_HEAD
    wanted = Wanted(
        strategy=attention.strategy if attention else None,
        attention=_observer(observed.observer, observed.observer_arguments),
        inputs=inputs,
        linear=_observer(input_observer, None),
    )
    ranks.agreed(lambda: check_observers([wanted.attention.name, wanted.linear.name], ranks))
    pinned = ckpt.pinned()
    share = ranks if quantizer is None else ALONE
    kept = None
    if journal is not None:
        depends = _identity(ckpt, pinned, samples, wanted, batch_size, device, eager)
        kept = Journal(journal, depends, ranks, share)
        whole = quantizer is None or quantizer.holds_all()
        if whole and (finished := kept.finished()) is not None:
            return finished
    weights = None
    if quantizer is not None:
        weights = quantizer.weights(weights_of(ckpt, Reader(device)))
    model = open_model(
        ckpt, device, weights, eager, trust_remote_code, attention=attention is not None
    )
    statistics = Statistics(wanted)
    ranks.agreed(lambda: model.check_vocabulary(samples.source, samples.token_ids))
    batches = share.share(samples.batches(batch_size))
    _run(model, batches, statistics, progress, kept, observed, quantizer)
    check_unchanged(pinned)
    statistics = merged(statistics, share)
    classes = _classes(model, statistics)
    _check_complete(ckpt, model, statistics)
    scales = scales_of(ckpt, statistics, classes, samples, batch_size)
    if kept is not None:
        kept.finish(scales)
    return scales


def _observer(name: str, arguments: Mapping[str, Any] | None) -> Observer:
    if name == "minmax":
        warnings.warn(
            "observer 'minmax' is llm-compressor's exponential average: it depends on the order of "
            "the samples and clips far below the maximum; 'static_minmax' does neither",
            stacklevel=3,
        )
    return make_observer(name, arguments)


def _run(
    model: LayerwiseModel,
    batches: Iterable[Batch],
    statistics: Statistics,
    progress: Progress,
    journal: Journal | None,
    attention: AttentionPlan,
    quantizer: LayerQuantizer | LayerTuner | None,
) -> None:
    """All layers, or those that are left."""
    stream = model.embed(batches)
    layers, inputs = model.layer_names, Inputs(model.loader, statistics.wanted.inputs.keys())
    holds = quantizer.holds if quantizer is not None else None
    done = journal.restore(stream, statistics, holds) if journal is not None else 0
    for index, name in enumerate(layers):
        if index >= done:
            watch = _watch(model, name, statistics, inputs, quantizer)
            if quantizer is None:
                model.run_layer(index, stream, watch)
            else:
                after = partial(quantizer.finish, model, index, stream)
                model.run_layer(index, stream, watch, after, again=quantizer.again)
            statistics.settle()
            if stream.batches:
                found = {p: stats["amax"].numel() for p, stats in statistics.points.items()}
                check_seen(model, name, found, attention)
            statistics.check_finite(model.loader.label)
            if journal is not None and index + 1 < len(layers):
                journal.keep(index + 1, stream, statistics)
        progress(index + 1, len(layers))


def _watch(
    model: LayerwiseModel,
    name: str,
    statistics: Statistics,
    inputs: Inputs,
    quantizer: LayerQuantizer | LayerTuner | None,
) -> Watch:
    """Sets the taps on a layer for one batch."""
    stored, wanted = model.loader.stored_module, statistics.wanted

    def tap_for(batch: Batch, latents: Latents) -> Tap:
        def see(module: str, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
            if module in latents:
                row_B1SR = latents.row(module, k_BHSD)
                statistics.add_latent(stored(module), row_B1SR, batch.lengths)
                return
            qkv_BHSD = {"q": q_BHSD, "k": k_BHSD, "v": v_BHSD}
            statistics.add_attention(stored(module), qkv_BHSD, batch.lengths)

        def maxima(module: str, q_BHSD: Tensor, k_BHSD: Tensor) -> Maxima:
            return statistics.maxima(stored(module), q_BHSD, k_BHSD)

        # this observer needs only maxima, of q, k and v; the others need every value
        enough = wanted.attention.name == "static_minmax" and not latents
        return Tap(batch.lengths, see, maxima if enough else None)

    @contextmanager
    def watch(layer: nn.Module, batch: Batch) -> Iterator[None]:
        latents = Latents(layer, name)
        tap = tap_for(batch, latents)
        attention = tapped(layer, name, tap) if wanted.strategy else nullcontext()
        linears = inputs.watched(layer, name, batch.lengths, statistics.add_input)
        weights = quantizer.watched(model, name, layer, batch) if quantizer else nullcontext()
        with latents.watched(), attention, linears, weights:
            yield

    return watch


def _classes(model: LayerwiseModel, statistics: Statistics) -> dict[str, str]:
    """Attention module, by its name on disk -> its class in transformers; not where queries have no
    scale, as in latent attention."""
    return {
        model.loader.stored_module(name): type(module).__name__
        for layer, root in model.skeleton.layers.items()
        for name, module in root.named_modules(prefix=layer)
        if f"{model.loader.stored_module(name)}.q" in statistics.points
    }


def _check_complete(ckpt: Checkpoint, model: LayerwiseModel, statistics: Statistics) -> None:
    if statistics.wanted.strategy and not any(p.endswith(".k") for p in statistics.points):
        raise PlanError(
            f"{ckpt.path}: no attention of {type(model.skeleton.model).__name__} passes through "
            "transformers' attention interface, so its q, k and v cannot be observed; "
            f"{WEIGHTS_ALONE}"
        )
    for linear in statistics.wanted.inputs:
        if f"{linear}.input" not in statistics.points:
            raise PlanError(
                f"{ckpt.path}: {linear} received no input during calibration, so it has no input "
                "scale; it is not a Linear of a decoder layer, or it is an expert without tokens"
            )


def _identity(
    ckpt: Checkpoint,
    pinned: Mapping[Path, State],
    samples: Samples,
    wanted: Wanted,
    batch_size: int,
    device: str,
    eager: bool,
) -> dict[str, Any]:
    """Everything on which the bits of the statistics depend."""
    return {
        "source": source_fingerprint(ckpt),
        "modified": lasting(ckpt.path, pinned),
        "samples": samples.digest,
        **wanted.to_json(),
        "batch_size": batch_size,
        "device": device.partition(":")[0],
        "eager": eager,
        "ckptq": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
