"""Markers that only the template may write: `<|eot_id|>` in a tool's result stays nine letters, never the token.

A text is hidden before it enters a template (each marker spelled in it becomes two private characters), so that every
marker in the template's output is the template's own; encoding then turns the hidden ones back into plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import tokenizers
from transformers import PreTrainedTokenizerBase

# A noncharacter, which no text should hold (one that does is hidden too), and a private character that counts markers.
_ESCAPE = "\U0010ffff"
_FIRST = 0xF0000


class Markers:
    """The added tokens of one tokenizer, special or not: `<|im_end|>`, but also `<tool_response>`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: tokenizers.Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast tokenizer behind it, so text that spells a marker could not be "
                "told from the marker; add tokenizer.json to the tokenizer's folder"
            )
        self._tokenizer = tokenizer
        self._ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        self._texts = [_ESCAPE, *sorted(self._ids, key=len, reverse=True)]  # the longest first, as the tokenizer does
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._any = re.compile("|".join(map(re.escape, self._texts)))
        self._split = re.compile(f"({'|'.join(map(re.escape, self._texts[1:]))})")
        self._hidden = re.compile(f"{_ESCAPE}([{chr(_FIRST)}-{chr(_FIRST + len(self._ids))}])")
        # The same model between markers, without any: it reads all text as text.
        self._plain = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        self._plain.pre_tokenizer = cast(Any, backend.pre_tokenizer)

    def __contains__(self, text: str) -> bool:
        return text in self._ids

    def hide(self, text: str) -> str:
        """The text with its markers hidden; safe to put into a template."""
        return self._any.sub(lambda found: _ESCAPE + chr(_FIRST + self._numbers[found[0]]), text)

    def show(self, text: str) -> str:
        """The text as it reads, with hidden markers spelled out."""
        return self._hidden.sub(lambda found: self._texts[ord(found[1]) - _FIRST], text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which every marker that is not hidden stands for its token."""
        if not texts:
            return []
        # Hidden texts are rare. They are encoded by hand below; the empty text keeps their places in the batch.
        batch = ["" if _ESCAPE in text else text for text in texts]
        encoded = cast(list[list[int]], self._tokenizer(batch, add_special_tokens=False)["input_ids"])
        return [self._by_hand(text) if _ESCAPE in text else ids for text, ids in zip(texts, encoded, strict=True)]

    def _by_hand(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._split.split(text):
            marker = self._ids.get(piece)
            ids += (
                [marker] if marker is not None else self._plain.encode(self.show(piece), add_special_tokens=False).ids
            )
        return ids
