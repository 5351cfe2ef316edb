"""Token-exact rendering for families whose templates rewrite earlier turns: Llama 3, Qwen 2.5, Qwen 3.

A tokenizer in; a renderer with the interface of `Renderer` out. A conversation's beginning (system turn, tools, first user
turn) comes from the template; every later turn is written here, so that an episode's tokens never change. At construction
both ways are compared on a few conversations; a template that writes anything else is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jinja2
from absl import logging
from transformers import PreTrainedTokenizerBase

from subl_jax.chat import parsing
from subl_jax.chat.markers import Markers
from subl_jax.chat.messages import Message, ToolCall, ToolSchema, assistant, calls_of, system, tool, user
from subl_jax.chat.rendering import DATE, Renderer, Segment, first_difference, group_by_tools

Hide = Callable[[str], str]

# What Qwen 3 writes at the beginning of a turn that shall not think.
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


class FormatMismatch(ValueError):
    """The chat template bears a family's marks but writes another format."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's template writes the turns behind the beginning of a conversation.

    Attributes:
      name: for messages.
      signs: texts in the template's source that tell the family; all must be there.
      markers: added tokens that the format stands on.
      end: the end-of-turn marker, the last token that the assistant writes.
      other_ends: markers that end a sampled turn too, though the template never writes them.
      gap: what stands between a turn's end and the next turn.
      prompt: what opens an assistant's turn.
      turn: an assistant message -> its text, without the end. `hide` is applied to all text that is not the format's.
      added: messages between two assistant turns -> their text.
      parse: the text of a sampled turn -> its message.
      tools_in_user_turn: whether the tool list stands in the first user turn and not in the system turn.
    """

    name: str
    signs: tuple[str, ...]
    markers: tuple[str, ...]
    end: str
    gap: str
    prompt: str
    turn: Callable[[Message, Hide], str]
    added: Callable[[Sequence[Message], Hide], str]
    parse: Callable[[str], Message]
    tools_in_user_turn: bool = False
    other_ends: tuple[str, ...] = ()


def _call(call: ToolCall, arguments: str, hide: Hide) -> str:
    # Separators and letters beyond ASCII as the templates' own filter `tojson` has them.
    written = json.dumps(dict(call.arguments), ensure_ascii=False)
    return f'{{"name": "{hide(call.name)}", "{arguments}": {hide(written)}}}'


# --- Llama 3.1, 3.2 and 3.3 ---------------------------------------------------------------------------------------------


def _llama_turn(message: Message, hide: Hide) -> str:
    calls = calls_of(message)
    if not calls:
        return hide(message["content"].strip())
    first = calls[0]
    if len(calls) > 1:
        raise ValueError(
            f"Llama's format holds one tool call in a turn and this turn has {len(calls)} "
            f"({', '.join(call.name for call in calls)}); give each call a turn of its own"
        )
    if message["content"].strip():
        raise ValueError(
            f"Llama's format has no place for text beside a tool call and would drop {message['content'][:60]!r}; "
            "leave the text out or give it a turn of its own"
        )
    return _call(first, "parameters", hide)


def _llama_added(messages: Sequence[Message], hide: Hide) -> str:
    pieces = []
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "tool":
            # The template quotes whatever can be iterated over, and so every string.
            role, content = "ipython", json.dumps(message["content"], ensure_ascii=False)
        pieces.append(f"<|start_header_id|>{role}<|end_header_id|>\n\n{hide(content)}<|eot_id|>")
    return "".join(pieces)


LLAMA = Family(
    name="Llama 3",
    signs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "ipython", '"parameters"'),
    markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    end="<|eot_id|>",
    gap="",
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    turn=_llama_turn,
    added=_llama_added,
    parse=parsing.parse_bare,
    tools_in_user_turn=True,
    other_ends=("<|eom_id|>",),  # "end of message": a call was written, and its result is waited for
)

# --- Qwen 2.5 and Qwen 3 ------------------------------------------------------------------------------------------------


def _qwen_turn(message: Message, hide: Hide) -> str:
    calls = [f"<tool_call>\n{_call(call, 'arguments', hide)}\n</tool_call>" for call in calls_of(message)]
    return "\n".join([hide(message["content"])] * bool(message["content"]) + calls)


def _qwen3_turn(message: Message, hide: Hide) -> str:
    # The line breaks before a turn's text are the empty thought's, which the template strips from the text.
    content = message["content"].lstrip("\n")
    thought = parsing.THOUGHT.match(content)
    if thought is None:
        return _qwen_turn({**message, "content": content}, hide)
    rest = _qwen_turn({**message, "content": content[thought.end() :]}, hide)
    return f"<think>{hide(thought[1])}</think>{rest}"


def _qwen_added(messages: Sequence[Message], hide: Hide) -> str:
    text, previous = "", ""
    for message in messages:
        role, content = message["role"], hide(message["content"])
        if previous == "tool" != role:
            text += "<|im_end|>\n"
        if role == "tool":
            # Results of one turn's calls stand together in one user turn.
            text += "" if previous == "tool" else "<|im_start|>user"
            text += f"\n<tool_response>\n{content}\n</tool_response>"
        else:
            text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        previous = role
    return text + "<|im_end|>\n" * (previous == "tool")


QWEN = Family(
    name="Qwen 2.5",
    signs=("<|im_start|>", "<|im_end|>", "<tool_call>", "<tool_response>"),
    markers=("<|im_start|>", "<|im_end|>"),
    end="<|im_end|>",
    gap="\n",
    prompt="<|im_start|>assistant\n",
    turn=_qwen_turn,
    added=_qwen_added,
    parse=parsing.parse_tagged,
)

QWEN3 = dataclasses.replace(
    QWEN,
    name="Qwen 3",
    signs=(*QWEN.signs, "enable_thinking"),
    prompt=QWEN.prompt + EMPTY_THOUGHT,
    turn=_qwen3_turn,
    parse=parsing.parse_thinking,
)

FAMILIES = (LLAMA, QWEN3, QWEN)  # Qwen 2.5 behind Qwen 3, whose marks hold its own


# --- The renderer -------------------------------------------------------------------------------------------------------

_PROBE_TOOLS: list[ToolSchema] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "looks",
            "parameters": {"type": "object", "properties": {"path": {"type": "string", "description": "where"}}},
        },
    }
    for name in ("list", "read")
]
_PROBE_CALL = assistant(calls=[ToolCall("read", {"path": '/é "1"', "n": [1, None]})])

# Between them: with and without a system turn, text and calls, one and several results, a second user turn, and what
# templates trim or quote: spaces around a text, quotes, line breaks, letters beyond ASCII.
_PROBES: list[list[Message]] = [
    [system("be brief"), user("where?"), _PROBE_CALL, tool("read", ' a "b"\nö '), assistant("there")],
    [user("one"), assistant("two"), user(" three "), _PROBE_CALL, tool("read", "x"), tool("list", "y"), _PROBE_CALL]
    + [tool("read", "z"), user("so?"), assistant("so")],
    [user("one"), assistant("two"), system("aside"), user("three")],
]


class FamilyRenderer(Renderer):
    """Renders a family's conversations so that a prefix of an episode has a prefix of its tokens.

    The template is asked with the date `rendering.DATE` and, in Qwen 3, with `enable_thinking=False`: an assistant's
    turn then starts behind the empty thought, which belongs to the prompt and not to the assistant's tokens, in *every*
    turn. Qwen 3's template drops it from all turns but the last; dropping it from an episode would rewrite tokens that
    the model has seen, so here it stays. A thought that the model samples all the same stays in the tokens and is left
    out of the parsed message.

    Text of user and tool turns and everything in an assistant's message is text: markers spelled in it are encoded letter
    by letter and can neither end a turn nor begin one. The system turn and the tool schemas are the experimenter's and
    are encoded as the tokenizer would.

    Args:
      tokenizer: its eos token must be the family's end of turn, and it must have a fast tokenizer.
      family: which format.

    Raises:
      ValueError: eos is another token, or a marker of the format is not one token.
      FormatMismatch: the template and the family's code write different texts; both are shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
        super().__init__(tokenizer)
        self.family = family
        self._markers = Markers(tokenizer)
        self._template_arguments: Mapping[str, Any] = {"date_string": DATE, "enable_thinking": False}
        missing = [marker for marker in family.markers if marker not in self._markers]
        if missing:
            raise ValueError(
                f"the chat template is of the {family.name} family, but {missing[0]!r} is no token of this tokenizer; use "
                "the tokenizer and the template of one model"
            )
        if self._end_text != family.end:
            raise ValueError(
                f"the chat template does not end an assistant turn with the eos token {self._end_text!r} but with "
                f"{family.end!r} ({family.name}); a sampled turn could never end there; set the tokenizer's eos_token to "
                "the template's end-of-turn marker (a base model's is another one; instruct models have it right)"
            )
        known = [marker for marker in family.other_ends if marker in self._markers]
        self.end_ids = (self.end_id, *(cast(int, tokenizer.convert_tokens_to_ids(marker)) for marker in known))
        self._verify()

    def _verify(self) -> None:
        """Compares both ways of rendering on the probes: how a turn is opened, and all that stands before it.

        Empty thoughts are left out of the latter, for the template drops them from earlier turns.
        """
        for tools in ([], _PROBE_TOOLS):
            try:
                opened, closed = (self._texts(_PROBES, tools, open_turn) for open_turn in (True, False))
                for before, after in zip(closed, opened, strict=True):
                    self._compare(before + self.family.prompt, after)
                for probe, theirs in zip(_PROBES, closed, strict=True):
                    ours = self._whole(probe, tools, False)
                    self._compare(ours.replace(EMPTY_THOUGHT, ""), theirs.replace(EMPTY_THOUGHT, ""))
            except (jinja2.TemplateError, TypeError) as error:
                raise FormatMismatch(
                    f"the chat template bears the marks of {self.family.name} but fails on a conversation that this "
                    f"family can hold: {error}; restore the family's own template"
                ) from error

    def _compare(self, expected: str, written: str) -> None:
        if expected == written:
            return
        was, became = first_difference(expected, written, lead=30)
        raise FormatMismatch(
            f"the chat template bears the marks of {self.family.name} but writes {became!r} where this family's format has "
            f"{was!r}; restore the family's own template, or use Renderer(tokenizer) if this one is prefix-stable"
        )

    def _hidden(self, message: Message) -> Message:
        if message["role"] == "system":
            return message
        return {**message, "content": self._markers.hide(message["content"])}

    def _heads(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[ToolSchema], open_turn: bool
    ) -> list[str]:
        """The template's text of what stands before the first assistant turn, which is opened if there is one."""
        heads = [messages[: _next_turn(messages, 0)] for messages in conversations]
        if not all(heads):
            raise ValueError(
                "a conversation must begin with a system or user turn: this one is empty or the assistant's"
            )
        wanted = [open_turn or len(head) < len(whole) for head, whole in zip(heads, conversations, strict=True)]
        texts = {}
        for opened in (False, True):
            members = [index for index, flag in enumerate(wanted) if flag == opened]
            hidden = [[self._hidden(message) for message in heads[index]] for index in members]
            texts |= dict(zip(members, self._texts(hidden, tools, opened), strict=True))
        return [texts[index] for index in range(len(heads))]

    def _pieces(self, messages: Sequence[Message], head: str, open_turn: bool) -> list[Segment]:
        """Segments of a conversation, markers hidden: the head, then each turn and what is added behind it."""
        family, hide = self.family, self._markers.hide
        segments, text, turn = [], head, _next_turn(messages, 0)
        while turn < len(messages):
            following = _next_turn(messages, turn + 1)
            segments += [Segment(text, False), Segment(family.turn(messages[turn], hide) + family.end, True)]
            text = family.gap + family.added(messages[turn + 1 : following], hide)
            text += family.prompt * (open_turn or following < len(messages))
            turn = following
        return [*segments, Segment(text, False)]

    def _whole(self, messages: Sequence[Message], tools: Sequence[ToolSchema], open_turn: bool) -> str:
        [head] = self._heads([messages], tools, open_turn)
        return self._markers.show("".join(piece.text for piece in self._pieces(messages, head, open_turn)))

    def _segments(self, conversations: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]]) -> list[list[Segment]]:
        segments: list[list[Segment]] = [[] for _ in conversations]
        for members in group_by_tools(conversations):
            talks = [conversations[index][0] for index in members]
            heads = self._heads(talks, conversations[members[0]][1], False)
            for index, messages, head in zip(members, talks, heads, strict=True):
                pieces = self._pieces(messages, head, False)
                # An episode is over at its end token: white space behind it belongs to no one.
                segments[index] = pieces if pieces[-1].text.strip() else pieces[:-1]
        return segments

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self._markers.encode(texts)

    def _parse_text(self, text: str) -> Message:
        return self.family.parse(text)

    def opening(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[int]:
        """Ids of the conversation so far, ending where the assistant begins to write."""
        [head] = self._heads([messages], tools, True)
        pieces = self._encode_all([piece.text for piece in self._pieces(messages, head, True)])
        return [index for ids in pieces for index in ids]

    def text(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> str:
        """An episode's text of a conversation, with no turn opened behind it.

        Where the tools stand in the first user turn and there is none yet, the text ends where that turn's own would
        begin: it is how every conversation with this system turn and these tools starts.
        """
        if self.family.tools_in_user_turn and tools and all(message["role"] == "system" for message in messages):
            stop = "\x00"  # a character that no system turn or schema holds
            return self._texts([[*messages, user(stop)]], tools, False)[0].split(stop)[0]
        return self._whole(messages, tools, False)

    def turn_text(self, messages: Sequence[Message], turn: Message, tools: Sequence[ToolSchema]) -> str:
        """The text of one assistant turn, from where the assistant begins to the end-of-turn marker, inclusive."""
        del messages, tools  # a family's turn does not depend on what precedes it
        return self._markers.show(self.family.turn(turn, self._markers.hide)) + self.family.end

    def continuation(
        self, messages: Sequence[Message], added: Sequence[Message], tools: Sequence[ToolSchema]
    ) -> list[int]:
        """Ids that follow the assistant's end-of-turn token, up to the next turn; see `Renderer.continuation`.

        Raises:
          ValueError: `messages` does not end in an assistant turn, or `added` holds one.
        """
        del tools
        if not messages or messages[-1]["role"] != "assistant" or _next_turn(added, 0) < len(added):
            raise ValueError(
                "a continuation follows an assistant turn and holds none: pass only what is added behind it"
            )
        family = self.family
        [ids] = self._encode_all([family.gap + family.added(added, self._markers.hide) + family.prompt])
        return ids


def _next_turn(messages: Sequence[Message], start: int) -> int:
    """Index of the first assistant turn from `start` on; the number of messages if there is none."""
    turns = (index for index in range(start, len(messages)) if messages[index]["role"] == "assistant")
    return next(turns, len(messages))


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    template: Any = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def _check_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that writes today's date whatever it is told: ids would depend on the day."""
    if "strftime_now" not in _source(tokenizer):
        return
    day = "1 May 1111"
    if day not in str(
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], tokenize=False, date_string=day
        )
    ):
        raise ValueError(
            "the chat template writes today's date (strftime_now) and takes no date_string, so the same conversation "
            "would have other ids tomorrow; let it take date_string, as Llama 3.2's does"
        )


def renderer_for(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """The renderer of a tokenizer's family; the generic one, which asks a prefix-stable template, if it has none.

    Args:
      tokenizer: with its chat template.

    Raises:
      FormatMismatch: the template bears a family's marks but writes another format.
      ValueError: eos is not the end of a turn, a marker is missing, or the template cannot do without today's date.
    """
    _check_date(tokenizer)
    source = _source(tokenizer)
    family = next((family for family in FAMILIES if all(sign in source for sign in family.signs)), None)
    logging.info("chat template: %s", f"{family.name} family" if family else "generic, must be prefix-stable")
    return FamilyRenderer(tokenizer, family) if family else Renderer(tokenizer)
