"""The example models' task: write eight symbols backwards.

    <s> a b c d e f g h = h g f e d c b a </s>

Small enough to be learned in a minute on two CPU cores, and unforgiving: an answer counts only
when every symbol and the end marker are right, so damage to one attention head shows.

Shape letters: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN, EQUALS = "<pad>", "<s>", "</s>", "<unk>", "="
SYMBOLS = list(string.ascii_lowercase)
TOKENS = [PAD, BOS, EOS, UNKNOWN, EQUALS, *SYMBOLS]
TOKEN_ID = {token: i for i, token in enumerate(TOKENS)}
NUM_SYMBOLS = 8
PROMPT_TOKENS = NUM_SYMBOLS + 2
"""<s>, the symbols and the equals sign; everything after them is the answer."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + ' ' + message['content'] + ' =' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def draw_samples(count: int, seed: int) -> Tensor:
    """Token ids [B, T] of `count` whole lines, `<s>` and `</s>` included; T is 19.

    Example: "<s> a b c d e f g h = h g f e d c b a </s>".
    """
    generator = torch.Generator().manual_seed(seed)
    picks_BT = torch.randint(len(SYMBOLS), (count, NUM_SYMBOLS), generator=generator)
    symbols_BT = picks_BT + TOKEN_ID[SYMBOLS[0]]

    def column(token: str) -> Tensor:
        return torch.full((count, 1), TOKEN_ID[token])

    parts = [column(BOS), symbols_BT, column(EQUALS), symbols_BT.flip(1), column(EOS)]
    return torch.cat(parts, dim=1)


def to_text(ids: list[int]) -> str:
    """The tokens with a space between them, without the leading `<s>` that the tokenizer adds."""
    return " ".join(TOKENS[i] for i in ids).removeprefix(BOS + " ")


def answer_is_right(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Which of the B samples greedy decoding would answer without a mistake.

    One pass over the right answer decides it: greedy decoding follows that answer exactly as
    long as the most likely token is the right one, and fails at the first where it is not.
    """
    predicted_BT = logits_BTV[:, PROMPT_TOKENS - 1 : -1].argmax(-1)
    return (predicted_BT == ids_BT[:, PROMPT_TOKENS:]).all(-1)


@torch.no_grad()
def exact_match(model: PreTrainedModel, ids_BT: Tensor) -> float:
    """Share of samples that `model` answers without a mistake, from 0 to 1."""
    was_training = model.training
    model.eval()
    logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    model.train(was_training)
    return answer_is_right(logits_BTV.cpu(), ids_BT).float().mean().item()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `TOKENS` that puts `<s>` in front and has a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, TOKEN_ID[BOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def write_task(out: Path, ids_BT: Tensor) -> None:
    """Write held-out questions as `task.jsonl`: one {"prompt", "answer"} a line.

    The prompt leaves out `<s>` (the tokenizer adds it), the answer leaves out `</s>`.
    """
    lines = []
    for ids in ids_BT.tolist():
        prompt, answer = to_text(ids[:PROMPT_TOKENS]), to_text(ids[PROMPT_TOKENS:-1])
        lines.append(json.dumps({"prompt": prompt, "answer": answer}))
    (out / "task.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_calibration(out: Path, ids_BT: Tensor) -> None:
    """Write whole lines of the task as `calibration.txt`, one sample a line."""
    lines = [to_text(ids) for ids in ids_BT.tolist()]
    (out / "calibration.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
