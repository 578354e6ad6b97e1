"""llm-compressor as the judge of what is stored, and poisoned memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from format_cases import Judge
from torch import Tensor


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is never zero by luck."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        fresh = empty(*args, **kwargs)
        fresh.view(-1).view(torch.uint8).fill_(0xA5)
        return fresh

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def judge() -> Judge:
    """`judge({module name: weight}, format, args)` are the tensors that llm-compressor stores.

    Its own `model_free_ptq`, on a CPU, with one change: codes of 16-bit weights come from a
    division in float32, as in its GPU kernel (its CPU path divides in the weight's dtype).
    """
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.lifecycle import forward_helpers
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter

    divide = forward_helpers._quantize

    def divide_in_float32(x: Tensor, scale: Tensor, *args: object, **kwargs: object) -> Tensor:
        return divide(x.float(), scale.float(), *args, **kwargs)

    def ask(
        weights: Mapping[str, Tensor], format: str, args: dict[str, object]
    ) -> dict[str, dict[str, Tensor]]:
        scheme = QuantizationScheme(targets=["Linear"], weights=dict(args), format=format)
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=[])
        tensors = {f"{name}.weight": w_RC.clone() for name, w_RC in weights.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward_helpers, "_quantize", divide_in_float32)
            stored = ModelFreePtqConverter(config).process(tensors)
        return {
            name: {
                key.removeprefix(f"{name}."): tensor.detach()
                for key, tensor in stored.items()
                if key.startswith(f"{name}.")
            }
            for name in weights
        }

    return ask
