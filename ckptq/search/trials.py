"""Plans that are run: what a mixture of schemes really costs, in KL and in answers to a task.

Losses of sets order the plans along their size, the best at each size. What one of them loses as a
whole, `evaluate` measures, with its weights quantized in memory and one layer there at a time. An
accuracy cannot be added up from sets, so the smallest plan that holds is looked for among sizes:
between the smallest that holds so far and its lower neighbour, again and again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptq.errors import FoundWrong
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Text
from ckptq.printable import size
from ckptq.progress import Begin
from ckptq.recipes.scheme import Recipe
from ckptq.search.candidates import PLAIN
from ckptq.search.choice import Budget, Choices
from ckptq.search.kept_losses import Kept
from ckptq.search.mixed import mixed_recipe
from ckptq.search.result import Trial

RUNGS = 32
"""Sizes per bit: a task of a few hundred questions tells no finer ones apart."""
AT_ONCE = 4
"""Plans beside the source, its zero and the control: a layer is read once for all."""
SOURCE = "the source"
"""Where all stays as it is."""

Plan = Mapping[str, str]
"""Set -> scheme."""


@dataclass(frozen=True)
class Trials:
    """Runs plans that `kept` lacks, and keeps what is found."""

    choices: Choices
    text: Text
    budget: Budget
    ignore: Sequence[str]
    kept: Kept
    device: str
    begin: Begin

    def run(self, plans: Sequence[Plan]) -> list[Trial]:
        """What each of them costs, in order. FoundWrong for one that cannot be run."""
        known = self.kept.trials.setdefault(_digest(repr(self.text.lines)), {})
        recipes = [self._recipe(plan) for plan in plans]
        missing = {r.name: r for r in recipes if r.name not in known and r.name != SOURCE}
        if missing:
            found = evaluate(
                self.choices.candidates.ckpt,
                self.text,
                schemes=list(missing.values()),
                device=self.device,
                begin=self.begin,
            )
            if found.failures:
                raise FoundWrong("\n".join(found.failures))
            for row in (*found.rows, replace(found.zero, weights=SOURCE)):
                known[row.weights] = (row.measures.kl, row.measures.accuracy)
            self.kept.write()
        return [self._trial(p, *known[r.name]) for p, r in zip(plans, recipes, strict=True)]

    def smallest(self) -> tuple[Plan, list[Trial]]:
        """The smallest plan that was found to hold, and all that were run, smallest first.
        FoundWrong where none holds, or none that quantizes anything."""
        low, high = (each.nbytes for each in (self.choices.smallest, self.choices.closest))
        rungs = max(1, math.ceil(RUNGS * 8 * (high - low) / self.choices.candidates.weights))
        tried: dict[int, tuple[Plan, Trial]] = {}
        failed, held = -1, rungs
        fresh = [0, *_between(0, rungs), rungs]
        while fresh:
            plans = [self._at(low + (high - low) * rung // rungs) for rung in fresh]
            trials = self.run(plans)
            tried |= dict(zip(fresh, zip(plans, trials, strict=True), strict=True))
            held = min((rung for rung, (_, trial) in tried.items() if trial.holds), default=-1)
            failed = max((rung for rung in tried if rung < held), default=-1)
            fresh = _between(failed, held) if failed >= 0 else []
        every = _distinct([tried[rung][1] for rung in sorted(tried)])
        if held < 0 or _plain(tried[held][0]):
            lines = [_told(trial) for trial in every]
            raise FoundWrong("\n".join([f"no plan holds {_asked(self.budget)}", *lines]))
        return tried[held][0], every

    def _at(self, nbytes: int) -> Plan:
        chosen = self.choices.within_bytes(nbytes - self.choices.candidates.rest_bytes)
        assert chosen is not None, "no size is below the smallest"
        return chosen

    def _recipe(self, plan: Plan) -> Recipe:
        """Its name is what `kept` has it under."""
        recipe = mixed_recipe("", self.choices.candidates, plan, self.ignore)
        return replace(recipe, name=SOURCE if _plain(plan) else _digest(recipe.text))

    def _trial(self, plan: Plan, kl: float, accuracy: float | None) -> Trial:
        return Trial(
            point=self.choices.point(SOURCE if _plain(plan) else "plan", plan),
            kl=kl,
            accuracy=accuracy,
            holds=self.budget.holds(kl, accuracy),
        )


def _plain(plan: Plan) -> bool:
    """Whether it leaves all as it is."""
    return set(plan.values()) == {PLAIN}


def _between(low: int, high: int) -> list[int]:
    """Rungs at even distances between two."""
    steps = (low + (high - low) * step // (AT_ONCE + 1) for step in range(1, AT_ONCE + 1))
    return list(dict.fromkeys(rung for rung in steps if low < rung < high))


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    """Several sizes may have the same best plan."""
    return list({trial.point.nbytes: trial for trial in trials}.values())


def _told(trial: Trial) -> str:
    accuracy = "" if trial.accuracy is None else f", accuracy {trial.accuracy:.4g}"
    point = trial.point
    return f"{point.name}, {point.bits:.3f} bits, {size(point.nbytes)}: KL {trial.kl:.4g}{accuracy}"


def _asked(budget: Budget) -> str:
    limits = {"--max-kl": budget.max_kl, "--min-accuracy": budget.min_accuracy}
    return " and ".join(f"{name} {value:g}" for name, value in limits.items() if value is not None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
