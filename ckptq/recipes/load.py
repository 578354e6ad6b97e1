"""Read recipes: ours by name, compressed-tensors presets by name, a user's YAML by llm-compressor.

The built-in files spell everything out and are checked against llm-compressor's own models by a
test, so that using one does not import it (5 s). Everything else goes through those models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ckptq.errors import UsageError
from ckptq.files import read_small
from ckptq.recipes.args import Args
from ckptq.recipes.dialect import QUANTIZES, read_modifiers, read_stages
from ckptq.recipes.preset import EMPTY, preset_text
from ckptq.recipes.rewritten import REWRITTEN, rewriting
from ckptq.recipes.scheme import PARTS, Recipe, read_groups, read_strings
from ckptq.recipes.searched import SUFFIX, with_search
from ckptq.recipes.spelled import spelled

FOLDER = Path(__file__).parent

RECIPE_BYTES = 1 << 20
"""Of a recipe of the user's own; the largest that are known have 10 kB."""


def built_in() -> dict[str, Path]:
    """The recipes that come with ckptq, by scheme name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_scheme(name: str) -> Recipe:
    """`--scheme NAME`: a built-in recipe, or a compressed-tensors preset (FP8_DYNAMIC).

    With "-search" behind it, as `--search` makes it.
    """
    if name.lower().endswith(SUFFIX):
        return with_search(load_scheme(name[: -len(SUFFIX)]))
    if name.lower() in REWRITTEN:
        return rewriting(name.lower())
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
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    ours = {name: _first_comment(path) for name, path in built_in().items()}
    presets = {name: "compressed-tensors preset" for name in PRESET_SCHEMES if name != EMPTY}
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


def load_text(name: str, text: str) -> Recipe:
    """Parse with llm-compressor's own models, so that a typo fails with its field named."""
    modifiers, configs = read_modifiers(text)
    kinds = [type(modifier).__name__ for modifier in modifiers]
    others = tuple(kind for kind in kinds if kind != QUANTIZES)
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
    return _recipe(name, text, modifier, others)


def _recipe(
    name: str, text: str, modifier: Mapping[str, Any], handed_over: tuple[str, ...] = ()
) -> Recipe:
    kv = modifier.get("kv_cache_scheme")
    return Recipe(
        name=name,
        groups=tuple(read_groups(modifier.get("config_groups", {}), None, _refuse)),
        ignore=read_strings(modifier.get("ignore", []), "ignore", _refuse),
        kv_cache_scheme=None if kv is None else Args.read(kv, "kv_cache_scheme", _refuse),
        handed_over=handed_over,
        text=text,
    )


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
    stages = yaml.safe_load(text)
    modifier = stages["quantization_stage"]["quantization_modifiers"]["QuantizationModifier"]
    return _recipe(name, text, modifier)
