"""The positions of a text in pieces whose logits are computed at once.

Shape letters: B batch, S positions, E hidden size, N positions that count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.evaluate.scores import Position
from ckptq.evaluate.variant import Run, Track, Variant
from ckptq.forward.layerwise import LayerwiseModel, Stream
from ckptq.text.samples import Batch

CHUNK_ELEMENTS = 1 << 24
"""Logits in one chunk: 128 MB in float64."""
CHUNKS_ON_GPU = 8
"""So many of these at once where there is room: on a GPU calls cost more than memory."""
COPIES = 16
"""Float64 copies of a chunk that scores hold at most, with what the allocator keeps."""


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


def pieces_of(track: Track) -> Iterator[Piece]:
    """The batches of one variant, cut along their positions."""
    chunk = _chunk(track.model)
    count = len(track.stream.batches) // len(track.variants)
    for number, run in enumerate(track.stream.batches[:count]):
        assert isinstance(run, Run)
        positions = list(_positions(run))
        step = max(1, chunk // len(run.lines))
        for start in range(0, max(run.lengths), step):
            inside = [p for p in positions if start <= p.at < start + step]
            if inside:
                yield Piece(number, start, start + step, inside)


def _positions(run: Run) -> Iterator[Position]:
    for row, line in enumerate(run.lines):
        for at, target in enumerate(line.token_ids[1:]):
            scored = line.scored is not None and at + 1 >= line.scored
            asked = line.answer is not None and at + 1 >= line.answer
            if scored or asked:
                yield Position(run.first_line + row, row, at, target, scored, asked)


def cut(track: Track, pieces: Sequence[Piece], rows: Sequence[Variant]) -> Stream:
    """The pieces of these variants, as batches of their own: heads work position by position."""
    count = len(track.stream.batches) // len(track.variants)
    batches, hidden = [], []
    for piece in pieces:
        for number in map(track.variants.index, rows):
            at, span = number * count + piece.batch, slice(piece.start, piece.stop)
            batch = track.stream.batches[at]
            ids_BN, mask_BN = batch.input_ids_BS[:, span], batch.mask_BS[:, span]
            batches.append(Batch(ids_BN, mask_BN, (ids_BN.shape[1],) * len(ids_BN)))
            hidden.append(track.stream.hidden_BSE[at][..., span, :])
    return Stream(batches, hidden, [])


def _chunk(model: LayerwiseModel) -> int:
    """Positions whose logits are computed at once."""
    vocabulary = model.skeleton.model.config.get_text_config(decoder=True).vocab_size
    return max(1, CHUNK_ELEMENTS * _chunks_at_once(model.device) // int(vocabulary))


def _chunks_at_once(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(CHUNKS_ON_GPU, free // (COPIES * CHUNK_ELEMENTS * 8)))
