"""The cells of the matrix, each made once in a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from matrix_cells import Cell, convert
from matrix_models import save_source


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> its unquantized checkpoint."""
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("source") / family.replace(" ", "-")
            made[family] = save_source(family, folder)
        return made[family]

    return source


@pytest.fixture(scope="session")
def cell(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Cell:
    made: dict[tuple[str, str], Path] = {}

    def converted(family: str, format: str) -> tuple[Path, Path]:
        source = sources(family)
        if (family, format) not in made:
            out = tmp_path_factory.mktemp("cell") / f"{source.name}-{format}"
            made[family, format] = convert(source, out, format)
        return source, made[family, format]

    return converted
