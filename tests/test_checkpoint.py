"""Checkpoints: bitwise resume, survival of kills and damage, refusal of other models, restore onto another mesh."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subl_jax import checkpoint

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def params_of(seed: int = 0) -> dict:
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": jax.random.normal(a, (8, 4)),
        "layers": {"w": jax.random.normal(b, (2, 4, 4), jnp.bfloat16), "count": jnp.arange(5, dtype=jnp.int32)},
        "norm.scale": jax.random.normal(c, (4,)),
    }


def state_of(seed: int = 0) -> dict:
    weights = {"w": jax.random.normal(jax.random.key(seed), (8, 4)), "h": jnp.full((3,), 1 / 3, jnp.bfloat16)}
    return {
        "params": weights,
        "opt_state": OPTIMIZER.init(weights),
        "key": jax.random.key(seed + 1),
        "raw_key": jax.random.PRNGKey(seed + 2),
        "host": np.arange(6, dtype=np.float64).reshape(2, 3),
        "position": 17 + seed,
        "scale": 0.1,
    }


@jax.jit
def update(state: dict) -> dict:
    key, draw = jax.random.split(state["key"])
    noise = jax.tree.map(lambda p: jax.random.normal(draw, p.shape, p.dtype), state["params"])
    updates, opt_state = OPTIMIZER.update(noise, state["opt_state"], state["params"])
    return {**state, "params": optax.apply_updates(state["params"], updates), "opt_state": opt_state, "key": key}


def step(state: dict) -> dict:
    return {**update(state), "position": state["position"] + 1, "scale": state["scale"], "host": state["host"]}


def bits(leaf) -> tuple:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    if isinstance(leaf, int | float):
        return type(leaf), leaf
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_bitwise(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    for name, a, b in zip(names, jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert bits(a) == bits(b), name


def data_file(directory: Path) -> Path:
    """The largest array file of a checkpoint."""
    return max(
        (p for p in directory.rglob("*") if p.is_file() and "/d/" in p.as_posix()), key=lambda p: p.stat().st_size
    )


# --- Final parameters -------------------------------------------------------------------------------------------------


def test_model_round_trip_is_bitwise(tmp_path):
    params = params_of()
    metadata = {"config": {"layers": 2, "width": 4}, "tokenizer": "abc", "note": "ü"}
    checkpoint.save_model(tmp_path / "student" / "final", params, metadata)
    loaded, back = checkpoint.load_model(tmp_path / "student" / "final")
    assert_bitwise(loaded, params)
    assert back == metadata == checkpoint.read_metadata(tmp_path / "student" / "final")
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["final"]


def test_a_model_directory_is_a_plain_orbax_checkpoint(tmp_path):
    from orbax.checkpoint import v1 as ocp

    params = params_of()
    checkpoint.save_model(tmp_path / "m", params, {})
    assert_bitwise(ocp.load(str(tmp_path / "m"), params), params)
    layout = json.loads((tmp_path / "m" / "metadata.json").read_text())["layout"]
    assert layout["layers/w"] == [[2, 4, 4], "bfloat16"]


def test_expectations_are_checked_by_name_before_arrays_are_read(tmp_path):
    metadata = {"config": {"layers": 2, "width": 4}, "tokenizer": "abc", "free": 1}
    checkpoint.save_model(tmp_path / "m", params_of(), metadata)
    checkpoint.load_model(tmp_path / "m", expect={"config": {"layers": 2, "width": 4}})
    data_file(tmp_path / "m").unlink()  # would be an error of another kind if arrays came first
    with pytest.raises(checkpoint.CheckpointMismatch) as caught:
        checkpoint.load_model(tmp_path / "m", expect={"config": {"layers": 3, "width": 4}, "tokenizer": "x", "new": 1})
    message = str(caught.value)
    assert "config.layers: 2 in the checkpoint, 3 in this run" in message
    assert 'tokenizer: "abc" in the checkpoint, "x" in this run' in message
    assert 'new: "(absent)" in the checkpoint, 1 in this run' in message
    assert "width" not in message and "free" not in message and "\n" not in message


def test_damaged_model_is_refused_in_one_line(tmp_path):
    checkpoint.save_model(tmp_path / "m", params_of(), {})
    path = data_file(tmp_path / "m")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(checkpoint.CheckpointError, match=rf"{path.name}.*truncated.*delete"):
        checkpoint.load_model(tmp_path / "m")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(checkpoint.CheckpointError, match="checksum differs"):
        checkpoint.load_model(tmp_path / "m")
    (tmp_path / "m" / "metadata.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=r"metadata\.json.*JSON"):
        checkpoint.load_model(tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match="no usable checkpoint in .*nowhere"):
        checkpoint.load_model(tmp_path / "nowhere")


def test_existing_model_is_kept_unless_overwrite(tmp_path):
    checkpoint.save_model(tmp_path / "m", params_of(0), {"seed": 0})
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        checkpoint.save_model(tmp_path / "m", params_of(1), {"seed": 1})
    assert checkpoint.load_model(tmp_path / "m")[1] == {"seed": 0}
    checkpoint.save_model(tmp_path / "m", params_of(1), {"seed": 1}, overwrite=True)
    loaded, metadata = checkpoint.load_model(tmp_path / "m")
    assert metadata == {"seed": 1}
    assert_bitwise(loaded, params_of(1))


def test_unstorable_parameters_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"\['a'\]\[0\].*nested dictionaries"):
        checkpoint.save_model(tmp_path / "m", {"a": [jnp.ones(2)]}, {})
    with pytest.raises(ValueError, match=r"\['a'\] is a float"):
        checkpoint.save_model(tmp_path / "m", {"a": 1.0}, {})
    with pytest.raises(ValueError, match="slash"):
        checkpoint.save_model(tmp_path / "m", {"a/b": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match="float64.*narrower"):
        checkpoint.save_model(tmp_path / "m", {"a": np.ones(2)}, {})
    with pytest.raises(ValueError, match="empty dictionary"):
        checkpoint.save_model(tmp_path / "m", {"a": jnp.ones(2), "b": {}}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(checkpoint.CheckpointError, match="file") as caught:
            checkpoint.save_model(directory, params_of(), {})
        assert "\n" not in str(caught.value)
    with pytest.raises(checkpoint.CheckpointError, match="is a file"):
        checkpoint.TrainCheckpointer(tmp_path / "file", 1, 2, {})
    assert (tmp_path / "file").read_text() == "x"


def restored(saver: checkpoint.TrainCheckpointer, template) -> tuple:
    """The newest checkpoint, which must be there."""
    found = saver.restore_latest(template)
    assert found is not None
    return found


# --- Training state ---------------------------------------------------------------------------------------------------


def test_resume_is_bitwise(tmp_path):
    unbroken = state_of()
    with checkpoint.TrainCheckpointer(tmp_path, 3, 2, {"config": "h"}) as saver:
        for count in range(1, 8):
            unbroken = step(unbroken)
            assert saver.save(count, unbroken) == (count % 3 == 0)
    with checkpoint.TrainCheckpointer(tmp_path, 3, 2, {"config": "h"}) as saver:
        resumed, count = restored(saver, state_of(99))
    assert count == 6
    resumed = step(resumed)
    assert_bitwise(resumed, unbroken)


def test_nothing_saved_is_none(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path / "new", 3, 2, {}) as saver:
        assert saver.restore_latest(state_of()) is None


def test_keeps_the_newest_and_forces_the_last(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path, 10, 2, {}) as saver:
        for count in (10, 20, 30):
            assert saver.save(count, {"n": count})
        assert not saver.save(35, {"n": 35})
        assert saver.save(35, {"n": 35}, force=True)
        saver.wait()
        assert saver.steps() == [30, 35]
        assert saver.restore_latest({"n": 0}) == ({"n": 35}, 35)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000030", "00000035"]


def test_steps_that_are_to_stay_are_saved_and_stay_beside_the_newest(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path, 3, 2, {}, keep_every=4) as saver:
        saved = [count for count in range(1, 15) if saver.save(count, {"n": count})]
        saver.wait()
        assert saved == [3, 4, 6, 8, 9, 12]
        assert saver.steps() == [4, 8, 9, 12]


def test_a_save_is_due_so_many_minutes_after_the_one_before(tmp_path):
    now = [1000.0]
    with checkpoint.TrainCheckpointer(tmp_path, 10, 9, {}, every_minutes=2, clock=lambda: now[0]) as saver:
        for count, elapsed in enumerate([60, 59, 1, 119, 1, 0, 0, 0, 5, 30, 90, 25], start=1):
            now[0] += elapsed
            saver.save(count, {"n": count})
        saver.wait()
        # 120 s after the beginning, 120 s later; 10 by steps, from which the time counts anew; then 115 s are too few.
        assert saver.steps() == [3, 5, 10]
        now[0] += 5
        assert not saver.due(13, timed=False) and saver.due(13)
    with checkpoint.TrainCheckpointer(tmp_path, 10, 9, {}, clock=lambda: now[0]) as saver:
        now[0] += 10**9
        assert not saver.due(13)  # without minutes, by steps alone


@pytest.mark.parametrize("given", [{"keep_every": -1}, {"every_minutes": -1.0}, {"every_minutes": float("nan")}])
def test_a_policy_without_meaning_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match="must not be negative"):
        checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}, **given)


def test_saving_a_step_again_replaces_it(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver:
        for value in (1, 2):
            saver.save(5, {"n": value})
        saver.wait()
        assert saver.restore_latest({"n": 0}) == ({"n": 2}, 5)


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    expected = np.arange(3_000_000, dtype=np.float32)
    state = {"w": jnp.asarray(expected) + 0}
    erase = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver:
        template = jax.eval_shape(lambda: state)
        saver.save(1, state)
        jax.block_until_ready(erase(state))
        back, _ = restored(saver, template)
    np.testing.assert_array_equal(back["w"], expected)


def damage_truncate(path: Path) -> None:
    os.truncate(data_file(path), 3)


def damage_flip(path: Path) -> None:
    file = data_file(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def damage_metadata(path: Path) -> None:
    (path / "metadata.json").unlink()


def damage_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, damage_metadata, damage_empty])
def test_damaged_newest_falls_back_with_a_warning(tmp_path, caplog, damage):
    first, second = state_of(1), state_of(2)
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver:
        saver.save(1, first)
        saver.save(2, second)
    damage(tmp_path / "00000002")
    with checkpoint.TrainCheckpointer(tmp_path, 1, 1, {}) as saver, caplog.at_level(logging.WARNING, logger="absl"):
        state, count = restored(saver, state_of(3))
        assert count == 1
        assert_bitwise(state, first)
        assert "00000002" in caplog.text and "damaged" in caplog.text
        # The damaged one is out of the way: it neither counts as kept nor blocks its step.
        assert saver.steps() == [1]
        saver.save(2, second)
        saver.wait()
        state, count = restored(saver, state_of(3))
        assert count == 2
        assert_bitwise(state, second)


def test_all_damaged_is_an_error_that_moves_nothing(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver:
        saver.save(1, state_of(1))
        saver.save(2, state_of(2))
        saver.wait()
        for name in ("00000001", "00000002"):
            damage_truncate(tmp_path / name)
        with pytest.raises(checkpoint.CheckpointError, match=r"every checkpoint in .*newest 00000002: .*truncated"):
            saver.restore_latest(state_of())
        assert saver.steps() == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "extra": 1}, r'extra: "\(absent\)" in the checkpoint, \[\[\], "int"\] in this run'),
        (lambda s: {k: v for k, v in s.items() if k != "scale"}, r'scale: \[\[\], "float"\] in the checkpoint'),
        (
            lambda s: {**s, "raw_key": jnp.zeros((3,), jnp.uint32)},
            r'raw_key: \[\[2\], "uint32"\] in the checkpoint, \[\[3\], "uint32"\] in this run',
        ),
        (lambda s: {**s, "raw_key": jnp.zeros((2,), jnp.int32)}, r'\[\[2\], "int32"\] in this run'),
        (lambda s: {**s, "key": jax.random.key(0, impl="rbg")}, r'"key<fry>"\] in the checkpoint.*"key<rbg>"'),
    ],
)
def test_other_layout_is_refused_by_name(tmp_path, change, message):
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver:
        saver.save(1, state_of())
        with pytest.raises(checkpoint.CheckpointMismatch, match=message):
            saver.restore_latest(change(state_of()))
        assert saver.steps() == [1]


def test_other_run_is_refused_by_name_and_left_alone(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {"config": {"lr": 0.1, "steps": 4}}) as saver:
        saver.save(1, state_of())
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {"config": {"lr": 0.2, "steps": 4}}) as saver:
        with pytest.raises(checkpoint.CheckpointMismatch, match=r"config.lr: 0.1 in the checkpoint, 0.2 in this run"):
            saver.restore_latest(state_of())
        assert saver.steps() == [1]


def test_unsupported_leaf_is_named(tmp_path):
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver, pytest.raises(ValueError, match="a/b is a str"):
        saver.save(1, {"a": {"b": "text"}})


def test_a_failed_background_save_is_reported_and_leaves_the_previous_one(tmp_path, monkeypatch):
    with checkpoint.TrainCheckpointer(tmp_path, 1, 2, {}) as saver:
        saver.save(1, {"n": 1})
        saver.wait()

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("subl_jax.artifacts.file_manifest", full)
            saver.save(2, {"n": 2})
            with pytest.raises(checkpoint.CheckpointError, match=r"00000002: No space left on device; free some space"):
                saver.wait()
        assert saver.restore_latest({"n": 0}) == ({"n": 1}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


# --- In processes of their own ----------------------------------------------------------------------------------------


def run_python(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
            **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_kill_during_save_leaves_the_previous_one_usable(tmp_path):
    killed = run_python(
        """
        import os, signal, sys, numpy as np
        from subl_jax import artifacts, checkpoint
        saver = checkpoint.TrainCheckpointer(sys.argv[1], 1, 3, {})
        saver.save(1, {"w": np.full(100_000, 1.0)})
        saver.wait()
        # The arrays of step 2 are on disk, the directory is not yet published.
        artifacts.file_manifest = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        saver.save(2, {"w": np.full(100_000, 2.0)})
        saver.wait()
        """,
        str(tmp_path),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".00000002.partial").is_dir()
    with checkpoint.TrainCheckpointer(tmp_path, 1, 3, {}) as saver:
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
        state, count = restored(saver, {"w": np.zeros(100_000)})
        assert count == 1 and (state["w"] == 1.0).all()
        saver.save(2, {"w": np.full(100_000, 2.0)})
        assert restored(saver, {"w": np.zeros(100_000)})[1] == 2


def test_full_disk_is_a_one_line_error_and_nothing_appears(tmp_path):
    # A file size limit stands in for the full disk: the write system calls fail while Orbax is at work.
    done = run_python(
        """
        import resource, signal, sys, numpy as np
        from subl_jax import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        noise = {"w": np.random.default_rng(0).integers(0, 2**31, 400_000, np.int32)}  # does not compress
        saver = checkpoint.TrainCheckpointer(sys.argv[1] + "/train", 1, 2, {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        for name, save in (
            ("model", lambda: checkpoint.save_model(sys.argv[1] + "/model", noise, {})),
            ("train", lambda: (saver.save(1, noise), saver.wait())),
        ):
            try:
                save()
            except checkpoint.CheckpointError as error:
                print(name, error)
        """,
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    model, train = done.stdout.splitlines()
    for line, path in ((model, tmp_path / "model"), (train, tmp_path / "train" / "00000001")):
        assert f"cannot write the checkpoint {path}: File too large; raise the file size limit" in line
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["train"]


MESH = """
    import sys, numpy as np, jax, jax.numpy as jnp, optax
    from absl import logging
    from subl_jax import checkpoint
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    P = jax.sharding.PartitionSpec
    def mesh(*shape):
        devices = np.array(jax.devices()).reshape(shape)
        return jax.sharding.Mesh(devices, ("data", "fsdp")[: len(shape)])
    def place(tree, mesh, spec):
        return jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(
            mesh, spec if x.ndim == 2 else P())), tree)
    weights = {"w": jnp.arange(64.0).reshape(16, 4), "b": jnp.ones(3, jnp.bfloat16)}
    state = {"params": weights, "opt": optax.adam(1e-3).init(weights), "key": jax.random.key(7)}
"""


def test_restore_onto_another_mesh_silently(tmp_path):
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = run_python(
        MESH
        + """
    assert len(jax.devices()) == 8
    stored = place(state, mesh(2, 4), P("fsdp", "data"))
    with checkpoint.TrainCheckpointer(sys.argv[1] + "/train", 1, 2, {}) as saver:
        saver.save(1, stored)
        wanted = place(jax.tree.map(jnp.zeros_like, {k: state[k] for k in ("params", "opt")}), mesh(8), P("data"))
        template = {**wanted, "key": jax.device_put(
            jax.random.key(0), jax.sharding.NamedSharding(mesh(8), P()))}
        restored, _ = saver.restore_latest(template)
    for a, b, c in zip(*map(jax.tree.leaves, (restored, template, state)), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        raw = jax.random.key_data if jnp.issubdtype(c.dtype, jax.dtypes.prng_key) else (lambda x: x)
        assert np.asarray(raw(a)).tobytes() == np.asarray(raw(c)).tobytes()
    assert len(restored["params"]["w"].addressable_shards) == 8
    checkpoint.save_model(sys.argv[1] + "/model", stored["params"], {})
    spread, _ = checkpoint.load_model(
        sys.argv[1] + "/model", sharding=jax.sharding.NamedSharding(mesh(8), P()))
    assert len(spread["w"].sharding.device_set) == 8
    """,
        str(tmp_path),
        **eight,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    # Saved on eight devices, read here on one.
    params, _ = checkpoint.load_model(tmp_path / "model")
    np.testing.assert_array_equal(params["w"], np.arange(64.0).reshape(16, 4))
    assert params["w"].sharding.device_set == {jax.local_devices()[0]}


def test_no_pickle_is_used():
    source = Path(checkpoint.__file__).read_text()
    assert not re.search(r"pickle|allow_pickle=True", source)
