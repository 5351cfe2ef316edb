"""Vocabulary alignment: which token ids two tokenizers agree on, and a teacher cut or padded to a student's rows.

Two tokenizers, or a teacher's parameters, come in; the number of shared ids, or a teacher whose head has the student's
width, comes out. Ids from the shared range on are padding to both models (`ModelConfig.num_tokens`), so that no divergence
gives them probability. Tokenizers that disagree on one id share no vocabulary, and are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerBase

from subl_jax.distill import fused
from subl_jax.models.config import ModelConfig
from subl_jax.trajectory import Trajectory

# Tokens of one tokenizer alone that a log line or an error names.
_NAMED = 6


class VocabularyError(ValueError):
    """Teacher and student share no vocabulary, or a document holds a token that they do not share."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What two tokenizers share.

    Attributes:
      shared_tokens: both map exactly the same tokens to the ids below it.
      only_teacher, only_student: tokens beyond, by id; at most one of the two has any.
    """

    shared_tokens: int
    only_teacher: tuple[str, ...]
    only_student: tuple[str, ...]

    def describe(self) -> str:
        """One line for a log."""
        cut = [
            f"; {len(tokens)} tokens of the {who} alone are cut ({named(tokens)})"
            for who, tokens in (("teacher", self.only_teacher), ("student", self.only_student))
            if tokens
        ]
        return f"teacher and student share {self.shared_tokens} tokens{''.join(cut)}"


def named(tokens: Sequence[str]) -> str:
    """The first few tokens, for people."""
    return ", ".join(map(repr, tokens[:_NAMED])) + (", …" if len(tokens) > _NAMED else "")


def align(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Alignment:
    """Compares two tokenizers id by id, special and added tokens included, and logs what is cut.

    One may simply end before the other (Qwen 2.5 has 151665 tokens, Qwen 3 the same and four more). Both may have the same
    ids that no token bears.

    Raises:
      VocabularyError: an id below the end of both means different tokens; it and both tokens are named.
    """
    theirs, ours = (_by_id(tokenizer) for tokenizer in (teacher, student))
    shared = min(max(theirs) + 1, max(ours) + 1)
    for index in range(shared):
        if theirs.get(index) != ours.get(index):
            raise VocabularyError(
                f"the tokenizers differ at id {index}: {_shown(theirs, index)} to the teacher, {_shown(ours, index)} to the "
                "student, so their logits are about different tokens; choose models of one family, or distil with "
                "--objective=hard_label, which reads the teacher's texts alone"
            )
    only = (tuple(tokens[i] for i in sorted(tokens) if i >= shared) for tokens in (theirs, ours))
    found = Alignment(shared, *only)
    logging.info("%s", found.describe())
    return found


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Every token by its id."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    if not tokens:
        raise VocabularyError("a tokenizer has no tokens; is its folder complete?")
    return tokens


def _shown(tokens: Mapping[int, str], index: int) -> str:
    return repr(tokens[index]) if index in tokens else "no token"


# --- The models -------------------------------------------------------------------------------------------------------


def aligned_teacher(
    config: ModelConfig, params: Mapping[str, Any], shared: int, vocab_size: int
) -> tuple[ModelConfig, dict[str, Any]]:
    """A teacher with the student's number of rows, that knows the shared tokens alone.

    Rows of the embedding and columns of the head beyond `vocab_size` are cut, missing ones are zeros; either way their ids
    are not below `shared`, and stand in no document and in no divergence. The teacher is then good for that: to be rolled
    out it needs its own tokens.

    Args:
      config, params: the teacher, its adapters merged.
      shared: from `align`.
      vocab_size: the student's.

    Raises:
      ValueError: more shared tokens than one of the two has rows, or an adapter on the head.
    """
    if not 1 <= shared <= min(config.vocab_size, vocab_size):
        raise ValueError(
            f"shared={shared} tokens do not fit into the teacher's vocab_size={config.vocab_size} and the student's "
            f"{vocab_size}; is each tokenizer its model's own?"
        )
    if config.adapts_head:
        raise ValueError("the teacher has an adapter on its head; merge its adapters first (models.lora.merged)")
    changed = {"embedding": fused.resized(params["embedding"], vocab_size, 0)}
    if not config.tie_embeddings:
        changed["head"] = fused.resized(params["head"], vocab_size, 1)
    return dataclasses.replace(config, vocab_size=vocab_size, num_tokens=_padding(shared, vocab_size)), {
        **params,
        **changed,
    }


def aligned_student(config: ModelConfig, shared: int) -> ModelConfig:
    """The student's shape while it learns: its rows as they are, of which it knows the shared tokens alone."""
    return dataclasses.replace(config, num_tokens=_padding(shared, config.vocab_size))


def _padding(shared: int, vocab_size: int) -> int:
    """`ModelConfig.num_tokens`: 0 where no row is padding."""
    return 0 if shared == vocab_size else shared


# --- The documents ----------------------------------------------------------------------------------------------------


def check_documents(
    trajectories: Sequence[Trajectory], shared: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Refuses documents with tokens that are not shared: one of the models has no row for them.

    Args:
      trajectories: the documents.
      shared: from `align`.
      tokenizer: of the documents, to show the token; its id alone is shown without one.

    Raises:
      VocabularyError: names the first such document, its token, where it stands, and how many documents there are.
    """
    wrong = [item for item in trajectories if len(item.tokens) and int(item.tokens.max()) >= shared]
    if not wrong:
        return
    first = wrong[0]
    place = int(np.argmax(first.tokens >= shared))
    index = int(first.tokens[place])
    token = "" if tokenizer is None else f" ({_shown(_by_id(tokenizer), index)})"
    raise VocabularyError(
        f"document {first.task_id} holds token {index}{token} at place {place}, which is not among the {shared} tokens that "
        f"teacher and student share; so do {len(wrong) - 1} other documents: leave them out, or use models of one tokenizer"
    )
