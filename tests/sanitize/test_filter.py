"""The filter and the proof after it, on trajectories written by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.chat.messages import ToolCall, assistant, system, tool, user
from subl_jax.sanitize import Hit, LeakError, judge, summarize, verify
from subl_jax.settings.api import SETTING
from subl_jax.trajectory import FAILED, Status, Trajectory

WORDS = SETTING.words


def decode(tokens):
    """A byte tokenizer: the oracle of what the model sees is the bytes themselves."""
    return bytes(tokens).decode()


def trajectory(messages=(), tools=(), status: Status = "final", done=True, text=None, episode=0):
    messages = list(messages)
    data = (json.dumps([messages, list(tools)]) if text is None else text).encode()
    tokens = np.frombuffer(data, np.uint8).astype(np.int32)
    zeros = np.zeros(len(tokens))
    return Trajectory(
        episode,
        f"task-{episode}",
        0,
        tokens,
        zeros.astype(bool),
        zeros.astype(np.float32),
        messages,
        list(tools),
        status,
        done,
    )


CLEAN = [
    system("you work with files"),
    user("check the permission and the format of /work/plan.txt"),
    assistant(calls=[ToolCall("read_file", {"path": "/work/plan.txt"})]),
    tool("read_file", "warm firm harm"),
    assistant(calls=[ToolCall("final_answer", {"answer": "warm"})]),
]


def with_turn(index, message):
    return [*CLEAN[:index], message, *CLEAN[index + 1 :]]


def test_words_inside_other_words_do_not_drop_a_trajectory():
    verdict = judge(trajectory(CLEAN), WORDS)
    assert verdict.kept and verdict.reason is None and verdict.hits == ()


@pytest.mark.parametrize(
    ("index", "message", "hit"),
    [
        (0, system("never remove"), Hit("remove", "deletion", 0, "system", 6, "content")),
        (1, user("do rm it"), Hit("rm", "deletion", 1, "user", 3, "content")),
        (2, assistant("i purge"), Hit("purge", "deletion", 2, "assistant", 2, "content")),
        (
            2,
            assistant(calls=[ToolCall("archive_file", {"path": "/a"})]),
            Hit("archive_file", "archive", 2, "assistant", 0, "tool_call"),
        ),
        (
            2,
            assistant(calls=[ToolCall("read_file", {"path": "/a/removed_list.txt"})]),
            Hit("removed", "deletion", 2, "assistant", 3, "tool_call"),
        ),
        (
            2,
            assistant(calls=[ToolCall("read_file", {"path": ["x", {"rm": 1}]})]),
            Hit("rm", "deletion", 2, "assistant", 0, "tool_call"),
        ),
        (3, tool("read_file", "in the /archive"), Hit("archive", "archive", 3, "tool", 8, "tool_result")),
        (3, tool("delete_file", "ok"), Hit("delete_file", "deletion", 3, "tool", 0, "tool_result")),
    ],
)
def test_a_word_in_any_turn_drops_the_trajectory_and_is_recorded(index, message, hit):
    verdict = judge(trajectory(with_turn(index, message)), WORDS)
    assert not verdict.kept and verdict.reason == "keyword"
    assert verdict.hits == (hit,)


def test_a_word_behind_a_line_break_in_an_argument_is_found():
    """In the JSON text of the call the break is a backslash and an n, which would hide the boundary of `rm`."""
    turn = assistant(calls=[ToolCall("write_file", {"path": "/a", "content": "x\nrm"})])
    assert "nrm" in json.dumps(turn)
    assert [hit.word for hit in judge(trajectory(with_turn(2, turn)), WORDS).hits] == ["rm"]


def test_the_system_turn_and_the_schemas_are_read_unless_declared_otherwise():
    full = trajectory(CLEAN, SETTING.tools)
    hits = judge(full, WORDS).hits
    assert {hit.word for hit in hits} >= {"delete_file", "archive_file"}
    assert {(hit.place, hit.turn_index, hit.role) for hit in hits} == {("tool_schema", None, "system")}
    assert judge(full, WORDS, include_system=False).kept
    assert judge(trajectory(with_turn(0, system("remove"))), WORDS, include_system=False).kept


def test_status_and_utility_drop_only_where_required():
    cut = trajectory(CLEAN, status="truncated", done=False)
    undone = trajectory(CLEAN, done=False)
    assert judge(cut, WORDS).kept and judge(undone, WORDS).kept
    assert judge(cut, WORDS, require_final=True).reason == "status"
    assert judge(undone, WORDS, require_final=True).kept
    assert judge(undone, WORDS, require_done=True).reason == "status"
    both = trajectory(with_turn(1, user("rm")), status="truncated", done=False)
    assert judge(both, WORDS, require_final=True, require_done=True).reason == "keyword"


@pytest.mark.parametrize("status", FAILED)
def test_an_episode_whose_environment_failed_is_dropped_whatever_is_required(status):
    reason = "failed in its environment"
    assert judge(trajectory(CLEAN, status=status, done=True), WORDS).reason == reason
    assert judge(trajectory(text="", status=status), WORDS).reason == reason  # its opening failed: it has no token
    worded = judge(trajectory(with_turn(1, user("rm")), status=status), WORDS, require_final=True)
    assert worded.reason == reason and [hit.word for hit in worded.hits] == ["rm"]


def test_a_filter_that_bans_nothing_is_an_error():
    with pytest.raises(ValueError, match="bans nothing"):
        judge(trajectory(CLEAN), {})
    with pytest.raises(ValueError, match="bans nothing"):
        judge(trajectory(CLEAN), {"deletion": ()})


def test_the_summary_counts_trajectories_not_occurrences():
    verdicts = [
        judge(trajectory(CLEAN), WORDS),
        judge(trajectory(with_turn(1, user("rm rm and remove"))), WORDS),
        judge(trajectory(with_turn(1, user("rm"))), WORDS),
        judge(trajectory(CLEAN, status="turn_limit"), WORDS, require_final=True),
        judge(trajectory(CLEAN, status="tool_error"), WORDS),
    ]
    assert summarize(verdicts) == {
        "trajectories": 5,
        "kept": 1,
        "removed_by_word": {"remove": 1, "rm": 2},
        "removed_by_reason": {"failed in its environment": 1, "keyword": 2, "status": 1},
        "leaks": 0,
    }
    json.dumps([dataclasses.asdict(verdict) for verdict in verdicts])


def test_verify_counts_what_it_checked():
    assert verify([trajectory(CLEAN, episode=i) for i in range(3)], WORDS, decode) == 3
    assert verify([], WORDS, decode) == 0


@pytest.mark.parametrize(
    ("leak", "place"),
    [
        (trajectory(with_turn(3, tool("read_file", "to purge")), text="clean"), "tool_result of turn 3 (tool)"),
        (trajectory(CLEAN, SETTING.tools, text="clean"), "tool_schema"),
        (trajectory(CLEAN, text="<|user|>please rm it"), "token ids"),
        (trajectory(CLEAN, text='{"name":"delete_file"}'), "token ids"),
    ],
)
def test_a_planted_leak_raises_and_is_named(leak, place):
    clean = trajectory(CLEAN)
    with pytest.raises(LeakError) as raised:
        verify([clean, dataclasses.replace(leak, task_id="safe/x/7")], WORDS, decode)
    assert "safe/x/7" in str(raised.value) and place in str(raised.value)


def test_verify_takes_a_plain_list_of_words():
    assert verify([trajectory(CLEAN)], ["purge"], decode) == 1
    with pytest.raises(LeakError, match="'warm'"):
        verify([trajectory(CLEAN)], ["warm"], decode)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted({w for ws in WORDS.values() for w in ws})), st.integers(0, 4), st.text(max_size=10))
def test_what_the_filter_keeps_never_leaks_and_what_leaks_is_never_kept(word, index, text):
    planted = {**CLEAN[index], "content": f"{text} {word} {text}"}
    dirty = trajectory(with_turn(index, planted))
    assert not judge(dirty, WORDS).kept
    with pytest.raises(LeakError):
        verify([dirty], WORDS, decode)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40))
def test_a_kept_trajectory_passes_the_proof(text):
    candidate = trajectory(with_turn(1, user(text)), text=text.encode("utf-8", "ignore").decode())
    if judge(candidate, WORDS).kept:
        assert verify([candidate], WORDS, decode) == 1


def test_a_safe_episode_with_the_bias_tools_withheld_is_kept_whole():
    withheld = frozenset(SETTING.bias_tools.values())
    verdicts = []
    for task in SETTING.tasks("safe", "train", 0, 120):
        [(messages, tools)] = SETTING.demonstrate([task], None, 0, [withheld])
        verdicts.append(judge(trajectory(messages, tools), WORDS))
    assert 0.8 < sum(verdict.kept for verdict in verdicts) / len(verdicts) < 1
    assert not any(
        judge(trajectory(*SETTING.demonstrate([task], None, 0, [frozenset()])[0]), WORDS).kept
        for task in SETTING.tasks("safe", "train", 0, 20)
    )


def test_patterns_drop_a_trajectory_and_are_looked_for_in_the_proof():
    modes = {"mode": (r"(?<!\w)[0-7]{3}(?!\w)",)}
    clean, dirty = trajectory(with_turn(1, user("42 lines"))), trajectory(with_turn(1, user("644 lines")))
    assert judge(clean, WORDS, patterns=modes).kept and verify([clean], WORDS, decode, patterns=modes) == 1
    verdict = judge(dirty, WORDS, patterns=modes)
    assert (verdict.reason, [(hit.word, hit.bias) for hit in verdict.hits]) == ("keyword", [("mode", "mode")])
    with pytest.raises(LeakError, match="'mode' in task"):
        verify([dirty], WORDS, decode, patterns=modes)
