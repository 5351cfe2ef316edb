"""A rollout that reaches the disk while it runs: a journal of finished episodes, and at the end one sealed dataset.

Episodes and a function that runs them go in; a dataset in episode order and the rollout's figures come out. Killed at any
moment, the same call goes on with the episodes that are not finished. Where JAX runs on several processes, each rolls out
its block of the episodes on its own devices, and the first seals the shards of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from subl_jax import artifacts, data
from subl_jax.metrics.progress import progress
from subl_jax.parallel import processes
from subl_jax.rollout.conversation import Episode
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.trajectory import CUT_OFF, FAILED, Trajectory

# Times pass side by side on all processes, and steps are counted at the slowest replica: of these the largest counts.
_SIDE_BY_SIDE = ("decode_seconds", "prefill_seconds", "waiting_seconds", "wall_seconds", "decode_steps")

Run = Callable[[Sequence[Episode], RolloutStatistics], Iterator[Trajectory]]


def roll_out(
    directory: Path,
    identity: Mapping[str, Any],
    episodes: Sequence[Episode],
    run: Run,
    *,
    metadata: Mapping[str, Any],
    label: str,
    in_flight: int,
) -> dict[str, Any]:
    """Makes a dataset of episodes; what an earlier call of the same rollout has finished is not run again.

    Every process of a distributed run calls it with the same arguments.

    Args:
      directory: of the dataset, on a file system that all processes see. Journals lie beside it, and vanish with its seal.
      identity: all that an episode's record depends on: policy, sampling (slots included), seed, tasks.
      episodes: sorted by (index, sample), without duplicates, at least one.
      run: runs the episodes it is given and yields each as it is finished, in any order; fills the statistics. It is not
        called if there is nothing to run.
      metadata: of the dataset.
      label: at the head of progress lines.
      in_flight: episodes that this process runs at a time, for the estimate of the time that is left.

    Returns:
      Figures for the stage's marker. Of the dataset: episodes, sampled_tokens, truncated (cut off by a limit), failed (in
      their environment). Of what was run by this call, on all processes, or None if that is nothing: tokens_per_s (of
      device time), decode_tokens_per_s, occupancy, tools_share (the part of the time in which devices waited for tools).
      Besides, resumed (episodes that were there already), compiled (programs) and compile_s.

    Raises:
      JournalError: a journal of another rollout stands in the place of this one's, is in use, or is damaged.
      DatasetError: the dataset cannot be written.
    """
    rank, world = jax.process_index(), jax.process_count()
    counted, mark = RolloutStatistics(), artifacts.digest(identity)
    sealed = processes.told_by_first(f"seal of {directory}", _mark(directory))
    if sealed == mark:  # killed between the seal and the stage's marker
        logging.info("%s: the dataset of this rollout is sealed already", label)
        if rank == 0:
            for path in directory.parent.glob("journal-*-of-*.jsonl"):
                path.unlink()
        return _figures(counted, _counts(data.open_source(directory)), len(episodes))
    if rank == 0:
        _adopt(directory, identity, episodes, world)
    processes.barrier(f"journals of {directory}")
    own = [episodes[place] for place in data.block(len(episodes), rank, world)]
    with data.Journal.open(_journal(directory, rank, world), identity) as journal:
        todo = [episode for episode in own if (episode.index, episode.sample) not in journal.finished]
        resumed = len(own) - len(todo)
        if resumed:
            logging.info("%s: %d of %d episodes stand in %s", label, resumed, len(own), journal.path)
        if todo:
            shown = label if world == 1 else f"{label} (process {rank} of {world})"
            for trajectory in _shown(run(todo, counted), shown, len(todo), counted, in_flight):
                journal.append(trajectory)
        finished = journal.read()
        data.write_shard(directory, rank, world, finished)
        told = processes.gather(
            f"rolled out {directory}",
            {"resumed": resumed, "counts": _counts(finished), "statistics": _plain(counted)},
        )
        if rank == 0:  # every process has told, and so has written
            data.seal_shards(directory, world, metadata={**metadata, "rollout": mark}, overwrite=True)
        processes.barrier(f"seal of {directory}")
        journal.delete()
    counted = _together(counted, [each["statistics"] for each in told])
    counts = {name: sum(each["counts"][name] for each in told) for name in told[0]["counts"]}
    if rank == 0 and counted.episodes:
        logging.info("%s\n  %s", label, "\n  ".join(counted.lines()))
    broken = next((item for item in finished if item.status in FAILED), None)
    if broken is not None:
        logging.warning(
            "%s: %d of %d episodes failed in their environment, such as episode %d (task %s): %s, %s",
            label, counts["failed"], len(episodes), broken.episode, broken.task_id, broken.status, broken.error,
        )  # fmt: skip
    return _figures(counted, counts, sum(each["resumed"] for each in told))


def _shown(
    found: Iterator[Trajectory], label: str, total: int, counted: RolloutStatistics, in_flight: int
) -> Iterator[Trajectory]:
    """Passes trajectories on, and shows how far the rollout is, how fast, and how long it will take."""
    with progress(total, label, unit="episode") as shown:
        for trajectory in found:
            yield trajectory  # first of all it reaches the journal
            running = min(in_flight, total - counted.episodes)
            rate = counted.sampled_tokens / counted.wall_seconds if counted.wall_seconds else 0.0
            figures: dict[str, Any] = {"tokens/s": rate, "occupancy": counted.occupancy}
            shown.advance(eta_s=counted.eta_s(total, running), **figures)


# --- Files ------------------------------------------------------------------------------------------------------------


def _journal(directory: Path, rank: int, world: int) -> Path:
    """Where a process keeps what it has finished: beside the dataset, in the stage's directory."""
    return directory.parent / f"journal-{rank:05d}-of-{world:05d}.jsonl"


def _mark(directory: Path) -> str | None:
    """The digest of the rollout whose dataset stands sealed in a directory, if one does."""
    try:
        return data.read_metadata(directory).get("rollout")
    except data.DatasetError:
        return None


def _adopt(directory: Path, identity: Mapping[str, Any], episodes: Sequence[Episode], world: int) -> None:
    """Moves what another number of processes has left behind to the journals of the processes that there are now."""
    own = [_journal(directory, rank, world) for rank in range(world)]
    left = sorted(set(directory.parent.glob("journal-*-of-*.jsonl")) - set(own))
    if not left:
        return
    home = {
        (episodes[place].index, episodes[place].sample): rank
        for rank in range(world)
        for place in data.block(len(episodes), rank, world)
    }
    with contextlib.ExitStack() as stack:
        old = [stack.enter_context(data.Journal.open(path, identity)) for path in left]
        new = [stack.enter_context(data.Journal.open(path, identity)) for path in own]
        moved = 0
        for trajectory in (item for journal in old for item in journal.read()):
            key = trajectory.episode, trajectory.sample
            if key not in new[home[key]].finished:
                new[home[key]].append(trajectory)
                moved += 1
        for journal in new:
            journal.close()  # on the disk, before the old ones go
        for journal in old:
            journal.delete()
    logging.info("took over %d finished episodes from another number of processes", moved)


# --- Processes --------------------------------------------------------------------------------------------------------


def _plain(counted: RolloutStatistics) -> dict[str, Any]:
    return {
        field.name: getattr(counted, field.name)
        for field in dataclasses.fields(counted)
        if field.name not in ("compilations", "device_kind")
    }


def _together(own: RolloutStatistics, everyone: Sequence[Mapping[str, Any]]) -> RolloutStatistics:
    """The statistics of all processes; compilations are this one's, since each compiles the same."""
    merged = {name: (max if name in _SIDE_BY_SIDE else sum)(each[name] for each in everyone) for name in everyone[0]}
    return dataclasses.replace(own, **merged)


# --- Figures ----------------------------------------------------------------------------------------------------------


def _counts(trajectories: Iterable[Trajectory]) -> dict[str, int]:
    """What a dataset holds."""
    counts: dict[str, int] = dict.fromkeys(("episodes", "sampled_tokens", "truncated", "failed"), 0)
    for trajectory in trajectories:
        counts["episodes"] += 1
        counts["sampled_tokens"] += int(trajectory.loss_mask.sum())
        counts["truncated"] += trajectory.status in CUT_OFF
        counts["failed"] += trajectory.status in FAILED
    return counts


def _figures(counted: RolloutStatistics, counts: Mapping[str, int], resumed: int) -> dict[str, Any]:
    """See `roll_out`."""

    def rate(seconds: float) -> float | None:
        return counted.sampled_tokens / seconds if seconds else None

    return {
        **counts,
        "resumed": resumed,
        "tokens_per_s": rate(counted.device_seconds),
        "decode_tokens_per_s": rate(counted.decode_seconds),
        "occupancy": counted.occupancy if counted.slots else None,
        "tools_share": counted.waiting_seconds / counted.wall_seconds if counted.wall_seconds else None,
        "compiled": len(counted.compilations),
        "compile_s": sum((each.seconds for each in counted.compilations), 0.0),
    }
