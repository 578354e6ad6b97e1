"""What `quantization_config` declares, read as data that may hold anything.

Every oddity becomes a finding, and what is left is well typed: groups with a weight scheme that
can be, names that can be matched, a KV-cache strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.engines.vllm import kv_scheme_faults, loads_with_plain_inputs, means_every_linear
from ckptq.errors import PlanError, SourceError
from ckptq.quantize.scheme import FORMATS, WeightScheme
from ckptq.verify.kinds import finding
from ckptq.verify.names import Names, read_names
from ckptq.verify.report import Finding

KNOWN_FIELDS = ("targets", "weights", "input_activations", "output_activations", "format")


NAIVE = "naive-quantized"
"""What llm-compressor calls codes of whole bytes where activations are not quantized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A group that quantizes Linears."""

    name: str
    targets: tuple[str, ...]
    named: Names
    scheme: WeightScheme | None
    """None where what is declared cannot be; a finding has said so."""
    input_scale: str | None
    """Local name of the scale that its activations need; None where they are found at run time."""
    input_reach: float = 448.0
    """The largest code of its activations."""
    input_group: int | None = None
    """Columns of activations that share a scale; None where there are no such groups."""

    @property
    def every_linear(self) -> bool:
        return any(means_every_linear(target) for target in self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Declared:
    """A quantization_config, understood as far as it can be."""

    present: bool
    groups: tuple[Group, ...] = ()
    ignore: Names
    kv_strategy: str | None = None
    """"tensor" or "attn_head"; None where no KV-cache scheme is declared."""
    attention_group: bool = False

    def group_of(self, module: str) -> Group | None:
        """The group that a Linear of this name falls to: by name first, then by class."""
        if self.ignore.match(module):
            return None
        named = next((g for g in self.groups if g.named.match(module)), None)
        return named or next((g for g in self.groups if g.every_linear), None)


def read_declared(ckpt: Checkpoint) -> tuple[Declared, list[Finding]]:
    """The config's declarations and what is wrong with them.

    Raises SourceError for a quantization method other than compressed-tensors.
    """
    config = ckpt.quantization_config
    if config is None:
        return Declared(present=False, ignore=read_names(())), []
    method = config.get("quant_method")
    found: list[Finding] = []
    if method != "compressed-tensors":
        said = "missing" if method is None else repr(str(method)[:80])
        if "config_groups" not in config:
            raise SourceError(
                f"{ckpt.path / CONFIG}: quant_method is {said}; verify reads compressed-tensors "
                "checkpoints"
            )
        found.append(_wrong("quant-method", "quant_method", method, '"compressed-tensors"'))
    ignore = _strings(config, "ignore", "quantization_config.ignore", found)
    names = read_names(ignore)
    found += [_bad_pattern("ignore", entry) for entry in names.broken]
    _status(config, found)
    _beyond_groups(config, found)
    entries = _groups(config, found)
    attention = [name for name, entry in entries if is_attention(entry)]
    groups = tuple(
        _group(name, entry, config, found) for name, entry in entries if not is_attention(entry)
    )
    for name, entry in entries:
        if name in attention:
            _attention_group(name, entry, config, found)
    declared = Declared(
        present=True,
        groups=groups,
        ignore=names,
        kv_strategy=_kv_strategy(config, found),
        attention_group=bool(attention),
    )
    return declared, found


def is_attention(entry: Mapping[str, Any]) -> bool:
    """A group without weights quantizes q, k and v inside attention."""
    return entry.get("weights") is None and entry.get("input_activations") is not None


def _status(config: Mapping[str, Any], found: list[Finding]) -> None:
    status = config.get("quantization_status")
    if status != "compressed":
        found.append(_wrong("status", "quantization_status", status, '"compressed"'))


def _beyond_groups(config: Mapping[str, Any], found: list[Finding]) -> None:
    """Sparsity, which vLLM 0.32 has no more, and rotations: both written by llm-compressor."""
    if config.get("sparsity_config"):
        found.append(_wrong("sparsity", "sparsity_config", config["sparsity_config"], "none"))
    if config.get("transform_config"):
        found.append(_wrong("transforms", "transform_config", config["transform_config"], "none"))


def _groups(config: Mapping[str, Any], found: list[Finding]) -> list[tuple[str, Mapping[str, Any]]]:
    groups = config.get("config_groups")
    if groups is None:
        found.append(_wrong("config-groups-missing", "config_groups", None, "an object, even {}"))
        return []
    if not isinstance(groups, dict):
        found.append(_wrong("group-invalid", "config_groups", groups, "an object"))
        return []
    for name, entry in groups.items():
        if not isinstance(entry, dict):
            found.append(_wrong("group-invalid", f"config_groups.{name}", entry, "an object"))
    return [(name, entry) for name, entry in groups.items() if isinstance(entry, dict)]


def _group(
    name: str, entry: Mapping[str, Any], config: Mapping[str, Any], found: list[Finding]
) -> Group:
    where = f"config_groups.{name}"
    for field in sorted(entry.keys() - set(KNOWN_FIELDS)):
        found.append(_wrong("group-invalid", f"{where}.{field}", entry[field], "no such field"))
    targets = _strings(entry, "targets", f"{where}.targets", found)
    if not targets:
        found.append(_wrong("group-invalid", f"{where}.targets", entry.get("targets"), "a list"))
    named = read_names(targets)
    found += [_bad_pattern(f"{where}.targets", entry) for entry in named.broken]
    for field in ("input_activations", "output_activations"):
        if entry.get(field) is not None and not isinstance(entry[field], dict):
            found.append(_wrong("group-invalid", f"{where}.{field}", entry[field], "an object"))
    inputs = entry.get("input_activations")
    inputs = inputs if isinstance(inputs, dict) else None
    return Group(
        name=name,
        targets=tuple(targets),
        named=named,
        scheme=_scheme(where, entry, config, found),
        input_scale=_input_scale(inputs),
        input_reach=127.0 if (inputs or {}).get("type") == "int" else 448.0,
        input_group=_input_group(inputs or {}),
    )


def _input_group(inputs: Mapping[str, Any]) -> int | None:
    size = inputs.get("group_size")
    return size if type(size) is int and size > 0 else None


def _input_scale(inputs: Mapping[str, Any] | None) -> str | None:
    """NVFP4 activations are dynamic within their group, "local", under one static global scale."""
    if inputs is None or inputs.get("dynamic") is True:
        return None
    return "input_global_scale" if inputs.get("dynamic") == "local" else "input_scale"


def _scheme(
    where: str, entry: Mapping[str, Any], config: Mapping[str, Any], found: list[Finding]
) -> WeightScheme | None:
    weights = entry.get("weights")
    if not isinstance(weights, dict):
        found.append(_wrong("group-invalid", f"{where}.weights", weights, "an object"))
        return None
    actorder = weights.get("actorder")
    if isinstance(actorder, str) and actorder.lower() in ("group", "dynamic"):
        found.append(_wrong("actorder", f"{where}.weights.actorder", actorder, "static or null"))
        weights = {**weights, "actorder": None}
    format = entry.get("format") or config.get("format")
    if format == NAIVE:
        format = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if not isinstance(format, str) or format not in FORMATS:
        choice = f"one of {', '.join(FORMATS)}"
        found.append(_wrong("format", f"{where}.format", format, choice))
        return None
    if entry.get("input_activations") is None and not loads_with_plain_inputs(weights, format):
        wanted = "pack-quantized, as vLLM loads integers of weights alone"
        found.append(_wrong("format", f"{where}.format", format, wanted))
    kept = {key: value for key, value in weights.items() if value is not None}
    try:
        return WeightScheme.from_args(kept, format, stored=True)
    except PlanError as error:
        wanted = f"weights that {format} can hold"
        found.append(_wrong("group-invalid", f"{where}.weights", str(error), wanted))
        return None


def _attention_group(
    name: str, entry: Mapping[str, Any], config: Mapping[str, Any], found: list[Finding]
) -> None:
    """vLLM knows such a group by its one target, a class name; its scheme must be the cache's."""
    where = f"config_groups.{name}"
    targets = _strings(entry, "targets", f"{where}.targets", found)
    if len(targets) != 1 or targets[0].startswith("re:") or not targets[0].endswith("Attention"):
        wanted = 'one class name that ends in "Attention"'
        found.append(_wrong("attention-target", f"{where}.targets", targets, wanted))
    kv, inputs = config.get("kv_cache_scheme"), entry["input_activations"]
    if not isinstance(kv, dict):
        wanted = "that of the attention group, or vLLM keeps the cache unquantized"
        found.append(_wrong("kv-scheme-missing", "kv_cache_scheme", kv, wanted))
    elif isinstance(inputs, dict):
        for field in ("num_bits", "type", "strategy", "symmetric"):
            if field in kv and field in inputs and kv[field] != inputs[field]:
                wanted = f"{inputs[field]!r}, as in {where}"
                found.append(_wrong("kv-scheme", f"kv_cache_scheme.{field}", kv[field], wanted))


def _kv_strategy(config: Mapping[str, Any], found: list[Finding]) -> str | None:
    """The cache's strategy; findings for what vLLM does not serve."""
    kv = config.get("kv_cache_scheme")
    if kv is None:
        return None
    if not isinstance(kv, dict):
        found.append(_wrong("kv-scheme", "kv_cache_scheme", kv, "an object or null"))
        return None
    for field, value, choice in kv_scheme_faults(kv):
        said = " or ".join(map(repr, choice))
        found.append(_wrong("kv-scheme", f"kv_cache_scheme.{field}", value, said))
    strategy = kv.get("strategy")
    return strategy if strategy in ("tensor", "attn_head") else None


def _strings(config: Mapping[str, Any], key: str, where: str, found: list[Finding]) -> list[str]:
    """A list of strings; what is none is reported and left out."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        found.append(_wrong("group-invalid", where, value, "a list of names"))
        return []
    for item in value:
        if not isinstance(item, str):
            found.append(_wrong("group-invalid", where, item, "a name"))
    return [item for item in value if isinstance(item, str)]


def _bad_pattern(where: str, entry: str) -> Finding:
    return _wrong("pattern-invalid", where, entry, "a regular expression")


def _wrong(code: str, field: str, found: object, wanted: str) -> Finding:
    return finding(
        code, field, file=CONFIG, found="nothing" if found is None else str(found)[:200],
        wanted=wanted,
    )  # fmt: skip
