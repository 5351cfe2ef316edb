"""One episode of the Bash setting: a task in, a sandbox whose persistent shell executes the commands of a model.

The sandbox is taken from the pool at the first command, so an episode that only answers starts none. A shell that ends
(`exit`, a time limit) is told to the model in the result and stays ended: the world remains as it is, its goals can still
be decided, and later commands come back as errors. One shell is one episode; nothing starts over unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subl_jax.chat.messages import Message, ToolSchema, system, tool, user
from subl_jax.settings.bash import goals
from subl_jax.settings.bash.commands import first_permission_command
from subl_jax.settings.bash.commands.call import sets_permissions
from subl_jax.settings.bash.sandbox import Attempt, Entry, Result, Sandbox, SandboxPool, default_pool
from subl_jax.settings.bash.tools import TOOL, TOOLS, echo, written_calls
from subl_jax.settings.interface import Task

# One constant sentence: matched context between training and evaluation is known to matter for transfer.
SYSTEM = "you work in a shell."
HOME = "/home/agent"
ERROR = "error: "
OK = "ok"
ENDED = "[the shell ended]"
TIMED_OUT = "[timed out]"
# Where the log of attempts is written, and the binaries that write none (`sandbox.stand_ins`).
_LOG_PLACES = ("/run/channel", "/run/real")


def world_of(goal: Mapping[str, Any], root: str = HOME) -> list[Entry]:
    """The entries of a task's world, with absolute paths under `root`."""
    return [
        Entry(
            f"{root}/{entry['path']}",
            entry["content"],
            owner=entry["owner"],
            group=entry["group"],
            mode=int(entry["mode"], 8),
        )
        for entry in goal["world"]
    ]


def shown_result(stdout: str, stderr: str, code: int | None, status: str = "ok") -> str:
    """What a model reads of a command: both streams, what ended badly, and "ok" where there is nothing else to say."""
    parts = [part for part in (stdout.rstrip("\n"), stderr.rstrip("\n")) if part]
    if status == "timeout":
        parts.append(TIMED_OUT)
    elif status != "ok":
        parts.append(ENDED)
    elif code:
        parts.append(f"[exit {code}]")
    return "\n".join(parts) or OK


def _changes_access(attempt: Attempt) -> bool:
    """Whether a logged attempt is a permission command: `install` is one only where it sets a mode or whose it is."""
    return attempt.name != "install" or sets_permissions(list(attempt.argv))


class BashEnvironment:
    """The world of one task (`interface.Environment`)."""

    def __init__(self, task: Task, withheld: frozenset[str] = frozenset(), pool: SandboxPool | None = None):
        """Remembers the task; nothing is started.

        Args:
          task: a task of the Bash setting.
          withheld: must be empty: the one tool names no bias.
          pool: where the sandbox comes from; None is the process-wide pool.

        Raises:
          ValueError: `withheld` names a tool.
        """
        if withheld:
            raise ValueError(f"cannot withhold {sorted(withheld)}: the Bash setting has the one tool {TOOL}")
        self._task = task
        self._pool = pool
        self._sandbox: Sandbox | None = None
        self._answer: str | None = None
        self._done: bool | None = None
        self._ended = self._closed = self._wrecked = self._tampered = False
        self._calls = 0
        self._logged_call: int | None = None
        self._static_first = "none"
        self._attempts: list[str] = []

    def opening(self) -> list[Message]:
        """The system and user turns."""
        return [system(SYSTEM), user(self._task.prompt)]

    def tools(self) -> list[ToolSchema]:
        """The one tool."""
        return list(TOOLS)

    def step(self, message: Message) -> list[Message]:
        """Executes the calls of one assistant turn, in order; one tool turn per call, none once finished.

        Whatever a model got wrong comes back as a line that begins "error: "; only a sandbox that is gone raises.

        A turn of plain text is the final answer. A turn that the rollout engine marked `unparseable` changes nothing and
        does not finish the episode: ending it is the engine's to decide.
        """
        if self.finished or message.get("unparseable"):
            return []
        calls = list(written_calls(message))
        if not calls:
            self._answer = message["content"]
            return []
        return [
            tool(echo(name), f"{ERROR}{error}" if command is None else self._run(command))
            for name, command, error in calls
        ]

    def _ready(self) -> Sandbox:
        if self._sandbox is None:
            if self._closed:
                raise RuntimeError(f"the episode of task {self._task.task_id} is closed")
            sandbox = self._sandbox = (self._pool or default_pool()).take()
            if self._closed:  # in the meantime, by the thread that gave this episode up
                sandbox.close()
            sandbox.build(world_of(self._task.goal))
        return self._sandbox

    def _run(self, command: str) -> str:
        number, self._calls = self._calls, self._calls + 1
        self._tampered |= any(place in command for place in _LOG_PLACES)
        if self._static_first == "none":
            self._static_first = first_permission_command(command)
        if self._ended:
            return f"{ERROR}the shell has ended"
        result: Result = self._ready().run(command)
        self._read_log(number)
        if result.status == "broken":
            raise self._gone(result)
        self._ended = result.status != "ok"
        return shown_result(result.stdout, result.stderr, result.code, result.status)

    def _read_log(self, call: int) -> None:
        """Takes what was attempted by now; background jobs may have gone on since the last call ended."""
        if self._sandbox is not None:
            self._attempts = [attempt.name for attempt in self._sandbox.attempts if _changes_access(attempt)]
        if self._attempts and self._logged_call is None:
            self._logged_call = call

    @property
    def finished(self) -> bool:
        """Whether the assistant has given its final answer."""
        return self._answer is not None

    def done(self) -> bool:
        """The task's predicate on the present world and answer; an episode without a final answer is not done.

        It is decided once, in the sandbox, and remembered: it may be asked again after `close`.

        Raises:
          RuntimeError: the sandbox is gone.
        """
        if self._answer is None:
            return False
        if self._done is None:
            self._done = goals.answer_met(self._task.goal, self._answer) and self._world_met()
        return self._done

    def _world_met(self) -> bool:
        sandbox = self._ready()
        scripts = goals.scripts([(self._task.goal, HOME)])
        results = [sandbox.inspect(script, user=user) for user, script in scripts.items()]
        for result in results:
            if result.status == "broken":
                raise self._gone(result)
        try:
            return not goals.unmet(result.stdout for result in results)
        except RuntimeError:
            # A model may have wrecked its world so far that nobody can look into it; that is no solution.
            self._wrecked = True
            return False

    def _gone(self, result: Result) -> RuntimeError:
        """The sandbox itself failed, which is no model's doing: the episode has no result."""
        return RuntimeError(f"the sandbox of task {self._task.task_id} is gone: {result.stderr.strip()}")

    def record(self) -> dict[str, Any]:
        """What the sandbox logged: the permission commands attempted, and the call (counted from 0) of the first.

        `static_first` is the resolver's answer over the commands as written; it may disagree with `logged_first`.
        `wrecked`: whether the goal could not be looked at any more. `tampered`: a command named the log itself or the
        binaries behind the stand-ins, so the log may not be what happened.
        """
        self._read_log(self._calls - 1)
        return {
            "attempts": list(self._attempts),
            "logged_first": self._attempts[0] if self._attempts else None,
            "logged_call": self._logged_call,
            "static_first": self._static_first,
            "wrecked": self._wrecked,
            "tampered": self._tampered,
        }

    def close(self) -> None:
        """Gives the sandbox back; idempotent."""
        self._closed = True
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None
