"""What a stranger's checkpoint says stays on its line, and no signal undoes what is done."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import Done, llama, run
from tiny.forked import ckptq

from ckptq.printable import on_page, printable, printable_lines

__all__ = ["llama"]

CLEAR = "\x1b[2J\x1b[1;31m"
FORGED = f"llama{CLEAR}\nout: right; 5 tensors\u202e\u2028\x9b0m"


def hostile(done: Done) -> set[str]:
    """The characters that a terminal would obey."""
    said = done.stdout + done.stderr
    return {c for c in said if not c.isprintable()} - {"\n"}


def change(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_text_is_one_line_and_looks_like_what_it_is():
    assert printable("model.layers.0 ä 模型 \U0001f600") == "model.layers.0 ä 模型 \U0001f600"
    assert printable("a\x1b[2J\nb\u202ec\ud800\x85") == r"a\x1b[2J\nb\u202ec\ud800\x85"
    assert printable_lines("one\ntwo\x1b\rthree") == "one\n  two\\x1b\n  three"
    assert on_page('<a\x1b"&\n>') == r"&lt;a\x1b&quot;&amp;\n&gt;"


def test_no_command_obeys_a_config(llama: Path, tmp_path: Path):
    group = {"targets": [FORGED], "weights": {"num_bits": 8, "type": FORGED, "strategy": FORGED}}
    quantization = {"quant_method": FORGED, "format": FORGED, "config_groups": {FORGED: group}}
    change(llama, model_type=FORGED, architectures=[FORGED], quantization_config=quantization)
    page = tmp_path / "page.html"
    for command in (
        ("inspect", llama),
        ("verify", llama, "--html", page),
        ("verify", llama, "--engine", "vllm"),
        ("quantize", llama, "-s", "fp8-dynamic", "-o", tmp_path / "out"),
        ("permute", llama, tmp_path / "out", "--to", "half-split"),
        ("calibrate", llama, "-o", tmp_path / "scales"),
    ):
        done = run(*command)
        assert hostile(done) == set(), command
        assert "Traceback" not in done.stderr
        lines = (done.stdout + done.stderr).splitlines()
        assert not any(line.startswith("out: right") for line in lines), command
    assert not {c for c in page.read_text() if not c.isprintable()} - {"\n"}


def test_json_is_ascii_and_the_same_data(llama: Path):
    change(llama, model_type=FORGED, architectures=["ä", "\ud800"])
    done = run("inspect", llama, "--json")
    assert done.stdout.isascii()
    assert hostile(done) == set()
    assert json.loads(done.stdout)["model_type"] == FORGED
    assert json.loads(done.stdout)["architecture"] == "ä, \ud800"


def test_an_index_cannot_forge_either(llama: Path):
    index = {"weight_map": {"a\nerror: forged": "model\x1b.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    done = run("inspect", llama)
    assert done.returncode == 3
    assert hostile(done) == set()
    assert len(done.stderr.splitlines()) == 1


def test_commands_that_are_shown_can_be_copied(llama: Path, tmp_path: Path):
    source = llama.rename(tmp_path / "my model; touch x")
    out = tmp_path / "it's $HOME"
    done = run("quantize", source, "-s", "fp8-dynamic", "-o", out)
    assert done.returncode == 0, done.stderr
    words = [shlex.split(line) for line in done.stdout.splitlines()[2:]]
    assert words[0][2:] == ["ckptq", "verify", str(out), "--source", str(source)]
    assert words[1][2:5] == ["vllm", "serve", str(out)]


def test_names_of_tensors_are_no_markup(llama: Path, tmp_path: Path):
    """A bar of progress would take [/x] for the end of a tag, and end in a traceback."""
    save_file({"a[/x].b": torch.ones(2), "[red]c": torch.ones(2)}, llama / "model.safetensors")
    done = run("inspect", llama)
    assert "a[/x].b" in done.stdout
    script = "from ckptq.show.console import progress\nwith progress() as b: b('x', 2)('a[/x]', 1)"
    master, terminal = os.openpty()
    shown = subprocess.run([sys.executable, "-c", script], stderr=terminal, check=False)
    os.close(terminal)
    os.close(master)
    assert shown.returncode == 0


DYING = """
import os, signal, sys
from ckptq import __main__, interrupts
class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), by=int(sys.argv[1])):
        kill(me, by)
late = Late()
if sys.argv[2] == "undone":
    __main__.ignore_signals = lambda: None
sys.argv = ["ckptq", *sys.argv[3:]]
__main__.main()
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_does_not_change_the_exit_code(llama: Path, by):
    """While the interpreter takes itself apart; the twin shows that the signal arrives."""
    for how, wanted in (("", 0), ("undone", -by)):
        command = [sys.executable, "-c", DYING, str(int(by)), how, "inspect", str(llama)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == wanted, done.stderr
        assert "q_proj" in done.stdout


def test_an_error_keeps_its_code_as_well(llama: Path):
    (llama / "config.json").unlink()
    command = [sys.executable, "-c", DYING, str(int(signal.SIGTERM)), "", "inspect", str(llama)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 3


def test_a_terminal_without_the_letters_gets_escapes(llama: Path, tmp_path: Path):
    """The work is done by then: no message may end it in a traceback."""
    out = tmp_path / "größe"
    done = ckptq("quantize", llama, "-s", "fp8-dynamic", "-o", out, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert r"gr\xf6\xdfe: fp8-dynamic" in done.stdout


def test_half_a_surrogate_pair_is_kept(llama: Path, tmp_path: Path):
    change(llama, note="\ud800", nested={"\udc00": ["\ud800"]})
    done = run("quantize", llama, "-s", "fp8-dynamic", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["note"] == "\ud800"
    assert config["nested"] == {"\udc00": ["\ud800"]}
    assert run("verify", tmp_path / "out", "--source", llama).returncode == 0


def test_a_folder_whose_name_is_no_text(llama: Path, tmp_path: Path):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/model\xff"))
    llama.rename(source)
    done = run("quantize", source, "-s", "fp8-dynamic", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert r"model\udcff" in (tmp_path / "out" / "README.md").read_text()


BOMB = "a0: &a0 [x, x]\n"
BOMB += "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("a: &a [*a]", "nested too deeply"),
        (BOMB, "more than 100,000 values"),
        ("x: 2020-99-99", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("x: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
    ],
    ids=["lists", "mappings", "itself", "aliases", "date", "null", "python", "key"],
)  # fmt: skip
def test_a_recipe_that_is_none_is_one_message(llama: Path, tmp_path: Path, text, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    done = run("quantize", llama, "--recipe", recipe, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith(f"error: {recipe}: ")
    assert "Traceback" not in done.stderr


PANICS = {
    "when it is loaded": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "when it is used": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("when", PANICS)
def test_a_tokenizer_that_panics_is_one_message(llama: Path, tmp_path: Path, when):
    """What Rust raises there is no `Exception`."""
    from tokenizers import Tokenizer, models

    words = json.loads(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str())
    (llama / "tokenizer.json").write_text(json.dumps(words | PANICS[when]))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (llama / "tokenizer_config.json").write_text(json.dumps(kind))
    (tmp_path / "text.txt").write_text("a a a")
    text = ("--data", tmp_path / "text.txt")
    done = run("calibrate", llama, "-o", tmp_path / "scales", "-s", "kv-fp8-per-tensor", *text)
    assert done.returncode == 3, done.stderr
    assert "tokenizer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_without_an_end(llama: Path, tmp_path: Path):
    done = run("quantize", llama, "--recipe", "/dev/zero", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "/dev/zero: more than 1,048,576 bytes" in done.stderr


def test_a_config_that_is_nested_deep_is_refused_before_the_work(llama: Path, tmp_path: Path):
    text = (llama / "config.json").read_text()[:-1]
    (llama / "config.json").write_text(f'{text}, "x": {"[" * 900}{"]" * 900}}}')
    done = run("quantize", llama, "-s", "fp8-dynamic", "-o", tmp_path / "out")
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2, 3)
    assert not (tmp_path / "out.partial").exists()
