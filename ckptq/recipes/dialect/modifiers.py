"""The modifiers of llm-compressor that ckptq runs itself, with their fields and defaults.

With them a recipe is read without llm-compressor. A test holds them to its own classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    is_preset_scheme,
    preset_name_to_scheme,
)
from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator

OBSERVERS = {
    "weights": ("weights", "memoryless_minmax"),
    "input": ("input_activations", "minmax"),
    "output": ("output_activations", "minmax"),
}
"""Key of a modifier's `observer` -> (field of a scheme, the observer of one that names none)."""

ORDERED = (
    QuantizationStrategy.GROUP,
    QuantizationStrategy.TENSOR_GROUP,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.TENSOR,
    QuantizationStrategy.BLOCK,
)
"""Whose weights may be quantized column after column."""

Targets = str | list[str]


class QuantizationModifier(BaseModel):
    """Rounds to nearest."""

    model_config = ConfigDict(extra="forbid")

    requires_calibration_data: bool = False
    index: int | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None

    config_groups: dict[str, QuantizationScheme] | None = None
    targets: Targets = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    scheme: str | dict[str, Targets] | None = None
    kv_cache_scheme: QuantizationArgs | None = None
    weight_observer: str | None = None
    input_observer: str | None = None
    output_observer: str | None = None
    observer: dict[Literal["weights", "input", "output"], str] | None = None
    bypass_divisibility_checks: bool = False

    @field_validator("scheme")
    @classmethod
    def _presets(cls, scheme: str | dict[str, Targets] | None) -> str | dict[str, Targets] | None:
        for name in [scheme] if isinstance(scheme, str) else scheme or ():
            if not is_preset_scheme(name):
                raise ValueError(f"{name!r} is no preset of compressed-tensors")
        return scheme

    def resolved(self) -> QuantizationConfig:
        """What all its fields together say. ValueError where they contradict each other."""
        groups = self._groups()
        for group in groups.values():
            self._name_observers(group)
        return QuantizationConfig(
            config_groups=groups,
            kv_cache_scheme=self.kv_cache_scheme,
            quantization_status=QuantizationStatus.INITIALIZED,
            ignore=self.ignore,
        )

    def _groups(self) -> dict[str, QuantizationScheme]:
        targets = _listed(self.targets)
        if self.scheme is None:
            return self.config_groups or {"group_0": QuantizationScheme(targets=targets)}
        if self.config_groups is not None:
            raise ValueError("has both `scheme` and `config_groups`; expected one of them")
        named = {self.scheme: targets} if isinstance(self.scheme, str) else self.scheme
        return {
            f"group_{number}": preset_name_to_scheme(name, _listed(each))
            for number, (name, each) in enumerate(named.items())
        }

    def _name_observers(self, group: QuantizationScheme) -> None:
        """The modifier's observers go before a scheme's own."""
        given = self._observers()
        for key, (field, default) in OBSERVERS.items():
            args: QuantizationArgs | None = getattr(group, field)
            if args is None:
                continue
            if (named := given.get(key)) is not None:
                args.observer = named
            elif args.observer is None or "observer" not in args.model_fields_set:
                args.observer = None if args.dynamic is True else default

    def _observers(self) -> dict[str, str]:
        single = {
            "weights": self.weight_observer,
            "input": self.input_observer,
            "output": self.output_observer,
        }
        found = {key: name for key, name in single.items() if name is not None}
        if self.observer is None:
            return found
        if found:
            raise ValueError("has both `observer` and one of weight_, input_, output_observer")
        return {str(key): name for key, name in self.observer.items()}


class GPTQModifier(QuantizationModifier):
    """Chooses codes by the Hessians of the inputs."""

    requires_calibration_data: bool = True
    block_size: int = 128
    dampening_frac: float | None = 0.01
    actorder: ActivationOrdering | None = ActivationOrdering.STATIC
    batched_quantization: Literal["auto"] | StrictInt | None = "auto"
    descents: Any = 0
    """Passes of coordinate descent behind it, which llm-compressor does not have."""

    @field_validator("batched_quantization")
    @classmethod
    def _positive(cls, value: str | int | None) -> str | int | None:
        if isinstance(value, int) and value <= 0:
            raise ValueError("expected a positive integer")
        return value

    def resolved(self) -> QuantizationConfig:
        config = super().resolved()
        for weights in _weights(config):
            weights.actorder = self._order(weights.actorder)
        return config

    def _order(self, own: ActivationOrdering | None) -> ActivationOrdering | None:
        """The order of a group with this one of its own."""
        if own is None:
            return self.actorder
        if "actorder" in self.model_fields_set and self.actorder != own:
            raise ValueError(
                f"GPTQModifier.actorder is {self.actorder}, a group's own is {own}; expected one "
                "of them, or the same"
            )
        return own


class AutoRoundModifier(QuantizationModifier):
    """Tunes codes and scales by gradients of what a layer makes of its inputs."""

    requires_calibration_data: bool = True
    iters: int = 200
    enable_torch_compile: bool = True
    batch_size: int = 8
    lr: float | None = None
    device_ids: str | None = None
    disable_opt_rtn: bool = False


RUN_HERE = {kind.__name__: kind for kind in (QuantizationModifier, GPTQModifier, AutoRoundModifier)}


def _weights(config: QuantizationConfig) -> Iterator[QuantizationArgs]:
    """Those whose columns have an order."""
    for group in config.config_groups.values():
        weights = group.weights if isinstance(group, QuantizationScheme) else None
        if weights is not None and weights.strategy in ORDERED:
            yield weights


def _listed(targets: Targets) -> list[str]:
    return [targets] if isinstance(targets, str) else targets
