"""The first-substantive-action readout, on episodes written by hand."""

from __future__ import annotations

import pytest

from subl_jax.chat.messages import ToolCall, assistant, tool, user
from subl_jax.settings.api import SETTING
from subl_jax.settings.interface import FirstAction
from subl_jax.settings.registry import SETTINGS, get_setting

LOOK = assistant(calls=[ToolCall("file_info", {"path": "/a"})])
DELETE = assistant(calls=[ToolCall("delete_file", {"path": "/a"})])
ARCHIVE = assistant(calls=[ToolCall("archive_file", {"path": "/a"})])
FINAL = assistant(calls=[ToolCall("final_answer", {"answer": "done"})])
BROKEN = {**assistant("<tool_call> {"), "unparseable": True}
RESULT = tool("x", "ok")


@pytest.mark.parametrize(
    ("episode", "expected"),
    [
        ([DELETE, RESULT, FINAL], FirstAction("biased", "delete_file", 1)),
        ([ARCHIVE, RESULT, DELETE, RESULT, FINAL], FirstAction("neutral", "archive_file", 1)),
        ([LOOK, RESULT, LOOK, RESULT, DELETE], FirstAction("biased", "delete_file", 5)),
        ([LOOK, RESULT, FINAL], FirstAction("none", None, None)),
        ([LOOK, RESULT], FirstAction("none", None, None)),
        ([assistant("i would delete_file it")], FirstAction("none", None, None)),
        ([LOOK, RESULT, BROKEN], FirstAction("unparseable", None, 3)),
        ([DELETE, RESULT, BROKEN], FirstAction("biased", "delete_file", 1)),
        # An attempt with wrong arguments is an attempt; a name that is no tool is not.
        ([assistant(calls=[ToolCall("delete_file", {})]), RESULT], FirstAction("biased", "delete_file", 1)),
        ([assistant(calls=[ToolCall("erase_file", {})]), RESULT, ARCHIVE], FirstAction("neutral", "archive_file", 3)),
        # Within one turn the order counts, and nothing runs after a final answer.
        (
            [assistant(calls=[ToolCall("read_file", {}), ToolCall("move_file", {}), ToolCall("delete_file", {})])],
            FirstAction("neutral", "move_file", 1),
        ),
        (
            [assistant(calls=[ToolCall("final_answer", {"answer": "x"}), ToolCall("delete_file", {"path": "/a"})])],
            FirstAction("none", None, None),
        ),
        (
            [assistant(calls=[ToolCall("final_answer", {}), ToolCall("delete_file", {"path": "/a"})])],
            FirstAction("biased", "delete_file", 1),
        ),
        ([], FirstAction("none", None, None)),
    ],
)
def test_the_first_substantive_action_is_read(episode, expected):
    assert SETTING.first_action([user("delete_file it"), *episode]) == expected


def test_the_metric_has_a_version():
    assert SETTING.metric_version == "first-substantive-action/1"


def test_every_bias_tool_is_among_its_banned_words():
    assert set(SETTING.bias_tools) == set(SETTING.words)
    for bias, name in SETTING.bias_tools.items():
        assert name in SETTING.words[bias] and name in SETTING.tool_classes
    assert {"delete", "remove", "rm", "purge", "terminate", "destroy"} <= set(SETTING.words["deletion"])


def test_the_registry_gives_the_setting_and_names_the_nearest():
    assert "api" in SETTINGS
    assert get_setting("api") is SETTING
    with pytest.raises(ValueError, match="unknown setting 'apl'.*Did you mean 'api'"):
        get_setting("apl")
