"""The report as a page: whole, without a network, and safe with names from a hostile checkpoint."""

import math
import re
from html.parser import HTMLParser

import pytest
from verify_checkpoints import copy_of

from ckptq.convert.permute import PermuteRequest, permute
from ckptq.rope_order import RopeOrder
from ckptq.show.page import breakable
from ckptq.show.verify_page import html_report
from ckptq.verify.report import HeadResult, LayerResult, Report
from ckptq.verify.run import verify

VOID = {"meta", "wbr"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)


@pytest.fixture(scope="module")
def report(good, tmp_path_factory):
    """Baked for engines that do not permute, and asked what vLLM makes of it."""
    folder, source = good("llama4", "fp8-channel", True)
    out = tmp_path_factory.mktemp("html") / "baked"
    permute(PermuteRequest(model=folder, out=out, to=RopeOrder.HALF_SPLIT))
    return verify(out, source, engine="vllm")


def test_one_page_with_everything(report):
    page = html_report(report)
    points = Balanced(page).tags.count("use")
    assert page.count('role="img"') == 2
    assert points >= len(report.tensors) + sum(len(r.values) for r in report.scales)
    for one in report.findings:
        assert one.code in page
        assert breakable(one.tensor) in page
    assert "4 faults" in page
    assert "vllm" in page


def test_nothing_is_fetched(report):
    page = html_report(report)
    own = re.sub(r'xmlns(:xlink)?="[^"]*"|href="#|url\(#', "", page)  # names within the page
    assert not re.search(r"https?://|src=|href=|url\(|@import|<script", own)
    assert "default-src 'none'" in page


def test_plots_of_heads_and_layers():
    heads = tuple(
        HeadResult(
            module="model.layers.0.self_attn", which="q", head=head, scale=0.1, amax=1.0,
            saturated=0.1 * head, underflowed=0.0, error=0.03, error_unscaled=math.nan,
            error_shared=0.5,
        )
        for head in range(3)
    )  # fmt: skip
    layers = (LayerResult(module="m.layers.0.x", error=0.1, error_unscaled=0.2, error_shared=0.3),)
    report = Report(
        path="x", source=None, fast=True, seconds=1, tensors_on_disk=1, nbytes=1, findings=(),
        notes=(), heads=heads, layers=layers,
    )  # fmt: skip
    page = html_report(report)
    assert Balanced(page).open == []
    assert page.count('role="img"') == 3
    assert "heads that matter" in page


def test_names_are_escaped(good, tmp_path):
    editor = copy_of(good("llama", "int8")[0], tmp_path / "x")
    editor.tensors["<script>alert(1)</script>.weight_scale"] = editor.tensors["model.norm.weight"]
    page = html_report(verify(editor.save(), good("llama", "int8")[1]))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    Balanced(page)
