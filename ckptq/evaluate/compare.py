"""Run models side by side over the same tokens, one layer of each in memory at a time.

The first variant of the first track is the source; everything is measured against it. Its layer
runs first, and gives scales to caches that have none stored.

Shape letters: B batch, S positions, E hidden size, N positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ckptq.errors import SourceError
from ckptq.evaluate.inputs import InputMaxima, InputScheme, remembering, rules_of
from ckptq.evaluate.kv_cache import PLAIN, Maxima, See, through_cache
from ckptq.evaluate.products import Change, experts_one_by_one, inputs_changed
from ckptq.evaluate.scores import Measures, Position, Scores
from ckptq.evaluate.spoil import spoiled, spoiled_layer
from ckptq.evaluate.text import Text
from ckptq.evaluate.variant import Run, Track, Variant
from ckptq.forward.layerwise import LayerwiseModel, Stream
from ckptq.forward.linear_inputs import real_positions
from ckptq.forward.tap import Tap, tapped
from ckptq.progress import Report
from ckptq.text.samples import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK_ELEMENTS = 1 << 24
"""Logits in one chunk: 128 MB in float64."""
CHUNKS_ON_GPU = 4
"""So many of these at once: a GPU is faster at large ones, and calls cost it more."""


Rules = Mapping[str, tuple["Tensor", InputScheme]]
"""Parameter -> its weight, and how the input of it is rounded."""

Tokens = Mapping[tuple[int, int], tuple[float, int]]
"""(line, position) -> log-probability of the next token, and the most likely one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One variant beside the source."""

    measures: Measures
    layers: tuple[float, ...]
    """Relative error of the hidden states after each decoder layer, mean over tokens."""
    tokens: Tokens = field(default_factory=dict, compare=False, repr=False)


@dataclass
class Comparison:
    """A comparison in progress."""

    tracks: Sequence[Track]
    text: Text
    consumed: Mapping[str, tuple[str, ...]]
    """Tensor of the source -> the Linears that it contains."""
    batch_size: int | None = 1
    """Lines in a forward pass; None for as many of one length as make `TOKENS_AT_ONCE`."""
    release: Callable[[], None] = lambda: None
    """Called when all tracks have loaded a layer: what they share of it may go."""
    maxima: Maxima = field(default_factory=Maxima)
    input_maxima: InputMaxima = field(default_factory=InputMaxima)
    errors: dict[str, list[Tensor]] = field(default_factory=dict)
    """By variant, layer after layer, on the device: reading one makes the host wait."""

    def run(self, report: Report) -> dict[str, Outcome]:
        """Results by name of the variant. SourceError for tokens outside the vocabulary."""
        _check_vocabulary(self.tracks[0].model, self.text)
        for track in self.tracks:
            experts_one_by_one(track.model.skeleton.model)
            track.embed(self.text, self.batch_size)
        self.release()
        layers = self.tracks[0].model.layer_names
        for index, name in enumerate(layers):
            for track in self.tracks:
                track.model.run_layer(index, track.stream, self._watch(track, index))
            self.release()
            self._note_errors()
            report(name, 1)
        scores = self._scores()
        self.release()
        return {
            name: Outcome(
                measures=found.measures(), layers=_numbers(self.errors[name]), tokens=found.tokens()
            )
            for name, found in scores.items()
        }

    @property
    def source(self) -> Variant:
        return self.tracks[0].variants[0]

    def _watch(
        self, track: Track, index: int
    ) -> Callable[[nn.Module, Batch], AbstractContextManager[None]]:
        """What happens to a layer while one batch of one variant runs through it.

        What a variant does to a layer is worked out at its first batch, after the source's last.
        """
        name = track.model.layer_names[index]
        is_spoiled = index == spoiled_layer(len(track.model.layer_names))
        rules: dict[str, Rules] = {}
        sees: dict[str, See] = {}

        @contextmanager
        def watch(layer: nn.Module, run: Batch) -> Iterator[None]:
            assert isinstance(run, Run)
            variant = run.variant
            if variant.name not in rules:
                rules[variant.name] = self._rules(track, name, layer, variant)
                sees[variant.name] = through_cache(
                    variant.cache, self.maxima, track.model.loader.stored_module
                )
            with ExitStack() as stack:
                if variant.spoiled and is_spoiled:
                    stack.enter_context(spoiled(layer))
                if variant is self.source and self._measures_caches:
                    see = self._measuring(run, track.model.loader.stored_module)
                    stack.enter_context(tapped(layer, name, Tap(run.lengths, see)))
                elif variant.cache.mode != PLAIN:
                    tap = Tap(run.lengths, sees[variant.name])
                    stack.enter_context(tapped(layer, name, tap))
                changes = dict(self._changes(run, rules[variant.name]))
                stack.enter_context(inputs_changed(changes))
                yield

        return watch

    def _rules(self, track: Track, name: str, layer: nn.Module, variant: Variant) -> Rules:
        """How the inputs of this layer's weights are rounded; of the source's, which are seen."""
        inputs = self._static if variant is self.source else variant.inputs
        stored_names = track.model.loader.stored_names(name)
        found = rules_of(layer, name, stored_names, self.consumed, inputs)
        if variant is self.source:
            return found
        filled = self.input_maxima.filled
        return {p: (weight, filled(p, rule)) for p, (weight, rule) in found.items()}

    def _changes(self, run: Run, rules: Rules) -> Iterator[tuple[Tensor, Change]]:
        """Measure the source's inputs, round the others'."""
        remembered = remembering()
        for parameter, (weight, rule) in rules.items():
            if run.variant is self.source:
                yield weight, partial(self.input_maxima.see, parameter, run.lengths)
            else:
                yield weight, partial(remembered, rule)

    @property
    def _measures_caches(self) -> bool:
        return any(v.cache.measures for track in self.tracks for v in track.variants)

    @property
    def _static(self) -> dict[str, InputScheme]:
        """Linears whose static scales no checkpoint has."""
        every = (v.inputs.items() for track in self.tracks for v in track.variants)
        return {name: rule for inputs in every for name, rule in inputs if rule.static}

    def _measuring(self, run: Run, on_disk: Callable[[str], str]) -> See:
        def see(module: str, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
            qkv = {"q": q_BHSD, "k": k_BHSD, "v": v_BHSD}
            self.maxima.see(on_disk(module), qkv, run.lengths)

        return see

    def _note_errors(self) -> None:
        """After a layer: the distance of each variant's hidden states from the source's."""
        count = len(self.tracks[0].stream.batches) // len(self.tracks[0].variants)
        reference = self.tracks[0].stream.hidden_BSE[:count]
        for track in self.tracks:
            for number, variant in enumerate(track.variants):
                hidden = track.stream.hidden_BSE[number * count : (number + 1) * count]
                runs = track.stream.batches[:count]
                error = relative_error(reference, hidden, runs)
                self.errors.setdefault(variant.name, []).append(error)

    def _scores(self) -> dict[str, Scores]:
        """Score logits in chunks: the source's first, then each variant's."""
        first = self.tracks[0]
        pieces = list(_pieces(first, self.text, _chunk(first.model)))
        heads = [track.model.head(_cut(track, pieces)) for track in self.tracks]
        scores = {v.name: Scores() for track in self.tracks for v in track.variants}
        for piece in pieces:
            reference_NV = None
            for track, head in zip(self.tracks, heads, strict=True):
                for variant in track.variants:
                    logits_NV = piece.logits(next(head))
                    reference_NV = logits_NV if reference_NV is None else reference_NV
                    scores[variant.name].add(piece.positions, reference_NV, logits_NV)
        for head in heads:
            head.close()  # type: ignore[attr-defined]
        return scores


@dataclass(frozen=True, slots=True)
class Piece:
    """Some positions of one batch."""

    batch: int
    start: int
    stop: int
    positions: list[Position]

    def logits(self, logits_BSV: Tensor) -> Tensor:
        """Of the positions that count, [N, V]."""
        rows = [position.row for position in self.positions]
        return logits_BSV[rows, [position.at - self.start for position in self.positions]]


def relative_error(
    reference: Sequence[Tensor], hidden: Sequence[Tensor], batches: Sequence[Batch]
) -> Tensor:
    """Mean over real tokens of |h - reference| / |reference|, hidden states [..., B, S, E]."""
    import torch

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for one, other, batch in zip(reference, hidden, batches, strict=True):
        want = _real(one, batch.lengths).double()
        got = _real(other.to(one.device), batch.lengths).double()
        share = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)
        total, tokens = total.to(one.device) + share.sum(), tokens + share.numel()
    return total / tokens


def _real(hidden_BSE: Tensor, lengths: Sequence[int]) -> Tensor:
    """What is not padding, [..., T, E]."""
    flat = hidden_BSE.flatten(-3, -2)
    where = real_positions(lengths, hidden_BSE.shape[-2], hidden_BSE.device)
    return flat if where is None else flat.index_select(-2, where)


def _numbers(errors: Sequence[Tensor]) -> tuple[float, ...]:
    import torch

    return tuple(torch.stack(list(errors)).tolist())


def _pieces(track: Track, text: Text, chunk: int) -> Iterator[Piece]:
    """The batches of one variant, cut along their positions."""
    count = len(track.stream.batches) // len(track.variants)
    first_line = 0
    for number, run in enumerate(track.stream.batches[:count]):
        assert isinstance(run, Run)
        positions = list(_positions(run, first_line))
        first_line += len(run.lines)
        step = max(1, chunk // len(run.lines))
        for start in range(0, max(run.lengths), step):
            inside = [p for p in positions if start <= p.at < start + step]
            if inside:
                yield Piece(number, start, start + step, inside)


def _positions(run: Run, first_line: int) -> Iterator[Position]:
    for row, line in enumerate(run.lines):
        for at, target in enumerate(line.token_ids[1:]):
            scored = line.scored is not None and at + 1 >= line.scored
            asked = line.answer is not None and at + 1 >= line.answer
            if scored or asked:
                yield Position(first_line + row, row, at, target, scored, asked)


def _cut(track: Track, pieces: Sequence[Piece]) -> Stream:
    """The pieces of every variant, as batches of their own: heads work position by position."""
    count = len(track.stream.batches) // len(track.variants)
    batches, hidden = [], []
    for piece in pieces:
        for number in range(len(track.variants)):
            at, span = number * count + piece.batch, slice(piece.start, piece.stop)
            batch = track.stream.batches[at]
            ids_BN, mask_BN = batch.input_ids_BS[:, span], batch.mask_BS[:, span]
            batches.append(Batch(ids_BN, mask_BN, (ids_BN.shape[1],) * len(ids_BN)))
            hidden.append(track.stream.hidden_BSE[at][..., span, :])
    return Stream(batches, hidden, [])


def _chunk(model: LayerwiseModel) -> int:
    """Positions whose logits are computed at once."""
    vocabulary = model.skeleton.model.config.get_text_config(decoder=True).vocab_size
    elements = CHUNK_ELEMENTS * (CHUNKS_ON_GPU if model.device.type == "cuda" else 1)
    return max(1, elements // int(vocabulary))


def _check_vocabulary(model: LayerwiseModel, text: Text) -> None:
    size = model.skeleton.model.config.get_text_config(decoder=True).vocab_size
    largest = max(max(line.token_ids) for line in text.lines)
    if largest >= size:
        raise SourceError(
            f"{text.source}: token id {largest} is outside the model's vocabulary of {size}"
        )
