"""`ckptq calibrate`, as one function: run the model layer by layer and read scales off what passes.

The model is observed unquantized, as llm-compressor does. Only attention inside the decoder layers
is observed: text never reaches a vision tower, so scales for it would be made up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ckptq import __version__
from ckptq.calibrate.forward import LayerwiseModel, Stream, open_model
from ckptq.calibrate.journal import Journal
from ckptq.calibrate.observers import Observer, Strategy, make_observer
from ckptq.calibrate.scales import Record, Scales, source_fingerprint
from ckptq.calibrate.statistics import Statistics
from ckptq.calibrate.text import Samples
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, SourceError, UsageError
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""(layers done, layers in all)"""


def calibrate(
    ckpt: Checkpoint,
    samples: Samples,
    *,
    strategy: str = "attn_head",
    observer: str = "static_minmax",
    observer_arguments: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
    journal: Path | None = None,
) -> Scales:
    """Scales for q, k and v of every attention layer: [H, 1, 1] for "attn_head", [1] for "tensor".

    One decoder layer's weights are in memory at a time, and the hidden states of all samples:
    samples * seq_len * hidden_size * 2 bytes in bf16 (8 GB for 512 samples of 2048 tokens at 4096).

    Raises PlanError for a model that has no attention heads or cannot be run layer by layer,
    SourceError where weights are missing or the activations of a layer are not finite.

    With a `journal` folder an interrupted run goes on where it stopped, and ends with equal bytes;
    UsageError when the folder is of a run with another source, samples or arguments.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    statistics = Statistics(_observer(observer, observer_arguments), _strategy(strategy))
    kept = None
    if journal is not None:
        kept = Journal(journal, _identity(ckpt, samples, statistics, batch_size, device))
        if (finished := kept.finished()) is not None:
            return finished
    model = open_model(ckpt, device)
    _check_vocabulary(model, samples)
    stream = model.embed(samples.batches(batch_size))
    _run(model, stream, statistics, str(ckpt.path), progress, kept)
    if not statistics.points:
        raise PlanError(
            f"{ckpt.path}: no attention of {type(model.skeleton.model).__name__} passes through "
            "transformers' attention interface, so its q, k and v cannot be observed"
        )
    scales = _scales(ckpt, model, statistics, samples, batch_size)
    if kept is not None:
        kept.finish(scales)
    return scales


def _strategy(name: str) -> Strategy:
    for known in get_args(Strategy):
        if name == known:
            strategy: Strategy = known
            return strategy
    raise UsageError(f"unknown strategy {name!r}; known: {', '.join(get_args(Strategy))}")


def _check_vocabulary(model: LayerwiseModel, samples: Samples) -> None:
    size = model.skeleton.model.config.get_text_config(decoder=True).vocab_size
    largest = max(map(max, samples.token_ids))
    if largest >= size:
        raise SourceError(
            f"{samples.source}: token id {largest} is outside the model's vocabulary of {size}"
        )


def _observer(name: str, arguments: Mapping[str, Any] | None) -> Observer:
    if name == "minmax":
        warnings.warn(
            "observer 'minmax' is llm-compressor's exponential average: it depends on the order of "
            "the samples and clips far below the true maximum; 'static_minmax' does neither",
            stacklevel=3,
        )
    return make_observer(name, arguments)


def _run(
    model: LayerwiseModel,
    stream: Stream,
    statistics: Statistics,
    where: str,
    progress: Progress,
    journal: Journal | None,
) -> None:
    """All layers, or those that are left. Progress counts those of a former run too."""
    layers = model.layer_names
    done = journal.restore(stream, statistics) if journal is not None else 0
    for index, name in enumerate(layers):
        if index >= done:
            model.run_layer(
                index, stream, lambda number: statistics.tap(stream.batches[number].lengths)
            )
            statistics.check_finite(where, name)
            if journal is not None and index + 1 < len(layers):
                journal.keep(index + 1, stream, statistics)
        progress(index + 1, len(layers))


def _identity(
    ckpt: Checkpoint, samples: Samples, statistics: Statistics, batch_size: int, device: str
) -> dict[str, Any]:
    """Everything on which the bits of the statistics depend."""
    return {
        "source": source_fingerprint(ckpt),
        "modified": {h.file.name: h.file.stat().st_mtime_ns for h in ckpt.headers},
        "samples": samples.digest,
        "strategy": statistics.strategy,
        "observer": asdict(statistics.observer),  # type: ignore[call-overload]
        "batch_size": batch_size,
        "device": device,
        "ckptq": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _scales(
    ckpt: Checkpoint,
    model: LayerwiseModel,
    statistics: Statistics,
    samples: Samples,
    batch_size: int,
) -> Scales:
    """Everything under the names that it has on disk."""
    modules = {point: point.rpartition(".")[0] for point in statistics.points}
    stored = {module: model.loader.stored_module(module) for module in set(modules.values())}
    on_disk = {
        point: f"{stored[module]}.{point.rpartition('.')[2]}" for point, module in modules.items()
    }
    dtypes = {point: _stored_dtype(ckpt, model, module) for point, module in modules.items()}
    arguments = asdict(statistics.observer)  # type: ignore[call-overload]
    return Scales(
        tensors={
            f"{on_disk[point]}_scale": scale for point, scale in statistics.scales(dtypes).items()
        },
        statistics={
            f"{on_disk[point]}_{key}": stats[key]
            for point, stats in statistics.points.items()
            for key in ("amin", "amax")
        },
        made=Record(
            model=ckpt.name,
            source_fingerprint=source_fingerprint(ckpt),
            strategy=statistics.strategy,
            observer=arguments.pop("name"),
            observer_arguments=arguments,
            text=samples.source,
            samples=len(samples.token_ids),
            tokens=sum(map(len, samples.token_ids)),
            seq_len=samples.seq_len,
            batch_size=batch_size,
            seed=samples.seed,
            token_digest=samples.digest,
            attention={
                stored[modules[point]]: _class_name(model, modules[point])
                for point in statistics.points
                if point.endswith(".k")
            },
        ),
    )


def _stored_dtype(ckpt: Checkpoint, model: LayerwiseModel, module: str) -> torch.dtype:
    """The dtype of the module's first weight on disk, which llm-compressor gives its scales."""
    names = next(iter(model.loader.stored_names(module).values()))
    return torch_dtype(ckpt.tensors[names[0]].spec.dtype)


def _class_name(model: LayerwiseModel, module: str) -> str:
    return type(model.skeleton.model.get_submodule(module)).__name__
