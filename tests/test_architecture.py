"""Imports flow the way data does: no room imports one above it, no modules import each other."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import reach

import ckptq

ORDER = (
    *("errors", "interrupts", "numbered", "patterns", "printable", "progress", "spec"),
    *("device", "files", "optional", "rope_order", "distributed"),
    *("kernels", "quantize", "checkpoint", "recipes", "engines", "models", "permute", "plan"),
    *("text", "forward", "gptq", "autoround", "calibrate"),
    *("verify", "convert", "mend", "evaluate", "inspect", "search"),
    *("show", "cli", "__main__"),
)
"""The rooms of ckptq/, folders and modules at its top, from the bottom up."""

ROOMS = {
    "ckptq": ORDER,
    "ckptq.verify": (
        *("report", "kinds", "loaders", "options", "config_judge", "subject", "stored_linear"),
        *("engine", "structure", "values", "roundtrip", "attention", "diagnosis"),
        *("one_pass", "by_text", "run"),
    ),
    "ckptq.evaluate": (
        *("text", "scores", "largest", "linears", "caches", "weights"),
        *("variant", "watching", "pieces", "compare", "outside", "result", "run", "request"),
    ),
    "ckptq.kernels": (
        *("gpu", "rounding", "words", "product_rows", "code_operands"),
        *("quantize", "int4", "linear", "attention", "cache", "token_head"),
    ),
}
"""House -> the rooms in it, from the bottom up."""

WAITING: dict[str, tuple[str, ...]] = {}
"""Purpose -> the launchers that no command reaches yet: none."""

Sources = Mapping[str, str]
"""Module -> its text."""


def sources() -> dict[str, str]:
    root = Path(ckptq.__path__[0])
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = file.read_text()
    return found


def imports(module: str, known: Sources) -> set[str]:
    """The modules of ckptq that this one imports: anywhere in it, for types alone included, and
    behind a door, "module:name"."""
    found = set()
    for node in ast.walk(reach.parsed(known[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else str(node.module) for name in whole}
        elif isinstance(node, ast.Constant) and str(node.value).partition(":")[0] in known:
            found.add(node.value.partition(":")[0])
    return {name for name in found if name.split(".")[0] == "ckptq"} - {module, "ckptq"}


def room(module: str, house: str = "ckptq") -> str | None:
    """The folder or module of this house that it lies in; None where it lies in none."""
    inner = module.removeprefix(f"{house}.")
    return inner.split(".")[0] if inner != module else None


def upward(known: Sources, house: str = "ckptq") -> list[str]:
    """A line for each import of a room that is not below the module's own."""
    rank = {name: number for number, name in enumerate(ROOMS[house])}
    inside = [module for module in known if room(module, house) is not None]
    return [
        f"{module} imports {name}"
        for module in inside
        for name in sorted(imports(module, known))
        if rank.get(room(name, house), -1) > rank[room(module, house)]
    ]


def circle(known: Sources) -> list[str]:
    """Modules of which each imports the next, and the last the first; empty where none do."""
    below = {module: sorted(imports(module, known) & known.keys()) for module in known}
    clear: set[str] = set()

    def walk(path: list[str]) -> Iterator[list[str]]:
        for name in below[path[-1]]:
            if name in path:
                yield path[path.index(name) :]
            elif name not in clear:
                yield from walk([*path, name])
        clear.add(path[-1])

    return next((found for module in known for found in walk([module])), [])


RAW = re.compile(
    r'(\.get\(|[\w)\]]\[)"(num_bits|strategy|symmetric|dynamic|group_size|block_structure'
    r'|input_activations|kv_cache_scheme)"|[=!]= "local"'
)
"""Quantization arguments asked by string."""


def raw_schemes(known: Sources) -> list[str]:
    """Modules that ask a mapping for what a typed scheme says; padding of a tokenizer is none, and
    the config of another maker's format is read where that format is."""
    rooms = ("recipes", "text")
    theirs = "ckptq.models.quantized."
    asked = (name for name in known if room(name) not in rooms and not name.startswith(theirs))
    return [name for name in asked if RAW.search(known[name])]


def test_schemes_are_read_behind_one_door():
    assert raw_schemes(sources()) == []


@pytest.mark.parametrize("asks", ['args.get("num_bits", 8)', 'w["strategy"]', 'x == "local"'])
def test_a_scheme_that_is_read_elsewhere_is_noticed(asks):
    assert raw_schemes(sources() | {"ckptq.plan.fake": asks}) == ["ckptq.plan.fake"]
    assert raw_schemes(sources() | {"ckptq.recipes.fake": asks}) == []


@pytest.mark.parametrize("house", ROOMS)
def test_every_room_has_its_place(house):
    rooms = {room(module, house) for module in sources()} - {None}
    assert rooms == set(ROOMS[house])
    assert len(ROOMS[house]) == len(set(ROOMS[house]))


@pytest.mark.parametrize("house", ROOMS)
def test_no_room_imports_one_above_it(house):
    assert upward(sources(), house) == []


def test_no_modules_import_each_other():
    assert circle(sources()) == []


@pytest.mark.parametrize("call", ["Journal.open(", "Shards(", "write_side_files("])
def test_every_output_goes_through_one_writer(call):
    users = {m for m, text in sources().items() if f" {call}" in text and f"def {call}" not in text}
    assert users == {"ckptq.convert.output"}


def test_an_import_that_climbs_is_noticed():
    whole = sources()
    for text in (
        "from ckptq.plan.make import make_plan",
        "import ckptq.plan.make",
        "from ckptq.plan import make",
        "if TYPE_CHECKING:\n    from ckptq.plan.make import make_plan",
        "def late():\n    from ckptq.plan.make import make_plan",
    ):
        found = upward(whole | {"ckptq.models.fake": text})
        assert found == ["ckptq.models.fake imports ckptq.plan.make"], text
        assert upward(whole | {"ckptq.convert.fake": text}) == []


def test_an_import_that_climbs_within_verify_is_noticed():
    whole = sources()
    text = "from ckptq.verify.roundtrip.tally import Tally"
    for module in ("ckptq.verify.structure.fake", "ckptq.verify.subject"):
        found = upward(whole | {module: text}, "ckptq.verify")
        assert found == [f"{module} imports ckptq.verify.roundtrip.tally"]
    assert upward(whole | {"ckptq.verify.diagnosis.fake": text}, "ckptq.verify") == []
    assert upward(whole | {"ckptq.verify.roundtrip.fake": text}, "ckptq.verify") == []


def test_a_circle_is_noticed():
    a, b, c = (f"ckptq.plan.fake_{letter}" for letter in "abc")
    chain = {a: f"import {b}", b: f"from ckptq.plan import {c.rpartition('.')[2]}", c: ""}
    assert circle(chain) == []
    assert circle(chain | {c: f"def f():\n    from {a} import x"}) == [a, b, c]


def not_waiting(known: Sources, listed: Mapping[str, tuple[str, ...]] = WAITING) -> list[str]:
    """A line for each kernel and launcher that neither a command nor a listed launcher reaches,
    and for each listed one that a command does reach, or that is gone."""
    named = reach.names(known)
    commands = [
        name for name in named if name.startswith(("ckptq.cli:", "ckptq.cli.", "ckptq.__main__:"))
    ]
    served = reach.reached(named, commands)
    waiting = {f"ckptq.kernels.{name}" for names in listed.values() for name in names}
    needed = served | reach.reached(named, waiting)
    launchers = reach.launchers(known)
    return [
        *(f"{name} is reached by no command" for name in reach.kernels(known) - needed),
        *(f"{name} is reached by no command" for name in launchers - served - waiting),
        *(f"{name} waits for nothing: a command reaches it" for name in waiting & served),
        *(f"{name} is no launcher" for name in waiting - launchers),
    ]


def test_every_kernel_is_reached_by_a_command():
    known = sources()
    launchers = reach.launchers(known)
    assert "ckptq.kernels.attention.dense_attention:attention" in launchers
    assert all(launcher.startswith("ckptq.kernels.") for launcher in launchers)
    assert all(kernel.startswith("ckptq.kernels.") for kernel in reach.kernels(known))
    assert not_waiting(known) == []


KERNEL = """
import triton

@triton.jit
def _copy_kernel(x): ...

def copy(x):
    _copy_kernel[(1,)](x)
"""


def test_a_kernel_that_serves_no_command_is_noticed():
    whole = sources() | {"ckptq.kernels.fake": KERNEL}
    assert sorted(not_waiting(whole)) == [
        "ckptq.kernels.fake:_copy_kernel is reached by no command",
        "ckptq.kernels.fake:copy is reached by no command",
    ]
    use = "\n\ndef use():\n    from ckptq.kernels.fake import copy as fast\n    fast(1)\n"
    unused = whole["ckptq.convert.arithmetic"] + use
    assert len(not_waiting(whole | {"ckptq.convert.arithmetic": unused})) == 2
    used = f"{unused}\nKERNELS = (use,)\n"
    assert not_waiting(whole | {"ckptq.convert.arithmetic": used}) == []


def test_a_waiting_kernel_that_came_or_went_is_noticed():
    whole = sources() | {"ckptq.kernels.fake": KERNEL}
    listed = {**WAITING, "a test": ("fake:copy",)}
    assert not_waiting(whole, listed) == []
    use = "\nfrom ckptq.kernels.fake import copy\nTABLE = {'copy': copy}\n"
    served = whole | {"ckptq.cli": whole["ckptq.cli"] + use}
    waits = "ckptq.kernels.fake:copy waits for nothing: a command reaches it"
    assert not_waiting(served, listed) == [waits]
    assert not_waiting(sources(), listed) == ["ckptq.kernels.fake:copy is no launcher"]


def test_an_import_that_climbs_within_kernels_is_noticed():
    whole = sources()
    text = "def late():\n    from ckptq.kernels.token_head.hadamard import rotate"
    found = upward(whole | {"ckptq.kernels.attention.fake": text}, "ckptq.kernels")
    assert found == ["ckptq.kernels.attention.fake imports ckptq.kernels.token_head.hadamard"]
    assert upward(whole | {"ckptq.kernels.token_head.fake": text}, "ckptq.kernels") == []


LARGE = {"checkpoint": 15}
"""Folders with more than 14 modules. They only become fewer, and smaller."""


def test_folders_are_small():
    root = Path(ckptq.__path__[0])
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    counts = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: n for name, n in counts.items() if n > LARGE.get(name, 14)} == {}


PATTERNS = {"__init__.py", "__main__.py"}
TWICE = {"attention.py", "journal.py", "options.py", "request.py", "result.py", "run.py"}
TWICE |= {"scales.py", "transformers.py", "vllm.py", "vllm_worker.py"}
"""Names that stand twice in ckptq/ and are no pattern. They only become fewer."""


def test_a_file_name_stands_twice_only_where_it_is_a_pattern():
    root = Path(ckptq.__path__[0])
    seen = Counter(file.name for file in root.rglob("*.py"))
    assert {name for name, count in seen.items() if count > 1} <= PATTERNS | TWICE
    beside = Counter(file.name for file in Path(__file__).parent.rglob("*.py"))
    assert {name for name, count in beside.items() if count > 1} == {"__init__.py", "conftest.py"}
