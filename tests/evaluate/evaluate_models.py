"""Tiny checkpoints to evaluate, quantized by ckptq, and the plain way to run them.

Shape letters: B batch, S positions, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
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
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def llama4() -> PreTrainedModel:
    """Multimodal; the second layer has experts that are fused and transposed, its RoPE pairs
    neighbours, one layer has none."""
    text = TEXT | {
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 16,
        "use_qk_norm": True,
        "floor_scale": 8,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    }
    config = transformers.Llama4Config(
        text_config=text,
        vision_config=vision,
        boi_token_index=61,
        eoi_token_index=62,
        image_token_index=63,
    )
    return transformers.Llama4ForConditionalGeneration(config)


def mixtral() -> PreTrainedModel:
    """Experts one by one on disk, fused in transformers."""
    config = transformers.MixtralConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(config)


FAMILIES = {"llama": llama, "llama4": llama4, "mixtral": mixtral}


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
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def token_rows(lengths: tuple[int, ...], seed: int = 7) -> list[list[int]]:
    """Random token ids, below those that stand for images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 60, (n,), generator=generator).tolist() for n in lengths]


def write_rows(file: Path, rows: list[list[int]]) -> Path:
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return file


def quantized(source: Path, scheme: str, out: Path, **changes) -> Path:
    """The source converted by a built-in recipe."""
    rows = write_rows(out.with_suffix(".jsonl"), token_rows((20, 20), seed=1))
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
