"""Shapes of the tensors against the sizes in config.json. Headers only.

Uses only what all Hugging Face decoders share: the embedding is [vocabulary, hidden], k_proj has
head_dim rows per key/value head, and embedding and layers have the same parent where transformers
does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint.open import CONFIG
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject

EXTRA_ROWS = {"mllama_text_model": 8, "moshi": 1}
"""Rows of the embedding beyond the vocabulary: Llama-3.2 Vision's image tokens, Moshi's start of
a text."""

WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size")
"""What the embedding's columns are called, the first that config.json has: OPT-350M projects its
embedding to the hidden size."""


def check_geometry(subject: Subject) -> Iterator[Finding]:
    """One finding for each size that the tensors contradict."""
    prefix, _ = subject.layers
    parent = prefix.rpartition(".")[0]
    embeddings = [name for name in subject.ckpt.tensors if name.endswith("embed_tokens.weight")]
    own = f"{parent}.embed_tokens.weight" if parent else "embed_tokens.weight"
    if (
        len(embeddings) == 1
        and prefix.rpartition(".")[2] == "layers"
        and embeddings[0] != own
        and not _so_in_transformers(subject, prefix, embeddings[0])
    ):
        found = f"layers under {parent or 'nothing'!r}, the embedding is {embeddings[0]}"
        yield finding("names-moved", prefix, found=found, wanted="the same parent")
    if own in subject.ckpt.tensors:
        yield from _embedding(subject, own)
    yield from _heads(subject)


def _so_in_transformers(subject: Subject, layers: str, embedding: str) -> bool:
    """Whether its own model has them by these names (SpeechT5: in decoder and prenet)."""
    tree = subject.witnesses.tree
    return tree is not None and tree.layers == layers and tree.owner(embedding) is not None


def _embedding(subject: Subject, name: str) -> Iterator[Finding]:
    shape = subject.ckpt.tensors[name].spec.shape
    config = subject.ckpt.text_config
    if len(shape) != 2:
        return
    more = EXTRA_ROWS.get(str(config.get("model_type")), 0)
    width = next((key for key in WIDTHS if type(config.get(key)) is int), "hidden_size")
    for field, size in zip(("vocab_size", width), (shape[0] - more, shape[1]), strict=True):
        said = config.get(field)
        if type(said) is int and said != size:
            yield _differs(field, said, f"{size} in {name}")


def _heads(subject: Subject) -> Iterator[Finding]:
    """Rows of k_proj, if all layers have the same heads; where transformers builds the model,
    `whole` checks this instead."""
    if subject.witnesses.tree is not None:
        return
    rows = {
        subject.modules[f"{layer}.k_proj"].shape
        for layer, kind in subject.attention.items()
        if kind == "heads" and f"{layer}.k_proj" in subject.modules
    }
    shape = rows.pop() if len(rows) == 1 else None
    config, heads = subject.ckpt.text_config, subject.heads
    head_dim = config.get("head_dim", config.get("attention_head_dim"))
    hidden = config.get("hidden_size")
    if head_dim is None and heads is not None and type(hidden) is int:
        head_dim = hidden // heads[0]
    if shape is None or heads is None or type(head_dim) is not int:
        return
    if heads[1] * head_dim != shape[0]:
        said = f"{heads[1]} heads of {head_dim}"
        yield _differs("num_key_value_heads", said, f"{shape[0]} rows in every k_proj")


def _differs(field: str, said: object, held: str) -> Finding:
    repair = "restore the config.json of this model"
    return finding("config-shapes", field, file=CONFIG, found=str(said), wanted=held, repair=repair)


def well_typed(subject: Subject) -> bool:
    """Whether the sizes in config.json are numbers."""
    config = subject.ckpt.text_config
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    shares = ("partial_rotary_factor", "rotary_pct", "rotary_dim")
    ropes = config.get("rope_parameters")
    sets = [config, *([ropes] if isinstance(ropes, dict) else [])]
    return (
        all(config.get(key) is None or type(config[key]) is int for key in keys)
        and (ropes is None or isinstance(ropes, dict))
        and all(type(s.get(k, 0.0)) in (int, float) for s in sets for k in shares)
    )
