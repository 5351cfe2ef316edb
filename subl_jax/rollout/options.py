"""How a rollout is run, as flags (`--config.engine.*`): groups of slots, dispatches, tools, memory, tensor parallelism."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a rollout is run. What an episode depends on is in `SamplingConfig`, and in two fields here: see `identity`.

    Attributes:
      groups: how many groups of `rollout.slots` a device has; with two, the host runs the tools of one while the devices
        decode the other.
      patience: share of a group's running slots that is expected to have stopped when a dispatch returns to the host, from
        the mean length of turns so far; 1: it returns when all have. Every device decodes as many steps, so that none waits
        for another.
      dispatch_steps: decode steps after which a dispatch returns anyhow.
      tool_workers: threads that execute environments and the tokenizer. More than the machine has cores pays only where
        tools really wait for something.
      tool_timeout_s: a tool call (or an opening) that takes longer costs its episode.
      result_kib: a tool result of more KiB costs its episode.
      kv_gib: memory of one device that keys and values may take, in GiB; 0 takes what is free.
      tensor: devices that one copy of the model is split over, where it exceeds a device.
    """

    groups: int = 2
    patience: float = 0.25
    dispatch_steps: int = 256
    tool_workers: int = 2
    tool_timeout_s: float = 60.0
    result_kib: int = 256
    kv_gib: float = 0.0
    tensor: int = 1

    def __post_init__(self) -> None:
        """Refuses an engine that would stand still."""
        for name, low in (("groups", 1), ("dispatch_steps", 1), ("tool_workers", 0), ("result_kib", 1), ("tensor", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {low}")
        if not 0 < self.patience <= 1:
            raise ValueError(f"patience={self.patience} is outside (0, 1]")
        if self.tool_timeout_s <= 0:
            raise ValueError(f"tool_timeout_s={self.tool_timeout_s}; it must be positive")
        if self.kv_gib < 0:
            raise ValueError(f"kv_gib={self.kv_gib} is negative; 0 takes what is free")

    def identity(self) -> dict[str, int]:
        """What an episode depends on: a model split over devices adds up in another order, and a long result ends it."""
        return {"tensor": self.tensor, "result_kib": self.result_kib}


# The engine as the presets run it.
DEFAULT = EngineConfig()
