"""From a row of text to token ids, with the checkpoint's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint.bounded import TOKENIZER_BYTES, parse, read_bounded
from ckptq.errors import SourceError
from ckptq.models.refusals import refusals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

MAX_PADDING = 1 << 24
"""Tokens: more than the longest published context."""

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
"""ShareGPT's names of speakers -> those of chat templates."""


class Tokenizer:
    """The checkpoint's own tokenizer, loaded when the first text needs it: token ids do not."""

    def __init__(self, checkpoint: Path, label: str, trust_remote_code: bool = False) -> None:
        self._checkpoint = checkpoint
        self._label = label
        self._trust_remote_code = trust_remote_code
        self._loaded: PreTrainedTokenizerBase | None = None

    def row(self, row: Row, number: int) -> list[int]:
        """The token ids of one row. `number` counts from 1, for messages."""
        if "input_ids" in row:
            return self._given(row["input_ids"], number)
        if "messages" in row or "conversations" in row:
            return self._conversation(row.get("messages") or row.get("conversations"), number)
        if isinstance(row.get("text"), str):
            return self._ids(row["text"])
        if "text" in row:
            found = type(row["text"]).__name__
            raise SourceError(f"{self._label}: sample {number}: text is {found}, expected a string")
        raise SourceError(
            f"{self._label}: sample {number} has the fields {', '.join(sorted(row)) or 'none'}; "
            "expected text, messages, conversations or input_ids"
        )

    def plain(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self._ids(text, add_special_tokens=False, verbose=False)

    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before every text."""
        plain, full = self.plain("a"), self._ids("a")
        return full[: full.index(plain[0])] if plain and plain[0] in full else []

    def _ids(self, text: str, **options: bool) -> list[int]:
        tokenizer = self._tokenizer
        with refusals(f"{self._checkpoint}: its tokenizer does not accept text"):
            return list(tokenizer(text, **options)["input_ids"])

    def _given(self, value: object, number: int) -> list[int]:
        if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
            raise SourceError(
                f"{self._label}: sample {number}: input_ids must be a list of integers"
            )
        return value

    def _conversation(self, turns: Any, number: int) -> list[int]:
        try:
            messages = [
                turn
                if "content" in turn
                else {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
                for turn in turns
            ]
        except (TypeError, KeyError) as error:
            raise SourceError(
                f"{self._label}: sample {number}: a turn needs role and content (or from and value)"
            ) from error
        if not self._tokenizer.chat_template:
            raise SourceError(
                f"{self._label}: sample {number} is a conversation, but the tokenizer in "
                f"{self._checkpoint} has no chat template"
            )
        what = f"the chat template in {self._checkpoint} does not accept this conversation"
        with refusals(f"{self._label}: sample {number}: {what}"):
            ids: Any = self._tokenizer.apply_chat_template(messages, return_dict=False)
        return list(ids)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._loaded is None:
            from transformers import AutoTokenizer

            _refuse_endless_padding(self._checkpoint / "tokenizer.json")
            with refusals(f"{self._checkpoint}: no tokenizer that transformers can load"):
                self._loaded = AutoTokenizer.from_pretrained(
                    self._checkpoint,
                    local_files_only=True,
                    trust_remote_code=self._trust_remote_code,
                )
        return self._loaded


def _refuse_endless_padding(file: Path) -> None:
    """Loading pads a first text as tokenizer.json says, whatever memory that takes."""
    if not file.exists():
        return
    data, _ = read_bounded(file, TOKENIZER_BYTES)
    try:
        padding = parse(str(file), data).get("padding") or {}
        strategy = padding.get("strategy")
        asked = [strategy.get("Fixed")] if isinstance(strategy, dict) else []
        asked.append(padding.get("pad_to_multiple_of"))
    except (SourceError, AttributeError):
        return  # transformers cannot load it, and says so
    for length in asked:
        if isinstance(length, int) and length > MAX_PADDING:
            raise SourceError(
                f"{file}: padding to {length:,} tokens; expected at most {MAX_PADDING:,}"
            )
