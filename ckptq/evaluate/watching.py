"""What happens to a layer while a row runs through it, what the source shows there, and what fails.

Shape letters: B batch, H heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.errors import CkptqError, MachineError
from ckptq.evaluate.caches.held import Held
from ckptq.evaluate.caches.kv_cache import PLAIN, Maxima
from ckptq.evaluate.caches.latent_rows import LatentRows
from ckptq.evaluate.caches.simulated import See
from ckptq.evaluate.linears.inputs import InputMaxima, InputScheme
from ckptq.evaluate.linears.products import Treatment, products_treated
from ckptq.evaluate.linears.treatments import Weights, observed, rules_of, treated
from ckptq.evaluate.variant import Run, Track, Variant
from ckptq.evaluate.weights.spoil import spoiled, spoiled_layer
from ckptq.forward.latent import Latents
from ckptq.forward.layerwise import Watch
from ckptq.forward.over_pages import pages_serve
from ckptq.forward.tap import Tap, tapped
from ckptq.text.samples import Batch

Rules = Mapping[str, InputScheme]
"""Parameter -> how its input is rounded."""


@dataclass
class Watching:
    """Of one comparison. The source runs first in each layer, and gives scales to rows that have
    none stored."""

    source: Variant
    rows: Sequence[Variant]
    """All of them, the source and the control too."""
    needed: Collection[str]
    """Names of those without which nothing can be said: their failure is everybody's."""
    consumed: Mapping[str, tuple[str, ...]]
    """Tensor of the source -> the Linears that it contains."""
    ranks: Ranks = ALONE
    """Each with other batches."""
    compared: int = -1
    """The last layer of which all ranks know what the source has shown."""
    maxima: Maxima = field(default_factory=Maxima)
    input_maxima: InputMaxima = field(default_factory=InputMaxima)
    notes: dict[str, dict[str, None]] = field(default_factory=dict)
    """By row, what was not computed as an engine does; each once, in order."""
    failed: dict[str, CkptqError] = field(default_factory=dict)
    """By row, why it ended."""
    simulates: bool = False
    """Whether caches are never held in pages, which kernels do for 16-bit values."""

    def layer(self, track: Track, index: int) -> Watch:
        """What to do around each batch of a layer.

        What a row does to a layer is worked out at its first batch, after the source's last.
        """
        name = track.model.layer_names[index]
        spoils = index == spoiled_layer(len(track.model.layer_names))
        rules: dict[str, Rules] = {}
        caches: dict[str, Held] = {}

        def watch(layer: nn.Module, run: Batch) -> AbstractContextManager[None] | None:
            assert isinstance(run, Run)
            row = run.variant
            if row is not self.source:
                self.compare(track, index)
            if row.name in self.failed:
                return None
            with self.told(row):
                weights = track.weights(name, layer, self.consumed)
                if row.name not in rules:
                    rules[row.name] = self._rules(weights, row)
                    caches[row.name] = self._held(track, row)
                around = []
                if row is self.source or row.cache.in_layer(index).mode != PLAIN:
                    around = self._attention(track, run, caches[row.name], layer, name)
                if spoils and row.spoiled:
                    around.insert(0, spoiled(layer))
                codes = not (spoils and row.spoiled)  # they are of weights that are not spoiled
                treatments = partial(self._treatments, weights, rules[row.name], run, codes)
                return self._running(row, around, treatments)
            return None

        return watch

    def compare(self, track: Track, index: int) -> None:
        """Once in a layer, when the source has run it: let all ranks know what it showed."""
        if index > self.compared:
            for each in (self.maxima.seen, self.input_maxima.seen):
                each.compare(self.ranks, track.model.device)
            self.compared = index

    def gather(self) -> None:
        """Let all ranks know which rows have failed on any, and why, and what was noted."""
        every = self.ranks.gathered((dict(self.failed), dict(self.notes)))
        self.failed.clear()
        self.notes.clear()
        for failed, notes in every:
            self.failed = failed | self.failed  # the first rank's error stays
            for row, lines in notes.items():
                self.notes[row] = self.notes.get(row, {}) | lines

    @contextmanager
    def told(self, *rows: Variant) -> Iterator[None]:
        """An error in the block ends these rows, and not the others; unless one is needed."""
        try:
            yield
        except (CkptqError, torch.OutOfMemoryError) as error:
            if any(row.name in self.needed for row in rows):
                raise
            # without its traceback, which holds tensors
            told = error if isinstance(error, CkptqError) else MachineError(str(error))
            self.failed |= {row.name: told.with_traceback(None) for row in rows}

    def alive(self, track: Track) -> list[Variant]:
        """The rows of a track that have not failed."""
        return [row for row in track.variants if row.name not in self.failed]

    @contextmanager
    def _running(
        self,
        row: Variant,
        around: Sequence[AbstractContextManager[None]],
        treatments: Callable[[], Mapping[Tensor, Treatment]],
    ) -> Iterator[None]:
        with self.told(row), ExitStack() as stack:
            for each in around:
                stack.enter_context(each)
            # made here: spoiled weights lie elsewhere
            stack.enter_context(products_treated(treatments()))
            yield

    def _attention(
        self, track: Track, run: Run, held: Held, layer: nn.Module, name: str
    ) -> list[AbstractContextManager[None]]:
        """What happens to keys and values: they are seen, or read from the row's cache."""
        row, latents = run.variant, Latents(layer, name)
        on_disk = track.model.loader.stored_module
        if row is self.source:
            measures = any(other.cache.measures for other in self.rows)
            tap = Tap(run.lengths, self._measuring(run, on_disk, latents))
            return [latents.watched(), tapped(layer, name, tap)] if measures else []
        if latents:
            rows = LatentRows(row.cache, self.maxima, on_disk)
            return [rows.held(latents, layer, name, run.lengths)]
        return [tapped(layer, name, held.tap(run.lengths))]

    def _treatments(
        self, weights: Weights, rules: Rules, run: Run, codes: bool
    ) -> Mapping[Tensor, Treatment]:
        if run.variant is self.source:
            return dict(observed(weights, rules, partial(self.input_maxima.see, run.lengths)))
        return dict(treated(weights, rules, codes))

    def _rules(self, weights: Weights, row: Variant) -> Rules:
        """How the inputs of this layer's weights are rounded; of the source's, which are seen."""
        if row is self.source:
            return rules_of(weights, self._static)
        found = rules_of(weights, row.inputs)
        return {p: self.input_maxima.filled(p, rule) for p, rule in found.items()}

    @property
    def _static(self) -> dict[str, InputScheme]:
        """Linears whose static scales no checkpoint has."""
        every = (row.inputs.items() for row in self.rows)
        return {name: rule for inputs in every for name, rule in inputs if rule.static}

    def _held(self, track: Track, row: Variant) -> Held:
        return Held(
            *(row.cache, self.maxima, track.model.loader.stored_module),
            in_pages=not self.simulates and pages_serve(track.model.device),
            note=partial(self._note, row),
        )

    def _note(self, row: Variant, said: str) -> None:
        self.notes.setdefault(row.name, {})[said] = None

    def _measuring(self, run: Run, on_disk: Callable[[str], str], latents: Latents) -> See:
        def see(module: str, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
            cached = latents.cached(module, q_BHSD, k_BHSD, v_BHSD)
            self.maxima.see(on_disk(module), cached, run.lengths)

        return see
