"""Commands under torchrun: rank 0 prints what one process prints, the others nothing, and all end
with the same code."""

import json
import shutil
from pathlib import Path

import pytest
from test_ranks_quantize import files
from tiny.rows import write_rows
from tiny.torchrun import Done, forked
from typer.testing import CliRunner

from ckptq.cli import app

RANKS = 3


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory) -> Path:
    """Findings in several shards, a code and a copy among them."""
    out = tmp_path_factory.mktemp("damaged") / "out"
    shutil.copytree(whole, out)
    for shard in sorted(out.glob("*.safetensors"))[:6]:
        data = bytearray(shard.read_bytes())
        data[-1] ^= 0x41
        shard.write_bytes(data)
    return out


@pytest.fixture(scope="module")
def commands(given, whole, damaged) -> dict[str, list[str]]:
    text = ["--data", str(given.text), "--device", "cpu"]
    source = ["--source", str(given.llama)]
    caches = ["--kv-cache", "fp8-per-head,fp8-scale-1"]
    return {
        "verify": ["verify", str(whole), *source, "--json"],
        "verify without a source": ["verify", str(whole), "--json"],
        "verify what is damaged": ["verify", str(damaged), *source, "--engine", "vllm", "--json"],
        "evaluate": ["evaluate", str(whole), *source, *caches, *text, "--json"],
        "more ranks than batches": [
            *("evaluate", str(given.llama), "--schemes", "fp8-static", *text, "--json"),
            *("--batch-size", "4", "--max-kl", "0"),
        ],
    }


@pytest.fixture(scope="module")
def refused(given, whole) -> dict[str, list[str]]:
    """A word of the refusal -> the command. The first two are refused before ranks have met."""
    convert = ["quantize", str(given.llama), "-o", str(whole.with_name("new"))]
    odd = write_rows(whole.with_name("odd.jsonl"), [[5, 999]])
    return {
        "permute runs in one process": ["permute", str(given.llama), "-o", "new"],
        "--tasks runs another program": ["evaluate", str(given.llama), "--tasks", "piqa"],
        "runs in llm-compressor, in one process": [
            *convert,
            "--recipe",
            str(whole.with_name("smooth.yaml")),
        ],
        "--stream is for single processes": [*convert, "--scheme", "w4a16", "--stream"],
        "--part is for single processes": [*convert, "--scheme", "w4a16", "--part", "1/2"],
        "already exists": [*convert[:-1], str(whole), "--scheme", "fp8-dynamic"],
        "token id 999 is outside the model's vocabulary": [
            *(*convert, "--scheme", "fp8-per-head", "--data", str(odd)),
        ],
        "odd.jsonl: token id 999": [
            *("evaluate", str(whole), "--source", str(given.llama), "--data", str(odd)),
        ],
        "'minmax' depends on the order": [
            *("calibrate", str(given.llama), "-o", str(whole.with_name("scales"))),
            *("--recipe", str(whole.with_name("minmax.yaml")), "--data", str(given.text)),
        ],
        "no-such-text.jsonl: cannot be read": [
            *("calibrate", str(given.llama), "-o", str(whole.with_name("scales"))),
            *("--scheme", "fp8-per-head", "--data", "no-such-text.jsonl"),
        ],
    }


MINMAX = """
DEFAULT_stage:
  DEFAULT_modifiers:
    QuantizationModifier:
      kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, dynamic: false,
                        strategy: tensor, observer: minmax}
"""


SMOOTH = """
DEFAULT_stage:
  DEFAULT_modifiers:
    SmoothQuantModifier: {mappings: [[["re:.*nowhere"], "re:.*nowhere"]]}
    QuantizationModifier: {targets: [Linear], scheme: W8A8, ignore: [lm_head]}
"""


@pytest.fixture(scope="module")
def ended(given, commands, refused, whole, tmp_path_factory) -> dict[str, list[Done]]:
    """By command, what each rank made of it."""
    folder = tmp_path_factory.mktemp("session")
    whole.with_name("minmax.yaml").write_text(MINMAX)
    whole.with_name("smooth.yaml").write_text(SMOOTH)
    every = {**refused, **commands}
    found = forked(folder / "session", list(every.values()), RANKS)
    ended = dict(zip(every, found, strict=True))
    assert not any(done.stdout for ranks in ended.values() for done in ranks[1:])
    return ended


def test_files_are_those_of_one_process(given, tmp_path):
    """Experts: scales of inputs, and codes that GPTQ chooses, in portions."""
    data = ["--data", str(given.text), "--device", "cpu", "-o"]
    commands = {
        "scales": ["calibrate", str(given.mixtral), "--scheme", "fp8-static", *data],
        "gptq": ["quantize", str(given.mixtral), "--scheme", "w4a16-g32-gptq", *data],
    }
    ranks = [[*words, tmp_path / name] for name, words in commands.items()]
    for done in forked(tmp_path / "session", ranks, 2):
        assert [each.code for each in done] == [0, 0], done
    for name, words in commands.items():
        alone = CliRunner().invoke(app, [*words, str(tmp_path / f"{name}-alone")])
        assert alone.exit_code == 0, alone.output
    assert (tmp_path / "scales").read_bytes() == (tmp_path / "scales-alone").read_bytes()
    assert files(tmp_path / "gptq") == files(tmp_path / "gptq-alone")


def test_rank_0_prints_what_one_process_does(commands, ended):
    for name, words in commands.items():
        alone = CliRunner().invoke(app, words)
        assert [done.code for done in ended[name]] == [alone.exit_code] * RANKS, ended[name]
        ours, theirs = json.loads(ended[name][0].stdout), json.loads(alone.stdout)
        assert ours.pop("seconds") > 0
        theirs.pop("seconds")
        assert ours == theirs, name


def test_the_comparison_would_notice(commands, ended):
    """Findings and figures are there, and those of other text differ."""
    assert len(json.loads(ended["verify what is damaged"][0].stdout)["findings"]) >= 3
    found = json.loads(ended["evaluate"][0].stdout)
    fewer = CliRunner().invoke(app, [*commands["evaluate"], "--samples", "5"])
    assert json.loads(fewer.stdout)["rows"] != found["rows"]
    assert ended["more ranks than batches"][0].code == 1


def test_what_is_not_divided_is_refused_in_one_line(refused, ended):
    for why in refused:
        told = [done.stderr for done in ended[why] if "error: " in done.stderr]
        assert len(told) == 1, (why, ended[why])
        assert why in told[0]
        assert told[0].count("error: ") == 1
        assert told[0].endswith("\n")
        bad_input = "text.jsonl" in why or "token id" in why
        assert {done.code for done in ended[why]} == {3 if bad_input else 2}


def test_a_refusal_leaves_no_folder(ended, whole):
    """Its twin, where a rank is killed in the midst of the work: test_ranks_quantize."""
    assert not list(whole.parent.glob("*.partial"))
