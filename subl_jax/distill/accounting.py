"""What a training run costs: FLOPs, utilisation, tokens per second, memory, and where its wall time goes.

Facts of batches and finished steps in; values for metric records and for the run's result out. Nothing here waits for a
device but the one thread that waits for the steps of which there are records.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax

from subl_jax import metrics
from subl_jax.distill.batches import BatchFacts
from subl_jax.metrics.peaks import PEAKS
from subl_jax.models import lora
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device

T = TypeVar("T")
Clock = Callable[[], float]


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def shape_of(config: ModelConfig, params: Any, adapters: Any = None) -> metrics.Shape:
    """What the FLOP formulas need to know of a model.

    Args:
      config, params: the model. Adapters among its parameters are computed like all others.
      adapters: that alone are trained, `params` being frozen.
    """
    merged, weights = lora.split(params)
    outside = [name for name in ("embedding", "head") if name in weights]
    return metrics.Shape(
        params=metrics.count_params(weights, outside) + metrics.count_params(merged),
        width=config.d_model,
        vocab=config.vocab_size,
        layers=config.num_layers,
        attention_width=config.num_heads * config.head_dim,
        lora_params=0 if adapters is None else metrics.count_params(adapters),
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """The models that compute in a step.

    Attributes:
      student: trained.
      teacher: live; None where there is none, or its opinion is cached.
      base: what `anchor` pins to: one more forward pass, which MEASURING's formula does not know, and which is counted.
    """

    student: metrics.Shape
    teacher: metrics.Shape | None = None
    base: metrics.Shape | None = None

    def flops(self, facts: BatchFacts) -> int:
        """Of one step, all devices together; see `metrics.kd_step_flops`."""
        amount = facts.tokens, facts.loss_tokens, facts.documents
        flops = metrics.kd_step_flops(self.teacher, self.student, *amount)
        return flops if self.base is None else flops + metrics.forward_flops(self.base, *amount)


def peak_flops(devices: Iterable[Device]) -> float | None:
    """FLOP/s of the devices together in bfloat16, whatever the model computes in; None where one is not known."""
    kinds = [PEAKS.get(device.device_kind) for device in devices]
    return None if None in kinds else sum(kind.flops for kind in kinds if kind is not None)


def memory_in_use(devices: Iterable[Device]) -> int | None:
    """The most bytes that an accelerator of this process has held so far; on CPUs the process's anonymous memory now.

    None where the platform does not tell.
    """
    stats = [device.memory_stats() or {} for device in devices if device.platform != "cpu"]
    if stats:
        return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return None


# --- Wall time --------------------------------------------------------------------------------------------------------


class Ledger:
    """Seconds that the host spent on other things than steps, by kind: `setup`, `compile`, `input`, `checkpoint`.

    Devices may be at work all the same, on steps that were dispatched before: what is left of the wall time is the least
    that was spent in steps.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.began = clock()
        self.seconds: dict[str, float] = defaultdict(float)

    @property
    def total(self) -> float:
        """Seconds of all kinds."""
        return sum(self.seconds.values())

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Counts a block's seconds."""
        before = self.clock()
        try:
            yield
        finally:
            self.seconds[kind] += self.clock() - before

    def waiting_for(self, kind: str, items: Iterator[T]) -> Iterator[T]:
        """The items; the seconds that each is waited for are counted."""
        while True:
            with self.spent_on(kind):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item


@dataclasses.dataclass(frozen=True)
class _Totals:
    """Sums over the steps of this process so far, and the seconds of the ledger."""

    tokens: int = 0
    capacity: int = 0
    loss_tokens: int = 0
    flops: int = 0
    waited: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run has cost in this process; a resumed one did only the rest.

    Attributes:
      seconds: wall time; compile_s: until the step was compiled, over all shapes of batches.
      tokens_per_s, loss_tokens_per_s: over the whole wall time.
      packing: share of the rows' places that hold a token.
      flops: of all steps, by formula; mfu: over the wall time without set-up and compilation, against bfloat16's peak;
        None where the device's peak is not known (see `metrics.peaks`).
      goodput: share of the wall time in steps: without set-up, compilation, and waits for input and checkpoints.
      peak_bytes: see `memory_in_use`; on CPUs the largest that was seen at a record.
    """

    seconds: float
    compile_s: float
    tokens_per_s: float
    loss_tokens_per_s: float
    packing: float
    flops: int
    mfu: float | None
    goodput: float
    peak_bytes: int | None


Record = concurrent.futures.Future[tuple[dict[str, float], float, int | None]]


class Meter:
    """Counts steps, and turns those that are recorded into values for their records.

    A thread waits for the recorded steps and notes when the devices had finished each; the loop does not wait.

    Args:
      work: of a step.
      ledger: of the run.
      devices: all that a step runs on.
    """

    def __init__(self, work: Work, ledger: Ledger, devices: Iterable[Device]) -> None:
        self._work, self._ledger = work, ledger
        devices = list(devices)
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        self._peak = peak_flops(devices)
        self._totals = _Totals()
        self._read_at: tuple[float, _Totals] | None = None
        self._peak_bytes: int | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="metrics")

    def start(self) -> None:
        """The first step has been compiled and dispatched: rates count from here."""
        self._read_at = self._ledger.clock(), dataclasses.replace(_Totals(), waited=self._ledger.total)

    def count(self, facts: BatchFacts) -> None:
        """Adds a step that has been dispatched."""
        before = self._totals
        self._totals = _Totals(
            before.tokens + facts.tokens,
            before.capacity + facts.capacity,
            before.loss_tokens + facts.loss_tokens,
            before.flops + self._work.flops(facts),
        )

    def record(self, step_metrics: Mapping[str, jax.Array]) -> tuple[_Totals, Record]:
        """Begins to wait for the last step that was counted."""
        totals = dataclasses.replace(self._totals, waited=self._ledger.total)
        return totals, self._thread.submit(self._finished, step_metrics)

    def _finished(self, step_metrics: Mapping[str, jax.Array]) -> tuple[dict[str, float], float, int | None]:
        values = {name: float(value) for name, value in jax.device_get(dict(step_metrics)).items()}
        return values, self._ledger.clock(), memory_in_use(self._local)

    def values(self, record: tuple[_Totals, Record]) -> dict[str, float]:
        """The step's own metrics, and those of the steps since the record before: rates per second of wall time.

        Beside the step's: tokens_per_s, loss_tokens_per_s, packing, goodput, and where they are known mfu and peak_bytes.
        Records are to be read in order.
        """
        totals, future = record
        found, finished, held = future.result()
        assert self._read_at is not None
        since, before = self._read_at
        self._read_at = finished, totals
        seconds = max(finished - since, 1e-9)
        found["tokens_per_s"] = (totals.tokens - before.tokens) / seconds
        found["loss_tokens_per_s"] = (totals.loss_tokens - before.loss_tokens) / seconds
        found["packing"] = (totals.tokens - before.tokens) / (totals.capacity - before.capacity)
        found["goodput"] = min(max(1 - (totals.waited - before.waited) / seconds, 0.0), 1.0)
        if self._peak is not None:
            found["mfu"] = metrics.mfu(totals.flops - before.flops, seconds, self._peak)
        if held is not None:
            self._peak_bytes = max(held, self._peak_bytes or 0)
            found["peak_bytes"] = float(self._peak_bytes)
        return found

    @property
    def loss_tokens(self) -> int:
        """Loss tokens of the steps that were counted."""
        return self._totals.loss_tokens

    def costs(self) -> Costs:
        """Of the run so far; to be called when its last step has been waited for."""
        totals, ledger = self._totals, self._ledger
        seconds = max(ledger.clock() - ledger.began, 1e-9)
        running = max(seconds - ledger.seconds["setup"] - ledger.seconds["compile"], 1e-9)
        return Costs(
            seconds=seconds,
            compile_s=ledger.seconds["compile"],
            tokens_per_s=totals.tokens / seconds,
            loss_tokens_per_s=totals.loss_tokens / seconds,
            packing=totals.tokens / max(totals.capacity, 1),
            flops=totals.flops,
            mfu=None if self._peak is None else metrics.mfu(totals.flops, running, self._peak),
            goodput=min(max(1 - ledger.total / seconds, 0.0), 1.0),
            peak_bytes=self._peak_bytes,
        )

    def __enter__(self) -> Meter:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread, behind the record that it waits for."""
        self._thread.shutdown()
