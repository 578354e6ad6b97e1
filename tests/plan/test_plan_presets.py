"""compressed-tensors' presets planned: what calibration owes, what vLLM does not serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny.plans import plan_of

from ckptq.errors import PlanError
from ckptq.recipes.preset import preset_names
from ckptq.spec import TensorSpec

PRESETS = preset_names()
NO_EXPERTS = ["W2A4", "W2A8", "W3A4", "W3A8", "W4A4", "W5A8", "W6A8", "W7A8"]
"""vLLM 0.32: "Unsupported FusedMoe scheme"."""


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_plans_a_dense_model(llama: Path, name: str) -> None:
    plan = plan_of(llama, name, permutable=name != "FP8_BLOCK")  # k and v are half a block
    assert sum(len(unit.parts) for unit in plan.units) == 2 * 7
    assert (len(plan.inputs) > 0) == (name in ("FP8", "NVFP4"))


@pytest.mark.parametrize("name", PRESETS)
def test_experts_are_planned_or_refused_by_name(llama4: Path, name: str) -> None:
    if name not in NO_EXPERTS:
        linears = [n for each in plan_of(llama4, name).groups.values() for n in each]
        experts = [linear for linear in linears if ".experts." in linear]
        assert len(experts) == 4 * 3
        return
    said = rf"experts\.0\.\w+: group 'group_0': vLLM cannot serve {name} experts"
    with pytest.raises(PlanError, match=said):
        plan_of(llama4, name)
    plan = plan_of(llama4, name, ignore=("re:.*experts.*",))
    assert not any(".experts." in linear for linears in plan.groups.values() for linear in linears)


def test_nvfp4_promises_a_float32_global_scale_for_every_linear(llama4: Path) -> None:
    plan = plan_of(llama4, "nvfp4")
    (linears,) = plan.groups.values()
    assert plan.inputs == dict.fromkeys(linears, 448.0 * 6.0)
    promised = {name: spec for unit in plan.units for name, spec in unit.scales.items()}
    assert promised == {
        f"{linear}.input_global_scale": TensorSpec("F32", (1,)) for linear in linears
    }


def test_nvfp4_weights_are_those_of_nvfp4a16(llama4: Path) -> None:
    with_inputs, alone = (
        {n: spec for unit in plan_of(llama4, scheme).units for n, spec in unit.writes.items()}
        for scheme in ("nvfp4", "nvfp4a16")
    )
    assert {n: s for n, s in with_inputs.items() if "input_global_scale" not in n} == alone
    assert len(with_inputs) > len(alone)
