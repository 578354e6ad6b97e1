"""What one set in one scheme costs at the end of the model: KL of its logits from the source's.

Each change is a row: the source with one set of Linears quantized, and their inputs rounded where
the scheme says so; or with the KV cache of one layer in another format. Before its layer a row is
the source, so it starts there. Rows run side by side, and each layer is read once for all of them;
in memory are one layer as the source has it, the same layer in one scheme, and the rows' hidden
states. All is float32: in bfloat16, rounding does more to the logits than 8-bit weights in one
layer.

Shape letters: N positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptq.errors import UsageError
from ckptq.evaluate.caches.kv_cache import parse_cache
from ckptq.evaluate.linears.products import experts_one_by_one
from ckptq.evaluate.pieces import cut, pieces_of
from ckptq.evaluate.scores import IN_CACHE, divergence, log_softmax
from ckptq.evaluate.text import Text
from ckptq.evaluate.variant import Track, Variant, runs_of
from ckptq.evaluate.watching import Watching
from ckptq.evaluate.weights.schemes import SchemeWeights, planned_inputs
from ckptq.forward.decoded import weights_of
from ckptq.forward.layerwise import LayerwiseModel, Stream, open_model
from ckptq.forward.reader import Reader
from ckptq.progress import Begin
from ckptq.search.candidates import Candidates
from ckptq.search.changed import (
    CacheChange,
    Change,
    Exchange,
    append,
    exchanged,
    exchanging,
    first_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

ROW_BYTES = 1 << 32
"""Hidden states of rows that run side by side."""
MOST_ROWS = 64
"""That run side by side: a run that is killed loses no more."""

SOURCE = Variant(name="source")

AnyChange = Change | CacheChange

Keep = Callable[[Mapping[AnyChange, float]], None]
"""Gets the KL of some changes, as soon as they are known."""


class Rows:
    """The source of a search, and each scheme that it may be in, ready to run layer by layer."""

    def __init__(
        self, candidates: Candidates, text: Text, device: str, row_bytes: int = ROW_BYTES
    ) -> None:
        self._candidates, self._text, self._row_bytes = candidates, text, row_bytes
        self._reader = Reader(device, keep=True)
        self._model = self._open(None)
        self._quantized = {scheme: self._open(scheme) for scheme in candidates.plans}
        self._inputs = {s: planned_inputs(plan) for s, plan in candidates.plans.items()}
        layout = next(iter(candidates.plans.values())).layout
        own = {f"{name}.weight": (name,) for name in layout.linears}
        self._consumed = {**own, **layout.consumed}
        self.layers = {
            linear: index
            for index, name in enumerate(self._model.layer_names)
            for linears in self._parameters(name).values()
            for linear in linears
        }
        """Linear -> index of its layer."""

    def measure(self, changes: Sequence[AnyChange], keep: Keep, begin: Begin) -> None:
        """The mean KL of every change over the tokens of the text, some changes at a time.

        UsageError for a model whose layers share more than hidden states.
        """
        ordered = sorted(changes, key=self._layer_of)
        at_once = self._at_once()
        groups = [ordered[at : at + at_once] for at in range(0, len(ordered), at_once)]
        firsts = [0, *(self._layer_of(group[0]) for group in groups[1:])]
        total = sum(len(self._model.layer_names) - first for first in firsts)
        report = begin("sensitivities", total, "layers")
        stream = self._embedded()
        for number, group in enumerate(groups):
            until = firsts[number + 1] if number + 1 < len(groups) else None
            track = Track(self._model, [SOURCE], {})
            track.stream = first_of(stream, len(stream.batches))
            for index, before in self._run(track, group, firsts[number]):
                stream = before if index == until else stream
                report(self._model.layer_names[index], 1)
            keep(self._divergences(track, group))

    def _open(self, scheme: str | None) -> LayerwiseModel:
        import torch

        ckpt = self._candidates.ckpt
        if scheme is None:
            weights = weights_of(ckpt, self._reader)
        else:
            weights = SchemeWeights(ckpt, self._candidates.plans[scheme], self._reader)
        device = str(self._reader.device)
        model = open_model(ckpt, device, weights, dtype=torch.float32)
        experts_one_by_one(model.skeleton.model)
        return model

    def _layer_of(self, change: AnyChange) -> int:
        if isinstance(change, CacheChange):
            return change.layer
        return self.layers[change.linears[0]]

    def _at_once(self) -> int:
        """So many rows run side by side."""
        width = self._model.skeleton.model.config.get_text_config(decoder=True).hidden_size
        tokens = sum(len(line.token_ids) for line in self._text.lines)
        return min(MOST_ROWS, max(1, self._row_bytes // (tokens * width * 4)))

    def _embedded(self) -> Stream:
        """The source in front of the first layer."""
        lines = (line.token_ids for line in self._text.lines)
        self._model.check_vocabulary(self._text.source, lines)
        size = 1 if self._reader.device.type == "cpu" else None
        stream = self._model.embed(runs_of(self._text, size, [SOURCE]))
        self._reader.release()
        if not stream.resumable:
            raise UsageError(
                f"{self._candidates.ckpt.path}: its layers share more than hidden states, so that "
                "none can be changed alone; search without --data"
            )
        return stream

    def _run(
        self, track: Track, changes: Sequence[AnyChange], first: int
    ) -> Iterator[tuple[int, Stream]]:
        """Run the source and all changes from layer `first` on, to the end. Yields, after each
        layer, its index and the source in front of it."""
        count = len(track.stream.batches)
        rows = {change: self._variant(change) for change in changes}
        every = [SOURCE, *rows.values()]
        track.variants = tuple(every)
        watching = Watching(
            source=SOURCE,
            rows=every,
            needed={row.name for row in every},
            consumed=self._consumed,
            simulates=True,
        )
        for index in range(first, len(self._model.layer_names)):
            before = first_of(track.stream, count)
            fresh = [change for change in changes if self._layer_of(change) == index]
            for change in fresh:
                append(track.stream, rows[change], count)
            linears = {change.name: change for change in fresh if isinstance(change, Change)}
            with self._exchange(index, linears) as exchange:
                watch = exchanging(watching.layer(track, index), exchange)
                self._model.run_layer(index, track.stream, watch)
            track.forget()
            self._reader.release()
            yield index, before

    def _variant(self, change: AnyChange) -> Variant:
        if isinstance(change, CacheChange):
            others = frozenset(range(len(self._model.layer_names))) - {change.layer}
            cache = replace(parse_cache(change.cache, None), skipped=others)
            return Variant(name=change.name, cache=cache)
        inputs = self._inputs[change.scheme]
        return Variant(
            name=change.name, inputs={n: inputs[n] for n in change.linears if n in inputs}
        )

    @contextmanager
    def _exchange(self, index: int, changes: Mapping[str, Change]) -> Iterator[Exchange]:
        """In the block, what gives a layer the weights of the rows that begin in it; it holds the
        layer in one scheme at a time."""
        name = self._model.layer_names[index]
        loaded: list[LayerwiseModel] = []

        def unload() -> None:
            while loaded:
                loaded.pop().loader.unload(name)

        def exchange(layer: nn.Module, row: Variant) -> AbstractContextManager[None] | None:
            change = changes.get(row.name)
            if change is None:
                return None
            model = self._quantized[change.scheme]
            if model not in loaded:
                unload()
                model.loader.load(name)
                loaded.append(model)
            return exchanged(layer, model.skeleton.layers[name], self._locals(name, change))

        try:
            yield exchange
        finally:
            unload()

    def _locals(self, layer: str, change: Change) -> list[str]:
        """The parameters that hold these Linears, by their names in the layer."""
        found = []
        for parameter, linears in self._parameters(layer).items():
            if not linears or not set(linears) & set(change.linears):
                continue
            if not set(linears) <= set(change.linears):
                raise UsageError(
                    f"{parameter}: holds Linears of several sets in transformers, so that none can "
                    "be changed alone; search without --data"
                )
            found.append(parameter.removeprefix(f"{layer}."))
        return found

    def _parameters(self, layer: str) -> dict[str, tuple[str, ...]]:
        """Parameter of a layer -> the Linears in it."""
        stored = self._model.loader.stored_names(layer)
        return {
            parameter: tuple(linear for name in names for linear in self._consumed.get(name, ()))
            for parameter, names in stored.items()
        }

    def _divergences(self, track: Track, changes: Sequence[AnyChange]) -> dict[AnyChange, float]:
        pieces = list(pieces_of(track))
        head = self._model.head(cut(track, pieces, track.variants))
        totals = [0.0] * len(changes)
        for piece in pieces:
            p_NV = log_softmax(piece.logits(next(head)))
            for number in range(len(changes)):
                totals[number] += _summed(p_NV, piece.logits(next(head)))
        head.close()  # type: ignore[attr-defined]
        self._reader.release()
        return {c: t / self._text.tokens for c, t in zip(changes, totals, strict=True)}


def _summed(p_NV: Tensor, logits_NV: Tensor) -> float:
    """KL of all positions together, from log-probabilities and logits."""
    step = max(1, IN_CACHE // p_NV.shape[1]) if p_NV.device.type == "cpu" else len(p_NV)
    parts = zip(p_NV.split(step), logits_NV.split(step), strict=True)
    return sum(divergence(p, log_softmax(q)).sum().item() for p, q in parts)
