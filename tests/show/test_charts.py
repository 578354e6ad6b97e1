"""Charts as a reader gets them: every point and name, whatever a checkpoint calls its tensors."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from ckptq.show.charts import MOST_SHAPES, Chart, Series, png, svg

SVG = "{http://www.w3.org/2000/svg}"


def chart(*series: Series, **options) -> Chart:
    return Chart(series=series, x_label="x", y_label="y", **options)


def of(*values: float, name: str = "a", line: bool = False) -> Series:
    return Series(name=name, points=list(enumerate(values)), line=line)


def drawn(made: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(svg(made))


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(each.itertext()) for each in root.iter(f"{SVG}text")]


def heights(root: ElementTree.Element) -> list[float]:
    """Of the points, from the top; the last mark is the legend's."""
    marks = [each for each in root.iter(f"{SVG}use") if each.get("style")]
    return [float(each.get("y")) for each in marks if "#1f77b4" in each.get("style")][:-1]


def test_larger_is_higher_and_a_decade_is_a_decade():
    places = heights(drawn(chart(of(1.0, 10.0, 100.0), log=True)))
    assert places[0] > places[1] > places[2]
    assert places[0] - places[1] == pytest.approx(places[1] - places[2])


def test_zero_has_a_place_on_a_logarithmic_axis_and_lies_lowest():
    places = heights(drawn(chart(of(0.0, 1e-3, 1.0), log=True)))
    assert places[0] > places[1] > places[2]


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -1.0]])
def test_nothing_to_show_is_no_chart(values):
    assert svg(chart(of(*values), log=True)) == ""
    assert svg(chart(of(*values, 1.0), log=True)) != ""


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [[1.0], [1e-40, 1e38], [5.0, 5.0], [0.03, 0.031], [0.0, 0.0]])
def test_every_finite_point_is_drawn(values, log):
    assert len(heights(drawn(chart(of(*values, math.nan), log=log)))) == len(values)


NAMES = [
    "$\\frac{",
    "_hidden",
    "<script>alert(1)</script>",
    "a\x1b[31mb",
    "é漢字",
    "x" * 200,
    "$x$",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_and_nothing_else(name):
    root = drawn(chart(of(1.0, name=name)))
    shown = name.replace("\x1b", "\\x1b")
    assert shown in texts(root)


def test_limits_are_lines_across_with_a_name():
    plain, limited = chart(of(1.0, 3.0)), chart(of(1.0, 3.0), limits=[("--max-kl 2", 2.0)])
    assert "--max-kl 2" in texts(drawn(limited))
    assert "--max-kl 2" not in texts(drawn(plain))
    assert "stroke-dasharray" in svg(limited)
    assert "stroke-dasharray" not in svg(plain)


def test_more_series_than_colors_differ_in_shape():
    series = [of(1.0, 2.0, name=f"s{i}") for i in range(24)]
    uses = {
        (each.get("{http://www.w3.org/1999/xlink}href"), each.get("style"))
        for each in drawn(chart(*series)).iter(f"{SVG}use")
        if "fill: #" in (each.get("style") or "")
    }
    assert len(uses) >= 24


def test_the_same_chart_gives_the_same_bytes_and_two_on_a_page_share_no_names():
    made, other = chart(of(1.0, 2.0)), chart(of(5.0, 2.0), log=True)
    assert svg(made) == svg(made)
    names = [[each.get("id") for each in drawn(c).iter() if each.get("id")] for c in (made, other)]
    assert not [name for name in names[0] if name.rpartition("_")[2].isdigit()]


def test_many_points_become_one_picture():
    crowd = chart(of(*(1.0 + i % 7 for i in range(MOST_SHAPES + 1))))
    assert 0 < len(svg(crowd)) < 200_000
    assert "data:image/png" in svg(crowd)


def test_a_png_is_a_png(tmp_path):
    png(chart(of(1.0, 2.0)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
