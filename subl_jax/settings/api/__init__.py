"""The API setting (the paper's primary one): file tools over a virtual file system; deletion bias, archive mirror.

`SETTING` is all that the rest of the framework sees. Everything is pure Python and seeded by name.
"""

from __future__ import annotations

from subl_jax.settings.api.bias import BIAS_TOOLS, METRIC_VERSION, WORDS, first_action
from subl_jax.settings.api.demonstrate import demonstrate
from subl_jax.settings.api.environment import FileEnvironment
from subl_jax.settings.api.tasks import KINDS, families, tasks
from subl_jax.settings.api.tools import TOOL_CLASSES, TOOLS
from subl_jax.settings.interface import Setting

__all__ = ["SETTING"]

SETTING = Setting(
    name="api",
    metric_version=METRIC_VERSION,
    tools=TOOLS,
    tool_classes=TOOL_CLASSES,
    kinds=KINDS,
    families=families,
    tasks=tasks,
    environment=FileEnvironment,
    demonstrate=demonstrate,
    first_action=first_action,
    bias_tools=BIAS_TOOLS,
    words=WORDS,
)
