"""What a throughput command yields: rows of DESIGN's contract, their table, and the JSON document of `--out`.

The quantities of a case and the timings of its programs come in; one row per peer comes out (one without a peer where
only ours was timed).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax import artifacts
from subl_jax.benchmark.harness import QUIET_CORES, Timing, ratio
from subl_jax.benchmark.machine import Machine
from subl_jax.metrics import flops as counts
from subl_jax.metrics.peaks import PEAKS

OURS = "ours"
_PEER_PACKAGES = ("torch", "transformers", "trl")
_MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a case is, whoever does it.

    Attributes:
      workload, case: names.
      params: P, without embedding and head.
      batch, seq, vocab: sequences, tokens of each (prompt and what follows it), rows of the vocabulary.
      dtype: of weights and activations.
      device: the card's name, or the processor and its cores.
      tokens: what tokens_per_s counts, per run.
      flops: of one run by MEASURING's formulas; None where they do not apply.
      extra: what else the row should say, by name.
    """

    workload: str
    case: str
    params: int
    batch: int
    seq: int
    vocab: int
    dtype: str
    device: str
    tokens: int
    flops: int | None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the contract (the fields up to `compile_s`: times are ours), then what the peer took.

    Attributes:
      peer: with whom `ratio` compares, peer's median time / ours; None: nobody.
      mfu, mbu, peak_bytes: None where the device's peak is not known, or its allocator tells nothing (CPUs).
      compile_s: what the warm-up took beyond as many median runs.
      busy_cores: that other processes used meanwhile, on average; see `harness.QUIET_CORES`.
      ratio_p20, ratio_p80: of the ratios round by round.
      extra: of the workload.
    """

    workload: str
    case: str
    params: int
    batch: int
    seq: int
    vocab: int
    dtype: str
    device: str
    peer: str | None
    ratio: float | None
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    tokens_per_s: float
    flops: int | None
    mfu: float | None
    mbu: float | None
    peak_bytes: int | None
    compile_s: float
    busy_cores: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    peer_median_s: float | None = None
    peer_p20_s: float | None = None
    peer_p80_s: float | None = None
    peer_tokens_per_s: float | None = None
    peer_compile_s: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether others computed meanwhile: then the ratio is no result."""
        return self.busy_cores is not None and self.busy_cores > QUIET_CORES


@dataclasses.dataclass(frozen=True)
class Absent:
    """A peer that was asked for and could not be run here, and why."""

    peer: str
    reason: str


def rows(
    work: Work, timings: Mapping[str, Timing], *, mbu: float | None = None, peak_bytes: int | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Row]:  # fmt: skip
    """One row per peer in `timings`, or one without a peer.

    Args:
      work: the case.
      timings: of "ours" and of each peer, from one call of `harness.interleave`.
      mbu: of ours, where the workload could tell.
      peak_bytes: of ours.
      extra: what a peer's row says besides `work.extra`, by peer.
    """
    ours, peak = timings[OURS], PEAKS.get(work.device)
    used = None if peak is None or work.flops is None else counts.mfu(work.flops, ours.median, peak.flops)
    alone = Row(
        work.workload, work.case, work.params, work.batch, work.seq, work.vocab, work.dtype, work.device,
        peer=None, ratio=None, median_s=ours.median, p20_s=ours.p20, p80_s=ours.p80, runs=len(ours.seconds),
        tokens_per_s=work.tokens / ours.median, flops=work.flops, mfu=used, mbu=mbu, peak_bytes=peak_bytes,
        compile_s=ours.compile_s, busy_cores=ours.busy_cores, extra=dict(work.extra),
    )  # fmt: skip
    found = []
    for name, peer in timings.items():
        if name == OURS:
            continue
        compared = ratio(peer, ours)
        found.append(
            dataclasses.replace(
                alone,
                peer=name,
                ratio=compared.median,
                ratio_p20=compared.p20,
                ratio_p80=compared.p80,
                peer_median_s=peer.median,
                peer_p20_s=peer.p20,
                peer_p80_s=peer.p80,
                peer_tokens_per_s=work.tokens / peer.median,
                peer_compile_s=peer.compile_s,
                extra={**work.extra, **(extra or {}).get(name, {})},
            )
        )
    return found or [alone]


# --- For people and for files -----------------------------------------------------------------------------------------


def table(found: Sequence[Row]) -> str:
    """The rows as aligned text; times are medians with their 20th and 80th percentile."""
    header = ("case", "params", "batch", "ours [p20, p80] s", "tok/s", "peer", "peer [p20, p80] s", "ratio [p20, p80]")
    cells: list[tuple[str, ...]] = [header]
    for row in found:
        peer, compared = _MISSING, _MISSING
        if row.peer is not None:
            peer = _spread(row.peer_median_s, row.peer_p20_s, row.peer_p80_s, 3)
            compared = _spread(row.ratio, row.ratio_p20, row.ratio_p80, 2) + (" busy" if row.busy else "")
        ours = _spread(row.median_s, row.p20_s, row.p80_s, 3)
        params = f"{row.params / 1e6:.1f}M"
        cells.append(
            (row.case, params, str(row.batch), ours, f"{row.tokens_per_s:.0f}", row.peer or _MISSING, peer, compared)
        )
    return aligned(cells, left=(0, 5))


def aligned(cells: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Lines of cells, the header first, as columns; those in `left` (names) are flush left."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [cells[0], tuple("-" * width for width in widths), *cells[1:]]
    )


def _spread(middle: float | None, low: float | None, high: float | None, digits: int) -> str:
    assert middle is not None and low is not None and high is not None  # a row with a peer has all of them
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def document(found: Sequence[Row], absent: Sequence[Absent], machine: Machine, described: Sequence[str]) -> dict:
    """What `--out` holds: the rows, peers that could not be run, definitions of the cases, machine, versions."""
    return artifacts.plain(
        {
            "rows": list(found),
            "absent": list(absent),
            "cases": list(described),
            "machine": machine,
            "versions": {**artifacts.versions(), **{name: _version(name) for name in _PEER_PACKAGES}},
        }
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
