"""Diluted training: which step reads what, by a brute-force account, and that a resumed run is the same run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax.checkpoint import CheckpointMismatch
from subl_jax.distill import loop
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.dilution import DilutedSource, Dilution
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import coins
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.step import compiled_step
from subl_jax.distill.train_config import TrainConfig
from tests.distill import tiny

STEPS, ROWS, CAPACITY = 30, 2, 24
OWN = tiny.documents(14, seed=1)
# As long, with as many loss tokens, and other words.
OTHER = [dataclasses.replace(each, tokens=(each.tokens * 7 + 3) % tiny.VOCAB) for each in OWN]
LONGER = tiny.documents(14, seed=2, longest=23)
for _document in [*OTHER, *LONGER]:
    _document.tokens[0] = 39  # tells a document of the dilution
for _document in OWN:
    _document.tokens[0] = 3
STUDENT = Model(tiny.SMALL, tiny.params(tiny.SMALL))
TEACHERS = [Model(tiny.LARGE, tiny.params(tiny.LARGE, seed)) for seed in (1, 2)]
CONFIG = TrainConfig(
    steps=8, batch_rows=ROWS, row_tokens=CAPACITY, checkpoint_every=2, log_every=1,
    optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=1),
)  # fmt: skip


def lengths(documents) -> list[int]:
    return [len(each.tokens) for each in documents]


def source_of(documents, steps: int = STEPS, seed: int = 5) -> BatchSource:
    return BatchSource(documents, lengths(documents), CAPACITY, ROWS, steps, seed)


def diluted(batch: Any) -> set[bool]:
    """Whether the documents of a batch are the dilution's."""
    tokens, segments, positions = (np.asarray(each) for each in batch[:3])
    return {bool(first == 39) for first in tokens[(segments > 0) & (positions == 0)]}


def run(root: Path, share: float | None = 0.5, **more: Any) -> Any:
    dilution = None if share is None else Dilution(OTHER, lengths(OTHER), TEACHERS[1], share)
    return train(
        STUDENT, OWN, more.pop("config", CONFIG), Objective("forward_kl"), seed=more.pop("seed", 5),
        directory=root / "model", stage="s", logs=root, metadata={"run": 1}, teacher=TEACHERS[0],
        dilution=more.pop("dilution", dilution),
    )  # fmt: skip


def test_each_step_reads_one_source_whole_and_each_source_is_read_in_its_own_order():
    wide = source_of(LONGER)
    wide.widen(64, 8)
    source = DilutedSource(source_of(OWN), wide, 0.4, STEPS, 5)
    alone = [source_of(OWN), source_of(LONGER)]
    seen = [0, 0]
    for position in range(STEPS):
        which = source.diluted(position)
        batch = source.batch(position)
        assert diluted(batch) == {which}
        expected = alone[which].batch(seen[which])
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
        assert batch.loss_weights.sum() == expected.loss_weights.sum() == source.facts(position).loss_tokens
        seen[which] += 1
    assert 0 < seen[1] < STEPS
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(source.batch(position))) for position in range(STEPS)}
    assert len(shapes) == 1 and (1, 1, 64, 8) in next(iter(shapes))


def test_the_share_of_diluted_steps_is_the_share_that_was_asked_for_and_a_seed_names_it():
    found = []
    for seed in range(40):
        source = DilutedSource(source_of(OWN, 1), source_of(OTHER, 1), 0.3, 500, seed)
        found.append([source.diluted(position) for position in range(500)])
    drawn = np.asarray(found)
    # Binomial over 20 000 coins: five standard deviations.
    assert abs(drawn.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / drawn.size)
    assert abs(drawn.mean(1) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 500)
    assert not np.array_equal(drawn[0], drawn[1])
    again = DilutedSource(source_of(OWN, 1), source_of(OTHER, 1), 0.3, 500, 7)
    assert [again.diluted(position) for position in range(500)] == found[7]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undiluted run, then a diluted one; how many signatures the step that they share was called with after each."""
    compiled_step.cache_clear()
    made: list[Any] = []

    def noted(*arguments: Any) -> Any:
        made.append(compiled_step(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "compiled_step", noted)
        run(tmp_path_factory.mktemp("plain"), share=None)
        before = made[0]._cache_size()
        result = run(tmp_path_factory.mktemp("whole"))
    assert made[0] is made[1]
    return result, before, made[1]._cache_size()


def test_both_kinds_of_steps_run_the_program_that_an_undiluted_run_compiles(whole):
    source = DilutedSource(source_of(OWN, 8), source_of(OTHER, 8), 0.5, 8, 5)
    assert {source.diluted(position) for position in range(8)} == {True, False}
    assert whole[1] == whole[2]


def test_each_step_learns_from_the_teacher_of_its_documents(tmp_path):
    """One step of each kind by itself: the same loss as a run of that source alone with that teacher."""
    one = dataclasses.replace(CONFIG, steps=1)
    for want in (False, True):
        seed = next(seed for seed in range(50) if bool(coins(0.5, 1, seed)[0]) == want)
        mixed = run(tmp_path / f"mixed-{want}", config=one, seed=seed)
        documents, teacher = (OTHER, TEACHERS[1]) if want else (OWN, TEACHERS[0])
        alone = train(
            STUDENT, documents, one, Objective("forward_kl"), seed=seed, directory=tmp_path / f"alone-{want}", stage="s",
            logs=tmp_path / f"alone-{want}", metadata={}, teacher=teacher,
        )  # fmt: skip
        assert mixed.loss == pytest.approx(alone.loss, rel=1e-5)
        wrong = train(
            STUDENT, documents, one, Objective("forward_kl"), seed=seed, directory=tmp_path / f"wrong-{want}", stage="s",
            logs=tmp_path / f"wrong-{want}", metadata={}, teacher=TEACHERS[1 - want],
        )  # fmt: skip
        assert wrong.loss != pytest.approx(mixed.loss, rel=1e-3)


@pytest.mark.parametrize("at", [3, 6])
def test_an_interrupted_diluted_run_ends_like_one_that_was_not(whole, tmp_path, monkeypatch, at):
    batch = DilutedSource.batch

    def interrupted(self: Any, position: int) -> Any:
        if position == at:
            raise KeyboardInterrupt
        return batch(self, position)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(DilutedSource, "batch", interrupted)
        run(tmp_path)
    found = run(tmp_path)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(whole[0].params), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_checkpoint_of_another_dilution_is_refused_by_name(tmp_path):
    config = dataclasses.replace(CONFIG, steps=3)
    run(tmp_path, config=config)
    others = [
        Dilution(OTHER, lengths(OTHER), TEACHERS[1], 0.6),
        Dilution(OTHER[:-1], lengths(OTHER[:-1]), TEACHERS[1], 0.5),
        Dilution(OTHER, lengths(OTHER), TEACHERS[0], 0.5),
        None,
    ]
    for other in others:
        with pytest.raises(CheckpointMismatch, match="dilution"):
            run(tmp_path, config=config, dilution=other)


def test_dilutions_that_cannot_be_are_refused(tmp_path):
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"share is {share}.*inside \(0, 1\)"):
            Dilution(OTHER, lengths(OTHER), None, share)
    with pytest.raises(ValueError, match="needs a teacher where the run has one"):
        run(tmp_path, dilution=Dilution(OTHER, lengths(OTHER), None, 0.5))
    small = Model(tiny.SMALL, tiny.params(tiny.SMALL, 3))
    with pytest.raises(ValueError, match="another shape"):
        run(tmp_path, dilution=Dilution(OTHER, lengths(OTHER), small, 0.5))
