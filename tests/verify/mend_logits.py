"""What an engine makes of a checkpoint before its fault, with it, and mended.

`PYTHONPATH=.:tests:tests/verify python tests/verify/mend_logits.py FOLDER [VLLM_PYTHON]` prints
docs/mend.md's table: the mean of |log-probability - the source's| of the same tokens.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from mend_trials import copy_of
from test_verify_faults import FAULTS
from tiny.models import causal
from verify_checkpoints import TEXT, Editor, convert, kv_recipe, recipe
from verify_faults import Fault

from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.output import RunOptions
from ckptq.errors import CkptqError
from ckptq.evaluate.outside.engine import in_vllm
from ckptq.evaluate.text import Line, Text
from ckptq.mend.run import MendRequest, mend

TOKENS = tuple((7 * at * at + 3) % 110 + 4 for at in range(48))

Logprobs = torch.Tensor | str
"""[tokens - 1], or why the engine does not load it."""

Engine = Callable[[Path], Logprobs]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault of the suite, or a request without one."""

    name: str
    weights: str = "fp8-channel"
    kv: bool = False
    source: bool = False
    """Whether it is mended with the source."""
    seen: bool = True
    """Whether transformers shows the fault; it merges no Linears, and folds no heads."""

    @property
    def fault(self) -> Fault | None:
        return next((one for one in FAULTS if one.name == self.name), None)


CASES = (
    Case(name="declare-another-group-size", weights="int4"),
    Case(name="ignore-nothing"),
    Case(name="part-global-scales", weights="nvfp4", seen=False),
    Case(name="transpose-codes"),
    Case(name="invert-scales"),
    Case(name="permute-only-the-scales", source=True),
    Case(name="drop-a-norm", source=True),
    Case(name="drop-codes", weights="int4", source=True),
    Case(name="flatten-scales-of-heads", weights="kv", kv=True),
    Case(name="per-tensor", weights="kv", kv=True, seen=False),
)


@dataclass(frozen=True)
class Folders:
    """The checkpoints of a case."""

    source: Path
    good: Path
    broken: Path
    mended: Path


def folders(case: Case, source: Path, good: Path, root: Path) -> Folders:
    """A copy of `good` with the fault, and what `mend` makes of it."""
    editor: Editor = copy_of(good, root / "broken")
    if case.fault is not None:
        case.fault.inject(editor)
    if case.name == "part-global-scales":
        part_global_scales(editor)
    request = MendRequest(
        path=editor.save(),
        out=root / "mended",
        source=source if case.source else None,
        per_tensor=case.name == "per-tensor",
        options=RunOptions(workers=1),
    )
    assert mend(request).ok
    return Folders(source, good, root / "broken", root / "mended")


def part_global_scales(editor: Editor) -> None:
    """The same weights, but v has its own global scale, where engines take one for q, k and v."""
    name = next(n for n in editor.tensors if n.endswith("0.self_attn.v_proj.weight_global_scale"))
    scale = name.replace("global_scale", "scale")
    for each in (name, scale):
        held = editor.tensors[each]
        editor.tensors[each] = (held.float() * 0.25).to(held.dtype)


def in_transformers(folder: Path) -> Logprobs:
    """A checkpoint with tensors that nothing fills, or that nothing takes, is not loaded."""
    import transformers

    transformers.logging.set_verbosity(50)
    try:
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, output_loading_info=True
            )
            if any(info[kind] for kind in ("missing_keys", "mismatched_keys")):
                return "not loaded whole"
            logits = model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].float()
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    chosen = torch.tensor(TOKENS[1:])[:, None]
    return logits.log_softmax(-1)[:-1].gather(1, chosen)[:, 0]


def vllm_with(python: Path) -> Engine:
    """vLLM in that interpreter."""
    text = Text(lines=(Line(token_ids=TOKENS),), source="tokens")

    def ask(folder: Path) -> Logprobs:
        try:
            tokens = in_vllm(python, open_checkpoint(folder), text, timeout=300).tokens
        except CkptqError as error:
            return str(error)
        return torch.tensor([tokens[place][0] for place in sorted(tokens)])

    return ask


def gap(found: Logprobs, wanted: Logprobs) -> float | None:
    """The mean of |difference|; None where there is none to compare."""
    if isinstance(found, str) or isinstance(wanted, str):
        return None
    return float((found - wanted).abs().mean())


def shown(value: float | None) -> str:
    return "not loaded" if value is None else "NaN" if value != value else f"{value:.3f}"


def main(root: Path, engines: dict[str, Engine]) -> None:
    torch.manual_seed(0)
    sharp = causal("Llama", TEXT, initializer_range=0.1)  # log-probabilities that differ
    sharp.bfloat16().save_pretrained(root / "llama")
    source = root / "llama"
    wanted = {name: ask(source) for name, ask in engines.items()}
    for case in CASES:
        good = root / f"{case.weights}-{case.kv}"
        if not good.exists():
            made = kv_recipe() if case.weights == "kv" else recipe(case.weights, kv=case.kv)
            convert(source, good, made)
        (root / case.name).mkdir()
        held = folders(case, source, good, root / case.name)
        cells = [
            shown(gap(ask(folder), wanted[name]))
            for name, ask in engines.items()
            for folder in (held.good, held.broken, held.mended)
        ]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    asked: dict[str, Engine] = {"transformers": cache(in_transformers)}
    if len(sys.argv) > 2:
        asked["vLLM"] = cache(vllm_with(Path(sys.argv[2])))
    main(Path(sys.argv[1]), asked)
