"""Token-exact rendering: messages in, token ids with the assistant's own tokens marked, and sampled ids back to messages.

A sampled token is never decoded and encoded again. Here a tool result is appended as the *difference* that it makes to
the template's text, so the template must be prefix-stable; one that is not is refused with the offending turn shown.
Families whose templates are not (Llama, Qwen) have renderers in `families`; `families.renderer_for` picks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from subl_jax.chat import parsing
from subl_jax.chat.messages import Message, ToolSchema

# The day that templates which write today's date are given: a conversation's ids must not depend on when it is rendered.
# It is the one that Llama 3.1's template itself falls back to.
DATE = "26 Jul 2024"


class PrefixUnstable(ValueError):
    """The chat template rewrites earlier turns when a later one is added."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as ids; `loss_mask` is true exactly on what the assistant writes, end-of-turn token included."""

    tokens: Int[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text that is encoded on its own: what the assistant writes in one turn, or the rest."""

    text: str
    assistant: bool


def first_difference(before: str, after: str, lead: int = 0) -> tuple[str, str]:
    """What stands in each text from `lead` characters before the first place where they differ on, for error messages."""
    place = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    start = max(0, place - lead)
    return before[start : place + 60], after[start : place + 60]


class Renderer:
    """Renders conversations with one tokenizer's chat template.

    Text that spells a marker becomes that marker, wherever it stands, as with the tokenizer itself.

    Attributes:
      tokenizer: any Hugging Face tokenizer with a chat template.
      end_id: the id that ends an assistant turn (the tokenizer's eos), as templates write it.
      end_ids: all that do; some families end a turn that calls a tool with a marker of its own.
    """

    # What templates are told besides the conversation; those that do not ask are not concerned.
    _template_arguments: Mapping[str, Any] = {"date_string": DATE}

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token; an assistant turn could never end")
        self.tokenizer = tokenizer
        self.end_id = int(cast(int, tokenizer.eos_token_id))
        self.end_ids: tuple[int, ...] = (self.end_id,)
        self._end_text = str(tokenizer.eos_token)

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, with nothing added around it."""
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of ids, markers included."""
        return cast(
            str, self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _texts(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[ToolSchema], open_turn: bool
    ) -> list[str]:
        if not conversations:  # the template engine looks at the first one
            return []
        return cast(
            list[str],
            self.tokenizer.apply_chat_template(
                cast(Any, list(conversations)),
                tools=cast(Any, list(tools) or None),
                tokenize=False,
                add_generation_prompt=open_turn,
                **self._template_arguments,
            ),
        )

    def opening(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        """Ids of the conversation so far, ending where the assistant begins to write."""
        return self.encode(self._texts([messages], tools, True)[0])

    def text(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> str:
        """The template's text of a conversation, with no turn opened behind it."""
        return self._texts([messages], tools, False)[0]

    def turn_text(self, messages: Sequence[Message], turn: Message, tools: Sequence[ToolSchema]) -> str:
        """What the template writes for one assistant turn after `messages`, from where the assistant begins."""
        opened = self._texts([messages], tools, True)[0]
        closed = self._texts([[*messages, turn]], tools, False)[0]
        self._check_prefix(opened, closed, len(messages))
        return closed[len(opened) :]

    def continuation(
        self, messages: Sequence[Message], added: Sequence[Message], tools: Sequence[ToolSchema]
    ) -> list[int]:
        """Ids that follow the assistant's end-of-turn token: what the template adds for `added`, up to the next turn.

        Args:
          messages: the conversation up to and including the assistant's last turn.
          added: the tool results.
          tools: the tools shown.

        Raises:
          PrefixUnstable: adding `added` changed the text of earlier turns.
        """
        before, after = self._texts([messages], tools, False)[0], self._texts([[*messages, *added]], tools, True)[0]
        self._check_prefix(before, after, len(messages))
        return self.encode(before[self._end_of_turn(before) :] + after[len(before) :])

    def _end_of_turn(self, text: str) -> int:
        """Index just behind the end-of-turn marker of a text that ends in an assistant turn.

        Templates may put white space after the marker, but nothing else: then the last marker belongs to an earlier turn.
        """
        stop = text.rfind(self._end_text) + len(self._end_text)
        if stop < len(self._end_text) or text[stop:].strip():
            raise ValueError(
                f"the chat template does not end an assistant turn with the eos token {self._end_text!r}: {text[-60:]!r}; "
                "a sampled turn could never end there; set the tokenizer's eos_token to the template's end-of-turn marker"
            )
        return stop

    def _check_prefix(self, before: str, after: str, turn: int) -> None:
        if after.startswith(before):
            return
        was, became = first_difference(before, after)
        raise PrefixUnstable(
            f"the chat template rewrites earlier text when turn {turn} is added: {was!r} became {became!r}; "
            "use a prefix-stable template or an incremental renderer for this family"
        )

    def _split(self, conversation: Sequence[Message], prefixes: dict[tuple[int, bool], str]) -> list[Segment]:
        """Splits a conversation's text at the places where the assistant starts and stops writing."""
        segments, cursor = [], 0
        whole = prefixes[len(conversation), False]
        # Every text must start with the one before it; the chain names the first turn that rewrites what precedes it.
        earlier, after = "", 0
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            opened, closed = prefixes[turn, True], prefixes[turn + 1, False]
            self._check_prefix(earlier, opened, after)
            self._check_prefix(opened, closed, turn)
            earlier, after = closed, turn + 1
            stop = self._end_of_turn(closed)
            segments += [Segment(closed[cursor : len(opened)], False), Segment(closed[len(opened) : stop], True)]
            cursor = stop
        self._check_prefix(earlier, whole, after)
        if whole[cursor:].strip():
            segments.append(Segment(whole[cursor:], False))
        return segments

    def _segments(self, conversations: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]) -> list[list[Segment]]:
        """The segments of whole conversations; those that show the same tools go through the template together."""
        segments: list[list[Segment]] = [[] for _ in conversations]
        for members in group_by_tools(conversations):
            tools = conversations[members[0]][1]
            for open_turn in (True, False):
                wanted = [
                    (index, turn + (not open_turn))
                    for index in members
                    for turn, message in enumerate(conversations[index][0])
                    if message["role"] == "assistant"
                ]
                if not open_turn:
                    wanted += [(index, len(conversations[index][0])) for index in members]
                texts = self._texts([conversations[index][0][:stop] for index, stop in wanted], tools, open_turn)
                if open_turn:
                    opened = {key: text for key, text in zip(wanted, texts, strict=True)}
                else:
                    closed = {key: text for key, text in zip(wanted, texts, strict=True)}
            for index in members:
                messages = conversations[index][0]
                prefixes = {
                    (turn, True): opened[index, turn] for turn in range(len(messages)) if (index, turn) in opened
                }
                prefixes |= {
                    (stop, False): closed[index, stop] for stop in range(len(messages) + 1) if (index, stop) in closed
                }
                segments[index] = self._split(messages, prefixes)
        return segments

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return (
            cast(list[list[int]], self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []
        )

    def render(self, conversations: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]) -> list[Rendered]:
        """Renders whole conversations as an episode would have produced them: segment by segment.

        Conversations that show the same tools go through the template together, and all segments through the tokenizer
        together, which is an order of magnitude faster than one by one.
        """
        segments = self._segments(conversations)
        encoded = iter(self._encode_all([segment.text for parts in segments for segment in parts]))
        rendered = []
        for parts in segments:
            ids = [next(encoded) for _ in parts]
            mask = np.repeat([part.assistant for part in parts], [len(piece) for piece in ids])
            rendered.append(Rendered(np.asarray([i for piece in ids for i in piece], np.int32), mask.astype(bool)))
        return rendered

    def parse(self, ids: Sequence[int]) -> Message:
        """The assistant message that sampled ids spell; see `parsing` for what makes a turn `unparseable`."""
        ids = list(ids)
        return self._parse_text(self.decode(ids[:-1] if ids and ids[-1] in self.end_ids else ids))

    def _parse_text(self, text: str) -> Message:
        return parsing.parse_tagged(text)


def group_by_tools(conversations: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]) -> list[list[int]]:
    """Indices of the conversations, those that show the same tools together."""
    groups: dict[str, list[int]] = {}
    for index, (_, tools) in enumerate(conversations):
        groups.setdefault(json.dumps(tools), []).append(index)
    return list(groups.values())
