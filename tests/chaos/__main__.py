"""`python -m tests.chaos --runs=20 [--seed=N] [--kinds=kill,freeze]`: a line for every round; exit code 1 if one went wrong."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.chaos import rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="rounds; kinds take turns")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn and printed by default")
    parser.add_argument("--kinds", default=",".join(rounds.KINDS), help="of %(default)s")
    given = parser.parse_args()
    kinds, seed = given.kinds.split(","), time.time_ns() % 2**32 if given.seed is None else given.seed
    print(f"seed {seed}; nothing may take longer than {rounds.BOUND_S} s to end", flush=True)
    draw, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        expected = rounds.unbroken(Path(directory) / "unbroken")
        for number in range(given.runs):
            kind = kinds[number % len(kinds)]
            try:
                outcome = rounds.play(kind, Path(directory) / f"round-{number}", draw, expected)
                wrong += not outcome.equal
                print(f"{number + 1:3}  {outcome.line()}", flush=True)
            except AssertionError as error:
                wrong += 1
                print(f"{number + 1:3}  {kind:14} WRONG: {error}", flush=True)
    print(f"{given.runs - wrong} of {given.runs} rounds ended correctly")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
