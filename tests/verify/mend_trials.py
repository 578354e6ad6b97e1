"""What `mend` makes of each fault of the suite, and the table of what it has to make.

`PYTHONPATH=.:tests:tests/verify python tests/verify/mend_trials.py FOLDER` tries them all, and
writes the table anew: minutes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from verify_checkpoints import Editor, convert, copy_of, kv_recipe, recipe, save_source
from verify_faults import Fault

from ckptq.convert.output import RunOptions
from ckptq.mend.run import Mended, MendRequest, mend
from ckptq.recipes.scheme import Recipe

TABLE = Path(__file__).with_name("mended.json")

OUTCOMES = {
    "equal": "mended: every byte of tensors and every field of config.json as before the fault",
    "right": "mended: verify calls it right",
    "partly": "mended in part; the rest is told",
    "source": "told: needs the source",
    "text": "told: needs text to calibrate on",
    "convert": "told: has to be converted again",
    "choice": "told: has two readings",
    "unseen": "verify calls it right: without the source nothing shows it, or it is a note",
}

WAYS = ("alone", "source")


def read_table() -> dict[str, dict[str, str]]:
    """Fault -> outcome without and with the source."""
    found = json.loads(TABLE.read_text())
    assert isinstance(found, dict)
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as held:
            found |= {n: held.get_tensor(n).clone() for n in held.keys()}  # noqa: SIM118
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return torch.equal(*bits)


def equal(out: Path, wanted: Path) -> bool:
    """Whether two checkpoints hold the same: tensors by their bytes, config.json by its fields."""
    ours, theirs = tensors_of(out), tensors_of(wanted)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, wanted)]
    alike = ours.keys() == theirs.keys() and all(same(t, theirs[n]) for n, t in ours.items())
    return alike and configs[0] == configs[1]


def outcome(done: Mended, out: Path, wanted: Path) -> str:
    """One of OUTCOMES."""
    if done.out is not None:
        if not done.ok:
            return "partly"
        return "equal" if equal(out, wanted) else "right"
    if done.before.ok:
        return "unseen"
    needs = {one.needs for one in done.left}
    return next(need for need in ("source", "text", "choice", "convert") if need in needs)


def tried(fault: Fault, editor: Editor, source: Path, wanted: Path, way: str) -> str:
    """Break a copy, mend it, and compare with the checkpoint that it was copied from."""
    (editor.folder.parent / "source").write_text(str(source))
    fault.inject(editor)
    before = {name: t.clone() for name, t in editor.tensors.items()}
    out = editor.folder.parent / "mended"
    given = source if way == "source" else None
    request = MendRequest(path=editor.save(), out=out, source=given, options=RunOptions(workers=1))
    done = mend(request)
    assert (done.out is None) == (not done.repairs) == (not out.exists())
    assert not out.with_name("mended.partial").exists()
    if done.after is not None:
        found = {(one.code, one.tensor) for one in (*done.after.findings, *done.after.notes)}
        assert {(one.code, one.where) for one in done.left} <= found
    kept = Editor(editor.folder).tensors
    assert kept.keys() == before.keys()
    assert all(same(tensor, before[name]) for name, tensor in kept.items())
    return outcome(done, out, wanted)


def write_table(found: Mapping[str, Mapping[str, str]]) -> None:
    lines = (f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _recipe(family: str, weights: str, kv: bool) -> Recipe:
    """As conftest's good checkpoints are made."""
    left = family == "llama4" and ("block" in weights or "asym" in weights)
    ignore = ("re:.*self_attn",) if left else ()
    return kv_recipe() if weights == "kv" else recipe(weights, kv=kv, ignore=ignore)


def main(root: Path) -> None:
    from test_verify_faults import FAULTS

    found: dict[str, dict[str, str]] = {}
    for fault in FAULTS:
        family, weights = fault.families[0], fault.weights[0]
        source, good = root / family, root / f"{family}-{weights}-{fault.kv}"
        if not source.exists():
            save_source(family, source)
        if not good.exists():
            convert(source, good, _recipe(family, weights, fault.kv))
        for way in WAYS:
            shutil.rmtree(root / "trial", ignore_errors=True)
            (root / "trial").mkdir()
            editor = copy_of(good, root / "trial" / "broken")
            found.setdefault(fault.name, {})[way] = tried(fault, editor, source, good, way)
            print(fault.name, way, found[fault.name][way], flush=True)
    write_table(found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
