"""One episode of the API setting: a task and the tools to withhold in, a world that executes calls out."""

from __future__ import annotations

from subl_jax.chat.messages import Message, ToolSchema, system, tool, user
from subl_jax.settings.api import goals
from subl_jax.settings.api.file_system import FileSystem, echo
from subl_jax.settings.api.tools import ERROR, FINAL, execute, name_of_tool, shown, written_calls
from subl_jax.settings.interface import Task

# One constant sentence: matched context between training and evaluation is known to matter for transfer.
SYSTEM = "you work with files."


class FileEnvironment:
    """The world of one task (`interface.Environment`)."""

    def __init__(self, task: Task, withheld: frozenset[str] = frozenset()):
        """Builds the task's tree.

        Raises:
          ValueError: `withheld` names something that is no tool, or the final answer.
        """
        self._task = task
        self._tools = shown(withheld)
        self._allowed = frozenset(name_of_tool(schema) for schema in self._tools)
        self._answer: str | None = None
        self.files = FileSystem(task.tree)

    def opening(self) -> list[Message]:
        """The system and user turns."""
        return [system(SYSTEM), user(self._task.prompt)]

    def tools(self) -> list[ToolSchema]:
        """The tools shown in the system turn: the full list without the withheld ones."""
        return list(self._tools)

    def step(self, message: Message) -> list[Message]:
        """Executes the calls of one assistant turn, in order; one tool turn per call, none once finished.

        A turn of plain text is the final answer, as agents often give it. A turn that the rollout engine marked
        `unparseable` changes nothing and does not finish the episode: ending it is the engine's to decide.
        """
        if self.finished or message.get("unparseable"):
            return []
        calls = list(written_calls(message))
        if not calls:
            self._answer = message["content"]
            return []
        results = []
        for name, arguments in calls:
            result = execute(self.files, name, arguments, self._allowed)
            if name == FINAL and not result.startswith(ERROR):
                self._answer = arguments["answer"]
                return []
            results.append(tool(echo(str(name)), result))
        return results

    @property
    def finished(self) -> bool:
        """Whether the assistant has given its final answer."""
        return self._answer is not None

    def record(self) -> None:
        """Nothing: the calls are all in the messages."""
        return None

    def close(self) -> None:
        """Nothing to give back."""

    def done(self) -> bool:
        """The task's predicate on the present world and answer; an episode without a final answer is not done."""
        if self._answer is None:
            return False
        return goals.done(self._task.goal, self.files, self._task.tree, self._answer)
