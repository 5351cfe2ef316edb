"""Keeps a command going: waits for machines, replaces those that were taken, starts again what asks for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from subl_jax.launching import checkout
from subl_jax.launching.command import LaunchError
from subl_jax.launching.programs import ProgramFailed, Programs
from subl_jax.launching.tpu_vm import resource, workers
from subl_jax.launching.tpu_vm.record import Record
from subl_jax.launching.tpu_vm.workers import Status
from subl_jax.parallel.contract import PEER_LOST, REQUEUE

# So often in a row may ssh fail while the API calls the machines active: they reboot, or are about to be taken.
UNREACHABLE = 10


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to give up.

    Attributes:
      restarts: starts and new machines after the first, whatever the cause.
      peers_lost: of those, restarts because a process lost another one or ended without a word.
      wait: seconds for machines to come; a queue may be days long.
      poll: seconds between looks.
      grace: seconds that a stopped command has for its checkpoint.
    """

    restarts: int = 20
    peers_lost: int = 3
    wait: int = 7 * 24 * 3600
    poll: int = 30
    grace: int = 300


def verdict(answers: Sequence[Status], expected: int) -> str:
    """What the workers' states add up to: running, done, failed, requeue or lost.

    One that failed by itself decides, since the others fail after it; then one that asks to be started again; then
    one that lost another, ended without a word, never started or does not answer.
    """
    codes = {answer.code for answer in answers if answer.state == "exited"}
    if codes - {0, REQUEUE, PEER_LOST}:
        return "failed"
    if REQUEUE in codes:
        return "requeue"
    if PEER_LOST in codes or any(answer.state in ("lost", "none") for answer in answers) or len(answers) < expected:
        return "lost"
    return "done" if codes == {0} and not any(answer.state == "running" for answer in answers) else "running"


def wait_active(
    programs: Programs, record: Record, limits: Limits, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Waits until the machines are there.

    Raises:
      LaunchError: the request failed or was suspended, or they did not come in time.
    """
    tpu, waited, shown = record.tpu, 0, ""
    while True:
        now, reason = resource.state(programs, tpu)
        if programs.dry_run or now in resource.ACTIVE:
            return
        if now in resource.LOST:
            because = f": {reason}" if reason else ""
            again = f"python -m launch.tpu_vm resume --name={tpu.name}"
            raise LaunchError(f"{tpu.name} is {now}{because}; {again} asks for it again, delete gives it up")
        if waited >= limits.wait:
            raise LaunchError(
                f"{tpu.name} is still {now} after {waited} s; raise --wait_s, or try another zone or --spot"
            )
        if now != shown:
            programs.note(f"{tpu.name} is {now}; waiting")
            shown = now
        sleep(limits.poll)
        waited += limits.poll


def create(programs: Programs, record: Record) -> None:
    """Asks for the machines; `wait_active` waits for them.

    Raises:
      LaunchError: the request was refused.
    """
    programs.run(record.tpu.create())
    if not programs.dry_run:
        record.save()


def install(programs: Programs, record: Record, python: str = "") -> None:
    """Puts the record's commit on every worker."""
    packed = checkout.archive(programs, record.commit, record.path.parent)
    version = checkout.stamp(record.commit)
    programs.note(f"installing {version} on {', '.join(record.tpu.nodes)}: minutes the first time")
    workers.install(programs, record.tpu, packed, version, record.extra, python)


def begin(programs: Programs, record: Record) -> None:
    """Starts the record's command, which is written down just before: from then on it may be running."""
    version = checkout.stamp(record.commit)
    hosts = workers.ready(programs, record.tpu, version)
    record.attempt += 1
    if not programs.dry_run:
        record.save()
    workers.start(programs, record.tpu, version, record.attempt, hosts, record.command)


def replace(programs: Programs, record: Record, limits: Limits, sleep: Callable[[float], None]) -> None:
    """Gives back what is left of machines that were taken, and asks for others."""
    if record.tpu.existing:
        raise LaunchError(
            f"{record.tpu.name} is gone and was not made here (--existing); make it again, then: "
            f"python -m launch.tpu_vm resume --name={record.tpu.name}"
        )
    gone = programs.run(record.tpu.delete(), check=False)
    if gone.code and "NOT_FOUND" not in gone.err and "was not found" not in gone.err:
        raise ProgramFailed(record.tpu.delete(), gone)
    create(programs, record)
    wait_active(programs, record, limits, sleep)


def rehearse(programs: Programs, record: Record, limits: Limits) -> None:
    """Prints what a resume may run, in order."""
    resource.state(programs, record.tpu)
    programs.note("if it was taken (SUSPENDED, FAILED, PREEMPTED) or is not there:")
    if record.tpu.existing:
        programs.note("  nothing: it was not made here")
    else:
        replace(programs, record, limits, time.sleep)
        install(programs, record)
    programs.note(f"if a worker asks for it ({REQUEUE}), lost another ({PEER_LOST}), or the machines are new:")
    workers.stop(programs, record.tpu, limits.grace)
    begin(programs, record)


def resume(programs: Programs, record: Record, limits: Limits, sleep: Callable[[float], None] = time.sleep) -> None:
    """Watches the record's command until it has ended well, starting it again after preemptions and requests to.

    Raises:
      LaunchError: it failed by itself, the limits are reached, or the machines cannot be had.
    """
    if not record.command:
        raise LaunchError(
            f"{record.tpu.name} has no recorded command; start one: python -m launch.tpu_vm run --name={record.tpu.name} -- ..."
        )
    if programs.dry_run:
        return rehearse(programs, record, limits)
    version = checkout.stamp(record.commit)
    counts = {"restarts": 0, "peers_lost": 0}
    unreachable, shown = 0, ""

    def count(what: str, why: str) -> None:
        counts[what] += 1
        if counts[what] > getattr(limits, what):
            flag = {"restarts": "--max_restarts", "peers_lost": "--max_peers_lost"}[what]
            raise LaunchError(
                f"given up: {why}, and {flag}={getattr(limits, what)} are used up; look at the logs, then resume again"
            )

    while True:
        now, reason = resource.state(programs, record.tpu)
        if now in resource.LOST:
            programs.note(f"{record.tpu.name} is {now}{f' ({reason})' if reason else ''}: asking for new machines")
            count("restarts", f"{record.tpu.name} is {now}")
            replace(programs, record, limits, sleep)
            install(programs, record)
            begin(programs, record)
            continue
        if now not in resource.ACTIVE:
            wait_active(programs, record, limits, sleep)
            continue
        try:
            expected = len(resource.addresses(resource.nodes(programs, record.tpu)))
            answers = workers.statuses(programs, record.tpu)
        except ProgramFailed as error:
            unreachable += 1
            if unreachable > UNREACHABLE:
                raise
            programs.note(f"workers do not answer ({unreachable} of {UNREACHABLE}): {str(error).splitlines()[0]}")
            sleep(limits.poll)
            continue
        unreachable = 0
        # New machines, or ones that somebody else installed another version on: they answer with nothing, or with that.
        if len(answers) < expected or any(told.version != version and told.state != "running" for told in answers):
            programs.note(f"workers lack version {version}")
            count("restarts", "workers came without this version")
            workers.stop(programs, record.tpu, limits.grace)
            install(programs, record)
            begin(programs, record)
            continue
        now = verdict(answers, expected)
        if now == "done":
            programs.note(f"done on all {len(answers)} workers")
            return
        if now == "failed":
            bad = [
                f"{answer.host}: {answer.code}"
                for answer in answers
                if answer.code not in (None, 0, REQUEUE, PEER_LOST)
            ]
            workers.stop(programs, record.tpu, limits.grace)
            raise LaunchError(f"the command failed ({', '.join(bad[:8])}); the log of the first worker ends:\n"
                              f"{workers.last_words(programs, record.tpu)}")  # fmt: skip
        if now == "running":
            if now != shown:
                programs.note(f"attempt {record.attempt} runs on {len(answers)} workers")
            shown = now
            sleep(limits.poll)
            continue
        shown = ""
        why = (
            "the command asks to be started again"
            if now == "requeue"
            else "a process lost another, or ended without a word"
        )
        programs.note(f"{why}: attempt {record.attempt + 1}")
        count("restarts", why)
        if now == "lost":
            count("peers_lost", why)
        workers.stop(programs, record.tpu, limits.grace)
        begin(programs, record)
