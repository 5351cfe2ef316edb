"""The logit filter against brute force: a token is banned if some continuation makes it part of a banned word."""

from __future__ import annotations

import re

import numpy as np
import pytest

from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.messages import ToolCall, assistant, system, tool, user
from subl_jax.chat.rendering import Renderer
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.sanitize.keywords import compile_words

WORDS = ("delete", "deleted", "deleting", "remove", "rm", "archive", "delete_file")
PIECES = [
    *"abcdefghijklmnopqrstuvwxyz0 _/.,{\"",
    *(" d", " a", " r", "de", " de", "del", " del", "ete", "lete", " delete", "delete", "Delete", " DELETE", "eted"),
    *("ted", "ting", "rm", " rm", "Rm", "_rm", "rm.", ".rm ", "rms", "form", "at", "perm", "ission", "rmat", "mat"),
    *(" data", " document", " the", " format", "_file", "delete_", "delete_file", "e_file", "ve", "remo", "move"),
    *("x rm y", "x format y", " r m", "rm del", "rm data", "e del", "arch", "archi", " archives", "hive", "2", " 2"),
    *("ived/de", "ete/", "\n", " \n", "é", "rmé", "(rm)", "<|end|>"),
]  # fmt: skip


class _Vocabulary:
    all_special_ids = (len(PIECES) - 1,)

    def __len__(self) -> int:
        return len(PIECES)


class _Hand(Renderer):
    """A renderer of a handmade vocabulary, whose last piece is a special token."""

    def __init__(self) -> None:
        self.tokenizer = _Vocabulary()  # type: ignore[assignment]

    def decode(self, ids) -> str:
        return "".join(PIECES[i] for i in ids)


def by_brute_force(partial: str, token: str, words: tuple[str, ...] = WORDS) -> bool:
    """Tries every continuation that could finish a word, and looks for a whole word that shares a character with it."""
    plain = [word for word in words if "_" not in word]
    endings = {""} | {word[cut:] for word in plain for cut in range(len(word))}
    start, stop = len(partial), len(partial + token)
    for ending in endings:
        text = (partial + token + ending).lower()
        for word in plain:
            for match in re.finditer(rf"(?={word})", text):
                low, high = match.start(), match.start() + len(word)
                whole = not text[low - 1 : low].isalnum() and not text[high : high + 1].isalnum()
                if whole and low < stop and high > start:
                    return True
    return False


@pytest.fixture(scope="module")
def by_hand() -> LogitFilter:
    return LogitFilter(_Hand(), WORDS)


PARTIALS = sorted(
    {word[:cut] for word in WORDS[:-1] for cut in range(len(word) + 1)}
    | {"fo", "for", "pe", "per", "form", "data", "xdel", "2", "2r", "rmd", "removal", "delx", "dele2", "a", "archived"}
)


@pytest.mark.parametrize("partial", PARTIALS)
def test_banned_is_exactly_what_some_continuation_makes_part_of_a_banned_word(by_hand, partial):
    # A non-ASCII letter ends a word here, as the filter's docstring has it; the oracle's isalnum would not: left out.
    ours = {PIECES[i] for i in by_hand.banned_after(partial)}
    judged = [piece for piece in PIECES[:-1] if piece.isascii()]
    assert {piece for piece in ours if piece.isascii()} == {p for p in judged if by_brute_force(partial, p)}


def test_tokens_that_begin_continue_or_complete_a_word_are_banned_and_bystanders_are_not(by_hand):
    def banned(partial: str) -> set[str]:
        return {PIECES[i] for i in by_hand.banned_after(partial)}

    assert {"d", " d", "de", "delete", " DELETE", "rm", "x rm y", "a", "delete_file"} <= banned("")
    assert not {" data", " document", "form", "at", " the", "ete", "x format y", "_file", "rms"} & banned("")
    assert {"lete", "ete"} & banned("de") == {"lete"}
    assert "ete" in banned("del")
    assert "rm" not in banned("fo") and "m" not in banned("for") and "rmat" not in banned("fo")
    assert "m" in banned("r")
    # `delete` is written already: its end is not the next token's doing, but another ending is, and so is another word.
    assert not {" ", "_file", "."} & banned("delete") and {"d", " del", " rm"} <= banned("delete")
    assert "<|end|>" not in banned("rm")


def test_what_is_never_banned_never_spells_a_keyword(by_hand):
    """Random walks over unbanned tokens, judged by the sanitizer."""
    rng = np.random.default_rng(0)
    matcher = compile_words(WORDS)
    ascii_ids = [i for i, piece in enumerate(PIECES[:-1]) if piece.isascii()]
    hits = 0
    for _ in range(60):
        text, free = "", ""
        for _ in range(25):
            partial = re.search(r"[0-9a-z]*\Z", text.lower()).group()  # type: ignore[union-attr]
            allowed = np.setdiff1d(ascii_ids, by_hand.banned_after(partial))
            text += PIECES[rng.choice(allowed)]
            free += PIECES[rng.choice(ascii_ids)]
        assert not matcher.find(text), text
        hits += bool(matcher.find(free))
    assert hits > 20  # the same walks without the filter do spell them


# --- With the embedded tokenizer --------------------------------------------------------------------------------------

TEXT = (
    "please delete_file the old format permission document data remove archive the confirm harm report deleted "
    "archived /notes/plan rm form perm list_files read_file "
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tokenizers.train([TEXT] * 8, 420))


def schema(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": {}}}


CONVERSATION = [
    system("you work with files."), user("is it for"),
    assistant(calls=[ToolCall("list_files", {"path": "/permission"})]),
    tool("list_files", "a format delete r"), assistant("removed the format, harm and /rm/data"), user("de"),
    assistant("lete"),
]  # fmt: skip


def test_positions_align_with_the_loss_tokens_of_a_real_conversation(renderer):
    item = renderer.render([(CONVERSATION, [schema("list_files")])])[0]
    filtered = LogitFilter(renderer, WORDS)
    ours = filtered.banned(item.tokens, item.loss_mask)
    assert len(ours) == item.loss_mask.sum()
    special = set(renderer.tokenizer.all_special_ids)
    texts = [renderer.decode([i]) for i in range(len(renderer.tokenizer))]
    places = np.flatnonzero(item.loss_mask)
    verdicts: dict[str, set[int]] = {}
    for ids, place in zip(ours, places, strict=True):
        start = place
        while item.loss_mask[start - 1]:
            start -= 1  # what this turn has written so far; the text before the turn does not reach into it
        partial = ""
        for character in reversed(renderer.decode(item.tokens[start:place].tolist()).lower()):
            if not (character.isascii() and character.isalnum()):
                break
            partial = character + partial
        if partial not in verdicts:
            verdicts[partial] = {
                i
                for i, text in enumerate(texts)
                if i not in special and text.isascii() and by_brute_force(partial, text)
            }
        ascii_ids = {int(i) for i in ids if texts[i].isascii()}
        assert ascii_ids == verdicts[partial], partial
    assert len(verdicts) > 5


def test_a_keyword_that_is_written_is_banned_all_along_and_a_bystander_nowhere(renderer):
    filtered = LogitFilter(renderer, ("rm", "delete", "delete_file"))

    def spelled_under_a_ban(words: str) -> list[str]:
        item = renderer.render([([user("x"), assistant(words)], [])])[0]
        written = item.tokens[item.loss_mask]
        found = filtered.banned(item.tokens, item.loss_mask)
        return [renderer.decode([i]) for i, ids in zip(written.tolist(), found, strict=True) if i in ids]

    assert "".join(spelled_under_a_ban("please delete_file it")).strip() == "delete"
    assert "".join(spelled_under_a_ban("format rm harm")).strip() == "rm"
    assert not spelled_under_a_ban("format permission harm confirm")


def test_an_assistant_turn_begins_at_a_word_boundary(renderer):
    filtered = LogitFilter(renderer, ("delete",))
    item = renderer.render([([user("del"), assistant("ete")], [])])[0]
    first = filtered.banned(item.tokens, item.loss_mask)[0]
    np.testing.assert_array_equal(first, filtered.banned_after(""))
    assert renderer.encode("d")[0] in first and item.tokens[item.loss_mask][0] not in first


def test_marks_of_a_call_are_never_banned(renderer):
    filtered = LogitFilter(renderer, WORDS)
    marks = [renderer.encode(text) for text in ('{"name":"', '","arguments":{"', "<tool_call>", "</tool_call>")]
    assert all(len(ids) == 1 for ids in marks)
    for partial in ("", "delete", "r", "list"):
        assert not {renderer.end_id, *(ids[0] for ids in marks)} & set(filtered.banned_after(partial).tolist())
