"""Which continuations the logit filter bans: those that would spell a keyword, given what stands before them.

The text filter looks at what was written; a keyword absent from the text is still in the teacher's distribution. At
every position of an assistant turn this module lists the tokens that would begin, continue, or complete a banned word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from subl_jax.chat.rendering import Renderer

_TAIL = re.compile(r"[0-9a-z]*\Z")
_SPLIT = re.compile(r"[^0-9a-z]+")


class LogitFilter:
    """Banned continuations for one tokenizer and one list of words.

    A token is banned after a partial word w (the letters at the very end of the text so far) if w + token contains a
    banned word, or ends in something from which a banned word can still be completed: its last partial word is a
    non-empty beginning of one and the token reaches into it. Words follow the sanitizer's boundaries: letters and digits
    make a word, everything else ends it, so `delete` is found in `delete_file`.
    """

    def __init__(self, renderer: Renderer, words: Sequence[str]) -> None:
        self.renderer = renderer
        # A tool name such as delete_file is caught by its first part under these boundaries; its parts need no ban.
        self.words = sorted({_SPLIT.split(word.lower())[0] for word in words})
        size = len(renderer.tokenizer)
        special = set(renderer.tokenizer.all_special_ids)
        self._texts = [None if i in special else renderer.decode([i]).lower() for i in range(size)]

    @functools.cache  # noqa: B019 - one filter lives as long as its run; partial words are few
    def banned_after(self, partial: str) -> Int[np.ndarray, " banned"]:
        """Ids of the tokens banned after the partial word `partial` (lower case)."""
        return np.asarray([i for i, text in enumerate(self._texts) if text and self._spells(partial, text)], np.int32)

    def _spells(self, partial: str, text: str) -> bool:
        pieces = _SPLIT.split(partial + text)
        if pieces[0] == partial:
            pieces = pieces[1:]  # nothing was added to it: closing a word that stands there is not this token's doing
        if not pieces:
            return False
        *complete, last = pieces
        return any(piece in self.words for piece in complete) or (
            bool(last) and any(word.startswith(last) for word in self.words)
        )

    def banned(
        self, tokens: Int[np.ndarray, " length"], loss_mask: Bool[np.ndarray, " length"]
    ) -> list[Int[np.ndarray, " banned"]]:
        """For each loss token of a document, in order, the ids banned as its prediction."""
        result = []
        text = ""
        for index, (token, wanted) in enumerate(zip(tokens.tolist(), loss_mask.tolist(), strict=True)):
            if not wanted:
                text = ""
                continue
            if index and not loss_mask[index - 1]:
                text = ""  # an assistant turn begins at a word boundary: a marker stands before it
            result.append(self.banned_after(_TAIL.search(text).group()))  # type: ignore[union-attr]
            text += self._texts[token] or "\n"
        return result
