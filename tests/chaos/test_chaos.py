"""One round of each kind, at moments that differ from run to run (the seed is printed where one fails)."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from subl_jax.parallel import contract
from tests.chaos import rounds
from tests.chaos.worker import STEPS

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    return rounds.unbroken(tmp_path_factory.mktemp("chaos") / "unbroken")


@pytest.mark.parametrize("kind", rounds.KINDS)
def test_a_disturbed_distillation_ends_in_time_and_goes_on_bit_for_bit(kind: str, tmp_path: Path, expected) -> None:
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")
    outcome = rounds.play(kind, tmp_path / "round", random.Random(seed), expected)
    print(outcome.line())
    assert outcome.equal
    if kind.startswith("terminate") and outcome.code == 0:
        # It came while the last steps ran, and there was nothing left to stop.
        assert outcome.starts == 1 and outcome.moment > STEPS - 20
    elif kind.startswith("terminate"):
        assert outcome.code == contract.REQUEUE
        assert "the same command continues from step" in outcome.output[0]
    else:
        assert outcome.code not in (0, contract.REQUEUE)
    if kind == "fill_disk":
        assert "No space left" in outcome.output[0] or "disk is full" in outcome.output[0]
    assert "Traceback" not in outcome.output[1]  # the run after it has nothing to complain of
