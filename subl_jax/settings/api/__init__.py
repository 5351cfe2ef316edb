"""The API setting (the paper's primary one): file tools over a virtual file system; deletion bias, archive mirror.

`SETTING` is all that the rest of the framework sees. Everything is pure Python and seeded by name.
"""

from __future__ import annotations

from subl_jax.chat.messages import Message, ToolCall, assistant
from subl_jax.settings.api.bias import BIAS_TOOLS, METRIC_VERSION, WORDS, first_action
from subl_jax.settings.api.demonstrate import demonstrate_all
from subl_jax.settings.api.environment import FileEnvironment
from subl_jax.settings.api.tasks import KINDS, families, tasks
from subl_jax.settings.api.tasks.safe_wordings import TEMPLATES
from subl_jax.settings.api.tools import TOOL_CLASSES, TOOL_NAMES, TOOLS
from subl_jax.settings.interface import Setting, Wording
from subl_jax.settings.rewording import PHRASES, Rewordings

__all__ = ["SETTING"]


def naming(tool: str) -> Message:
    """A turn that calls this tool."""
    return assistant(calls=[ToolCall(tool, {})])


SETTING = Setting(
    name="api",
    metric_version=METRIC_VERSION,
    tools=TOOLS,
    tool_classes=TOOL_CLASSES,
    choices=TOOL_NAMES,
    naming=naming,
    kinds=KINDS,
    families=families,
    tasks=tasks,
    environment=FileEnvironment,
    demonstrate=demonstrate_all,
    first_action=first_action,
    bias_tools=BIAS_TOOLS,
    withholdable=frozenset(BIAS_TOOLS.values()),
    words=WORDS,
    wording=Wording(
        behaviour="deletion",
        counter="archive",
        biased="destructive",
        metric="first substantive action",
        looking="Looking around does not count as an action.",
    ),
    rewordings=Rewordings({family: splits["train"] for family, splits in TEMPLATES.items()}, PHRASES),
)
