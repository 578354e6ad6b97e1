"""Read recipes: ours by name, compressed-tensors' presets by name, a user's YAML.

The built-in files spell everything out, so that using one does not import compressed-tensors; a
test holds them to llm-compressor's own reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ckptq.errors import UsageError
from ckptq.files import read_small
from ckptq.recipes import gptq, imatrix, searched, tuned
from ckptq.recipes.args import Args
from ckptq.recipes.dialect.read_recipe import read_modifiers, read_stages
from ckptq.recipes.preset import preset_names, preset_text
from ckptq.recipes.scheme import (
    DEQUANTIZE,
    PARTS,
    REPACK,
    REPACK_NVFP4,
    Recipe,
    read_groups,
    read_strings,
)
from ckptq.recipes.spelled import AUTOROUND, GPTQ, MODIFIERS, PLAIN, STAGE, spelled

FOLDER = Path(__file__).parent

SUFFIXES = {
    searched.SUFFIX: searched.with_search,
    imatrix.SUFFIX: imatrix.with_imatrix,
    gptq.SUFFIX: gptq.with_gptq,
    imatrix.REFINED: imatrix.with_descents,
    tuned.SUFFIX: tuned.with_tuning,
}
"""What may stand behind the name of a scheme, and what it makes of the scheme."""

REWRITTEN: Mapping[str, str] = {
    DEQUANTIZE: "A quantized source's weights, dequantized into the dtype of its config.json.",
    REPACK: "A quantized source's codes and scales as they are, in compressed-tensors' layout.",
    REPACK_NVFP4: "As repack, with MXFP4 cast to NVFP4: exact where NVFP4's scales reach.",
}
"""Schemes that quantize nothing, and what they make of a quantized source."""

NOTHING: Mapping[str, Any] = {}

RECIPE_BYTES = 1 << 20
"""Of a recipe of the user's own; the largest that are known have 10 kB."""


def built_in() -> dict[str, Path]:
    """The recipes that come with ckptq, by scheme name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_scheme(name: str) -> Recipe:
    """`--scheme NAME`: a built-in recipe, or a compressed-tensors preset (FP8_DYNAMIC).

    With "-search" behind it, as `--search` makes it; with "-imatrix", ranges that its inputs weigh;
    with "-gptq", codes chosen by GPTQ; with "-refined", both, and made better; with "-tuned",
    codes and scales tuned by AutoRound.
    """
    for suffix, change in SUFFIXES.items():
        if name.lower().endswith(suffix):
            return change(load_scheme(name[: -len(suffix)]))
    if name.lower() in REWRITTEN:
        return _rewriting(name.lower())
    files = built_in()
    if name.lower() in files:
        text = files[name.lower()].read_text()
        return _plain(name.lower(), text)
    from compressed_tensors.quantization import is_preset_scheme

    if is_preset_scheme(name):
        return load_text(name.upper(), preset_text(name.upper()))
    raise UsageError(
        f"unknown scheme {name!r}; built in: {', '.join(files)}; compressed-tensors' presets "
        "(FP8_DYNAMIC, W4A16, ...) are accepted too; `ckptq recipes` lists all"
    )


def load_either(scheme: str | None, file: Path | None) -> Recipe:
    """What `--scheme` or `--recipe` names. UsageError for both, or neither."""
    if (scheme is None) == (file is None):
        raise UsageError("give either --scheme NAME or --recipe FILE; `ckptq recipes` lists names")
    return load_recipe(file) if file is not None else load_scheme(str(scheme))


def describe() -> dict[str, str]:
    """Every name for `--scheme`, with a one-line description."""
    ours = {name: _first_comment(path) for name, path in built_in().items()}
    presets = dict.fromkeys(preset_names(), "compressed-tensors preset")
    return ours | dict(REWRITTEN) | presets


def _first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


def load_recipe(file: Path) -> Recipe:
    """`--recipe FILE`: a recipe in llm-compressor's dialect."""
    return _load_file(file, load_text)


def load_written(file: Path) -> Recipe:
    """A recipe.yaml that ckptq wrote. Those that it spelled out itself need no llm-compressor."""
    return _load_file(file, _load_spelled)


@lru_cache(maxsize=16)
def _load_spelled(name: str, text: str) -> Recipe:
    if text in (path.read_text() for path in built_in().values()):
        return _plain(name, text)
    read_stages(text)  # within bounds
    try:
        made = _plain(name, text)
    except (UsageError, LookupError, TypeError, AttributeError, ValueError):
        return load_text(name, text)
    return made if made.groups and spelled(made) == text else load_text(name, text)


def _load_file(file: Path, load: Callable[[str, str], Recipe]) -> Recipe:
    """UsageError names the file."""
    data = read_small(file, RECIPE_BYTES)
    try:
        return load(file.stem, data.decode("utf-8").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: not a text file: {error}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _rewriting(name: str) -> Recipe:
    """One of `REWRITTEN`; the groups of `repack` follow from the source."""
    return Recipe(name=name, conversion=name, text=f"# {REWRITTEN[name]}\n")


def load_text(name: str, text: str) -> Recipe:
    """Parse a recipe in llm-compressor's dialect; a typo fails with its field named."""
    modifiers = read_modifiers(text)
    configs = [modifier.config for modifier in modifiers if modifier.config is not None]
    kinds = [modifier.kind for modifier in modifiers]
    chosen = _chosen(kinds[0], modifiers[0].fields) if len(kinds) == 1 else {}
    others = () if chosen else tuple(kind for kind in kinds if kind != PLAIN)
    if not modifiers:
        raise UsageError(
            "the recipe has no modifier; expected a stage of modifiers, as in `ckptq recipes NAME`"
        )
    if len(configs) > 1:
        raise UsageError(
            f"{len(configs)} modifiers quantize; expected one with several config_groups"
        )
    modifier: dict[str, Any] = {}
    if configs:
        config, kv = configs[0], configs[0].kv_cache_scheme
        modifier = {
            "config_groups": {
                key: {**scheme.model_dump(mode="json"), "format": _format(scheme)}
                for key, scheme in config.config_groups.items()
                if any(getattr(scheme, part) is not None for part in PARTS)
            },
            "ignore": list(config.ignore or ()),
            "kv_cache_scheme": kv.model_dump(mode="json") if kv is not None else None,
        }
    made = _recipe(name, text, modifier, others, chosen)
    _refuse_idle_order(made)
    return made


def _refuse_idle_order(recipe: Recipe) -> None:
    """UsageError for an order of columns in a recipe that rounds to nearest."""
    for group in recipe.linears if not recipe.chooses and not recipe.handed_over else ():
        if group.weights is not None and group.weights.actorder:
            raise UsageError(
                f"config_groups.{group.name}.weights.actorder is {group.weights.actorder!r}, which "
                f"{GPTQ} alone obeys; {PLAIN} rounds every weight by itself"
            )


def _recipe(
    name: str,
    text: str,
    modifier: Mapping[str, Any],
    handed_over: tuple[str, ...] = (),
    chosen: Mapping[str, Any] = NOTHING,
) -> Recipe:
    kv = modifier.get("kv_cache_scheme")
    made = Recipe(
        name=name,
        groups=tuple(read_groups(modifier.get("config_groups", {}), None, _refuse)),
        ignore=read_strings(modifier.get("ignore", []), "ignore", _refuse),
        kv_cache_scheme=None if kv is None else Args.read(kv, "kv_cache_scheme", _refuse),
        handed_over=handed_over,
        text=text,
        **chosen,
    )
    if made.gptq is not None:
        gptq.check_gptq(made)
    return tuned.checked(made)


def _chosen(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's field for a modifier that chooses codes; empty for another."""
    if kind == GPTQ:
        return {"gptq": gptq.read_gptq(fields)}
    return {"tuning": tuned.read_tuning(fields)} if kind == AUTOROUND else {}


def _refuse(name: str, found: object, wanted: str) -> None:
    raise UsageError(f"{name} {found!r}: not {wanted}")


def _format(scheme: Any) -> str:
    """The stored format: the recipe's own, else the one that compressed-tensors infers."""
    if scheme.format is not None:
        return str(getattr(scheme.format, "value", scheme.format))
    if scheme.weights is None:
        return "dense"
    from compressed_tensors.compressors.format import infer_module_format
    from torch.nn import Linear

    return str(infer_module_format(Linear, scheme).value)


def _plain(name: str, text: str) -> Recipe:
    """One of our own files: already resolved."""
    modifiers = yaml.safe_load(text)[STAGE][MODIFIERS]
    kind = next((kind for kind in (GPTQ, AUTOROUND) if kind in modifiers), PLAIN)
    return _recipe(name, text, modifiers[kind], chosen=_chosen(kind, modifiers[kind]))
