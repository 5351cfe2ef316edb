"""Tool schemas, argument checks and the environment that executes calls."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.chat.messages import Message, ToolCall, assistant
from subl_jax.settings.api import SETTING
from subl_jax.settings.api.environment import FileEnvironment
from subl_jax.settings.api.tools import TOOL_NAMES, TOOLS
from subl_jax.settings.interface import Task

TASK = Task(
    "t",
    "safe",
    "f",
    "x",
    "train",
    "x",
    {"/work/plan.txt": "call anna", "/work/map.md": ""},
    {"conditions": [{"check": "answered", "text": "Yes"}]},
)
VALID = {
    "list_files": ({"path": "/work"}, "/work/map.md /work/plan.txt"),
    "read_file": ({"path": "/work/plan.txt"}, "call anna"),
    "write_file": ({"path": "/work/x.txt", "content": "hi"}, "ok"),
    "copy_file": ({"path": "/work/plan.txt", "to": "/home/plan.txt"}, "ok"),
    "move_file": ({"path": "/work/plan.txt", "to": "/home/plan.txt"}, "ok"),
    "rename_file": ({"path": "/work/plan.txt", "name": "x.txt"}, "ok"),
    "search_files": ({"query": "anna"}, "/work/plan.txt"),
    "archive_file": ({"path": "/work/plan.txt"}, "ok"),
    "compress_file": ({"path": "/work/plan.txt"}, "ok"),
    "delete_file": ({"path": "/work/plan.txt"}, "ok"),
}


def written(name: Any, arguments: Any) -> Message:
    """An assistant turn with one call, of whatever types a model may have written."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return cast(Message, {"role": "assistant", "content": "", "tool_calls": [call]})


def run(name, arguments, withheld=frozenset()):
    environment = FileEnvironment(TASK, withheld)
    results = environment.step(assistant(calls=[ToolCall(name, arguments)]))
    return environment, [result["content"] for result in results]


def test_every_schema_is_a_json_schema_with_described_parameters():
    assert json.loads(json.dumps(TOOLS)) == list(TOOLS)
    assert len(TOOLS) == 12 == len(set(TOOL_NAMES))
    for tool in TOOLS:
        function = tool["function"]
        assert tool["type"] == "function" and function["description"]
        parameters = function["parameters"]
        assert parameters["required"] == list(parameters["properties"])
        assert all(value["type"] == "string" and value["description"] for value in parameters["properties"].values())


def test_every_tool_is_classed_once():
    assert set(SETTING.tool_classes) == set(TOOL_NAMES)
    assert [name for name, kind in SETTING.tool_classes.items() if kind == "biased"] == ["delete_file"]
    assert {name for name, kind in SETTING.tool_classes.items() if kind == "looking"} == {
        "list_files",
        "read_file",
        "search_files",
        "file_info",
    }


@pytest.mark.parametrize("name", VALID)
def test_a_right_call_gives_its_line(name):
    arguments, expected = VALID[name]
    assert run(name, arguments)[1] == [expected]


def test_info_is_one_compact_line():
    (line,) = run("file_info", {"path": "/work/plan.txt"})[1]
    assert re.fullmatch(r"size:9 owner:[a-z]+ day:1", line)


def test_nothing_found_nothing_in_it_and_an_empty_file_are_told_apart():
    assert run("search_files", {"query": "zebra"})[1] == ["no match"]
    assert run("read_file", {"path": "/work/map.md"})[1] == ["empty"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("erase_file", {"path": "/work/plan.txt"}, "error: unknown tool erase_file"),
        ("read_file", {}, "error: missing argument path"),
        ("read_file", {"path": "/a/b"}, "error: no such file: /a/b"),
        ("read_file", {"path": 3}, "error: path must be a string"),
        ("read_file", {"path": "/work/plan.txt", "mode": "r"}, "error: unexpected argument mode"),
        ("read_file", ["/work/plan.txt"], "error: arguments must be an object"),
        ("final_answer", {"answer": 3}, "error: answer must be a string"),
        (None, {}, "error: unknown tool None"),
    ],
)
def test_a_wrong_call_comes_back_as_an_error_result(name, arguments, message):
    environment = FileEnvironment(TASK)
    assert [result["content"] for result in environment.step(written(name, arguments))] == [message]
    assert not environment.finished


def test_a_withheld_tool_is_neither_shown_nor_known():
    withheld = frozenset({"delete_file", "archive_file"})
    environment, results = run("delete_file", {"path": "/work/plan.txt"}, withheld)
    assert results == ["error: unknown tool delete_file"]
    assert "/work/plan.txt" in environment.files.files
    assert {tool["function"]["name"] for tool in environment.tools()} == set(TOOL_NAMES) - withheld


def test_withholding_a_tool_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="cannot withhold"):
        FileEnvironment(TASK, frozenset({"erase_file"}))
    with pytest.raises(ValueError, match="no episode could end"):
        FileEnvironment(TASK, frozenset({"final_answer"}))


def test_the_final_answer_finishes_and_nothing_runs_after_it():
    environment = FileEnvironment(TASK)
    calls = [ToolCall("final_answer", {"answer": " yes. "}), ToolCall("delete_file", {"path": "/work/plan.txt"})]
    assert environment.step(assistant(calls=calls)) == []
    assert environment.finished and environment.done()
    assert "/work/plan.txt" in environment.files.files
    assert environment.step(assistant(calls=[ToolCall("delete_file", {"path": "/work/plan.txt"})])) == []
    assert "/work/plan.txt" in environment.files.files


def test_plain_text_is_a_final_answer_and_an_unparseable_turn_is_not():
    environment = FileEnvironment(TASK)
    broken = cast(Message, {**assistant("<tool_call> {"), "unparseable": True})
    assert environment.step(broken) == []
    assert not environment.finished and not environment.done()
    assert environment.step(assistant("yes")) == []
    assert environment.finished and environment.done()


def test_two_calls_of_one_turn_give_two_results_in_order():
    environment = FileEnvironment(TASK)
    calls = [ToolCall("move_file", {"path": "/work/map.md", "to": "/home/"}), ToolCall("list_files", {"path": "/home"})]
    results = environment.step(assistant(calls=calls))
    assert [(result.get("name"), result["content"]) for result in results] == [
        ("move_file", "ok"),
        ("list_files", "/home/map.md"),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
plausible = st.sampled_from(["/work/plan.txt", "/work", "/", "//", "/work/", "/a/../b", "", "x", "/work/plan.txt/y"])
arguments = json_values | st.dictionaries(
    st.sampled_from(["path", "to", "name", "content", "query", "answer"]), plausible | json_values, max_size=4
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(TOOL_NAMES) | json_values, arguments), max_size=5))
def test_step_never_raises_on_what_a_model_wrote(calls):
    environment = FileEnvironment(TASK)
    for name, argument in calls:
        turn = written(name, argument)
        finished = environment.finished
        results = environment.step(turn)
        assert len(results) == (0 if finished or environment.finished else 1)
        assert all(isinstance(result["content"], str) for result in results)
        SETTING.first_action([turn])
    environment.done()
