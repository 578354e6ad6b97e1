"""Which definitions of ckptq a command reaches, read from the sources: who names whom.

A definition is a function or class at the top of a module, written "module:name"; "module:" stands
for the module's other statements. A definition reaches what its body names, and the statements of
its module; those reach what they name (tables of functions) and the modules that they import. A
string "module:name" names as well. A method belongs to its class, and whoever makes an object names
the class: so nothing that runs is missed, and a little that never runs may count as reached.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache

Sources = Mapping[str, str]
"""Module -> its text."""
Names = dict[str, set[str]]
"""Definition -> the definitions that it names."""

DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
parsed = cache(ast.parse)


@cache
def _within(node: ast.AST) -> list[ast.AST]:
    """The imports, names and constants in a node of a parsed text."""
    wanted = (ast.ImportFrom, ast.Name, ast.Attribute, ast.Constant)
    return [inner for inner in ast.walk(node) if isinstance(inner, wanted)]


def names(sources: Sources) -> Names:
    """Of all modules, from their texts."""
    trees = {module: parsed(text) for module, text in sources.items()}
    known = {f"{m}:{d.name}" for m, t in trees.items() for d in t.body if isinstance(d, DEFINITION)}
    found: Names = {}
    for module, tree in trees.items():
        rest = [node for node in tree.body if not isinstance(node, DEFINITION)]
        outer = _imported(rest, trees)
        outer |= {d.partition(":")[2]: d for d in known if d.startswith(f"{module}:")}
        found[f"{module}:"] = _named(rest, outer, known) | {
            f"{target.partition(':')[0]}:" for target in _imported(rest, trees).values()
        }
        for node in tree.body:
            if isinstance(node, DEFINITION):
                scope = outer | _imported([node], trees)
                found.setdefault(f"{module}:{node.name}", {f"{module}:"}).update(
                    _named([node], scope, known)
                )
    return found


def reached(found: Names, starts: Iterable[str]) -> set[str]:
    """What is named from these definitions, directly or not, these included."""
    done: set[str] = set()
    todo = list(starts)
    while todo:
        name = todo.pop()
        if name not in done:
            done.add(name)
            todo += found.get(name, ())
    return done


def kernels(sources: Sources) -> set[str]:
    """The functions under `triton.jit`."""
    return {
        f"{module}:{node.name}"
        for module, text in sources.items()
        for node in parsed(text).body
        if isinstance(node, ast.FunctionDef)
        if any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }


def launchers(sources: Sources) -> set[str]:
    """The functions that launch a kernel: `name[grid](...)`, of a name that ends in `_kernel`."""
    return {
        f"{module}:{node.name}"
        for module, text in sources.items()
        for node in parsed(text).body
        if isinstance(node, ast.FunctionDef) and any(map(_launches, ast.walk(node)))
    }


def _launches(node: ast.AST) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Subscript) and ast.unparse(called.value).endswith("_kernel")


def _imported(nodes: Iterable[ast.AST], known: Collection[str]) -> dict[str, str]:
    """Name -> what of ckptq an import in these nodes binds it to."""
    found = {}
    for node in (inner for outer in nodes for inner in _within(outer)):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = f"{whole}:" if whole in known else f"{node.module}:{alias.name}"
                found[alias.asname or alias.name] = target
    return found


def _named(nodes: Iterable[ast.AST], scope: Mapping[str, str], known: set[str]) -> set[str]:
    def targets() -> Iterator[str]:
        for node in (inner for outer in nodes for inner in _within(outer)):
            if isinstance(node, ast.Name) and node.id in scope:
                yield scope[node.id]
            elif isinstance(node, ast.Constant) and node.value in known:
                yield node.value
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = scope.get(node.value.id, "")
                if module.endswith(":"):
                    yield f"{module}{node.attr}"

    # a constant belongs to its module's statements
    return {name if name in known else f"{name.partition(':')[0]}:" for name in targets()}
