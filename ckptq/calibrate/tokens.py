"""A row of calibration text becomes token ids, by the checkpoint's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
"""ShareGPT's names of the speakers, in the chat templates' words."""


class Tokenizer:
    """The checkpoint's own tokenizer, loaded when the first text needs it: token ids need none."""

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
            return list(self._tokenizer(row["text"])["input_ids"])
        if "text" in row:
            found = type(row["text"]).__name__
            raise SourceError(f"{self._label}: sample {number}: text is {found}, wanted a string")
        raise SourceError(
            f"{self._label}: sample {number} has the fields {', '.join(sorted(row)) or 'none'}; "
            "wanted text, messages, conversations or input_ids"
        )

    def plain(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        plain, full = self.plain("a"), list(self._tokenizer("a")["input_ids"])
        return full[: full.index(plain[0])] if plain and plain[0] in full else []

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
                f"{self._label}: sample {number} is a conversation, and the tokenizer in "
                f"{self._checkpoint} has no chat template"
            )
        from jinja2 import TemplateError

        try:
            ids: Any = self._tokenizer.apply_chat_template(messages, return_dict=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{self._label}: sample {number}: the chat template in {self._checkpoint} does not "
                f"take this conversation: {error}"
            ) from error
        return list(ids)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._loaded is None:
            from transformers import AutoTokenizer

            try:
                self._loaded = AutoTokenizer.from_pretrained(
                    self._checkpoint,
                    local_files_only=True,
                    trust_remote_code=self._trust_remote_code,
                )
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).strip().splitlines()
                raise SourceError(
                    f"{self._checkpoint}: no tokenizer that transformers can load: "
                    f"{reason[0] if reason else type(error).__name__}"
                ) from error
        return self._loaded
