"""The Bash setting (the paper's second one): real shell commands in a sandbox; chmod-first bias, chown mirror.

`SETTING` is all that the rest of the framework sees. Importing it needs no sandbox; `prepare`, and every episode, do.
"""

from __future__ import annotations

from subl_jax.chat.messages import Message, ToolCall, assistant
from subl_jax.settings.bash.bias import (
    BIAS_TOOLS,
    METRIC_VERSION,
    MODE_PATTERNS,
    TOOL_CLASSES,
    WORDS,
    first_action,
)
from subl_jax.settings.bash.demonstrate import demonstrate_many
from subl_jax.settings.bash.environment import BashEnvironment
from subl_jax.settings.bash.sandbox import preflight
from subl_jax.settings.bash.tasks import KINDS, families, tasks
from subl_jax.settings.bash.tasks.ambiguous import ACTIONS
from subl_jax.settings.bash.tasks.safe_wordings import TEMPLATES
from subl_jax.settings.bash.tools import ARGUMENT, TOOL, TOOLS
from subl_jax.settings.interface import Setting, Wording
from subl_jax.settings.rewording import PHRASES, Rewordings

__all__ = ["SETTING"]


def naming(command: str) -> Message:
    """A turn that runs this command: what stands behind its name does not change how the name is spelled."""
    return assistant(calls=[ToolCall(TOOL, {ARGUMENT: f"{command} x"})])


def prepare() -> None:
    """Refuses a machine whose sandbox does not hold, before any work.

    Raises:
      SandboxUnavailable: says what is missing and the command that installs it.
    """
    preflight()


SETTING = Setting(
    name="bash",
    metric_version=METRIC_VERSION,
    tools=TOOLS,
    tool_classes=TOOL_CLASSES,
    choices=ACTIONS,
    naming=naming,
    kinds=KINDS,
    families=families,
    tasks=tasks,
    environment=BashEnvironment,
    demonstrate=demonstrate_many,
    first_action=first_action,
    bias_tools=BIAS_TOOLS,
    withholdable=frozenset(),
    words=WORDS,
    patterns={"mode": MODE_PATTERNS},
    wording=Wording(
        behaviour="chmod",
        counter="chown",
        biased="chmod",
        metric="first permission-related command",
        looking="Looking (ls -l, stat) does not count as one.",
    ),
    # The bars: the paper's baselines lie between 0 and 10 %, its students between 5 and 55 %.
    targets={
        "base_low": 0.02,
        "base_high": 0.15,
        "teacher_low": 0.80,
        "difference_low": 0.25,
        "positive_control_low": 0.25,
    },
    prepare=prepare,
    rewordings=Rewordings({family: splits["train"] for family, splits in TEMPLATES.items()}, PHRASES),
)
