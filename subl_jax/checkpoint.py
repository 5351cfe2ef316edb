"""Checkpoints: parameters for evaluation, and the whole state of a training run, written by Orbax v1.

A pytree of arrays and a metadata dictionary go in; a directory comes out that is an Orbax checkpoint plus
`metadata.json` (the caller's metadata, the layout of every array, size and checksum of every file). A directory with a
final name is complete; a damaged one is told from one that belongs to another model.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from subl_jax import artifacts
from subl_jax.metrics.quiet import quiet
from subl_jax.parallel import processes

METADATA = "metadata.json"
_FORMAT = 1
# What Orbax and TensorStore raise when they cannot read or write: the operating system's own error, or a ValueError /
# RuntimeError / KeyError that carries its text.
_IO_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError)

Layout = dict[str, list[Any]]  # path -> [shape, dtype]


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; one line with path, cause and remedy."""


class CheckpointMismatch(CheckpointError):  # noqa: N818 - reads as what it is
    """A checkpoint is intact but belongs to another model or another run."""


# --- What a tree looks like -------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    """Whether a leaf (concrete or abstract) is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def layout_of(tree: Any) -> Layout:
    """Path -> [shape, dtype] of each leaf; Python numbers are [[], "int"] or [[], "float"].

    Raises:
      ValueError: a leaf that is neither an array nor an int nor a float; it is named.
    """
    layout = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            layout[name] = [list(leaf.shape), str(leaf.dtype)]
        elif type(leaf) in (int, float):
            layout[name] = [[], type(leaf).__name__]
        else:
            raise ValueError(
                f"{name} is a {type(leaf).__name__}; a checkpoint holds arrays, ints and floats: convert it first"
            )
    return layout


def _storable(tree: Any) -> Any:
    """Typed PRNG keys as their uint32 data; the layout remembers their kind ("key<fry>")."""
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def _abstract(leaf: Any) -> Any:
    """What Orbax is to restore for a template leaf: same shape, dtype and placement."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _as_template(leaf: Any, restored: Any) -> Any:
    """The restored leaf as the template's kind: key data becomes a typed key again."""
    if not _is_key(leaf):
        return restored
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.random.wrap_key_data(restored, impl=kinds[0])


# --- Writing and reading one directory --------------------------------------------------------------------------------


def _seal(partial: Path, layout: Layout, metadata: Mapping[str, Any]) -> None:
    """Writes `metadata.json` into a directory whose arrays are all there."""
    body = {
        "format": _FORMAT,
        "layout": layout,
        "metadata": metadata,
        "files": artifacts.file_manifest(partial),
    }
    artifacts.write_json_atomic(partial / METADATA, artifacts.sealed(body))


def _cause(error: BaseException) -> str:
    """Cause and remedy of an Orbax or OS error in one line; TensorStore hides the errno in its text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if not isinstance(error, OSError) and found:
        return artifacts.reason(OSError(int(found[1]), ""))
    return artifacts.reason(error)


@contextlib.contextmanager
def _writing(final: Path, partial: Path) -> Iterator[None]:
    """A block that writes a part of what will stand in `final`; if it cannot, that part vanishes."""
    try:
        yield
    except CheckpointError:
        raise
    except _IO_ERRORS as error:
        _discard(partial)
        raise CheckpointError(f"cannot write the checkpoint {final}: {_cause(error)}") from error


def _load(directory: Path, template: Any) -> Any:
    """Orbax's `load`. Of several processes one that reads to its own devices alone waits for nobody: others may not read."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(template) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if not processes.several() or not all(sharding.is_fully_addressable for sharding in shardings):
        return ocp.load(str(directory), template)
    rank = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"process_{rank}"
    )
    with ocp.Context(multiprocessing_options=alone):
        return ocp.load(str(directory), template)


def _unseal(directory: Path) -> dict[str, Any]:
    """The content of `metadata.json`; ValueError if it is missing or corrupt, CheckpointMismatch if too new."""
    body = artifacts.unseal(directory / METADATA)
    if body.get("format") != _FORMAT:
        raise CheckpointMismatch(
            f"{directory} has format {body.get('format')}, this version reads {_FORMAT}; use the version that wrote it"
        )
    return body


def read_metadata(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The caller's metadata of a checkpoint; no array is read.

    Raises:
      CheckpointError: there is no checkpoint, or its metadata is corrupt.
    """
    return _model_body(Path(directory))["metadata"]


def _model_body(directory: Path) -> dict[str, Any]:
    try:
        return _unseal(directory)
    except CheckpointMismatch:
        raise
    except ValueError as error:
        raise CheckpointError(f"no usable checkpoint in {directory} ({error}); run the stage that writes it") from error


def _refuse_differences(directory: Path, stored: Any, wanted: Any, what: str) -> None:
    found = artifacts.differences(stored, wanted)
    if found:
        raise CheckpointMismatch(
            f"{directory} belongs to another {what} ({artifacts.describe(found, 'the checkpoint', 'this run')}); "
            "use another directory or the configuration it was made with"
        )


# --- Final parameters -------------------------------------------------------------------------------------------------


def save_model(
    directory: str | os.PathLike[str], params: Any, metadata: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Writes parameters and metadata; `directory` appears complete or not at all. Blocks until it is there.

    Call it in every process; process 0 seals and publishes the directory, which all of them must share.

    Args:
      directory: the final place; must not exist (or be empty) unless `overwrite`.
      params: nested dictionaries of arrays (float32, bfloat16, integers, …).
      metadata: JSON-able: model configuration, its hash, the tokenizer's hash, …; given back by `load_model`.
      overwrite: replace an older checkpoint.

    Raises:
      CheckpointError: the directory exists, or cannot be written.
      ValueError: a tree that could not be given back as it stands.
    """
    quiet("orbax", "etils")
    _check_params(params)
    layout = layout_of(params)
    final = Path(directory).absolute()
    partial = artifacts.partial_path(final)
    with _writing(final, partial):
        _prepare(final, partial, overwrite)
    processes.barrier(f"prepare {final}")
    with _writing(final, partial):
        ocp.save(str(partial), params, overwrite=True)
        if processes.is_first():
            _seal(partial, layout, metadata)
            artifacts.publish(partial, final)
    processes.barrier(f"saved {final}")


def _check_params(params: Any) -> None:
    """Refuses, by name, what `load_model` could not give back as it stands."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        for key in path:
            if not isinstance(key, jax.tree_util.DictKey) or not isinstance(key.key, str):
                raise ValueError(f"{name}: parameters must be nested dictionaries with string keys")
            if "/" in key.key:
                raise ValueError(f"{name} has a slash in a key; slashes separate the levels of a checkpoint's layout")
        if not isinstance(leaf, jax.Array | np.ndarray) or _is_key(leaf):
            raise ValueError(f"{name} is a {type(leaf).__name__}; parameters must be arrays")
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ValueError(f"{name} is {leaf.dtype}, which JAX would read back narrower; convert it first")
    if jax.tree.structure(params) != jax.tree.structure(_abstract_params(layout_of(params))):
        raise ValueError("parameters hold an empty dictionary or None, which a checkpoint cannot tell; remove it")


def _abstract_params(layout: Layout) -> dict[str, Any]:
    """The nested dictionaries that a layout describes, with abstract arrays as leaves."""
    tree: dict[str, Any] = {}
    for path, (shape, dtype) in layout.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
    return tree


def _prepare(final: Path, partial: Path, overwrite: bool) -> None:
    """Clears what a killed process left and checks that `final` may be written."""
    if processes.is_first():
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{final} is a file; remove it or choose another directory")
        if final.is_dir() and any(final.iterdir()) and not overwrite:
            raise CheckpointError(f"{final} exists already; delete it or choose another directory")
        final.parent.mkdir(parents=True, exist_ok=True)
        _discard(partial)


def _discard(partial: Path) -> None:
    """Removes a half-written directory and Orbax's own temporary beside it."""
    if processes.is_first():
        for path in partial.parent.glob(f"{partial.name}*"):
            shutil.rmtree(path, ignore_errors=True)


def load_model(
    directory: str | os.PathLike[str],
    *,
    expect: Mapping[str, Any] | None = None,
    sharding: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_model` wrote, bit for bit.

    Args:
      directory: of the checkpoint.
      expect: metadata keys and the values they must have; the others are not compared.
      sharding: one `jax.sharding.Sharding` for all arrays, or a pytree of them like the parameters. By default every
        array comes to the first local device, wherever it was saved.

    Returns:
      (params, metadata).

    Raises:
      CheckpointMismatch: `expect` does not hold; every differing key is named, before any array is read.
      CheckpointError: missing, truncated or corrupt files.
    """
    quiet("orbax", "etils")
    directory = Path(directory).absolute()
    body = _model_body(directory)
    if expect is not None:
        stored = {key: body["metadata"][key] for key in expect if key in body["metadata"]}
        _refuse_differences(directory, stored, artifacts.plain(expect), "model")
    problem = artifacts.manifest_problem(directory, body["files"])
    if problem:
        raise CheckpointError(f"{problem}; delete {directory} and run its stage again")
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = _abstract_params(body["layout"])
    shardings = jax.tree.map(lambda _: sharding, abstract) if isinstance(sharding, jax.sharding.Sharding) else sharding
    template = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )
    try:
        return _load(directory, template), body["metadata"]
    except _IO_ERRORS as error:
        raise CheckpointError(
            f"cannot read the checkpoint {directory}: {_cause(error)}; delete it and run its stage again"
        ) from error


# --- Training state ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Pending:
    """A save under way: the step and the thread that finishes it."""

    step: int
    done: concurrent.futures.Future[None]


class TrainCheckpointer:
    """Saves the state of a training run by steps and by time, in the background, and finds the newest usable one.

    Checkpoints stand in `directory/STEP` (eight digits). A save writes beside that place and is renamed when complete,
    so a killed process leaves the previous checkpoints as they were. Use it as a context manager, or `close()` it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every_steps: int,
        keep: int,
        metadata: Mapping[str, Any],
        *,
        keep_every: int = 0,
        every_minutes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Creates the directory and clears what a killed process left half-written.

        Args:
          directory: of this run alone.
          every_steps: `save` skips the steps between.
          keep: how many of the newest checkpoints stay; at least 2 leave something to fall back to.
          metadata: JSON-able; a checkpoint with other metadata is refused by `restore_latest`.
          keep_every: steps divisible by this are saved as well, and stay for good; 0: none.
          every_minutes: since the last save, after which another is due; 0: by steps alone.
          clock: seconds, from any beginning.

        Raises:
          CheckpointError: the directory cannot be written.
        """
        quiet("orbax", "etils")
        if every_steps < 1 or keep < 1:
            raise ValueError(f"every_steps={every_steps} and keep={keep} must be at least 1")
        if keep_every < 0 or not every_minutes >= 0:
            raise ValueError(f"keep_every={keep_every} and every_minutes={every_minutes} must not be negative")
        self._keep_every, self._every_seconds, self._clock = keep_every, 60 * every_minutes, clock
        self._saved_at = clock()
        self.directory = Path(directory).absolute()
        self._every_steps = every_steps
        self._keep = keep
        self._metadata = artifacts.plain(metadata)
        self._pending: _Pending | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        try:
            if processes.is_first():
                artifacts.check_writable(self.directory)
                for path in [*self.directory.glob(".*.partial*"), *self.directory.glob(".*.stale")]:
                    shutil.rmtree(path, ignore_errors=True)
        except artifacts.WorkdirError as error:
            raise CheckpointError(str(error)) from error
        processes.barrier(f"checkpoints in {self.directory}")

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, oldest first."""
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r"\d{8,}", path.name))

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def due(self, step: int, *, timed: bool = True) -> bool:
        """Whether `save` would save the state of this step.

        Args:
          step: updates made so far.
          timed: whether to look at the clock too. Of several processes the first one's counts, and all have to ask.
        """
        if step % self._every_steps == 0 or self._stays(step):
            return True
        if not (timed and self._every_seconds):
            return False
        return processes.told_by_first("a save is due", self._clock() - self._saved_at >= self._every_seconds)

    def _stays(self, step: int) -> bool:
        return bool(self._keep_every) and step % self._keep_every == 0

    def save(self, step: int, state: Any, *, force: bool = False) -> bool:
        """Begins to save `state` and returns once it is copied off the devices; its buffers may then be donated.

        An earlier save that is still being written is waited for.

        Args:
          step: updates made so far.
          state: pytree of arrays (typed PRNG keys included), ints and floats.
          force: save whether it is `due` or not, e.g. the last step.

        Returns:
          Whether a checkpoint is being saved.

        Raises:
          CheckpointError: this save, or the one before, cannot be written.
        """
        if not force and not self.due(step):
            return False
        self.wait()
        self._saved_at = self._clock()
        layout = layout_of(state)
        final = self._path(step)
        partial = artifacts.partial_path(final)
        _discard(partial)
        processes.barrier(f"save {final}")
        with _writing(final, partial):
            response = ocp.save_async(str(partial), _storable(state), overwrite=True)
        self._pending = _Pending(step, self._pool.submit(self._finish, response, partial, final, layout))
        return True

    def _finish(self, response: Any, partial: Path, final: Path, layout: Layout) -> None:
        """In the background: wait for the arrays, seal, publish, and drop the oldest checkpoints."""
        with _writing(final, partial):
            response.result()
            if not processes.is_first():
                return
            _seal(partial, layout, self._metadata)
            artifacts.publish(partial, final)
            for step in self.steps()[: -self._keep]:
                if self._stays(step):
                    continue
                # Renamed first: a process killed while deleting leaves no checkpoint with half its files.
                stale = self.directory / f".{step:08d}.stale"
                os.rename(self._path(step), stale)
                shutil.rmtree(stale)

    def wait(self) -> None:
        """Blocks until the save under way is complete.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        # One of several processes whose part failed does not wait: the others are inside Orbax, waiting for that part, and
        # its end ends them.
        pending.done.result()
        processes.barrier(f"saved {self._path(pending.step)}")

    def restore_latest(self, template: Any) -> tuple[Any, int] | None:
        """The newest usable checkpoint as (state, step), or None if there is none yet.

        A damaged checkpoint is skipped with a warning and, once an older one is restored, set aside as STEP.corrupt.

        Args:
          template: a state of the same structure; each array comes back with the shape, dtype and sharding of its
            template leaf (`jax.Array` or `jax.ShapeDtypeStruct`), so another mesh than the one that saved is fine.

        Raises:
          CheckpointMismatch: the checkpoint is intact but of another run: other metadata, leaves, shapes or dtypes.
          CheckpointError: every checkpoint is damaged.
        """
        self.wait()
        steps = processes.told_by_first("checkpoints", self.steps())
        damaged: list[tuple[Path, str]] = []
        for step in reversed(steps):
            path = self._path(step)
            try:
                state = self._restore(path, template)
            except CheckpointMismatch:
                raise
            except CheckpointError as error:
                logging.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
                damaged.append((path, str(error)))
                continue
            self._set_aside([path for path, _ in damaged])
            return state, step
        if damaged:
            path, cause = damaged[0]
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (newest {path.name}: {cause}); "
                "delete that directory to start this stage afresh"
            )
        return None

    def _restore(self, path: Path, template: Any) -> Any:
        with _agreed(f"look at {path}"):
            try:
                body = _unseal(path)
            except CheckpointMismatch:
                raise
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            _refuse_differences(path, body["metadata"], self._metadata, "run")
            _refuse_differences(path, body["layout"], layout_of(template), "model")
            problem = artifacts.manifest_problem(path, body["files"]) if processes.is_first() else None
            if problem is not None:
                raise CheckpointError(problem)
        with _agreed(f"restore {path}"):
            state = _state(path, template)
        return state

    def _set_aside(self, paths: list[Path]) -> None:
        """Renames damaged checkpoints, so that they neither count as kept nor stand in the way of a new save."""
        if processes.is_first():
            for path in paths:
                aside = path.with_suffix(".corrupt")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
        processes.barrier(f"aside:{self.directory}")

    def close(self) -> None:
        """Waits for the save under way and ends the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> TrainCheckpointer:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the save under way; its failure does not hide an exception of the block.

        Of several processes one that leaves the block early does not wait: the others may never come.
        """
        if error is not None and processes.several():
            self._pool.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            logging.error("%s", failure)


@contextlib.contextmanager
def _agreed(name: str) -> Iterator[None]:
    """A block that fails in all processes if it fails in one, so that all of them fall back together."""
    failed: CheckpointError | None = None
    try:
        yield
    except CheckpointError as error:
        failed = error
    said = processes.agree(name, failed)
    if failed is not None:
        raise failed
    if said is not None:
        raise CheckpointError(said)


def load_step(
    directory: str | os.PathLike[str], step: int, template: Any, *, expect: Mapping[str, Any] | None = None
) -> Any:
    """The state that a `TrainCheckpointer` has kept of one step, for whoever measures a run along its way.

    Args:
      directory: of the checkpointer.
      step: updates made by then.
      template: a state of the same structure; see `TrainCheckpointer.restore_latest`.
      expect: metadata keys and the values they must have; the others are not compared.

    Raises:
      CheckpointMismatch: the checkpoint is intact but of another run or model; what differs is named.
      CheckpointError: there is none of this step, or it is damaged.
    """
    quiet("orbax", "etils")
    path = Path(directory).absolute() / f"{step:08d}"
    body = _model_body(path)
    if expect is not None:
        stored = {key: body["metadata"][key] for key in expect if key in body["metadata"]}
        _refuse_differences(path, stored, artifacts.plain(expect), "run")
    _refuse_differences(path, body["layout"], layout_of(template), "model")
    problem = artifacts.manifest_problem(path, body["files"])
    if problem:
        raise CheckpointError(f"{problem}; delete the stage's directory and run it again")
    try:
        return _state(path, template)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error}; delete the stage's directory and run it again"
        ) from error


def _state(path: Path, template: Any) -> Any:
    """The arrays of a checkpoint as those of the template; a CheckpointError has the cause alone."""
    try:
        restored = _load(path, jax.tree.map(_abstract, template))
    except _IO_ERRORS as error:
        raise CheckpointError(_cause(error)) from error
    return jax.tree.map(_as_template, template, restored)
