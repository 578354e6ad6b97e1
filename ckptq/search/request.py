"""`ckptq search` as a request and one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.device import find_device
from ckptq.errors import UsageError
from ckptq.evaluate.text import Line, Text, read_questions, text_of
from ckptq.files import text_bytes, write_whole
from ckptq.models.modules import read_layout
from ckptq.models.unsound import refuse_unsound
from ckptq.plan.doubts import transformers_doubts, vllm_doubts
from ckptq.plan.make import make_plan
from ckptq.plan.unit import Plan
from ckptq.progress import Begin, Note, silent, untold
from ckptq.search.caches import CACHES, Caches, cache_scheme, find_caches
from ckptq.search.candidates import PLAIN, Candidates, find_candidates
from ckptq.search.choice import Budget, Choices
from ckptq.search.kept_losses import open_kept
from ckptq.search.mixed import mixed_recipe
from ckptq.search.result import Chosen, ChosenCache, Found, Trial
from ckptq.search.sensitivities import Losses, Sensitivities
from ckptq.search.trials import Trials
from ckptq.text.samples import Samples, read_samples

Per = Literal["set", "layer"]

SCHEMES = ("nvfp4a16", "fp8-dynamic", PLAIN)

MARK = "# chosen by ckptq search"
"""The first line of its recipes, which another search may overwrite."""

KL = "KL at the end of the model, in nats per token"
WEIGHTS = "relative squared error of weights"


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """What to choose from, by what, and within what."""

    model: str | Path
    budget: Budget
    output: Path
    """The recipe."""
    sensitivities: Path | None = None
    """Default: beside the recipe, with its name."""
    revision: str | None = None
    schemes: Sequence[str] = SCHEMES
    ignore: tuple[str, ...] = ()
    data: str | None = None
    """Text; None asks the weights alone."""
    samples: int = 16
    seq_len: int = 512
    seed: int = 0
    per: Per = "set"
    """What is measured alone, with text: every set, or every layer."""
    device: str | None = None
    task: Path | None = None
    """Questions with answers; plans that are run answer them."""
    questions: int | None = None
    """As many of them; None means all."""
    kv_bits: float | None = None
    """Of the KV cache, per value on average; None leaves it as it is."""
    kv_caches: Sequence[str] = CACHES
    """Its formats to choose from."""

    @property
    def kept(self) -> Path:
        return self.sensitivities or self.output.with_suffix(".sensitivities.json")


def search(request: SearchRequest, begin: Begin = silent, note: Note = untold) -> Found:
    """Measure what is not known yet, choose, and write the recipe.

    UsageError where no size is within the budget, FoundWrong where no plan holds what it asks for,
    PlanError where no scheme fits the model, SourceError for a source that lacks tensors.
    """
    _check(request)
    ckpt = open_checkpoint(request.model, request.revision)
    refuse_unsound(ckpt, read_layout(ckpt))
    candidates = find_candidates(ckpt, request.schemes, request.ignore)
    for line in candidates.told:
        note(line)
    caches = None
    if request.kv_bits is not None:
        if request.budget.measured or request.task is not None:
            note("plans are run with the cache in 16 bits; `evaluate` measures both")
        caches = find_caches(ckpt, request.kv_caches)
        caches.check(request.kv_bits)
    questions = _questions(request, ckpt)
    measured, samples = _measuring(request, candidates, begin, note)
    text = None if samples is None else text_of(samples, [])
    losses = _losses(measured, text, request.per)
    choices = Choices(candidates, losses)
    chosen, tried = _chosen(request, choices, measured, samples, questions)
    cache = _cache(request, measured, text, caches)
    scheme = cache_scheme(cache.cache) if cache is not None else None
    recipe = mixed_recipe(request.output.stem, candidates, chosen, request.ignore, scheme)
    plan = make_plan(ckpt, recipe, ignore=request.ignore)
    total = choices.point("chosen", chosen)
    assert plan.write_bytes == total.nbytes + _scale_bytes(plan), (
        "the recipe is not what was chosen"
    )
    write_whole(request.output, text_bytes(f"{MARK}\n{_served(cache)}{recipe.text}"))
    return Found(
        model=str(request.model),
        recipe=request.output,
        sensitivities=request.kept,
        measure=WEIGHTS if text is None else KL,
        text=None if text is None else text.source,
        chosen=tuple(
            Chosen.of(each, chosen[each.name], dict(losses[each.name])) for each in candidates.sets
        ),
        total=total,
        uniform=tuple(choices.uniform()),
        best=tuple(choices.best()),
        told=(*vllm_doubts(plan), *transformers_doubts(plan)),
        tried=tuple(tried),
        kv_cache=cache,
    )


def _check(request: SearchRequest) -> None:
    """UsageError for options that do not fit together, before any work."""
    if request.output.is_file() and not _is_ours(request.output):
        raise UsageError(
            f"{request.output}: exists and is no recipe of `ckptq search`; remove it or choose "
            "another --output"
        )
    if request.kept.resolve() == request.output.resolve():
        raise UsageError(f"--sensitivities {request.kept}: is the --output; choose another file")
    request.budget.check()
    if request.data is None and request.budget.max_kl is not None:
        raise UsageError("--max-kl: KL is measured on text; add --data FILE")
    if request.data is None and request.kv_bits is not None:
        raise UsageError("--kv-bits: what a cache costs is measured on text; add --data FILE")
    if request.task is None and request.budget.min_accuracy is not None:
        raise UsageError("--min-accuracy needs questions: --task FILE")


def _is_ours(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(MARK)) == MARK.encode()


def _questions(request: SearchRequest, ckpt: Checkpoint) -> list[Line]:
    if request.task is None:
        return []
    return read_questions(request.task, ckpt.path, limit=request.questions, seed=request.seed)


def _chosen(
    request: SearchRequest, choices: Choices, measured: Sensitivities, samples: Samples | None,
    questions: Sequence[Line],
) -> tuple[Mapping[str, str], Sequence[Trial]]:  # fmt: skip
    """Set -> scheme, and the plans that were run for it."""
    if not request.budget.measured and not questions:
        return request.budget.choose(choices), []
    trials = Trials(
        choices=choices,
        text=text_of(samples, questions, str(request.task)),
        budget=request.budget,
        ignore=request.ignore,
        kept=measured.kept,
        device=measured.device,
        begin=measured.begin,
    )
    if request.budget.measured:
        return trials.smallest()
    chosen = request.budget.choose(choices)
    return chosen, trials.run([chosen])


def _scale_bytes(plan: Plan) -> int:
    """Of the cache."""
    modules = plan.attention.scales.values() if plan.attention is not None else ()
    return sum(spec.nbytes for scales in modules for spec in scales.values())


def _measuring(
    request: SearchRequest, candidates: Candidates, begin: Begin, note: Note
) -> tuple[Sensitivities, Samples | None]:
    """What measures, and on which text."""
    samples, options = None, dict[str, object](ignore=list(request.ignore))
    if request.data is not None:
        options["per"] = request.per
        samples = read_samples(
            *(request.data, candidates.ckpt.path),
            samples=request.samples,
            seq_len=request.seq_len,
            seed=request.seed,
        )
    kept = open_kept(request.kept, candidates, samples, options, note)
    measured = Sensitivities(candidates, kept, str(find_device(request.device)), begin)
    return measured, samples


def _losses(measured: Sensitivities, text: Text | None, per: Per) -> Losses:
    if text is None:
        return measured.of_weights()
    return measured.of_text(text, per_layer=per == "layer")


def _cache(
    request: SearchRequest, measured: Sensitivities, text: Text | None, caches: Caches | None
) -> ChosenCache | None:
    if caches is None or request.kv_bits is None or text is None:
        return None
    return caches.choose(measured.of_caches(text, caches), request.kv_bits)


def _served(cache: ChosenCache | None) -> str:
    """A line of the recipe that says what else cannot."""
    return f"# Serve with: vllm serve ... {cache.flags}\n" if cache and cache.flags else ""
