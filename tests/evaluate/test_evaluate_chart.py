import itertools
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from test_evaluate_scores import evaluation, logits, row

from ckptq.evaluate.axes import Linear, Log
from ckptq.evaluate.chart import frontier, layer_chart, names_of, quality_chart, spread
from ckptq.evaluate.marks import Box, Dot, Stroke, Words, box_of

SVG = "{http://www.w3.org/2000/svg}"
BASE = row(logits(1), logits(2))


def rows(points, *, cache_bits=None):
    """Rows of these (megabytes, KL)."""
    return tuple(
        replace(
            BASE,
            weights=f"scheme <{i}>",
            kv_cache=f"cache {i}",
            nbytes=int(size * 1e6),
            cache_bits=cache_bits[i] if cache_bits else 16.0,
            outcome=replace(
                BASE.outcome, measures=replace(BASE.outcome.measures, kl=kl), layers=(kl, 2 * kl)
            ),
        )
        for i, (size, kl) in enumerate(points)
    )


def drawn(found_rows, **limits):
    return quality_chart(replace(evaluation(BASE, **limits), rows=found_rows))


def texts(drawing) -> list[str]:
    return [mark.text for mark in drawing.marks if isinstance(mark, Words)]


def dots(drawing) -> list[Dot]:
    return [mark for mark in drawing.marks if isinstance(mark, Dot)]


def test_worse_is_higher_larger_is_further_right_and_a_decade_is_a_decade():
    drawing = drawn(rows([(10 + i, 10.0**-i) for i in range(4)]))
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (dot.at for dot in dots(drawing))
    assert x0 < x1 < x2 < x3
    assert y1 - y0 == pytest.approx(y2 - y1) == pytest.approx(y3 - y2)
    assert y1 > y0
    assert {"0.001", "1", "size, MB", *(f"scheme <{i}>" for i in range(4))} <= set(texts(drawing))


def test_zero_lies_under_every_decade_and_what_is_not_finite_is_named():
    drawing = drawn(rows([(1, 0.0), (2, 1e-3), (3, math.nan)]))
    zero, small = dots(drawing)
    assert zero.at[1] > small.at[1] + 20
    assert "0" in texts(drawing)
    assert any("not finite: scheme <2>" in text for text in texts(drawing))
    assert dots(drawn(rows([(1, math.nan)]))) == []


def test_blue_are_those_that_none_beats_in_both():
    points = [(1.0, 5.0), (2.0, 1.0), (2.0, 3.0), (3.0, 1.0), (4.0, 0.5), (9.0, math.nan)]
    assert list(frontier(points)) == [0, 1, 4]
    drawing = drawn(rows(points))
    blue = {dot.color for i, dot in enumerate(dots(drawing)) if i in (0, 1, 4)}
    grey = {dot.color for i, dot in enumerate(dots(drawing)) if i in (2, 3)}
    assert len(blue) == len(grey) == 1
    assert blue != grey


CROWDED = [(0.86 + 0.001 * (i % 3), 10 - 0.3 * i) for i in range(7)] + [(0.6, 0.01), (0.61, 0.011)]


def test_no_name_covers_another_or_a_point_and_all_are_on_the_chart():
    drawing = drawn(rows(CROWDED), max_kl=0.02)
    named = [mark for mark in drawing.marks if isinstance(mark, Words) and "scheme" in mark.text]
    assert len(named) == len(CROWDED)
    for one, other in itertools.combinations(map(box_of, named), 2):
        assert not one.meets(other)
    page = Box(0, 0, drawing.width, drawing.height)
    for box in map(box_of, named):
        assert box.within(page)
        assert not any(
            box.left < x < box.right and box.top < y < box.bottom
            for x, y in (dot.at for dot in dots(drawing))
        )


def test_limit_and_control_are_lines_across_at_their_height():
    drawing = drawn(rows([(1, 0.01), (2, 0.1)]), max_kl=0.01)
    dashed = [mark for mark in drawing.marks if isinstance(mark, Stroke) and mark.dash]
    assert len(dashed) == 2
    assert dots(drawing)[0].at[1] in {mark.points[0][1] for mark in dashed}
    assert {"--max-kl 0.01", "control: a layer spoiled"} <= set(texts(drawing))
    assert "--max-kl 0.01" not in texts(drawn(rows([(1, 0.01)])))


def test_caches_of_one_model_are_told_apart_by_their_bits():
    caches = tuple(
        replace(each, weights="model") for each in rows([(1, 0.01), (1, 0.1)], cache_bits=(8, 2))
    )
    drawing = drawn(caches)
    wide, narrow = dots(drawing)
    assert wide.at[0] > narrow.at[0]
    assert {"cache 0", "cache 1", "cache, bits a value"} <= set(texts(drawing))
    assert names_of(caches[:1]) == ["model, cache 0 cache"]


def test_names_beside_lines_keep_their_order_and_distance():
    placed = spread([50.0, 10.0, 11.0, 12.0, 199.0], 14, 0, 200)
    assert placed == [52.0, 10.0, 24.0, 38.0, 199.0]
    assert spread([199.0, 199.0], 14, 0, 200) == [186.0, 200.0]


def test_every_row_has_a_line_and_layers_are_whole_numbers():
    found = replace(evaluation(BASE), rows=rows([(1, 0.01), (2, 0.0), (3, math.nan)]))
    drawing = layer_chart(found)
    said = texts(drawing)
    assert {"scheme <0>", "scheme <1>", "control: a layer spoiled", "1", "2"} <= set(said)
    assert "1.5" not in said
    assert any("not finite: scheme <2>" in text for text in said)


def test_axes_hold_their_ends():
    axis = Linear.over([5.0], 0, 100, margin=0.1)
    assert axis.place(5.0) == pytest.approx(50)
    log = Log.over([math.inf], 100, 0)
    assert (log.place(1.0), log.zero) == (100, False)


def test_svg_escapes_and_is_whole():
    root = ElementTree.fromstring(drawn(rows([(1, 0.01), (2, 0.1)])).svg())
    assert "scheme <0>" in [each.text for each in root.iter(f"{SVG}text")]
    assert len(list(root.iter(f"{SVG}circle"))) == 2
