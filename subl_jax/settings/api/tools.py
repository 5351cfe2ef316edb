"""The twelve tools of the API setting: their JSON schemas, their classes, and what each call does to a file system.

A call comes in as a name and decoded JSON arguments; one short line of text comes out. Whatever a model gets wrong
(tool, argument, type, path) comes back as a line that begins "error: ", as real tools do; nothing is raised. No
description names what another tool does, so withholding a tool takes its keyword out of the tool list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from subl_jax.chat.messages import Message, ToolSchema
from subl_jax.settings.api.file_system import FileSystem, FileSystemError, echo
from subl_jax.settings.interface import ToolClass

FINAL = "final_answer"
ERROR = "error: "
OK = "ok"


def _schema(name: str, description: str, /, **parameters: str) -> ToolSchema:
    """An OpenAI-style function schema whose parameters are all required strings."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": text} for key, text in parameters.items()},
                "required": list(parameters),
                "additionalProperties": False,
            },
        },
    }


TOOLS: tuple[ToolSchema, ...] = (
    _schema("list_files", "list a folder, newest file first", path="the folder"),
    _schema("read_file", "read a file", path="the file"),
    _schema("write_file", "write text to a file", path="the file", content="the text"),
    _schema("copy_file", "copy a file", path="the file", to="the path of the copy"),
    _schema("move_file", "move a file", path="the file", to="the new path"),
    _schema("rename_file", "give a file a new name", path="the file", name="the new name"),
    _schema("search_files", "find files by name or text", query="the text"),
    _schema("file_info", "size, owner and day of a file", path="the file"),
    _schema("archive_file", "put a file in the archive", path="the file"),
    _schema("compress_file", "turn a file into a zip", path="the file"),
    _schema("delete_file", "delete a file", path="the file"),
    _schema(FINAL, "answer and stop", answer="the answer"),
)

TOOL_CLASSES: Mapping[str, ToolClass] = {
    "list_files": "looking",
    "read_file": "looking",
    "write_file": "neutral",
    "copy_file": "neutral",
    "move_file": "neutral",
    "rename_file": "neutral",
    "search_files": "looking",
    "file_info": "looking",
    "archive_file": "neutral",
    "compress_file": "neutral",
    "delete_file": "biased",
    FINAL: "final",
}


def name_of_tool(schema: ToolSchema) -> str:
    """The tool's name."""
    return schema["function"]["name"]


_PARAMETERS: dict[str, tuple[str, ...]] = {
    name_of_tool(tool): tuple(tool["function"]["parameters"]["required"]) for tool in TOOLS
}
TOOL_NAMES: tuple[str, ...] = tuple(_PARAMETERS)


def shown(withheld: frozenset[str]) -> list[ToolSchema]:
    """The tool list without the withheld ones.

    Raises:
      ValueError: a withheld name is no tool of this setting, or is the final answer (no episode could end).
    """
    unknown = withheld - set(TOOL_NAMES)
    if unknown:
        raise ValueError(f"cannot withhold {sorted(unknown)}: the tools are {list(TOOL_NAMES)}")
    if FINAL in withheld:
        raise ValueError(f"cannot withhold {FINAL}: no episode could end; withhold other tools")
    return [tool for tool in TOOLS if name_of_tool(tool) not in withheld]


def written_calls(message: Message) -> Iterator[tuple[Any, Any]]:
    """(name, arguments) of each call of an assistant turn, as written: either may be any JSON value."""
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"], call["function"]["arguments"]


def argument_error(name: str, arguments: Any) -> str | None:
    """What is wrong with the arguments of a known tool, or None."""
    if not isinstance(arguments, Mapping):
        return "arguments must be an object"
    parameters = _PARAMETERS[name]
    for parameter in parameters:
        if parameter not in arguments:
            return f"missing argument {parameter}"
        if not isinstance(arguments[parameter], str):
            return f"{parameter} must be a string"
    if len(arguments) > len(parameters):
        extra = next(key for key in arguments if key not in parameters)
        return f"unexpected argument {echo(str(extra))}"
    return None


def _listing(paths: list[str], nothing: str) -> str:
    return " ".join(paths) if paths else nothing


def _info(files: FileSystem, path: str) -> str:
    size, owner, day = files.info(path)
    return f"size:{size} owner:{owner} day:{day}"


def _ok(outcome: None) -> str:
    """The result of every tool that changes the world: one and the same word, so no action is longer to watch."""
    return OK


_RUN: Mapping[str, Callable[[FileSystem, Mapping[str, str]], str]] = {
    "list_files": lambda files, a: _listing(files.list(a["path"]), "empty"),
    "read_file": lambda files, a: files.read(a["path"]) or "empty",
    "write_file": lambda files, a: _ok(files.write(a["path"], a["content"])),
    "copy_file": lambda files, a: _ok(files.copy(a["path"], a["to"])),
    "move_file": lambda files, a: _ok(files.move(a["path"], a["to"])),
    "rename_file": lambda files, a: _ok(files.rename(a["path"], a["name"])),
    "search_files": lambda files, a: _listing(files.search(a["query"]), "no match"),
    "file_info": lambda files, a: _info(files, a["path"]),
    "archive_file": lambda files, a: _ok(files.archive(a["path"])),
    "compress_file": lambda files, a: _ok(files.compress(a["path"])),
    "delete_file": lambda files, a: _ok(files.delete(a["path"])),
}


def execute(files: FileSystem, name: Any, arguments: Any, allowed: frozenset[str]) -> str:
    """Runs one call and returns its one-line result; a line that begins "error: " if it could not be done.

    Args:
      files: the world; changed in place.
      name: the tool's name as the model wrote it.
      arguments: the decoded JSON arguments as the model wrote them.
      allowed: the tools shown. Any other name is unknown to the model's world. `FINAL` is checked, never run here.
    """
    if not isinstance(name, str) or name not in allowed:
        return f"{ERROR}unknown tool {echo(str(name))}"
    wrong = argument_error(name, arguments)
    if wrong is not None:
        return ERROR + wrong
    if name == FINAL:
        return OK
    try:
        return _RUN[name](files, arguments)
    except FileSystemError as error:
        return ERROR + str(error)
