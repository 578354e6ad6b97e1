"""Run models side by side over the same tokens, one layer of each in memory at a time.

The first variant of the first track is the source; everything is measured against it. Its layer
runs first, and gives scales to caches that have none stored.

Shape letters: B batch, S positions, E hidden size, N positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckptq.distributed.ranks import ALONE, Ranks
from ckptq.evaluate.linears.products import experts_one_by_one
from ckptq.evaluate.pieces import cut, pieces_of
from ckptq.evaluate.scores import Measures, Scores
from ckptq.evaluate.text import Text
from ckptq.evaluate.variant import Track
from ckptq.evaluate.watching import Watching
from ckptq.forward.linear_inputs import real_positions
from ckptq.progress import Begin
from ckptq.text.samples import Batch

Tokens = Mapping[tuple[int, int], tuple[float, int]]
"""(line, position) -> log-probability of the next token, and the most likely one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One variant beside the source."""

    measures: Measures
    layers: tuple[float, ...]
    """Relative error of the hidden states after each decoder layer, mean over tokens."""
    notes: tuple[str, ...] = ()
    """What was simulated although the device computes as an engine does, and why."""
    tokens: Tokens = field(default_factory=dict, compare=False, repr=False)


@dataclass
class Comparison:
    """A comparison in progress."""

    tracks: Sequence[Track]
    text: Text
    watching: Watching
    batch_size: int | None = 1
    """Lines in a forward pass; None for as many of one length as make `TOKENS_AT_ONCE`."""
    ranks: Ranks = ALONE
    """Each runs its share of the batches; all have all results."""
    release: Callable[[], None] = lambda: None
    """Called when all tracks have loaded a layer: what they share of it may go."""
    errors: dict[str, list[Tensor]] = field(default_factory=dict)
    """By variant, layer after layer: a sum over the tokens of each batch, on the device, because
    reading one makes the host wait."""

    def run(self, begin: Begin) -> dict[str, Outcome]:
        """Results by name of the variant; those in `watching.failed` have none. SourceError for
        tokens outside the vocabulary."""
        lines = (line.token_ids for line in self.text.lines)
        model = self.tracks[0].model
        self.ranks.agreed(lambda: model.check_vocabulary(self.text.source, lines))
        for track in self.tracks:
            experts_one_by_one(track.model.skeleton.model)
            with self.watching.told(*track.variants):
                track.embed(self.text, self.batch_size, self.ranks)
        self.release()
        layers = self.tracks[0].model.layer_names
        report = begin("evaluate", len(layers), "layers")
        for index, name in enumerate(layers):
            for track in self.tracks:
                self._run_layer(track, index)
                self.watching.compare(track, index)  # a rank may have no batch at all
            self.release()
            self._note_errors()
            report(name, 1)
        scores = self._scores(begin)
        self.release()
        self.watching.gather()
        rows = [row.name for track in self.tracks for row in self.watching.alive(track)]
        return {name: self._outcome(name, scores[name]) for name in rows}

    def _run_layer(self, track: Track, index: int) -> None:
        if self.watching.alive(track):
            with self.watching.told(*track.variants):
                track.model.run_layer(index, track.stream, self.watching.layer(track, index))
            if not self.watching.alive(track):
                track.model.loader.unload(track.model.layer_names[index])
        track.forget()

    def _outcome(self, name: str, mine: Sequence[Scores]) -> Outcome:
        alone = self.ranks.world == 1
        batches = self.ranks.joined(mine if alone else [each.on_cpu() for each in mine])
        found = Scores.of(batches)
        return Outcome(
            measures=found.measures(),
            layers=self._layer_errors(self.errors[name]),
            notes=tuple(self.watching.notes.get(name, ())),
            tokens=found.tokens(),
        )

    def _layer_errors(self, mine: Sequence[Tensor]) -> tuple[float, ...]:
        """Of each layer the mean over all tokens, added batch by batch in the order of the text."""
        by_batch = list(torch.stack(list(mine)).T.cpu()) if mine else []
        tokens = sum(len(line.token_ids) for line in self.text.lines)
        total = sum(self.ranks.joined(by_batch), torch.zeros(()))
        return tuple((total / tokens).tolist())

    def _note_errors(self) -> None:
        """After a layer: the distance of each variant's hidden states from the source's."""
        count = len(self.tracks[0].stream.batches) // len(self.tracks[0].variants)
        reference = self.tracks[0].stream.hidden_BSE[:count]
        for track in self.tracks:
            for variant in self.watching.alive(track):
                number = track.variants.index(variant)
                hidden = track.stream.hidden_BSE[number * count : (number + 1) * count]
                runs = track.stream.batches[:count]
                errors = relative_errors(reference, hidden, runs)
                self.errors.setdefault(variant.name, []).append(errors)

    def _scores(self, begin: Begin) -> dict[str, list[Scores]]:
        """Score logits in chunks, by batch: the source's first, then each variant's."""
        pieces = list(pieces_of(self.tracks[0]))
        running = [(t, self.watching.alive(t)) for t in self.tracks if self.watching.alive(t)]
        heads = [track.model.head(cut(track, pieces, rows)) for track, rows in running]
        count = len(self.tracks[0].stream.batches) // len(self.tracks[0].variants)
        scores = {row.name: [Scores() for _ in range(count)] for _, rows in running for row in rows}
        report = begin("output head", len(pieces) * len(scores), "pieces of text")
        for piece in pieces:
            reference: list[Tensor] = []
            for (_, rows), head in zip(running, heads, strict=True):
                if rows[0].name not in self.watching.failed:
                    with self.watching.told(*rows):
                        for row in rows:
                            logits_NV = piece.logits(next(head))
                            reference = reference or [logits_NV]
                            found = scores[row.name][piece.batch]
                            found.add(piece.positions, reference[0], logits_NV)
                for row in rows:
                    report(row.name, 1)
        for head in heads:
            head.close()  # type: ignore[attr-defined]
        return scores


def relative_errors(
    reference: Sequence[Tensor], hidden: Sequence[Tensor], batches: Sequence[Batch]
) -> Tensor:
    """Of each batch the sum over real tokens of |h - reference| / |reference|, hidden states
    [..., B, S, E]; [batches]."""
    found = []
    for one, other, batch in zip(reference, hidden, batches, strict=True):
        want = _real(one, batch.lengths).double()
        got = _real(other.to(one.device), batch.lengths).double()
        share = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)
        found.append(share.sum())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def _real(hidden_BSE: Tensor, lengths: Sequence[int]) -> Tensor:
    """What is not padding, [..., T, E]."""
    flat = hidden_BSE.flatten(-3, -2)
    where = real_positions(lengths, hidden_BSE.shape[-2], hidden_BSE.device)
    return flat if where is None else flat.index_select(-2, where)
