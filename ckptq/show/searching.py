"""A search as text and as a picture: what was chosen, what else it would have cost, and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.numbered import NUMBER, starred
from ckptq.printable import on_page, shell_word, size
from ckptq.show import console
from ckptq.show.charts import Chart, Series, svg
from ckptq.show.evaluate_page import shown_table, write_drawn
from ckptq.show.page import page

if TYPE_CHECKING:
    from ckptq.search.result import Chosen, ChosenCache, Found, Point
    from ckptq.show.evaluate_page import Table


def show_search(found: Found, json: bool) -> None:
    """`search`: sets by scheme, the whole beside every uniform scheme, and what to run next."""
    if json:
        console.show_json(found)
        return
    for title, columns, rows in search_tables(found):
        console.show_table(title, columns, rows)
    console.show_lines(
        *(f"note  {line}" for line in found.told),
        f"{found.recipe}: {found.total.bits:.3f} bits per weight, {size(found.total.nbytes)}; "
        f"sensitivities are in {found.sensitivities}",
        f"quantize:   ckptq quantize {shell_word(found.model)} --recipe {shell_word(found.recipe)}",
        *_serving(found.kv_cache),
    )


def search_tables(found: Found) -> list[Table]:
    """What was chosen, similar sets together; then sizes and losses of whole models."""
    schemes = list(dict.fromkeys(s for each in found.chosen for s in each.losses))
    kinds: dict[tuple[str, str], list[Chosen]] = {}
    for each in found.chosen:
        kinds.setdefault((_kind(each), each.scheme), []).append(each)
    columns = ("sets", "layers", "scheme", "bits", *(f"loss in {s}" for s in schemes))
    rows = [
        (kind, _layers(sets), scheme, f"{_bits(sets):.2f}", *_losses(sets, schemes))
        for (kind, scheme), sets in kinds.items()
    ]
    text = f" on {found.text}" if found.text else ""
    title = f"{found.model}; loss: {found.measure}{text}"
    points = [found.total, *found.uniform]
    sizes = [(p.name, f"{p.bits:.3f}", size(p.nbytes), f"{p.loss:.4g}") for p in points]
    tables: list[Table] = [
        (title, columns, rows),
        ("", ("all sets", "bits", "size", "loss"), sizes),
    ]
    if found.tried:
        tables.append(("", ("measured", "bits", "loss", "KL", "accuracy"), _tried(found)))
    if found.kv_cache is not None:
        caches = [found.kv_cache.point, *found.kv_cache.uniform]
        told = [(c.name, f"{c.bits:.3f}", f"{c.loss:.4g}") for c in caches]
        tables.append(("", ("KV cache", "bits", "loss"), told))
    return tables


def _tried(found: Found) -> list[tuple[str, ...]]:
    """Plans that were run; the chosen one by its name."""
    return [
        (
            "chosen" if trial.point.nbytes == found.total.nbytes else trial.point.name,
            f"{trial.point.bits:.3f}",
            f"{trial.point.loss:.4g}",
            f"{trial.kl:.4g}",
            "-" if trial.accuracy is None else f"{trial.accuracy:.1%}",
        )
        for trial in found.tried
    ]


def _serving(cache: ChosenCache | None) -> Iterator[str]:
    """What vLLM has to be told, and how to measure the cache that was chosen."""
    if cache is not None:
        yield f"evaluate:   ckptq evaluate ... --kv-cache {cache.point.name}"
        yield f"serve:      vllm serve ... {cache.flags}".rstrip()


def write_search_report(file: Path, found: Found) -> None:
    """`--report`: the page, or the chart alone."""
    chart = size_chart(found)
    title = f"ckptq search: {found.model}"
    tables = "".join(shown_table(*each) for each in search_tables(found))
    sections = (
        f"<h1>{on_page(title)}</h1>", tables, f"<h2>Quality against size</h2>{svg(chart)}",
    )  # fmt: skip
    write_drawn(file, chart, page(title, sections))


def size_chart(found: Found) -> Chart:
    """Loss over size: the best at every size, what was chosen, and each scheme by itself."""
    series = [Series(name=p.name, points=[_at(p)]) for p in (found.total, *found.uniform)]
    best = Series(name="best mixture", points=list(map(_at, found.best)), line=True, dashed=True)
    return Chart(series=[*series, best], x_label="size, MB", y_label=found.measure, log=True)


def _at(point: Point) -> tuple[float, float]:
    return point.nbytes / 1e6, point.loss


def _kind(each: Chosen) -> str:
    more = f" and {len(each.linears) - 1} more" if len(each.linears) > 1 else ""
    return starred(each.name) + more


def _bits(sets: Sequence[Chosen]) -> float:
    return sum(each.bits * each.weights for each in sets) / sum(each.weights for each in sets)


def _losses(sets: Sequence[Chosen], schemes: Iterable[str]) -> Iterator[str]:
    for scheme in schemes:
        known = [each.losses[scheme] for each in sets if scheme in each.losses]
        yield f"{sum(known):.4g}" if len(known) == len(sets) else "-"


def _layers(sets: Sequence[Chosen]) -> str:
    """ "0-3, 7": the first number of each name."""
    numbers = sorted({int(found[0]) for each in sets if (found := NUMBER.search(each.name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
