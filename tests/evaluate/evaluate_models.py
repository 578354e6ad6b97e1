"""Tiny checkpoints to evaluate, quantized by ckptq, and the plain way to run them.

Shape letters: B batch, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from tiny.models import TOKENS, causal, image_tokens, llama4
from tiny.rows import token_rows, write_rows
from tiny.words import word_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.recipes.load import load_scheme

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = len(WORDS), 3, 4, 2, 32
TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    **TOKENS,
    "tie_word_embeddings": False,
}


LLAMA4 = TEXT | {
    "intermediate_size_mlp": 128,
    "num_local_experts": 2,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 1, 0],
    "attention_chunk_size": 16,
    "use_qk_norm": True,
    "floor_scale": 8,
}
"""The second layer has experts that are fused and transposed, its RoPE pairs neighbours, one layer
has none."""
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": partial(causal, "Llama", TEXT),
    "llama4": partial(llama4, LLAMA4, **image_tokens(63, 61, 62)),
    # experts one by one on disk, fused in transformers
    "mixtral": partial(causal, "Mixtral", TEXT, num_local_experts=2, num_experts_per_tok=1),
}


def save_family(family: str, folder: Path) -> Path:
    """A bf16 model of that family, the same each time, with a tokenizer of whole words.

    V heads differ by a factor of 2^16, undone in the output projection: one FP8 scale for both is
    not enough.
    """
    torch.manual_seed(3)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
        for module in model.modules():
            v_proj, o_proj = (getattr(module, name, None) for name in ("v_proj", "o_proj"))
            if v_proj is not None and v_proj.weight.shape[0] == KV_HEADS * HEAD_DIM:
                v_proj.weight[:HEAD_DIM] *= 2.0**16
                o_proj.weight[:, : HEADS // KV_HEADS * HEAD_DIM] /= 2.0**16
    model.to(torch.bfloat16).save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    word_tokenizer(WORDS, "<unk>", begin="<s>", **special).save_pretrained(folder)
    return folder


rows_of = partial(token_rows, ids=(4, 60))
"""Below the ids that stand for images."""


def quantized(source: Path, scheme: str, out: Path, **changes) -> Path:
    """The source converted by a built-in recipe."""
    rows = write_rows(out.with_suffix(".jsonl"), rows_of((20, 20), seed=1))
    wanted = CalibrationRequest(data=str(rows), samples=2, seq_len=32)
    recipe = load_scheme(scheme)
    quantize(QuantizeRequest(model=source, recipe=recipe, out=out, calibration=wanted, **changes))
    return out


def plain_model(folder: Path) -> PreTrainedModel:
    """The source as transformers loads it, experts computed one by one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def plain_logits(model: PreTrainedModel, row: list[int]) -> Tensor:
    """[S, V] of one line, alone in its batch."""
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def kl_by_torch(reference_SV: Tensor, logits_SV: Tensor) -> Tensor:
    """KL(reference‖logits) of each position, by torch's own function, [S]."""
    p, q = (x.double().log_softmax(-1) for x in (reference_SV, logits_SV))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
