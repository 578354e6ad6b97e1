"""Divergence, perplexity, agreement and accuracy, folded token by token.

In float64 from the logits that the models give, so that a model against itself is exactly zero.

Shape letters: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TENSORS = ("kl", "kl_reverse", "loss", "agree", "best")
"""The fields of `Scores` with a tensor for every piece."""

IN_CACHE = 1 << 18
"""Log-probabilities per step on a CPU: 2 MiB in float64."""


@dataclass(frozen=True, slots=True)
class Position:
    """A position with a known next token."""

    line: int
    """Which line of the text."""
    row: int
    """Where that line is in its batch."""
    at: int
    """Counted from the first position of the line."""
    target: int
    scored: bool
    asked: bool = False
    """Whether the next token belongs to the answer of a question."""


@dataclass
class Scores:
    """One variant's results so far, where its logits are: reading them makes the host wait."""

    kl: list[Tensor] = field(default_factory=list)
    """Of each token, source‖variant, in nats."""
    kl_reverse: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)
    """The most likely token."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """Line and position of each token that is scored."""
    questions: dict[int, bool] = field(default_factory=dict)
    """Line of the question -> whether greedy decoding answers it exactly."""

    def add(self, positions: list[Position], reference_NV: Tensor, logits_NV: Tensor) -> None:
        """Fold in the logits of some positions, with the source's."""
        kept = [i for i, position in enumerate(positions) if position.scored]
        step = _rows_at_once(logits_NV)
        for start in range(0, len(kept), step):
            rows = kept[start : start + step]
            self._score([positions[i] for i in rows], reference_NV[rows], logits_NV[rows])
        if not any(position.asked for position in positions):
            return
        best = logits_NV.argmax(-1).tolist()
        for position, token in zip(positions, best, strict=True):
            if position.asked:
                right = self.questions.get(position.line, True)
                self.questions[position.line] = right and token == position.target

    def _score(self, positions: list[Position], reference_NV: Tensor, logits_NV: Tensor) -> None:
        target_N = torch.tensor([each.target for each in positions], device=logits_NV.device)
        p_NV, q_NV = log_softmax(reference_NV), log_softmax(logits_NV)
        self.kl.append(divergence(p_NV, q_NV))
        self.kl_reverse.append(divergence(q_NV, p_NV))
        self.loss.append(-q_NV.gather(1, target_N[:, None])[:, 0])
        self.agree.append(p_NV.argmax(-1) == q_NV.argmax(-1))
        self.best.append(q_NV.argmax(-1))
        self.places += [(each.line, each.at) for each in positions]

    @staticmethod
    def of(parts: Sequence[Scores]) -> Scores:
        """Those of several batches, in order."""
        whole = Scores()
        for part in parts:
            for name in TENSORS:
                getattr(whole, name).extend(getattr(part, name))
            whole.places += part.places
            whole.questions |= part.questions
        return whole

    def on_cpu(self) -> Scores:
        """The same, for other processes."""
        moved = Scores(places=self.places, questions=self.questions)
        for name in TENSORS:
            setattr(moved, name, [tensor.cpu() for tensor in getattr(self, name)])
        return moved

    def tokens(self) -> dict[tuple[int, int], tuple[float, int]]:
        """(line, position) -> log-probability of the next token, and the most likely one."""
        logprob = (-torch.cat(self.loss)).tolist()
        best = torch.cat(self.best).tolist()
        return dict(zip(self.places, zip(logprob, best, strict=True), strict=True))

    def measures(self) -> Measures:
        """Means and extremes over all tokens."""
        kl, reverse = torch.cat(self.kl).cpu(), torch.cat(self.kl_reverse).cpu()
        loss, agree = torch.cat(self.loss).cpu(), torch.cat(self.agree).cpu()
        return Measures(
            tokens=len(kl),
            kl=mean(kl),
            kl_reverse=mean(reverse),
            kl_99=kl.quantile(0.99).item() if kl.isfinite().all() else math.nan,
            kl_max=kl.max().item(),
            perplexity=loss.new_tensor(mean(loss)).exp().item(),
            agreement=mean(agree.double()),
            accuracy=share(self.questions),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """A variant's results."""

    tokens: int
    kl: float
    """Mean over tokens of KL(source‖variant), in nats."""
    kl_reverse: float
    kl_99: float
    """The 99th percentile over tokens."""
    kl_max: float
    perplexity: float
    agreement: float
    """Share of tokens for which both models have the same most likely next token."""
    accuracy: float | None
    """Share of the task's questions answered exactly."""


def _rows_at_once(logits_NV: Tensor) -> int:
    """All at once on a GPU; on a CPU, float64 copies beyond its cache cost more than the sums."""
    if logits_NV.device.type != "cpu":
        return len(logits_NV)
    return max(1, IN_CACHE // logits_NV.shape[1])


def log_softmax(logits_NV: Tensor) -> Tensor:
    """Log-probabilities in float64."""
    return logits_NV.double().log_softmax(-1)


def divergence(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """KL(p‖q) in nats of each row of log-probabilities, [N]; infinite where q excludes what p has.

    Formula: sum of exp(p) * (p - q), with 0 for what p excludes (a vocabulary padded with -inf).
    """
    term_NV = p_NV.exp() * (p_NV - q_NV)
    return torch.where(p_NV == -math.inf, 0.0, term_NV).sum(-1)


def mean(x_N: Tensor) -> float:
    """Of float64, rounded once: with any number of threads the same."""
    if not x_N.isfinite().all():
        return x_N.mean().item()
    return math.fsum(x_N.tolist()) / len(x_N)


def share(questions: dict[int, bool]) -> float | None:
    """Share of right answers; None if there are no questions."""
    return sum(questions.values()) / len(questions) if questions else None
