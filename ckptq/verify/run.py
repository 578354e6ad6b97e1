"""`ckptq verify`, as one function. It opens the result like any other reader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckptq.checkpoint.open import Checkpoint, Problems, open_checkpoint
from ckptq.distributed.ranks import together
from ckptq.errors import SourceError, UsageError
from ckptq.progress import Begin, silent
from ckptq.verify.config_judge import judge_config
from ckptq.verify.engine.ask import ask_engine
from ckptq.verify.loaders import find_engine
from ckptq.verify.options import Options, Progress, Text
from ckptq.verify.report import ByText, Checked, Finding, Report, once
from ckptq.verify.structure.checks import check_structure
from ckptq.verify.structure.tensors import check_tensors
from ckptq.verify.structure.whole import check_whole
from ckptq.verify.subject import Subject


def verify(
    path: str | Path,
    source: str | Path | None = None,
    *,
    fast: bool = False,
    headers_only: bool = False,
    engine: str | None = None,
    vllm_python: Path | None = None,
    attention: bool = False,
    text: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    device: str | None = None,
    begin: Begin = silent,
) -> Report:
    """Check a finished compressed-tensors checkpoint, against its source where one is given.

    `fast` compares a first, a middle and a last run of rows of each weight instead of all, and
    `headers_only` reads no tensors and takes a second or two. With `engine` (a key of
    `ckptq.verify.loaders.ENGINES`) that engine loads names, shapes and dtypes (vLLM only with
    `vllm_python`), and the effect of loading on the values is simulated. `text` (a file or data
    set) is run through the source, on `device` (`find_device`), `samples` of at most `seq_len`
    tokens, and codes that were chosen by other text are judged by it. `attention` measures its q, k
    and v in FP8 with the stored scales, on a built-in corpus if no text is given.

    Under torchrun the comparison of weights and copies is divided among the processes; the first
    does the rest, and all return its report.

    Raises SourceError for a checkpoint that cannot be read; everything else is a finding.
    """
    run = text is not None or attention
    option = "--attention" if attention else f"--data {text}"
    if run and source is None:
        raise UsageError(f"{option} runs the unquantized model; give --source")
    chosen = find_engine(engine) if engine is not None else None
    if headers_only and run:
        raise UsageError(f"{option} needs tensors; drop --headers-only")
    if vllm_python is not None and engine != "vllm":
        raise UsageError(f"--vllm-python {vllm_python} applies only to --engine vllm")
    if headers_only and engine == "vllm" and vllm_python is None:
        raise UsageError("simulating vllm needs tensors; give --vllm-python or drop --headers-only")
    given = {"--samples": samples, "--seq-len": seq_len, "--device": device}
    for name, value in given.items() if not run else ():
        if value is not None:
            raise UsageError(f"{name} {value} applies only to --attention and --data")
    words = Text(attention=attention, data=text, samples=samples, seq_len=seq_len, device=device)
    began = time.monotonic()
    with together() as ranks:
        problems: Problems = []
        ckpt = ranks.agreed(lambda: open_checkpoint(path, problems=problems))
        progress = _up_to(ckpt.nbytes // ranks.world, begin)
        asking = Asking(
            headers_only=headers_only,
            engine=engine,
            vllm_python=vllm_python,
            text=words if run else None,
            options=Options(fast=fast, engine=chosen, progress=progress, ranks=ranks),
        )
        original = ranks.agreed(lambda: open_checkpoint(source) if source is not None else None)
        made = judge(ckpt, original, asking, problems) if ranks.leads else None
        if not ranks.leads and not headers_only:
            _assist(ckpt, original, asking.options)
        found = ranks.from_first(made)
    assert found is not None
    told = None if source is None else str(source)
    return replace(found, path=str(path), source=told, seconds=time.monotonic() - began)


def _up_to(total: int, begin: Begin) -> Progress:
    """Progress of a share that may be somewhat larger than the others'."""
    report, left = begin("verify", total), total

    def progress(what: str, done: int) -> None:
        nonlocal left
        if left > 0:
            report(what, min(done, left))
        left -= done

    return progress


def _assist(ckpt: Checkpoint, source: Checkpoint | None, options: Options) -> None:
    """What a rank behind the first does."""
    from ckptq.verify.one_pass import assist

    declared, _ = judge_config(ckpt)
    subject = Subject(ckpt, source, declared)
    assist(subject, check_tensors(subject), options)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """What a caller wants to know."""

    options: Options
    headers_only: bool = False
    quick: bool = True
    """Whether, with headers only, transformers is asked only where the engine's table is silent."""
    engine: str | None = None
    vllm_python: Path | None = None
    text: Text | None = None


def judge(
    ckpt: Checkpoint, source: Checkpoint | None, asking: Asking, problems: Problems
) -> Report:
    """The same for checkpoints that are open already, or changed since; `problems` were found while
    opening."""
    began = time.monotonic()
    headers_only, engine, options = asking.headers_only, asking.engine, asking.options
    declared, declared_wrong = judge_config(ckpt)
    subject = Subject(ckpt, source, declared, headers_only and asking.quick)
    by_linear = check_tensors(subject)
    structure = [*declared_wrong, *check_structure(subject, problems, by_linear)]
    asked = ask_engine(subject, engine, asking.vllm_python) if engine is not None else None
    if source is None and not headers_only and engine != "transformers":
        structure += check_whole(subject, structure)
    checked = Checked() if headers_only else _data(subject, by_linear, structure, options)
    seen = ByText()
    if asking.text is not None:
        seen = _by_text(subject, by_linear, checked, asking.text)
    answers = asked.findings if asked is not None else ()
    everything = [*structure, *once([*answers, *checked.findings]), *seen.findings]
    return Report(
        path=str(ckpt.path),
        source=str(source.path) if source is not None else None,
        fast=options.fast,
        headers_only=headers_only,
        seconds=time.monotonic() - began,
        tensors_on_disk=len(ckpt.tensors),
        nbytes=ckpt.nbytes,
        findings=tuple(f for f in everything if _is_fault(f)),
        notes=tuple(f for f in everything if f.severity == "note"),
        tensors=checked.tensors,
        copied=checked.copied,
        scales=checked.scales,
        engine=engine,
        engine_run=asked.run if asked is not None else None,
        arrivals=checked.arrivals,
        heads=seen.heads,
        layers=seen.layers,
        checks=_counted(subject, checked) | {"linears judged by text": seen.judged},
    )


def _by_text(
    subject: Subject,
    by_linear: Mapping[str, tuple[Finding, ...]],
    checked: Checked,
    text: Text,
) -> ByText:
    """All that only text can tell of what is not known to be wrong already."""
    from ckptq.verify.by_text import check_by_text
    from ckptq.verify.one_pass import sound

    wrong = {f.tensor.rpartition(".")[0] for f in checked.findings if f.tensor and _is_fault(f)}
    linears = (one for one in sound(subject, by_linear) if one.name not in wrong)
    return check_by_text(subject, {one.name: one for one in linears}, text)


def _data(
    subject: Subject,
    by_linear: Mapping[str, tuple[Finding, ...]],
    structure: list[Finding],
    options: Options,
) -> Checked:
    """All checks that read tensors; SourceError for a file that changes or ends while being
    read."""
    from ckptq.verify.one_pass import check_data

    try:
        return check_data(subject, by_linear, structure, options)
    except OSError as error:
        raise SourceError(f"{subject.ckpt.path}: cannot be read: {error}") from error


def _is_fault(one: Finding) -> bool:
    return one.severity == "fault"


def _counted(subject: Subject, checked: Checked) -> dict[str, int]:
    modules = subject.modules.values()
    return {
        "linears quantized": sum(m.quantized for m in modules),
        "linears left alone": sum(not m.quantized for m in modules),
        "attention layers": len(subject.attention),
        "cache scales": len(subject.cache_scales),
        "linears compared": len(checked.tensors),
        "tensors copied": checked.copied,
        "codes compared": sum(t.elements for t in checked.tensors),
        "codes exact": sum(t.exact for t in checked.tensors),
    }
