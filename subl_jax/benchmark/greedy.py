"""What every program of the rollout workload is asked for, and whether two of them answered alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from subl_jax.benchmark.harness import BenchmarkError

# DESIGN's bar: between implementations a first divergence is allowed only where the two best logits are this close.
MAX_GAP = 1e-4
# Of so many rows one may differ. More than that is no accident of rounding.
ROWS_PER_TIE = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts of one run, all of one length, and how many tokens follow each: always so many, nothing stops one."""

    prompts: list[list[int]]
    new_tokens: int


def check_lengths(name: str, request: Request, tokens: Sequence[Sequence[int]]) -> None:
    """Refuses an answer that is not `new_tokens` for each prompt: it would be less work than was asked for.

    Raises:
      BenchmarkError: some are missing.
    """
    lengths = sorted({len(row) for row in tokens})
    if len(tokens) != len(request.prompts) or lengths != [request.new_tokens]:
        raise BenchmarkError(
            f"{name} returned {len(tokens)} rows of {lengths} tokens; {len(request.prompts)} rows of "
            f"{request.new_tokens} were asked for"
        )


def differing_rows(
    peer: str, request: Request, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]],
    gap: Callable[[Sequence[int]], float],
) -> int:  # fmt: skip
    """How many rows differ; each must do so first where the two best logits nearly tie.

    Args:
      peer: its name, for errors.
      request: what both answered.
      ours, theirs: greedy tokens, [batch][new tokens].
      gap: token ids so far to the difference of the two best next logits.

    Raises:
      BenchmarkError: one differs without a tie, or more than a few differ.
    """
    differing = 0
    for number, (prompt, own, other) in enumerate(zip(request.prompts, ours, theirs, strict=True)):
        at = next((place for place, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), None)
        if at is None:
            continue
        differing += 1
        between = gap([*prompt, *own[:at]])
        if between > MAX_GAP:
            raise BenchmarkError(
                f"{peer} and we chose different tokens in row {number} at new token {at} ({other[at]} and {own[at]}), "
                f"where the two best logits are {between:.2g} apart (a tie is at most {MAX_GAP:g}): the two do not run "
                "the same model"
            )
    allowed = max(1, len(request.prompts) // ROWS_PER_TIE)
    if differing > allowed:
        raise BenchmarkError(
            f"{peer} and we differ in {differing} of {len(request.prompts)} rows, each first at a tie of the two best "
            f"logits; more than {allowed} are no accident"
        )
    return differing
