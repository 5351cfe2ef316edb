"""What a rollout did and how well it used the device, counted while it runs: rates, occupancy, bandwidth, waiting."""

from __future__ import annotations

import dataclasses

from subl_jax.metrics.flops import mbu
from subl_jax.metrics.peaks import PEAKS
from subl_jax.rollout.programs import Compilation


@dataclasses.dataclass
class RolloutStatistics:
    """Counts over a rollout, filled while it runs; times in seconds.

    Attributes:
      episodes: finished; truncated: of them, those cut off by a limit of tokens, turns or context.
      failed: of them, those whose environment raised or hung.
      turns: finished turns.
      sampled_tokens, prefilled_tokens: tokens that were drawn, and tokens that were fed besides.
      shared_tokens: prompt tokens that were copied from a kept prefix instead of being computed.
      dispatches: calls of the decode program.
      decode_seconds, prefill_seconds: time of the device in each.
      decode_steps: steps of the slowest replica, summed over dispatches; replica_steps: of all replicas.
      running_slots: slots in the middle of a turn, summed over all steps of all replicas; slots: there are, likewise.
      full_running_slots, full_slots: the same, before the first dispatch that left a slot free because no episode was left.
      decode_bytes: weights and keys/values that those steps had to read on one device of each replica (see MEASURING).
      tool_seconds: summed run time of environments and tokenizer; waiting_seconds: the part that the device waited for.
      wall_seconds: from the first opening to now.
      device_kind: as JAX names it.
      compilations: programs that were compiled for this rollout.
    """

    episodes: int = 0
    truncated: int = 0
    failed: int = 0
    turns: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    shared_tokens: int = 0
    dispatches: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    replica_steps: int = 0
    replicas: int = 1
    running_slots: int = 0
    slots: int = 0
    full_running_slots: int = 0
    full_slots: int = 0
    decode_bytes: float = 0.0
    tool_seconds: float = 0.0
    waiting_seconds: float = 0.0
    wall_seconds: float = 0.0
    device_kind: str = ""
    compilations: list[Compilation] = dataclasses.field(default_factory=list)

    @property
    def device_seconds(self) -> float:
        """Time in which a program was on the devices."""
        return self.decode_seconds + self.prefill_seconds

    @property
    def occupancy(self) -> float:
        """Share of the slots that decode steps were computed for and that were in the middle of a turn."""
        return self.running_slots / self.slots if self.slots else 0.0

    @property
    def full_occupancy(self) -> float:
        """`occupancy` before the final drain, in which no episode is left for a free slot."""
        return self.full_running_slots / self.full_slots if self.full_slots else 0.0

    @property
    def barrier_idle(self) -> float:
        """Share of decode steps that replicas waited at the end of a dispatch for the slowest one."""
        if not self.decode_steps:
            return 0.0
        return 1.0 - self.replica_steps / (self.decode_steps * self.replicas)

    @property
    def bandwidth_used(self) -> float | None:
        """MBU of decoding per replica, or None on a device whose bandwidth is not known."""
        peak = PEAKS.get(self.device_kind)
        if peak is None or not self.decode_seconds:
            return None
        return mbu(self.decode_bytes / self.replicas, self.decode_seconds, peak.bandwidth)

    def eta_s(self, total: int, running: int) -> float | None:
        """Seconds until `total` episodes are finished, or None before the first.

        Short episodes finish first, so that those in flight (`running`) count as half done: without them the first
        answers would promise too little.
        """
        done = self.episodes + running / 2
        if not self.episodes:
            return None
        return max(total - done, 0.0) * self.wall_seconds / done

    def lines(self) -> list[str]:
        """A readable account, one figure a line."""
        decode = self.sampled_tokens / self.decode_seconds if self.decode_seconds else 0.0
        prefilled = self.prefilled_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
        compiled = sum(each.seconds for each in self.compilations)
        used = self.bandwidth_used
        rate = self.decode_bytes / self.decode_seconds / 1e9 if self.decode_seconds else 0.0
        drain = f", {self.full_occupancy:.1%} before the final drain" if self.full_slots else ""
        return [
            f"episodes      {self.episodes} ({self.truncated} cut off by a limit, {self.failed} failed in their tools)",
            f"decode        {self.sampled_tokens} tokens in {self.decode_seconds:.2f} s, {decode:.0f} tokens/s",
            f"prefill       {self.prefilled_tokens} tokens in {self.prefill_seconds:.2f} s, {prefilled:.0f} tokens/s; "
            f"{self.shared_tokens} more copied from kept prefixes",
            f"occupancy     {self.occupancy:.1%} of the slots{drain}",
            f"bandwidth     {rate:.1f} GB/s read by decoding" + ("" if used is None else f", MBU {used:.0%}"),
            f"tools         {self.tool_seconds:.2f} s of work, {self.waiting_seconds:.2f} s of which the device waited",
            f"barrier       {self.barrier_idle:.1%} of the decode steps lost to the slowest device of a dispatch",
            f"compiled      {len(self.compilations)} programs in {compiled:.1f} s",
            f"wall          {self.wall_seconds:.2f} s",
        ]
