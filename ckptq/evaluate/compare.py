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
from ckptq.evaluate.caches.kv_cache import PLAIN, Maxima, See, through_cache
from ckptq.evaluate.linears.inputs import InputMaxima, InputScheme
from ckptq.evaluate.linears.products import experts_one_by_one, products_treated
from ckptq.evaluate.linears.treatments import Weights, observed, rules_of, treated
from ckptq.evaluate.pieces import cut, pieces_of
from ckptq.evaluate.scores import Measures, Scores
from ckptq.evaluate.text import Text
from ckptq.evaluate.variant import Run, Track, Variant
from ckptq.evaluate.weights.spoil import spoiled, spoiled_layer
from ckptq.forward.layerwise import LayerwiseModel
from ckptq.forward.linear_inputs import real_positions
from ckptq.forward.tap import Tap, tapped
from ckptq.progress import Report
from ckptq.text.samples import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

Rules = Mapping[str, InputScheme]
"""Parameter -> how its input is rounded."""

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
                track.forget()
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
            variant, weights = run.variant, track.weights(name, layer, self.consumed)
            if variant.name not in rules:
                rules[variant.name] = self._rules(weights, variant)
                sees[variant.name] = through_cache(
                    variant.cache, self.maxima, track.model.loader.stored_module
                )
            with ExitStack() as stack:
                spoils = variant.spoiled and is_spoiled
                if spoils:
                    stack.enter_context(spoiled(layer))
                if variant is self.source and self._measures_caches:
                    see = self._measuring(run, track.model.loader.stored_module)
                    stack.enter_context(tapped(layer, name, Tap(run.lengths, see)))
                elif variant.cache.mode != PLAIN:
                    tap = Tap(run.lengths, sees[variant.name])
                    stack.enter_context(tapped(layer, name, tap))
                if variant is self.source:
                    look = partial(self.input_maxima.see, run.lengths)
                    treatments = dict(observed(weights, rules[variant.name], look))
                else:
                    # codes are those of weights that are not spoiled
                    treatments = dict(treated(weights, rules[variant.name], codes=not spoils))
                stack.enter_context(products_treated(treatments))
                yield

        return watch

    def _rules(self, weights: Weights, variant: Variant) -> Rules:
        """How the inputs of this layer's weights are rounded; of the source's, which are seen."""
        if variant is self.source:
            return rules_of(weights, self._static)
        found = rules_of(weights, variant.inputs)
        return {p: self.input_maxima.filled(p, rule) for p, rule in found.items()}

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
        pieces = list(pieces_of(first))
        heads = [track.model.head(cut(track, pieces)) for track in self.tracks]
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


def relative_error(
    reference: Sequence[Tensor], hidden: Sequence[Tensor], batches: Sequence[Batch]
) -> Tensor:
    """Mean over real tokens of |h - reference| / |reference|, hidden states [..., B, S, E]."""
    import torch

    total: Tensor | float = 0.0
    tokens = 0
    for one, other, batch in zip(reference, hidden, batches, strict=True):
        want = _real(one, batch.lengths).double()
        got = _real(other.to(one.device), batch.lengths).double()
        share = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)
        total, tokens = total + share.sum(), tokens + share.numel()
    return torch.as_tensor(total) / tokens


def _real(hidden_BSE: Tensor, lengths: Sequence[int]) -> Tensor:
    """What is not padding, [..., T, E]."""
    flat = hidden_BSE.flatten(-3, -2)
    where = real_positions(lengths, hidden_BSE.shape[-2], hidden_BSE.device)
    return flat if where is None else flat.index_select(-2, where)


def _numbers(errors: Sequence[Tensor]) -> tuple[float, ...]:
    import torch

    return tuple(torch.stack(list(errors)).tolist())


def _check_vocabulary(model: LayerwiseModel, text: Text) -> None:
    size = model.skeleton.model.config.get_text_config(decoder=True).vocab_size
    largest = max(max(line.token_ids) for line in text.lines)
    if largest >= size:
        raise SourceError(
            f"{text.source}: token id {largest} is outside the model's vocabulary of {size}"
        )
