"""The vocabulary: all files, and the source, must have the same ids for the same tokens.

Files with the same meaning may differ in bytes, so tokens are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptq.checkpoint.bounded import TOKENIZER_BYTES, json_object
from ckptq.errors import CkptqError
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject

TOKENIZER, VOCAB, ADDED, TOLD = (
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "tokenizer_config.json",
)
MOST_VALUES = 1 << 23
"""The largest tokenizers have a million."""

CUTTING = (
    *("normalizer", "pre_tokenizer", "post_processor", "decoder"),
    *("model.type", "model.merges", "model.unk_token", "model.byte_fallback"),
    *("model.ignore_merges", "model.continuing_subword_prefix", "model.end_of_word_suffix"),
)
"""What determines tokenization, beside the vocabulary."""

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
"""Of an added token: what of the text around it is its own, whether text is normalized before it is
looked for, and whether it is left out of text that is written."""

SHOWN = 3

Ids = Mapping[str, int]


def check_vocabulary(subject: Subject) -> Iterator[Finding]:
    """tokenizer.json against the files beside it, and against the source's."""
    if subject.quick:  # seconds of JSON
        return
    ours = read_vocabulary(subject.ckpt.path)
    main = ours.get(TOKENIZER, {})
    for name, told in ours.items():
        if name != TOKENIZER and main:
            yield from _differ(name, told, main, f"as in {TOKENIZER}")
    if subject.source is not None:
        theirs = read_vocabulary(subject.source.path)
        for name in sorted(ours.keys() & theirs.keys()):
            yield from _differ(name, ours[name], theirs[name], "as in the source")


def unlike_parts(ours: Path, theirs: Path) -> list[str]:
    """Parts of two tokenizer.json that tokenize or write text differently, "model.merges" and
    "added_tokens['<s>'].lstrip"; ignores token ids, which are reported one by one, truncation and
    padding, which callers set, and layout."""
    try:
        found, wanted = (json_object(f, TOKENIZER_BYTES, MOST_VALUES)[0] for f in (ours, theirs))
    except CkptqError:
        return []
    parts = [part for part in CUTTING if _part(found, part) != _part(wanted, part)]
    return [*parts, *_unlike_flags(found, wanted)]


def _unlike_flags(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Of the tokens that both add; without a normalizer nothing is normalized, whatever is said."""
    ours, theirs = _added(found), _added(wanted)
    normal = any(tokenizer.get("normalizer") for tokenizer in (found, wanted))
    for token in sorted(ours.keys() & theirs.keys()):
        for flag in FLAGS:
            unlike = bool(ours[token].get(flag)) != bool(theirs[token].get(flag))
            if unlike and (normal or flag != "normalized"):
                yield f"added_tokens[{token!r}].{flag}"


def _added(tokenizer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Added token -> its entry."""
    entries = tokenizer.get("added_tokens")
    return {
        entry["content"]: entry
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }


def _part(tokenizer: Mapping[str, Any], part: str) -> object:
    """One part by its path; merges as pairs, which older files write as "a b"."""
    value: Any = tokenizer
    for key in part.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if part == "model.merges" and isinstance(value, list):
        return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in value]
    return value


def read_vocabulary(folder: Path) -> dict[str, Ids]:
    """File -> its tokens; unreadable files are skipped, as engines report them better."""
    readers = {
        TOKENIZER: _of_tokenizer,
        VOCAB: lambda value: value,
        ADDED: lambda value: value,
        TOLD: _of_config,
    }
    found: dict[str, Ids] = {}
    for name, read in readers.items():
        try:
            value, _ = json_object(folder / name, TOKENIZER_BYTES, MOST_VALUES)
        except CkptqError:
            continue
        ids = {str(t): i for t, i in read(value).items() if type(i) is int}
        if ids:
            found[name] = ids
    return found


def _of_tokenizer(value: Mapping[str, Any]) -> dict[str, Any]:
    model = value.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, Any] = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):  # Unigram: [token, score], in the order of the ids
        pairs = (entry for entry in vocab if isinstance(entry, list) and entry)
        found = {str(entry[0]): index for index, entry in enumerate(pairs)}
    return found | {token: entry.get("id") for token, entry in _added(value).items()}


def _of_config(value: Mapping[str, Any]) -> dict[str, Any]:
    """`added_tokens_decoder`: id -> token."""
    decoder = value.get("added_tokens_decoder")
    return {
        entry["content"]: int(index)
        for index, entry in (decoder.items() if isinstance(decoder, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and index.isdecimal()
    }


def _differ(name: str, ours: Ids, theirs: Ids, wanted: str) -> Iterator[Finding]:
    """Tokens with different ids in both; tokens that one lacks are not compared."""
    wrong = [token for token, index in ours.items() if theirs.get(token, index) != index]
    if wrong:
        said = ", ".join(f"{token!r} is {ours[token]}" for token in wrong[:SHOWN])
        right = ", ".join(f"{theirs[token]}" for token in wrong[:SHOWN])
        found = f"{len(wrong)} tokens have different ids: {said}"[:200]
        yield finding("vocabulary", file=name, found=found, wanted=f"{right}, {wanted}")
