"""A digest of Python code that only what the code does can change.

Comments, docstrings and formatting do not count, so that better prose does not make a figure old.
What a module imports from its own room counts with it: a kernel is measured with its helpers.
The digest is the same in every Python that parses the code: fields that newer ones have added are
empty where they are not used, and empty fields are left out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def digest(paths: Iterable[str], root: Path = REPOSITORY) -> str:
    """Sha256 of the modules at `paths`, files or folders below `root`; FileNotFoundError."""
    found = hashlib.sha256()
    for module in sorted(with_imports({each for path in paths for each in modules(root / path)})):
        text = normalized(module.read_text())
        found.update(f"{module.relative_to(root).as_posix()}\0{text}\0".encode())
    return found.hexdigest()


def modules(path: Path) -> list[Path]:
    """The Python files at or below `path`; FileNotFoundError where there are none."""
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    if not files:
        raise FileNotFoundError(f"{path}: no Python code there")
    return files


def with_imports(found: set[Path]) -> set[Path]:
    """The modules and, with each, those that it imports from its own room, `ckptq.ROOM`."""
    new = found
    while new := {each for module in new for each in _imports(module)} - found:
        found = found | new
    return found


def _imports(module: Path) -> Iterator[Path]:
    package = next((each for each in module.parents if each.name == "ckptq"), None)
    if package is None or module.parent == package:
        return
    room = f"ckptq.{module.relative_to(package).parts[0]}"
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{room}."):
            base = package.parent / str(node.module).replace(".", "/")
            named = [base.with_suffix(".py"), *(base / f"{name.name}.py" for name in node.names)]
            yield from (path for path in named if path.is_file())


@cache
def normalized(source: str) -> str:
    """What the source does, as one line."""
    return " ".join(_words(ast.parse(source)))


def _words(node: object) -> Iterator[str]:
    if isinstance(node, list):
        yield "["
        for each in node:
            if not _is_prose(each):
                yield from _words(each)
        yield "]"
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                yield name
                yield from _words(value)
    else:
        yield repr(node)


def _is_prose(node: object) -> bool:
    """Whether this is a docstring, of a module, a function or a field."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
