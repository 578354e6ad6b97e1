"""Good checkpoints, each made once in a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from verify_checkpoints import Editor, convert, copy_of, kv_recipe, recipe, save_source

Good = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Callable[[str], Path]:
    """Family -> its unquantized checkpoint."""
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            made[family] = save_source(family, tmp_path_factory.mktemp("source") / family)
        return made[family]

    return source


@pytest.fixture(scope="session")
def good(tmp_path_factory, sources) -> Good:
    """(family, weights, kv) -> (a good checkpoint, its source). Never written to."""
    made: dict[tuple[str, str, bool], Path] = {}

    def checkpoint(family: str, weights: str, kv: bool = False) -> tuple[Path, Path]:
        key = (family, weights, kv)
        source = sources(family)
        if key not in made:
            out = tmp_path_factory.mktemp("good") / f"{family}-{weights}"
            attention = ("re:.*self_attn",) if family == "llama4" and "block" in weights else ()
            attention = (
                ("re:.*self_attn",) if family == "llama4" and "asym" in weights else attention
            )
            what = kv_recipe() if weights == "kv" else recipe(weights, kv=kv, ignore=attention)
            made[key] = convert(source, out, what)
        return made[key], source

    return checkpoint


@pytest.fixture
def broken(good, tmp_path) -> Callable[..., tuple[Editor, Path]]:
    """(family, weights, kv) -> an editor on a copy of the good checkpoint, and its source."""

    def copy(family: str, weights: str, kv: bool = False) -> tuple[Editor, Path]:
        folder, source = good(family, weights, kv)
        return copy_of(folder, tmp_path / folder.name), source

    return copy
