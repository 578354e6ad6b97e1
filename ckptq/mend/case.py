"""What a repairer looks at: the draft, the source, and what follows from both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import CkptqError
from ckptq.mend.draft import Draft
from ckptq.permute.effect import Part
from ckptq.plan.make import RopeChoice, make_plan
from ckptq.plan.unit import Plan, Unit
from ckptq.recipes.scheme import Recipe
from ckptq.rope_order import RopeOrder
from ckptq.verify.config_judge import judge_config
from ckptq.verify.structure.rope_readers import order_of
from ckptq.verify.subject import Subject, written_recipe


@dataclass(frozen=True)
class Case:
    """One state of the draft. Everything else is worked out when it is asked for."""

    draft: Draft
    source: Checkpoint | None

    @cached_property
    def subject(self) -> Subject:
        declared, _ = judge_config(self.draft.ckpt)
        return Subject(self.draft.ckpt, self.source, declared)

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe that ckptq wrote beside the checkpoint."""
        return written_recipe(self.draft.ckpt.path)

    @cached_property
    def plan(self) -> Plan | str:
        """The source's conversion by the draft's config.json; why there is none."""
        if self.source is None:
            return "no source is given"
        declared = self.subject.declared
        recipe = Recipe(
            name="mend",
            groups=declared.groups,
            ignore=declared.ignore,
            kv_cache_scheme=declared.kv_cache_scheme,
            text="",
        )
        turned = order_of(self.subject, Part.WEIGHTS) is not order_of(
            Subject(self.source, None, declared), Part.WEIGHTS
        )
        half = order_of(self.subject, Part.WEIGHTS) is RopeOrder.HALF_SPLIT
        order: RopeChoice = "half-split" if turned and half else "keep"
        try:
            return make_plan(self.source, recipe, rope_order=order)
        except CkptqError as error:
            return str(error)

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Tensor -> the unit that makes it; empty where there is no plan."""
        if isinstance(self.plan, str):
            return {}
        return {name: unit for unit in self.plan.units for name in unit.writes}

    @property
    def chosen(self) -> bool:
        """Whether codes were chosen by more than rounding, which converting again does not do."""
        recipe = self.recipe
        return recipe is not None and (recipe.chooses or bool(recipe.handed_over))
