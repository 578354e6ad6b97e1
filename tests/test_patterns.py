"""Patterns mean what `re` says, and end."""

from __future__ import annotations

import random
import re
import warnings

import pytest

from ckptq import patterns
from ckptq.errors import SourceError
from ckptq.patterns import BadPattern, Pattern
from ckptq.recipes.names import read_names

ATOMS = [*"ab.{}[]()|*+?^$,1e<=:&~-", r"\.", r"\b", r"\d", r"\w", "(?:", "(?!", "(?=", "(?<!", "[^"]
ATOMS += ["{2}", "{1,}", "{,2}", "{e}", "{i<=1}", "[[:alpha:]]", r"\Z", "(?i)", "(?P<n>", "(?P=n)"]
ATOMS += ["*+", "++", "(?>", r"\[", "[a-", "{}", "{,}", "--", "&&", "||"]

SLOW = [r"(a|aa)+$", r"(a*)*b.*", r"((a{1,100}){1,100}){1,100}b", r"^(([a-z])+.)+[A-Z]([a-z])+$"]
SLOW += [r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6\7\8\9z", r"(?:(?:a?)+)+$"]


def random_pattern(rng: random.Random) -> str:
    return "".join(rng.choice(ATOMS) for _ in range(rng.randrange(1, 9)))


def test_they_match_what_re_matches():
    rng, compared = random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(30_000):
            text = random_pattern(rng)
            try:
                wanted = re.compile(text)
            except re.error:
                with pytest.raises(BadPattern):
                    Pattern(text)
                continue
            found = Pattern(text)
            found._simple = found._simple and rng.random() < 0.1
            for _ in range(5):
                name = "".join(rng.choice("ab1{}.e,[]:l") for _ in range(rng.randrange(7)))
                assert found.match(name) == bool(wanted.match(name)), (text, name)
                assert found.search(name) == bool(wanted.search(name)), (text, name)
                compared += 1
    assert compared > 20_000


def matches(entry, name):
    return read_names([entry]).match(name)


def test_the_entries_of_real_recipes():
    assert matches("lm_head", "lm_head")
    assert not matches("lm_head", "lm_head.x")
    assert not matches("lm_.*", "lm_head")
    assert matches("re:lm_.*", "lm_head")
    assert not matches("re:head", "lm_head")
    assert matches(r"re:^(?!.*lm_head).*", "model.layers.0.mlp.up_proj")
    assert not matches(r"re:^(?!.*lm_head).*", "model.lm_head")
    assert matches(r"re:.*\.(q|k|v)_proj$", "model.layers.0.self_attn.q_proj")
    assert matches(r"re:model\.layers\.(?:[0-9]|1[0-9])\.", "model.layers.17.mlp")


@pytest.mark.parametrize("text", SLOW)
def test_a_pattern_that_would_take_for_ever_ends(text, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    pattern = Pattern(text)
    assert not pattern._simple
    refused = None
    for length in (30, 60, 2000):
        for ask in (pattern.match, pattern.search):
            try:
                ask("a" * length + ".")
            except SourceError as error:
                refused = str(error)
    assert refused is None or "avoid nested repetitions" in refused


def test_the_limit_is_what_ends_them(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    with pytest.raises(SourceError, match=r"pattern '\(a\|aa\)\+\$' takes more than 0.05 s"):
        Pattern(r"(a|aa)+$").match("a" * 200 + ".")


def test_many_slow_names_are_too_many(monkeypatch):
    """Each within its limit, all of them together not."""
    monkeypatch.setattr(patterns, "NOTICED", 0.0)
    monkeypatch.setattr(patterns, "SLOW_SECONDS", 0.01)
    pattern = Pattern(r"(a|aa)+$")
    with pytest.raises(SourceError, match="takes more than"):
        any(pattern.match("a" * 15 + f".{number}") for number in range(100_000))


def test_simple_patterns_take_the_quick_way_and_others_do_not():
    for text in (r".*mlp.*", r"^(?!.*lm_head).*", r"model\.layers\.\d+\.mlp\.down_proj$"):
        assert Pattern(text)._simple
    for text in (r"(a+)+b", r"(a|b)*c", r".*a.*b.*c", r"(a?){30}"):
        assert not Pattern(text)._simple


@pytest.mark.parametrize("text", ["(", "a" * 10_001, "(" * 5000, r"\p{L}", "(?V1)a", r"\K"])
def test_what_is_no_pattern_is_told(text):
    with pytest.raises(BadPattern):
        Pattern(text)
