"""The command line as a user meets it: its surface, its results, its words when all is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
import typer
import yaml
from safetensors.torch import load_file, save_file
from tiny import forked
from tiny.rows import token_rows, write_rows

import ckptq
from ckptq.__main__ import main
from ckptq.checkpoint.open import open_checkpoint
from ckptq.cli import app
from ckptq.convert.documents import model_card
from ckptq.convert.run import write_quantized
from ckptq.interrupts import SIGNALS, Interrupted, listen
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_scheme
from ckptq.spec import dtype_name

SURFACE = {
    "quantize": {
        "--scheme", "--recipe", "--output", "--revision", "--ignore", "--group-size", "--scales",
        "--search",
        "--data", "--samples", "--seq-len", "--batch-size", "--seed", "--device", "--shard-size",
        "--max-ram", "--workers", "--rope-order", "--as-written",
        "--stream", "--part", "--join", "--push", "--private",
        "--dry-run", "--restart", "--trust-remote-code", "--json",
    },
    "calibrate": {
        "--output", "--scheme", "--recipe", "--revision", "--data", "--samples", "--seq-len",
        "--batch-size", "--seed", "--device", "--restart", "--trust-remote-code", "--json",
    },
    "verify": {
        "--source", "--fast", "--headers-only", "--engine", "--vllm-python", "--attention",
        "--data", "--samples", "--seq-len", "--device", "--html", "--json",
    },
    "evaluate": {
        "--source", "--schemes", "--kv-cache", "--revision", "--data", "--task", "--questions",
        "--tasks", "--tasks-path", "--samples", "--seq-len", "--batch-size", "--seed", "--device",
        "--max-kl", "--min-agreement", "--max-ppl-ratio", "--min-accuracy", "--vllm-python",
        "--report", "--json",
    },
    "mend": {
        *("--source", "--engine", "--per-tensor", "--headers-only", "--in-place", "--dry-run"),
        *("--workers", "--device", "--restart", "--json"),
    },
    "search": {
        *("--output", "--bits", "--size", "--max-kl", "--schemes", "--ignore", "--revision"),
        *("--data", "--samples", "--seq-len", "--seed", "--per", "--sensitivities", "--device"),
        *("--report", "--json", "--kv-bits", "--kv-caches"),
        *("--task", "--questions", "--min-accuracy"),
    },
    "permute": {"--to", "--only", "--revision", "--workers", "--restart", "--json"},
    "inspect": {"--revision", "--json"},
    "recipes": {"--json"},
}  # fmt: skip


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path) -> Done:
    """The whole program in this process: a fresh one would spend its time importing torch."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["ckptq", *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exit:
            main()
    finally:
        sys.argv = argv
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Done(int(exit.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A checkpoint of one layer; enough for every message that comes before a model runs."""
    folder = tmp_path / "llama"
    folder.mkdir()
    shapes = {
        "model.embed_tokens.weight": (16, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.k_proj.weight": (32, 32),
        "model.layers.0.self_attn.v_proj.weight": (32, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def runnable(tmp_path: Path) -> Path:
    """A checkpoint that transformers runs, for messages that come after its rehearsal."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "runnable")
    (tmp_path / "runnable" / "tokenizer.json").write_text("{}")
    return tmp_path / "runnable"


def test_the_surface_grows_only_on_purpose() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {
        name: {p.opts[0] for p in c.params if p.opts[0].startswith("--")} - {"--help"}
        for name, c in commands.items()
    }
    assert found == SURFACE


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from ckptq.cli import app\n"
        "result = CliRunner().invoke(app, ['--help']); assert 'quantize' in result.output\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_the_packages() -> None:
    assert run("--version") == Done(0, f"ckptq {ckptq.__version__}\n", "")


def test_the_shell_completes_commands_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CKPTQ_COMPLETE", "complete_bash")
    for words, wanted in (("ckptq qu", "quantize"), ("ckptq quantize --sche", "--scheme")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        assert run().stdout.split() == [wanted]


def test_quantize_writes_everything_and_verify_agrees(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", llama, "-s", "fp8-dynamic", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["linears"] == 4
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "recipe.yaml", "README.md", "ckptq.json",
        "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    checked = run("verify", out, "--source", llama, "--json")
    assert checked.returncode == 0, checked.stdout
    assert json.loads(checked.stdout)["ok"] is True


def test_verify_names_a_spoiled_tensor(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", llama, "-s", "fp8-dynamic", "-o", out).returncode == 0
    tensors = load_file(out / "model.safetensors")
    spoiled = "model.layers.0.self_attn.v_proj.weight_scale"
    tensors[spoiled] = tensors[spoiled].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    checked = run("verify", out, "--source", llama)
    assert checked.returncode == 1
    assert "model.layers.0.self_attn.v_proj" in checked.stdout


def test_dry_run_prints_every_unit_and_writes_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("quantize", llama, "-s", "fp8-dynamic", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert {unit["unit"] for unit in plan["units"]} == {
        "model.embed_tokens.weight",
        *(f"model.layers.0.self_attn.{which}_proj" for which in "qkvo"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_the_default_output_is_named_after_model_and_scheme(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("quantize", llama, "-s", "w4a16-g32").returncode == 0
    assert (tmp_path / "llama-w4a16-g32" / "config.json").exists()


def test_a_snapshot_in_the_hubs_cache_goes_by_its_hub_id(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is called by a commit, and its files are links."""
    snapshot = tmp_path / "hub" / "models--org--a-model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for file in llama.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    done = run("quantize", snapshot, "-s", "fp8-dynamic", "--json")
    assert json.loads(done.stdout)["out"] == "a-model-fp8-dynamic"
    assert "base_model: org/a-model\n" in Path("a-model-fp8-dynamic", "README.md").read_text()


@pytest.mark.parametrize("name", ["a: b", "[x]", "123", "'q"])
def test_the_model_card_is_yaml_whatever_the_folder_is_called(
    llama: Path, tmp_path: Path, name: str
) -> None:
    plan = make_plan(replace(open_checkpoint(llama), name=name), load_scheme("fp8-dynamic"))
    card = model_card(replace(open_checkpoint(llama), name=name), plan)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == name


def test_what_verify_is_given_is_what_was_read(llama: Path, tmp_path: Path) -> None:
    """A hub id alone would be another revision; `verify` takes none."""
    ckpt = replace(open_checkpoint(llama), name="org/a-model", revision="v2")
    plan = make_plan(ckpt, load_scheme("fp8-dynamic"))
    result = write_quantized(ckpt, plan, tmp_path / "out", arguments={})
    assert result.source == str(llama)


def test_every_recipe_is_data_too(llama: Path) -> None:
    """`--json` of a recipe printed YAML."""
    for name in ("fp8-per-head", "FP8_DYNAMIC"):
        done = run("recipes", name, "--json")
        assert json.loads(done.stdout) == yaml.safe_load(run("recipes", name).stdout)


def test_stdout_is_for_results_alone(llama: Path, tmp_path: Path) -> None:
    """In a process of its own: llm-compressor's log goes to what stdout is when it is imported."""
    command = ["quantize", str(llama), "-s", "FP8_DYNAMIC", "-o", str(tmp_path / "out"), "--json"]
    done = forked.ckptq(*command)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scheme"] == "FP8_DYNAMIC"


def test_vllm_is_not_proposed_for_rows_that_it_would_permute_again(
    llama: Path, tmp_path: Path
) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "llama4_text", "head_dim": 32}
    (llama / "config.json").write_text(json.dumps(config))
    for order, proposed in (("keep", True), ("half-split", False)):
        out = tmp_path / order
        arguments = ("quantize", llama, "-s", "fp8-dynamic", "--rope-order", order, "-o", out)
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        assert (f"vllm serve {out}" in done.stdout) is proposed
        assert ("as it is written; vLLM" in done.stdout) is not proposed


def test_vllm_is_not_proposed_for_blocks_that_it_would_split(llama: Path, tmp_path: Path) -> None:
    blocks = (
        "quant_stage: {quant_modifiers: {QuantizationModifier: {ignore: [lm_head], config_groups: "
        "{g: {targets: [Linear], weights: {num_bits: 8, type: float, strategy: block, "
        "block_structure: [128, 128]}}}}}}"
    )
    (tmp_path / "blocks.yaml").write_text(blocks)
    arguments = ("quantize", llama, "--recipe", tmp_path / "blocks.yaml", "-o", tmp_path / "out")
    done = run(*arguments, "--as-written")
    assert done.returncode == 0, done.stderr
    assert "2 Linears have rows that do not fill whole blocks" in " ".join(done.stderr.split())
    assert f"vllm serve {tmp_path / 'out'}" not in done.stdout


def test_text_that_verify_would_not_run_is_refused(llama: Path) -> None:
    refused(
        2,
        "--data t.txt runs the unquantized model; give --source",
        "verify",
        llama,
        "--data",
        "t.txt",
    )


def test_inspect_reads_headers(llama: Path) -> None:
    found = json.loads(run("inspect", llama, "--json").stdout)
    assert found["scheme"] == "unquantized"
    assert found["tensors"] == 5


def refused(code: int, words: str, *arguments: str | Path) -> None:
    done = run(*arguments)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_is_named(llama: Path, tmp_path: Path) -> None:
    refused(3, "/no/such: no such folder", "quantize", "/no/such", "-s", "fp8-dynamic")
    refused(2, "unknown scheme 'fp9'", "quantize", llama, "-s", "fp9")
    refused(2, "either --scheme NAME or --recipe", "quantize", llama)
    refused(2, "'5 apples' is not a size", "quantize", llama, "-s", "w8a8",
            "--shard-size", "5 apples")  # fmt: skip
    out = tmp_path / "taken"
    out.mkdir()
    refused(2, "already exists", "quantize", llama, "-s", "fp8-dynamic", "-o", out)


@pytest.mark.parametrize(
    ("device", "code", "words"),
    [
        ("gpu", 2, "--device gpu: expected cpu, cuda or cuda:N"),
        ("cuda:x", 2, "--device cuda:x: expected cpu, cuda or cuda:N"),
        ("meta", 2, "--device meta: expected cpu, cuda or cuda:N"),
        ("cuda:99", 4, "this machine"),
    ],
)
def test_a_device_that_is_not_here_is_refused_before_the_work(
    llama: Path, tmp_path: Path, device: str, code: int, words: str
) -> None:
    out = ("-o", tmp_path / "out", "--device", device)
    refused(code, words, "quantize", llama, "-s", "fp8-dynamic", *out)
    refused(code, words, "quantize", llama, "-s", "fp8-per-head", *out)
    refused(code, words, "calibrate", llama, *out)
    refused(code, words, "evaluate", llama, "--schemes", "w8a8", "--device", device)
    assert not list(tmp_path.glob("out*")), "nothing was begun"


def test_a_pickle_only_checkpoint_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(3, "only pickled weights (pytorch_model.bin)", "inspect", llama)


def test_a_truncated_file_is_named(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(3, "model.safetensors: tensor", "quantize", llama, "-s", "fp8-dynamic")
    refused(3, "truncated", "quantize", llama, "-s", "fp8-dynamic")


def test_an_index_that_leaves_the_folder_or_names_nothing(llama: Path, tmp_path: Path) -> None:
    index = llama / "model.safetensors.index.json"
    shutil.copy(llama / "model.safetensors", tmp_path / "outside.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    refused(3, "outside the folder", "inspect", llama)
    index.write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    refused(3, "lost.safetensors (for tensor 'a'), which does not exist", "inspect", llama)


def test_nan_is_refused_with_the_tensor_named_and_nothing_published(
    llama: Path, tmp_path: Path
) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][3, 5] = float("nan")
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    refused(3, "k_proj", "quantize", llama, "-s", "fp8-dynamic", "-o", out)
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_that_nothing_explains_are_refused(llama: Path, tmp_path: Path, dtype) -> None:
    """One Linear of them was copied, in silence, as if it were no weight."""
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    words = f"model.safetensors: tensor '{name}' is {dtype_name(dtype)} [32, 32], and config.json"
    refused(3, words, "quantize", llama, "-s", "w8a8", "-o", tmp_path / "out")


def test_a_model_without_attention_heads(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    words = "KV-cache scales were requested, but this model has no attention heads"
    refused(2, words, "quantize", llama, "-s", "kv-fp8-per-head")


def test_calibrate_takes_one_recipe_that_has_scales(llama: Path, tmp_path: Path) -> None:
    """`--scheme` beside `--recipe` was not heard; that text is run was said before the error."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(load_scheme("fp8-per-tensor").text)
    out = ("-o", tmp_path / "scales.safetensors")
    refused(2, "either --scheme NAME or --recipe", "calibrate", llama, *out, "-s", "fp8-per-head",
            "--recipe", recipe)  # fmt: skip
    done = run("calibrate", llama, *out, "-s", "w8a8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe 'w8a8' uses no calibrated scales; fp8-per-head")


def test_an_error_comes_before_what_is_said_on_the_way(llama: Path, runnable: Path) -> None:
    for words in ((), ("--schemes", "fp9"), ("--schemes", "w8a8", "--max-kl", "nan")):
        done = run("evaluate", llama, *words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
    done = run("quantize", runnable, "-s", "kv-fp8-per-head", "--max-ram", "100MB")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --max-ram")


def test_parts_to_permute_are_listed_with_commas_or_one_by_one(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "llama4_text"}
    (llama / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    source = tmp_path / "fp8"
    assert run("quantize", llama, "-s", "fp8-dynamic", "-o", source).returncode == 0
    for number, only in enumerate((("weights,scales",), ("weights", "scales"))):
        parts = [word for part in only for word in ("--only", part)]
        done = run(
            "permute", source, tmp_path / str(number), "--to", "half-split", *parts, "--json"
        )
        assert json.loads(done.stdout)["moved"] == {"weights": 2, "scales": 2}


def test_a_checkpoint_is_mended_by_the_command_that_verify_prints(
    llama: Path, tmp_path: Path
) -> None:
    out, fixed = tmp_path / "fp8", tmp_path / "fixed"
    assert run("quantize", llama, "-s", "fp8-dynamic", "-o", out).returncode == 0
    right = (out / "config.json").read_bytes()
    config = json.loads(right)
    config["quantization_config"]["quantization_status"] = "frozen"
    (out / "config.json").write_text(json.dumps(config))
    assert f"ckptq mend {out} OUT\n" in run("verify", out, "--headers-only").stdout
    assert run("mend", out).returncode == 2
    done = run("mend", out, fixed, "--headers-only", "--json")
    assert done.returncode == 0, done.stderr
    assert [one["code"] for one in json.loads(done.stdout)["repairs"]] == ["status"]
    assert (fixed / "config.json").read_bytes() == right
    done = run("mend", fixed, tmp_path / "again", "--headers-only")
    assert (done.returncode, done.stdout) == (0, f"{fixed}: nothing to mend\n")


def test_memory_that_is_too_little_for_the_program_alone(llama: Path, tmp_path: Path) -> None:
    arguments = ("quantize", llama, "-s", "fp8-dynamic", "-o", tmp_path / "out", "--workers", "1")
    words = "too small: ckptq needs 760,000,000 bytes with --workers 1\n"
    refused(2, f"--max-ram 100,000,000: {words}", *arguments, "--max-ram", "100MB")
    assert run(*arguments, "--max-ram", "760MB").returncode == 0


@pytest.mark.parametrize("command", ["quantize", "permute"])
def test_a_taken_output_is_said_in_every_commands_words(
    llama: Path, tmp_path: Path, command: str
) -> None:
    """`permute` has no -o."""
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "llama4_text"}
    (llama / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    out = tmp_path / "taken"
    out.mkdir()
    rest = {"quantize": ("-s", "w8a8", "-o", out), "permute": (out, "--to", "half-split")}
    words = f"error: {out}: already exists; remove it, or choose another output\n"
    refused(2, words, command, llama, *rest[command])


def test_no_right_to_write_is_the_machines_no(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere: what the system would say is put in its place."""
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "llama4_text"}
    (llama / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    monkeypatch.setattr("os.access", lambda *_: False)
    words = f"no permission to write in {tmp_path}"
    refused(4, words, "calibrate", llama, "-o", tmp_path / "scales.safetensors")
    refused(4, words, "verify", llama, "--html", tmp_path / "page.html")
    words = f"{tmp_path}: no permission to write here"
    refused(4, words, "quantize", llama, "-s", "w8a8", "-o", tmp_path / "out")
    refused(4, words, "permute", llama, tmp_path / "out", "--to", "half-split")


def test_empty_calibration_text_is_named(runnable: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    done = run("quantize", runnable, "-s", "fp8-per-head", "--data", empty, "-o", tmp_path / "out")
    assert done.returncode in (2, 3)
    assert "empty.txt" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["folder", "absent/file"])
def test_a_file_that_could_not_be_written_is_refused_before_the_work(
    llama: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    scales = run("calibrate", llama, "-o", tmp_path / place)
    assert scales.returncode == 2
    assert f"--output {tmp_path / place}: " in scales.stderr
    page = run("verify", llama, "--html", tmp_path / place)
    assert page.returncode == 2
    assert f"--html {tmp_path / place}: " in page.stderr


@pytest.mark.parametrize("out", ["", ".", "/", ".."])
def test_an_output_without_a_name_is_refused(llama: Path, out: str) -> None:
    words = f"{str(Path(out))!r} is no name for an output"
    refused(2, words, "quantize", llama, "-s", "fp8-dynamic", "-o", out)


def test_a_revision_of_a_folder_is_refused(llama: Path) -> None:
    """It was ignored, and written into the model card."""
    words = f"--revision v2 applies only to hub ids; {llama} is a local folder"
    refused(2, words, "quantize", llama, "-s", "fp8-dynamic", "--revision", "v2", "--dry-run")
    refused(2, words, "inspect", llama, "--revision", "v2")


def test_only_what_is_resumed_says_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted

    monkeypatch.setattr("ckptq.verify.run.open_checkpoint", stop)
    monkeypatch.setattr("ckptq.convert.quantize.open_checkpoint", stop)
    for command, words in (
        (("quantize", llama, "-s", "w8a8"), "rerun the same command"),
        (("verify", llama), "interrupted; nothing is kept"),
    ):
        refused(130, words, *command)


def test_what_the_machine_refuses_is_one_message_and_no_result_is_lost(
    runnable: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.svg"
    report.symlink_to("/dev/full")
    rows = write_rows(tmp_path / "rows.jsonl", token_rows((6, 6), ids=(3, 15)))
    for words, shown in (
        (("verify", runnable, "--html"), "tensors, "),
        (("evaluate", runnable, "--schemes", "w8a8", "--data", rows, "--report"), "perplexity"),
        (("search", runnable, "--bits", "6", "-o", tmp_path / "r.yaml", "--report"), "loss"),
    ):
        done = run(*words, report)
        assert done.returncode == 4, done.stderr
        assert f"error: {report}: No space left on device; free" in done.stderr
        assert shown in done.stdout


class Destructor:
    def __del__(self) -> None:
        raise Interrupted


def interrupted_unheard() -> None:
    Destructor()
    time.sleep(10)


def interrupted_importing(folder: Path) -> None:
    """As torch imports numpy: what is raised meanwhile is dropped."""
    text = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhole = True\n"
    (folder / "imported_whole.py").write_text(text)
    sys.path.insert(0, str(folder))
    with contextlib.suppress(BaseException):
        import imported_whole  # type: ignore[import-not-found]
    sys.path.remove(str(folder))
    assert imported_whole.whole
    time.sleep(10)


@pytest.mark.parametrize("while_", ["a destructor", "an import"])
def test_an_interrupt_that_python_drops_comes_again(tmp_path: Path, while_: str) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    hook = sys.unraisablehook
    try:
        listen()
        with pytest.raises(Interrupted):
            interrupted_importing(tmp_path) if while_ == "an import" else interrupted_unheard()
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_no_exit_code(llama: Path, tmp_path: Path, closed: str) -> None:
    """As a daemon starts commands."""
    script = (
        f'"$0" -m ckptq inspect "$1" {closed}; a=$?; "$0" -m ckptq verify no {closed}; echo $a $?'
    )
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, llama], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # or it would wait for the hub
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 3"
    assert "Traceback" not in done.stderr
