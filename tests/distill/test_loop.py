"""The training loop: it learns, it resumes bit for bit after a kill, and it refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from subl_jax import checkpoint
from subl_jax.checkpoint import CheckpointMismatch, read_metadata
from subl_jax.distill import loop, teacher_cache
from subl_jax.distill.accounting import shape_of
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.records import TrainingDiverged, why_diverged
from subl_jax.distill.run_identity import fingerprint
from subl_jax.distill.step import compiled_step
from subl_jax.distill.train_config import TrainConfig
from subl_jax.metrics import sft_step_flops
from subl_jax.metrics.trace import Trace
from subl_jax.metrics.writers import read_metrics
from subl_jax.models.config import LoraConfig
from subl_jax.parallel.layout import LayoutError, MeshConfig
from tests.distill import tiny

CONFIG = TrainConfig(
    steps=6, batch_rows=8, row_tokens=16, optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=1),
    checkpoint_every=2, log_every=1,
)  # fmt: skip
HARD = Objective("hard_label")
MODEL = Model(tiny.SMALL, tiny.params(tiny.SMALL))
# A teacher of another shape.
DISTILLED: dict[str, Any] = {
    "objective": Objective("forward_kl"), "teacher": Model(tiny.LARGE, tiny.params(tiny.LARGE, 1))
}  # fmt: skip
ADAPTED = Model(
    dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2, dropout=0.1, targets=("q", "down"))), MODEL.params
)
START = jax.tree.map(lambda leaf: np.array(leaf), MODEL.params)


def easy_documents() -> list:
    """Sequences that count upwards: a few steps suffice to see the loss fall."""
    return [tiny.document([(start + k) % 9 for k in range(12)], range(3, 12), f"t/{start}") for start in range(9)]


def run(root: Path, config: TrainConfig = CONFIG, seed: int = 3, metadata=None, **more):
    return train(
        more.pop("student", MODEL), more.pop("documents", easy_documents()), config, more.pop("objective", HARD),
        seed=seed, directory=root / "model", stage="base/large", logs=root, metadata=metadata or {"run": 1}, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    return root, run(root)


def assert_equal_bits(left, right) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_equal_to_rounding(left, right) -> None:
    """Relative L2 distance of all parameters together."""
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (left, right))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.fixture(scope="module")
def distilled_alone(tmp_path_factory):
    root = tmp_path_factory.mktemp("distilled")
    return root, run(root, **DISTILLED)


def losses_of(root: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in read_metrics(root / "metrics.jsonl")]


def test_the_loss_falls_and_the_start_is_left_as_it_was(unbroken):
    root, result = unbroken
    rows = losses_of(root)
    assert [step for step, *_ in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1][1] < rows[0][1] - 0.5
    assert result.loss == rows[-1][1]
    assert_equal_bits(MODEL.params, START)  # not donated away
    assert result.tokens_per_s == pytest.approx(6 * 8 * 12 / result.seconds)
    assert result.loss_tokens == 6 * 8 * 9
    assert all({"stage", "step", "loss", "gradient_norm", "loss_tokens"} <= row.keys()
               for row in read_metrics(root / "metrics.jsonl"))  # fmt: skip


def test_the_seed_orders_the_data_and_shares_the_program(unbroken, tmp_path):
    before = compiled_step.cache_info().misses
    other = run(tmp_path, seed=4)
    assert compiled_step.cache_info().misses == before
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(unbroken[1].params), strict=True)
    )


def run_until(at: int, root: Path, monkeypatch, **more) -> None:
    """A run that ends when it asks for the batch at a position."""
    batch = loop.BatchSource.batch

    def interrupted(self, position):
        if position == at:
            raise KeyboardInterrupt
        return batch(self, position)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.BatchSource, "batch", interrupted)
        run(root, **more)


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(unbroken, tmp_path, monkeypatch, at):
    run_until(at, tmp_path, monkeypatch)
    batch, asked = loop.BatchSource.batch, []
    monkeypatch.setattr(loop.BatchSource, "batch", lambda self, p: asked.append(p) or batch(self, p))
    resumed = run(tmp_path)
    assert asked == list(range(at - at % 2, 6))
    assert_equal_bits(resumed.params, unbroken[1].params)
    assert resumed.loss == unbroken[1].loss
    assert losses_of(tmp_path) == losses_of(unbroken[0])


@pytest.mark.slow
def test_a_run_that_was_killed_ends_like_one_that_was_not(unbroken, tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from subl_jax.distill import loop
        from tests.distill import test_loop
        batch = loop.BatchSource.batch
        def dying(self, position):
            if position == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(self, position)
        loop.BatchSource.batch = dying
        test_loop.run(Path({str(tmp_path)!r}))
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(tmp_path)
    assert_equal_bits(resumed.params, unbroken[1].params)
    assert losses_of(tmp_path) == losses_of(unbroken[0])


def test_a_run_killed_after_its_last_step_still_knows_its_loss(unbroken, tmp_path):
    """Between the loop's end and the caller's marker: the same call again must give the same result, not NaN."""
    run(tmp_path)
    again = run(tmp_path)
    assert again.loss == unbroken[1].loss and again.tokens_per_s > 0
    assert_equal_bits(again.params, unbroken[1].params)
    assert losses_of(tmp_path) == losses_of(unbroken[0])
    json.dumps(again.loss, allow_nan=False)


def test_metrics_are_written_every_log_every_steps_and_at_the_end(tmp_path):
    config = TrainConfig(6, 8, 16, CONFIG.optimizer, checkpoint_every=5, log_every=4)
    result = run(tmp_path, config)
    assert [step for step, *_ in losses_of(tmp_path)] == [4, 6]
    assert result.loss == losses_of(tmp_path)[-1][1]


def poison(monkeypatch) -> None:
    """From step 4 on no token of a batch has a weight: the loss is 0 / 0."""
    batch = loop.BatchSource.batch

    def poisoned(self, position):
        found = batch(self, position)
        return found._replace(loss_weights=found.loss_weights * np.float32(position < 3))

    monkeypatch.setattr(loop.BatchSource, "batch", poisoned)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch)
    # Nothing is logged at step 4, whose state would be the next to be kept.
    config = TrainConfig(6, 8, 16, CONFIG.optimizer, checkpoint_every=2, log_every=5)
    with pytest.raises(TrainingDiverged, match="base/large: the loss is nan at step 4; lower the learning rate"):
        run(tmp_path, config)
    assert [path.name for path in sorted((tmp_path / "model" / "steps").glob("0*"))] == ["00000002"]
    assert read_metadata(tmp_path / "model" / "steps" / "00000002")["run"] == 1


def test_a_checkpoint_of_another_run_is_refused_by_name_and_left(tmp_path):
    run(tmp_path, metadata={"run": 1, "config_hash": "aa"})
    kept = sorted(path.name for path in (tmp_path / "model" / "steps").iterdir())
    with pytest.raises(CheckpointMismatch, match="config_hash"):
        run(tmp_path, metadata={"run": 1, "config_hash": "bb"})
    assert sorted(path.name for path in (tmp_path / "model" / "steps").iterdir()) == kept


@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        (Objective("forward_kl"), {}, "forward_kl and a teacher missing"),
        (HARD, {"teacher": MODEL}, "hard_label and a teacher given"),
        (Objective("forward_kl", "anchor"), {"teacher": MODEL}, "anchor and a base missing"),
        (Objective("forward_kl"), {"teacher": MODEL, "base": MODEL}, "none and a base given"),
        (Objective("forward_kl", "drop"), {"teacher": MODEL}, "drop does not fit"),
        (Objective("forward_kl", "anchor"), {"teacher": MODEL, "base": MODEL}, "anchor does not fit"),
    ],
)
def test_a_teacher_base_or_filter_that_does_not_fit_the_objective_is_refused(tmp_path, objective, given, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, objective=objective, **given)
    assert not any(tmp_path.iterdir())


LENGTHS = ["steps", "batch_rows", "row_tokens", "checkpoint_every", "log_every", "accumulate", "keep"]


@pytest.mark.parametrize(("field", "value", "least"), [
    *((field, 0, 1) for field in LENGTHS),
    ("chunk_tokens", -1, 0), ("prefetch", -1, 0), ("keep_every", -1, 0),
    ("checkpoint_minutes", -0.5, 0), ("checkpoint_minutes", float("nan"), 0),
])  # fmt: skip
def test_a_length_that_cannot_be_is_refused_by_field(field, value, least):
    with pytest.raises(ValueError, match=f"{field}={value}; it must be at least {least}"):
        TrainConfig(**{field: value})  # type: ignore[arg-type]


def test_rows_that_do_not_divide_into_their_parts_are_refused():
    with pytest.raises(ValueError, match="batch_rows=8 does not divide into accumulate=3 parts"):
        TrainConfig(batch_rows=8, accumulate=3)


# --- What a checkpoint is bound to --------------------------------------------------------------------------------------

FREE = {
    "checkpoint_every": 3, "checkpoint_minutes": 60.0, "keep": 3, "keep_every": 4, "log_every": 2, "prefetch": 0, "spike": 9.0,
}  # fmt: skip


def test_when_things_are_saved_logged_and_fetched_is_no_part_of_a_runs_identity():
    assert dataclasses.replace(CONFIG, **FREE).identity() == CONFIG.identity()
    changed = {"accumulate": 2, "chunk_tokens": 16, "master_dtype": "bfloat16", "steps": 7}
    for name, value in changed.items():
        assert dataclasses.replace(CONFIG, **{name: value}).identity() != CONFIG.identity()
    fields = {field.name for field in dataclasses.fields(CONFIG)}
    assert CONFIG.identity().keys() == fields - FREE.keys()


def test_a_run_goes_on_with_other_times_to_save_log_and_fetch(unbroken, tmp_path, monkeypatch):
    run_until(3, tmp_path, monkeypatch)
    resumed = run(tmp_path, dataclasses.replace(CONFIG, **FREE))
    assert_equal_bits(resumed.params, unbroken[1].params)
    assert [step for step, *_ in losses_of(tmp_path)] == [1, 2, 4, 6]


def other_documents(tokens: bool) -> list:
    """The documents with one token, or one place of a loss mask, changed."""
    documents = easy_documents()
    if tokens:
        documents[4].tokens[5] ^= 1
    else:
        documents[4].loss_mask[3] = False
    return documents


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": Objective("forward_kl", temperature=2.0)}, r"training.objective.temperature: 1.0 in .*, 2.0 in"),
        ({"objective": Objective("reverse_kl")}, 'training.objective.loss: "forward_kl" in the checkpoint, "reverse_kl"'),
        ({"teacher": Model(tiny.LARGE, tiny.params(tiny.LARGE, 2))}, "training.teacher.parameters"),
        ({"teacher": Model(tiny.SMALL, tiny.params(tiny.SMALL, 1))}, "training.teacher.d_ff: 32 in .*, 24 in this run"),
        ({"student": Model(dataclasses.replace(tiny.SMALL, compute_dtype="bfloat16"), MODEL.params)},
         'training.student.compute_dtype: "float32" in the checkpoint, "bfloat16" in this run'),
        ({"seed": 4}, "training.seed: 3 in the checkpoint, 4 in this run"),
        ({"documents": other_documents(tokens=True)}, "training.data.tokens_and_masks"),
        ({"documents": other_documents(tokens=False)}, "training.data.tokens_and_masks"),
        ({"documents": easy_documents()[:-1]}, "training.data.documents: 9 in the checkpoint, 8 in this run"),
        ({"planned_lengths": [13] * 9}, "training.data.planned_lengths"),
        ({"config": dataclasses.replace(CONFIG, accumulate=2)}, "training.train.accumulate: 1 in .*, 2 in this run"),
        ({"config": dataclasses.replace(CONFIG, optimizer=OptimizerConfig(learning_rate=0.02, warmup_steps=1))},
         "training.train.optimizer.learning_rate: 0.03 in the checkpoint, 0.02 in this run"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_data_models_objective_or_options_is_refused_by_name(distilled_alone, change, named):
    root, _ = distilled_alone
    with pytest.raises(CheckpointMismatch, match=named) as caught:
        run(root, **{**DISTILLED, **change})
    assert caught.value.args[0].count(" in the checkpoint, ") <= 5  # and little besides: other shapes have several


def test_a_frozen_base_of_other_values_is_refused_by_name(tmp_path, monkeypatch):
    run_until(3, tmp_path, monkeypatch, student=ADAPTED)
    moved = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-3), MODEL.params)
    with pytest.raises(CheckpointMismatch, match="training.student.parameters"):
        run(tmp_path, student=Model(ADAPTED.config, moved))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_fingerprint_tells_places_and_values_and_no_mesh(dtype):
    def tree(*values: float) -> dict:
        return {"w": jax.numpy.asarray(values, dtype).reshape(2, -1), "b": jax.numpy.ones(3)}

    found = fingerprint(tree(1, 2, 3, 4))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    wide = tree(*range(8))
    assert fingerprint({**wide, "w": jax.device_put(wide["w"], columns)}) == fingerprint(wide)
    assert fingerprint(tree(1, 2, 3, 4)) == found
    for other in (tree(2, 1, 3, 4), tree(1, 2, 4, 3), tree(3, 2, 1, 4), tree(-1, 2, 3, 4), {"v": tree(1, 2, 3, 4)}):
        assert fingerprint(other) != found


# --- Parts, caches, costs, traces -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_in_parts_ends_with_the_parameters_of_a_step_at_once(unbroken, tmp_path):
    parts = run(tmp_path, dataclasses.replace(CONFIG, accumulate=4))
    assert_equal_to_rounding(parts.params, unbroken[1].params)


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_how_far_batches_are_fetched_ahead_changes_nothing(unbroken, tmp_path, depth):
    result = run(tmp_path, dataclasses.replace(CONFIG, prefetch=depth))
    assert_equal_bits(result.params, unbroken[1].params)
    assert losses_of(tmp_path) == losses_of(unbroken[0])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """All of the teacher's probabilities, of every loss token."""
    directory, teacher, documents = tmp_path_factory.mktemp("cache") / "cache", DISTILLED["teacher"], easy_documents()
    identity = teacher_cache.identity(teacher, "tokenizer", documents, 1.0, tiny.VOCAB, tiny.VOCAB)
    teacher_cache.write(directory, documents, teacher, k=tiny.VOCAB, shared_tokens=tiny.VOCAB, identity=identity)
    return teacher_cache.CacheReader(directory, identity)


@pytest.mark.slow
def test_a_student_of_a_cache_of_everything_ends_like_one_of_the_live_teacher(distilled_alone, cache, tmp_path):
    cached = run(tmp_path, objective=Objective("forward_kl"), teacher_cache=cache)
    live = distilled_alone[1]
    np.testing.assert_allclose(cached.loss, live.loss, rtol=1e-3)  # the cache's grid of probabilities
    assert cached.flops == 6 * sft_step_flops(shape_of(MODEL.config, MODEL.params), 96, 72, [12] * 8) < live.flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": DISTILLED["teacher"]}, "a teacher and a teacher cache are both given"),
        ({"objective": Objective("forward_kl", temperature=2.0)}, "temperature: 1.0 in the cache, 2.0 in this run"),
        (
            {"documents": easy_documents()[:-1]},
            "documents: 9 in the cache, 8 in this run; loss_tokens: 81 in .*, 72 in",
        ),
        ({"shared_tokens": 30}, "shared_tokens: 40 in the cache, 30 in this run"),
        ({"objective": HARD}, "hard_label and a teacher given"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(cache, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"objective": Objective("forward_kl"), "teacher_cache": cache, **given})


def test_models_that_know_fewer_tokens_than_they_are_to_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shared_tokens=41 and a model that knows 40"):
        run(tmp_path, shared_tokens=41)


def test_a_run_tells_what_it_cost(unbroken):
    root, result = unbroken
    flops = sft_step_flops(shape_of(MODEL.config, MODEL.params), 8 * 12, 8 * 9, [12] * 8)
    assert (result.flops, result.packing, result.mfu) == (6 * flops, 12 / 16, None)
    assert result.loss_tokens_per_s == pytest.approx(6 * 8 * 9 / result.seconds)
    assert 0 < result.compile_s < result.seconds and 0 < result.goodput < 1
    assert result.peak_bytes is not None and 10_000_000 < result.peak_bytes < 20_000_000_000
    for row in read_metrics(root / "metrics.jsonl"):
        assert row["packing"] == 12 / 16 and 0 <= row["goodput"] <= 1 and "mfu" not in row
        assert row["tokens_per_s"] / row["loss_tokens_per_s"] == pytest.approx(12 / 9)


def test_a_profile_holds_a_trace_of_a_few_steps_and_changes_nothing(unbroken, tmp_path, monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda where: seen.append(f"start {where}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    step = Trace(tmp_path / "trace", 0, 40)
    with step:
        for position in range(40):
            step.begin(position, ())
            seen.append(str(position))
            step.end(position + 1, ())
    at = seen.index("stop")
    assert (
        seen[at - 6 : at] == [f"start {tmp_path / 'trace'}", "10", "11", "12", "13", "14"] and seen.count("stop") == 1
    )
    seen.clear()
    result = run(tmp_path, profile=tmp_path / "trace")
    assert seen == [f"start {tmp_path / 'trace'}", "stop"]
    assert_equal_bits(result.params, unbroken[1].params)
    with pytest.raises(ValueError), Trace(tmp_path / "trace", 0, 3) as trace:
        trace.begin(0, ())
        raise ValueError
    assert seen[-1] == "stop"


@pytest.mark.slow
def test_checkpoints_are_written_by_time_as_well_and_every_so_many_steps_stay(tmp_path, monkeypatch):
    now = [0.0]
    real = checkpoint.TrainCheckpointer
    monkeypatch.setattr(checkpoint, "TrainCheckpointer", lambda *a, **k: real(*a, **k, clock=lambda: now[0]))
    batch = loop.BatchSource.batch

    def slow(self, position):
        now[0] += 20 * (position == 3)
        return batch(self, position)

    monkeypatch.setattr(loop.BatchSource, "batch", slow)
    config = dataclasses.replace(
        CONFIG, steps=9, checkpoint_every=100, checkpoint_minutes=0.25, keep=1, keep_every=3, log_every=2, prefetch=0
    )
    run(tmp_path, config)
    # 3 and 6 stay; 4 was the first record 15 seconds after a save; then 6 was the newest.
    assert [int(path.name) for path in sorted((tmp_path / "model" / "steps").glob("0*"))] == [3, 6]
    rows = [step for step, *_ in losses_of(tmp_path)]
    assert rows == [2, 4, 6, 8, 9]


def test_a_student_learns_its_teachers_distribution(tmp_path):
    teacher = Model(tiny.SMALL, tiny.params(tiny.SMALL, 1))
    config = TrainConfig(8, 8, 16, OptimizerConfig(learning_rate=0.03, warmup_steps=1), 100, 1)
    run(tmp_path, config, objective=Objective("forward_kl"), teacher=teacher)
    values = [loss for _, loss, _ in losses_of(tmp_path)]
    assert values[-1] < 0.8 * values[0]


# --- Meshes -----------------------------------------------------------------------------------------------------------

# A student of one key/value head, which two devices cannot share.
MESH = MeshConfig(fsdp=2, tensor=2, student_rules="kv_replicated")


def devices_of(params) -> int:
    (count,) = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)}
    return count


@pytest.mark.slow
def test_a_run_on_a_mesh_ends_with_the_parameters_of_a_run_on_one_device(distilled_alone, tmp_path):
    split = run(tmp_path, parallel=MESH, **DISTILLED)
    assert (devices_of(split.params), devices_of(distilled_alone[1].params)) == (4, 1)
    assert_equal_to_rounding(split.params, distilled_alone[1].params)
    np.testing.assert_allclose(losses_of(tmp_path), losses_of(distilled_alone[0]), rtol=1e-4)
    assert_equal_bits(MODEL.params, START)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(MESH, MeshConfig()), (MeshConfig(), MESH)], ids=["joined", "split"])
def test_a_checkpoint_resumes_on_another_mesh(distilled_alone, tmp_path, monkeypatch, first, then):
    run_until(3, tmp_path, monkeypatch, parallel=first, **DISTILLED)
    resumed = run(tmp_path, parallel=then, **DISTILLED)
    assert devices_of(resumed.params) == then.fsdp * then.tensor
    assert_equal_to_rounding(resumed.params, distilled_alone[1].params)
    assert [step for step, *_ in losses_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (MeshConfig(tensor=2), "num_kv_heads=1 .* over tensor=2 .*kv_replicated"),
        (MeshConfig(data=3), r"rows of a batch=8 .* over data=3 .* 6 or 9;"),
        (MeshConfig(fsdp=16), "has 16 devices, 8 are there"),
    ],
)
def test_what_does_not_split_is_refused_and_nothing_is_trained(tmp_path, parallel, message):
    with pytest.raises(LayoutError, match=message):
        run(tmp_path, parallel=parallel)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


# --- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_are_all_that_is_trained_and_kept_and_they_resume_bit_for_bit(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", student=ADAPTED)
    values = losses_of(tmp_path / "whole")
    assert values[-1][1] < values[0][1]
    assert_equal_bits(MODEL.params, START)
    # [layers, d_model 16 or d_ff 24, rank] and [layers, rank, heads 2 x 8 or d_model]
    shapes = {"down": ([1, 24, 2], [1, 2, 16]), "q": ([1, 16, 2], [1, 2, 16])}
    adapters = {f"layers/{name}/{leaf}": shape for name, pair in shapes.items()
                for leaf, shape in zip(("lora_a", "lora_b"), pair, strict=True)}  # fmt: skip
    trained: dict[tuple[str, ...], Any] = flatten_dict(whole.params)
    assert {"/".join(path): list(leaf.shape) for path, leaf in trained.items()} == adapters

    run_until(5, tmp_path / "cut", monkeypatch, student=ADAPTED)
    (newest,) = (tmp_path / "cut" / "model" / "steps").glob("00000004")
    layout = json.loads((newest / "metadata.json").read_text())["layout"]
    arrays = {path: shape for path, (shape, _) in layout.items() if shape}
    # Parameters and Adam's two moments, of adapters and of nothing else.
    assert len(arrays) == 3 * len(adapters)
    for path, shape in arrays.items():
        assert shape == adapters[path[path.index("layers/") :]]
    resumed = run(tmp_path / "cut", student=ADAPTED)
    assert_equal_bits(resumed.params, whole.params)
    assert losses_of(tmp_path / "cut") == values


def test_the_batch_of_a_step_that_diverged_is_kept_for_whoever_looks_for_the_cause(tmp_path, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(
        TrainingDiverged, match=r"the loss is nan at step 4; .* batch is in .*diverged-00000004\.npz"
    ) as caught:
        run(tmp_path)
    assert caught.value.step == 4
    kept = np.load(tmp_path / "model" / "diverged-00000004.npz", allow_pickle=False)
    source = BatchSource(easy_documents(), [12] * 9, CONFIG.row_tokens, CONFIG.batch_rows, CONFIG.steps, 3)
    expected = source.batch(3)
    np.testing.assert_array_equal(kept["tokens"], expected.tokens)
    np.testing.assert_array_equal(kept["loss_weights"], expected.loss_weights)


def test_a_spike_stops_the_run_before_its_state_is_kept_and_smaller_jumps_do_not(tmp_path, monkeypatch):
    # Only the run that is stopped is asked what it has kept; thirty checkpoints of each other one would take ten seconds.
    config = dataclasses.replace(CONFIG, steps=30, checkpoint_every=100)
    batch, weight = loop.BatchSource.batch, {"of": 1.0}

    def heavy(self, position):
        """A batch whose loss at step 26 is so many times what it was: tokens that nobody expects."""
        found = batch(self, position)
        return (
            found if position != 25 or weight["of"] == 1.0 else found._replace(tokens=found.tokens[:, :, ::-1].copy())
        )

    run(tmp_path / "calm", config)
    losses = [loss for _, loss, _ in losses_of(tmp_path / "calm")]
    monkeypatch.setattr(loop.BatchSource, "batch", heavy)
    weight["of"] = 2.0
    run(tmp_path / "watched", dataclasses.replace(config, spike=0.0))
    jumped = losses_of(tmp_path / "watched")[25][1] / float(np.median(losses[5:25]))
    assert jumped > 1.5
    run(tmp_path / "high bar", dataclasses.replace(config, spike=1.1 * jumped))
    with pytest.raises(TrainingDiverged, match=r"jumped to .* at step 26; lower the learning rate"):
        run(tmp_path / "low bar", dataclasses.replace(config, spike=0.9 * jumped, checkpoint_every=1))
    kept = [path.name for path in (tmp_path / "low bar" / "model" / "steps").iterdir() if path.name.isdigit()]
    assert max(kept) == "00000025"


@pytest.mark.parametrize(
    ("usual", "loss", "stops"),
    [
        (
            3e-4,
            0.0275,
            False,
        ),  # seen: a student of hard labels that knew them by heart, and one batch with a doubted word
        (3e-4, 0.49, False),
        (3e-4, 0.51, True),
        (2.0, 90.0, False),
        (2.0, 101.0, True),
        (2.0, float("inf"), True),
    ],
)
def test_a_loss_that_is_small_is_no_spike_however_small_it_was_before(usual, loss, stops):
    assert (why_diverged(loss, [usual] * 20, 50.0) is not None) == stops
