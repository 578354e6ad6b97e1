"""Whether a layer that has run showed all q, k and v for which the plan has scales."""

from __future__ import annotations

from collections.abc import Mapping

from ckptq.errors import PlanError
from ckptq.forward.layerwise import LayerwiseModel
from ckptq.models.refusals import WEIGHTS_ALONE
from ckptq.plan.attention import AttentionPlan


def check_seen(
    model: LayerwiseModel, layer: str, scales: Mapping[str, int], attention: AttentionPlan
) -> None:
    """PlanError for a module of the plan in `layer` that is not in `scales`, or with other scales.

    `scales` is how many were found at each point, "MODULE.k" by its name on disk.
    """
    inside, family = model.loader.stored_module(layer), type(model.skeleton.model).__name__
    for module, wanted in attention.scales.items():
        if not module.startswith(f"{inside}."):
            continue
        for name, spec in wanted.items():
            count = scales.get(name.removesuffix("_scale"))
            if count is None:
                raise PlanError(
                    f"{model.loader.label}: {module} did not run as attention of transformers' "
                    f"interface, so its q, k and v were not observed; {WEIGHTS_ALONE}"
                )
            if count != spec.numel:
                raise PlanError(
                    f"{model.loader.label}: {module} of {family} passes {count} heads to "
                    f"attention, but {name} is for {spec.numel}, so they cannot be matched; use "
                    "a scheme with per-tensor scales, or a weights-only one, for this model"
                )
