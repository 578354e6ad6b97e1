"""From a user's request to an evaluation: open checkpoints, read text and questions, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.device import find_device
from ckptq.distributed.ranks import Ranks, started, together
from ckptq.errors import UsageError
from ckptq.evaluate.caches.kv_cache import parse_cache
from ckptq.evaluate.outside.harness import Benchmarks, check_installed, run_benchmarks
from ckptq.evaluate.result import Evaluation, Thresholds
from ckptq.evaluate.text import Text
from ckptq.progress import Begin, Note, silent, untold
from ckptq.recipes.load import load_scheme
from ckptq.recipes.scheme import Recipe

NOTHING = Thresholds()

NO_TEXT = "evaluating on the built-in corpus; use --data or --task for text from your own domain"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """What to compare, on which text, and the thresholds."""

    source: str | None = None
    caches: Sequence[str] = ()
    schemes: Sequence[str] = ()
    data: str | None = None
    task: Path | None = None
    samples: int = 32
    seq_len: int = 512
    questions: int | None = None
    """Questions per task; None means all."""
    tasks: Sequence[str] = ()
    """Names of lm-eval's tasks."""
    tasks_path: Path | None = None
    """A folder with the user's own tasks in lm-eval's YAML."""
    batch_size: int | None = None
    """Lines in a forward pass; None is one, on a GPU as many as fill it."""
    seed: int = 0
    device: str | None = None
    vllm_python: Path | None = None
    """An interpreter with vLLM, to run source and checkpoint there as well."""
    thresholds: Thresholds = NOTHING


def evaluate_request(
    path: str | Path,
    asked: EvaluationRequest,
    *,
    revision: str | None = None,
    begin: Begin = silent,
    note: Note = untold,
) -> Evaluation:
    """Open, read, compare. UsageError for options that do not fit together, before any work.

    `note` receives messages for the user.
    """
    _check(asked)
    with together() as ranks:
        ckpt, source, recipes = ranks.agreed(lambda: _opened(path, revision, asked))
        if asked.data is None and asked.task is None:
            note(NO_TEXT)
        return _evaluate(ckpt, source, recipes, asked, ranks, begin)


def _opened(
    path: str | Path, revision: str | None, asked: EvaluationRequest
) -> tuple[Checkpoint, Checkpoint | None, list[Recipe]]:
    from ckptq.evaluate.run import check_compared

    named = {recipe.name: recipe for recipe in map(load_scheme, asked.schemes)}
    recipes = list(named.values())
    for recipe in recipes:
        if recipe.runs_layers:
            raise UsageError(
                f"--schemes {recipe.name}: weights are quantized by their inputs, which takes a "
                "calibration; run `ckptq quantize`, then evaluate its result with --source"
            )
    ckpt = open_checkpoint(path, revision)
    source = open_checkpoint(asked.source) if asked.source is not None else None
    compared = asked.caches or recipes
    if source is None and ckpt.quantization_config is not None and not compared:
        raise UsageError(f"{path}: is quantized; --source names the checkpoint it was made from")
    if source is not None and ckpt.quantization_config is None:
        raise UsageError(f"{path}: is not quantized; evaluate the quantized checkpoint instead")
    check_compared(ckpt, source, asked.caches, recipes)
    return ckpt, source, recipes


def _check(asked: EvaluationRequest) -> None:
    for name in asked.caches:
        parse_cache(name, None)
    asked.thresholds.check()
    others = {"--tasks": asked.tasks, "--vllm-python": asked.vllm_python}
    for option in others if started().world > 1 else ():
        if others[option]:
            raise UsageError(f"{option} runs another program, in one process; leave torchrun out")
    find_device(asked.device)
    if asked.thresholds.min_accuracy is not None and asked.task is None and not asked.tasks:
        raise UsageError("--min-accuracy needs questions: --task FILE or --tasks NAMES")
    if asked.tasks_path is not None:
        if not asked.tasks:
            raise UsageError(f"--tasks-path {asked.tasks_path}: needs --tasks NAMES")
        if not asked.tasks_path.is_dir():
            raise UsageError(f"--tasks-path {asked.tasks_path}: no such folder")
    if asked.tasks:
        check_installed(_benchmarks(asked))


def _benchmarks(asked: EvaluationRequest) -> Benchmarks:
    return Benchmarks(
        names=asked.tasks,
        folder=asked.tasks_path,
        limit=asked.questions,
        batch_size=asked.batch_size or 1,
        device=str(find_device(asked.device)),
        vllm_python=asked.vllm_python,
    )


def _text(asked: EvaluationRequest, base: Path) -> Text:
    from ckptq.evaluate.text import read_questions, text_of
    from ckptq.text.samples import read_samples

    questions = []
    if asked.task is not None:
        questions = read_questions(asked.task, base, limit=asked.questions, seed=asked.seed)
    samples = None
    if asked.task is None or asked.data is not None:
        samples = read_samples(
            asked.data, base, samples=asked.samples, seq_len=asked.seq_len, seed=asked.seed
        )
    return text_of(samples, questions, str(asked.task))


def _evaluate(
    ckpt: Checkpoint,
    source: Checkpoint | None,
    recipes: Sequence[Recipe],
    asked: EvaluationRequest,
    ranks: Ranks,
    begin: Begin,
) -> Evaluation:
    from ckptq.evaluate.run import evaluate

    found = evaluate(
        ckpt,
        ranks.agreed(lambda: _text(asked, (source or ckpt).path)),
        source=source,
        caches=asked.caches,
        schemes=recipes,
        thresholds=asked.thresholds,
        batch_size=asked.batch_size,
        device=str(find_device(asked.device)),
        vllm_python=asked.vllm_python,
        ranks=ranks,
        begin=begin,
    )
    if not asked.tasks:
        return found
    in_engine = found.engines[-1].ranks if found.engines else 1
    benchmarks = replace(_benchmarks(asked), ranks=in_engine)
    return replace(found, benchmarks=run_benchmarks(ckpt.path, benchmarks))
