"""The control: each rule of transformers' loader, broken in a checkpoint that was good.

`verify --engine transformers` names it, and transformers itself refuses the checkpoint, misses
keys, or computes something else. What is whole passes both.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from verify_checkpoints import EXPERTS, Editor, copy_of

from ckptq.checkpoint.open import open_checkpoint
from ckptq.models.tree.by_headers import load_by_headers
from ckptq.verify.run import verify

RULES: list[Rule] = []
TOKENS = torch.arange(3, 35)[None]


@dataclass(frozen=True)
class Rule:
    """One way to break a checkpoint, and the code that names it."""

    code: str
    family: str
    weights: str
    kv: bool
    breaks: Callable[[Editor], None]
    where: str
    """A part of the name that the finding must have."""

    def __str__(self) -> str:
        return f"{self.breaks.__name__}-{self.family}-{self.weights}"


def rule(code: str, where: str, *kinds: tuple[str, str], kv: bool = False):
    def keep(breaks: Callable[[Editor], None]) -> Callable[[Editor], None]:
        RULES.extend(Rule(code, family, weights, kv, breaks, where) for family, weights in kinds)
        return breaks

    return keep


@rule(
    "tied-head-not-ignored", "lm_head",
    ("llama", "fp8-channel"), ("llama", "int4"), ("mixtral", "fp8-channel"),
)  # fmt: skip
def ties_the_head(e: Editor) -> None:
    e.config["tie_word_embeddings"] = True
    del e.tensors["lm_head.weight"]
    e.quantization["ignore"] = [n for n in e.quantization["ignore"] if n != "lm_head"]


@rule("engine-not-ignored", "lm_head", ("qwen3-moe", "fp8-channel"), ("llama", "mxfp8"))
def forgets_the_head(e: Editor) -> None:
    e.quantization["ignore"] = [n for n in e.quantization["ignore"] if n != "lm_head"]


@rule("engine-not-ignored", "multi_modal_projector", ("llama4", "int4"), ("llama4", "fp8-channel"))
def forgets_the_tower(e: Editor) -> None:
    told = ("vision", "projector", "re:")
    kept = [n for n in e.quantization["ignore"] if not any(word in n for word in told)]
    e.quantization["ignore"] = kept


@rule("attention-group-first", "config_groups", ("qwen3-moe", "fp8-channel"), kv=True)
@rule("attention-group-first", "config_groups", ("mixtral", "int4"), kv=True)
def puts_attention_first(e: Editor) -> None:
    groups = e.quantization["config_groups"]
    e.quantization["config_groups"] = dict(
        sorted(groups.items(), key=lambda g: g[0] != "attention")
    )


@rule("never-quantized", "mlp.gate", ("qwen3-moe", "fp8-channel"), ("mixtral", "fp8-channel"))
def quantizes_a_router(e: Editor) -> None:
    router = e.named("gate.weight")
    weight = e.tensors[router].float()
    scale = weight.abs().amax(1, keepdim=True) / 448
    e.tensors[router] = (weight / scale).to(torch.float8_e4m3fn)
    e.tensors[f"{router}_scale"] = scale.bfloat16()
    parent = router.removesuffix(".weight")
    e.quantization["ignore"] = [n for n in e.quantization["ignore"] if n != parent]


@rule("engine-unfilled", "down_proj", ("llama", "fp8-channel"), ("llama", "int4"))
def loses_a_scale(e: Editor) -> None:
    del e.tensors[e.named("layers.1.mlp.down_proj.weight_scale")]


@rule("engine-unfilled", "self_attn.q_proj", ("llama", "int4"), ("mixtral", "mxfp4"))
def loses_codes(e: Editor) -> None:
    del e.tensors[e.named("layers.1.self_attn.q_proj.weight_packed")]


@rule("engine-shape", "experts.gate_up_proj", ("mixtral", "fp8-channel"), ("qwen3-moe", "int4"))
def loses_an_expert(e: Editor) -> None:
    lost = f".experts.{EXPERTS - 1}."
    for name in [n for n in e.tensors if lost in n and ".layers.1." in n]:
        del e.tensors[name]


@rule("engine-refuses", "experts.gate_up_proj", ("qwen3-moe", "fp8-channel"), ("mixtral", "int4"))
def loses_a_half_of_an_expert(e: Editor) -> None:
    name = "up_proj" if any("up_proj" in n for n in e.tensors) else "w3"
    for tensor in [n for n in e.tensors if f"layers.0.{_moe(e)}.experts.1.{name}." in n]:
        del e.tensors[tensor]


@rule("engine-left-over", "o_proj", ("llama", "fp8-channel"), ("qwen3-moe", "fp8-channel"))
def leaves_an_orphan(e: Editor) -> None:
    name = e.named("layers.0.self_attn.o_proj.weight")
    e.tensors[name] = torch.randn(e.tensors[name].shape).bfloat16()
    e.quantization["ignore"].append(name.removesuffix(".weight"))


@rule("engine-not-ignored", "k_proj", ("llama", "fp8-channel"), ("qwen3-moe", "int4"))
def leaves_a_linear_unquantized(e: Editor) -> None:
    codes = next(n for n in sorted(e.tensors) if "layers.0.self_attn.k_proj.weight" in n)
    module = codes.rpartition(".")[0]
    shape = (128, 128)
    for name in [n for n in e.tensors if n.startswith(f"{module}.")]:
        del e.tensors[name]
    e.tensors[f"{module}.weight"] = torch.randn(shape).bfloat16()


@rule(
    "engine-default", "self_attn.k_scale",
    ("llama", "int8"), ("qwen3-moe", "fp8-channel"), kv=True,
)  # fmt: skip
def loses_a_cache_scale(e: Editor) -> None:
    del e.tensors[e.named("layers.1.self_attn.k_scale")]


@rule("engine-shape", "self_attn.v_scale", ("llama", "fp8-channel"), ("mixtral", "int4"), kv=True)
def has_scales_of_other_heads(e: Editor) -> None:
    name = e.named("layers.0.self_attn.v_scale")
    e.tensors[name] = torch.cat([e.tensors[name], e.tensors[name][:1]])


@rule("target-unmatched", "config_groups.attention", ("llama", "fp8-channel"), kv=True)
def names_another_attention(e: Editor) -> None:
    e.quantization["config_groups"]["attention"]["targets"] = ["OtherAttention"]


def _moe(e: Editor) -> str:
    return next(n for n in e.tensors if ".experts." in n).split(".experts.")[0].rpartition(".")[2]


def repaired(folder: Path, out: Path) -> Editor:
    """A copy in which nothing is wrong, whatever made it: groups of Linears first, and everything
    in `ignore` that is not quantized."""
    editor = copy_of(folder, out)
    groups = editor.quantization["config_groups"]
    editor.quantization["config_groups"] = dict(sorted(groups.items(), reverse=True))
    plain = [
        name.removesuffix(".weight")
        for name, tensor in editor.tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.dtype == torch.bfloat16
    ]
    known = editor.quantization["ignore"]
    editor.quantization["ignore"] = [*known, *(n for n in plain if n not in known)]
    return editor


def real(folder: Path) -> torch.Tensor | str:
    """The logits of transformers, or what keeps it from them."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    transformers.logging.set_verbosity(50)
    try:
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            model, info = getattr(transformers, architecture).from_pretrained(
                folder, dtype=torch.bfloat16, output_loading_info=True
            )
            wrong = {
                kind: sorted(keys)
                for kind, keys in info.items()
                if kind in ("missing_keys", "unexpected_keys", "mismatched_keys") and keys
            }
            if wrong:
                return str(wrong)
            return model.eval()(input_ids=TOKENS).logits.float()
    except (RuntimeError, KeyError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_broken_rule_is_named_and_is_wrong_in_transformers(good, tmp_path, rule):
    folder, _ = good(rule.family, rule.weights, rule.kv)
    whole = repaired(folder, tmp_path / "whole").save()
    assert verify(whole, headers_only=True, engine="transformers").counts == {}
    wanted = real(whole)
    assert isinstance(wanted, torch.Tensor), wanted
    assert wanted.isfinite().all()

    broken = copy_of(whole, tmp_path / "broken")
    rule.breaks(broken)
    report = verify(broken.save(), headers_only=True, engine="transformers")
    named = [f.tensor for f in report.findings if f.code == rule.code]
    assert any(rule.where in (name or "") for name in named), report.counts
    found = real(broken.folder)
    assert isinstance(found, str) or not torch.equal(found, wanted)


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_cache_scales_are_no_fault_where_transformers_reads_none(good, tmp_path, family):
    """5.17 has places for them, 5.24 has none: a remark there, unless config.json has no cache."""
    folder, _ = good(family, "fp8-channel", True)
    report = verify(folder, headers_only=True, engine="transformers")
    assert report.findings == ()
    loaded = load_by_headers(open_checkpoint(folder))
    reads = any(place.endswith("k_scale") for place in loaded.wanted)
    assert any("no scales of the KV cache" in line for line in report.engine_run.remarks) != reads
    broken = copy_of(folder, tmp_path / "undeclared")
    del broken.config["quantization_config"]["kv_cache_scheme"]
    broken.quantization["config_groups"].pop("attention")
    counts = verify(broken.save(), headers_only=True, engine="transformers").counts
    assert counts["engine-left-over"] == 2


FORMATS = [
    (family, weights)
    for family in ("qwen3-moe", "mixtral", "llama4", "gemma4")
    for weights in ("fp8-channel", "fp8-block", "int8", "int4", "int4-asym", "mxfp8", "nvfp4")
]


@pytest.mark.parametrize(("family", "weights"), FORMATS)
def test_its_verdict_is_that_of_transformers(good, tmp_path, family, weights):
    """Among others the experts' formats for which transformers has no conversion."""
    folder, _ = good(family, weights)
    whole = repaired(folder, tmp_path / "whole").save()
    said = verify(whole, headers_only=True, engine="transformers")
    engine = [f for f in said.findings if f.code.startswith(("engine", "tied", "attention"))]
    found = real(whole)
    assert (engine == []) == isinstance(found, torch.Tensor), (found, engine)
