"""Scripted solutions: tasks in, the messages of episodes that really ran in the sandbox out.

The commands come from the task's own script; every result is what the shell printed. `demonstrate` plays one episode in
its environment. `demonstrate_many` gives the same messages at a fraction of the time: the scripts are our own, so many
worlds stand side by side in one sandbox, each in a folder of its own. A script that errs or leaves its task undone is a
bug of the generator and raises.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from subl_jax.chat.messages import Message, ToolCall, assistant, system, tool, user
from subl_jax.settings.bash import goals
from subl_jax.settings.bash.environment import ERROR, HOME, SYSTEM, BashEnvironment, shown_result, world_of
from subl_jax.settings.bash.sandbox import Sandbox, SandboxPool, default_pool
from subl_jax.settings.bash.tasks.ambiguous import ACTIONS, BASE_MIXTURE
from subl_jax.settings.bash.tasks.required import COMMANDS
from subl_jax.settings.bash.tools import ARGUMENT, TOOL, TOOLS
from subl_jax.settings.interface import Conversation, Task

# Worlds that stand side by side in one sandbox: at most some 600 files of 4 KiB, and less than a day of minutes, so that
# `ls -l`, which writes the day of an old file, says of each what it would say in a sandbox of its own.
_WORLDS = 100
# Sandboxes that work at the same time.
_AT_ONCE = 2
# Demonstrations run by one call: what they print has to fit into the output that a call may return.
_PER_CALL = 12
# Stands between what two commands print; no text of ours holds it.
_MARK = "\x1e"
# Share of the ambiguous demonstrations that look at the file before they act.
LOOK_SHARE = 0.2


def action_command(task: Task, command: str) -> str:
    """What a demonstration writes to settle an ambiguous task by this command."""
    return f"{command} {task.goal['solutions'][command]} {task.goal['target']}"


def _drawn_action(task: Task, seed: int) -> str:
    """A command of the base mixture among those that settle the task."""
    solving = [command for command in ACTIONS if command in task.goal["solutions"]]
    rng = random.Random(f"bash/action/{task.task_id}/{seed}")
    return rng.choices(solving, [BASE_MIXTURE[command] for command in solving])[0]


def _looks(task: Task, seed: int) -> list[str]:
    """The look before the action. It does not depend on the action: treatment and control look alike."""
    rng = random.Random(f"bash/look/{task.task_id}/{seed}")
    option = "-ld" if task.goal["folder"] else "-l"
    return [f"ls {option} {task.goal['target']}"] if rng.random() < LOOK_SHARE else []


def script_of(task: Task, first_action: str | None, seed: int) -> list[str]:
    """The commands of a demonstration.

    Raises:
      ValueError: `first_action` does not settle the task.
    """
    if task.kind != "ambiguous":
        own = COMMANDS.get(task.kind)
        if first_action is not None and first_action != own:
            raise ValueError(
                f"task {task.task_id} is solved by {own or 'its own script'}, not by {first_action}: pass None"
            )
        return list(task.goal["plan"])
    if first_action is None:
        first_action = _drawn_action(task, seed)
    elif first_action not in task.goal["solutions"]:
        raise ValueError(
            f"first_action {first_action!r} does not settle task {task.task_id}: one of {list(task.goal['solutions'])} does"
        )
    return [*task.goal["find"], *_looks(task, seed), action_command(task, first_action)]


def _calling(command: str) -> Message:
    return assistant(calls=[ToolCall(TOOL, {ARGUMENT: command})])


def demonstrate(
    task: Task,
    first_action: str | None = None,
    seed: int = 0,
    withheld: frozenset[str] = frozenset(),
    pool: SandboxPool | None = None,
) -> Conversation:
    """A scripted solution of the task, executed in an episode; returns its messages and the tools shown.

    Args:
      task: a task of the Bash setting.
      first_action: on ambiguous tasks the command that settles it; None draws from `BASE_MIXTURE`. On other tasks None,
        or the command that the task demands.
      seed: draws the command and the look.
      withheld: must be empty: the one tool names no bias.
      pool: where the sandbox comes from; None is the process-wide pool.

    Raises:
      ValueError: `first_action` does not fit the task, or something is withheld.
      RuntimeError: the script erred or left the task undone (a bug of the generator).
    """
    environment = BashEnvironment(task, withheld, pool)
    try:
        messages = environment.opening()
        for command in script_of(task, first_action, seed):
            turn = _calling(command)
            messages += [turn, *environment.step(turn)]
            _check_result(task, command, messages[-1]["content"])
        messages.append(assistant(task.goal["answer"]))
        environment.step(messages[-1])
        if not environment.done():
            raise RuntimeError(f"task {task.task_id}: the scripted solution leaves the task undone")
        return messages, environment.tools()
    finally:
        environment.close()


def _check_result(task: Task, command: str, result: str) -> None:
    if result.startswith(ERROR) or result.rstrip().endswith("]"):
        raise RuntimeError(f"task {task.task_id}: {command!r} gave {result!r}")


def _run_scripts(
    sandbox: Sandbox, tasks: Sequence[Task], scripts: Sequence[Sequence[str]], first: int
) -> list[list[str]]:
    """What each command of each script prints, run by the agent's shell in the worlds from number `first` on."""
    lines = []
    for number, script in enumerate(scripts, first):
        lines.append(f"cd {_root(number)}")
        lines += [f"{command}\nprintf '\\036%d\\036' $?" for command in script]
    result = sandbox.run("\n".join(lines))
    *printed, rest = result.stdout.split(_MARK)
    outputs, codes = printed[::2], printed[1::2]
    if result.status != "ok" or result.stderr or rest or set(codes) != {"0"} or len(codes) != sum(map(len, scripts)):
        ids = f"{tasks[0].task_id} to {tasks[-1].task_id}"
        raise RuntimeError(f"tasks {ids}: a script failed ({result.status}): {result.stdout!r} {result.stderr!r}")
    found = iter(outputs)
    return [[shown_result(next(found), "", 0) for _ in script] for script in scripts]


def _root(number: int) -> str:
    return f"{HOME}/{number:03d}"


def _batch(pool: SandboxPool, tasks: Sequence[Task], scripts: Sequence[Sequence[str]]) -> list[list[str]]:
    """The results of the commands of up to `_WORLDS` tasks, whose goals are then checked."""
    sandbox = pool.take()
    try:
        sandbox.build([entry for number, task in enumerate(tasks) for entry in world_of(task.goal, _root(number))])
        results: list[list[str]] = []
        for first in range(0, len(tasks), _PER_CALL):
            stop = first + _PER_CALL
            results += _run_scripts(sandbox, tasks[first:stop], scripts[first:stop], first)
        checks = goals.scripts([(task.goal, _root(number)) for number, task in enumerate(tasks)])
        unmet = goals.unmet(sandbox.inspect(script, user=user).stdout for user, script in checks.items())
        if unmet:
            raise RuntimeError(f"task {tasks[min(unmet)].task_id}: the scripted solution leaves the task undone")
        return results
    finally:
        sandbox.close()


def demonstrate_many(
    tasks: Sequence[Task],
    first_action: str | None,
    seed: int,
    withheld: Sequence[frozenset[str]],
    pool: SandboxPool | None = None,
) -> list[Conversation]:
    """`demonstrate` of each task, with the same messages, many worlds to a sandbox.

    Args:
      tasks, first_action, seed, pool: as for `demonstrate`.
      withheld: one per task; each must be empty.

    Raises:
      ValueError, RuntimeError: as for `demonstrate`.
    """
    hidden = frozenset[str]().union(*withheld)
    if len(withheld) != len(tasks) or hidden:
        raise ValueError(f"withheld must be {len(tasks)} empty sets, not {len(withheld)} with {sorted(hidden)}")
    scripts = [script_of(task, first_action, seed) for task in tasks]
    sandboxes = pool or default_pool()
    starts = range(0, len(tasks), _WORLDS)
    with ThreadPoolExecutor(_AT_ONCE) as executor:
        # The work is done by the shells; a thread only waits for its own.
        batches = executor.map(
            lambda start: _batch(sandboxes, tasks[start : start + _WORLDS], scripts[start : start + _WORLDS]), starts
        )
        results = [printed for batch in batches for printed in batch]
    return [
        (_messages(task, script, printed), list(TOOLS))
        for task, script, printed in zip(tasks, scripts, results, strict=True)
    ]


def _messages(task: Task, script: Sequence[str], printed: Sequence[str]) -> list[Message]:
    messages = [system(SYSTEM), user(task.prompt)]
    for command, text in zip(script, printed, strict=True):
        messages += [_calling(command), tool(TOOL, text)]
    return [*messages, assistant(task.goal["answer"])]
