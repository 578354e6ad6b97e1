"""`ckptq verify`, as one function. It opens the result like any other reader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckptq.checkpoint.open import Checkpoint, Problems, open_checkpoint
from ckptq.device import find_device
from ckptq.distributed.ranks import together
from ckptq.errors import SourceError, UsageError
from ckptq.progress import Begin, silent
from ckptq.verify.config_judge import judge_config
from ckptq.verify.engine.ask import ask_engine
from ckptq.verify.loaders import find_engine
from ckptq.verify.options import Options, Progress
from ckptq.verify.report import Checked, Finding, HeadResult, LayerResult, Report, once
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
    device: str | None = None,
    begin: Begin = silent,
) -> Report:
    """Check a finished compressed-tensors checkpoint, against its source where one is given.

    `fast` compares a first, a middle and a last run of rows of each weight instead of all, and
    `headers_only` reads no tensors and takes a second or two. With `engine` (a key of
    `ckptq.verify.loaders.ENGINES`) that engine loads names, shapes and dtypes (vLLM only with
    `vllm_python`), and the effect of loading on the values is simulated. `attention` runs the
    source on a little text (`text`: a file or data set, else a built-in corpus) and measures its
    q, k and v in FP8 with the stored scales, on `device` (`find_device`).

    Under torchrun the comparison of weights and copies is divided among the processes; the first
    does the rest, and all return its report.

    Raises SourceError for a checkpoint that cannot be read; everything else is a finding.
    """
    if attention and source is None:
        raise UsageError("--attention runs the unquantized model; give --source")
    chosen = find_engine(engine) if engine is not None else None
    if headers_only and attention:
        raise UsageError("--attention needs tensors; drop --headers-only")
    if vllm_python is not None and engine != "vllm":
        raise UsageError(f"--vllm-python {vllm_python} applies only to --engine vllm")
    if headers_only and engine == "vllm" and vllm_python is None:
        raise UsageError("simulating vllm needs tensors; give --vllm-python or drop --headers-only")
    if text is not None and not attention:
        raise UsageError(f"--data {text} applies only to --attention")
    if device is not None and not attention:
        raise UsageError(f"--device {device} applies only to --attention")
    where = find_device(device) if attention else "cpu"
    began = time.monotonic()
    with together() as ranks:
        problems: Problems = []
        ckpt = ranks.agreed(lambda: open_checkpoint(path, problems=problems))
        progress = _up_to(ckpt.nbytes // ranks.world, begin)
        asking = Asking(
            headers_only=headers_only,
            engine=engine,
            vllm_python=vllm_python,
            attention=attention,
            text=text,
            device=str(where),
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
    attention: bool = False
    text: str | None = None
    device: str = "cpu"


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
    seen = _attention(subject, asking.text, asking.device) if asking.attention else Attention()
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
        findings=tuple(f for f in everything if f.severity == "fault"),
        notes=tuple(f for f in everything if f.severity == "note"),
        tensors=checked.tensors,
        copied=checked.copied,
        scales=checked.scales,
        engine=engine,
        engine_run=asked.run if asked is not None else None,
        arrivals=checked.arrivals,
        heads=seen.heads,
        layers=seen.layers,
        checks=_counted(subject, checked),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Results of the forward pass; empty if none was requested."""

    findings: tuple[Finding, ...] = ()
    heads: tuple[HeadResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()


def _attention(subject: Subject, text: str | None, device: str) -> Attention:
    from ckptq.verify.attention.cache_diagnosis import diagnose_cache
    from ckptq.verify.attention.watch import check_attention, head_results, layer_results

    watch = check_attention(subject, text, device)
    return Attention(
        findings=tuple(diagnose_cache(watch)),
        heads=tuple(head_results(watch)),
        layers=tuple(layer_results(watch)),
    )


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
