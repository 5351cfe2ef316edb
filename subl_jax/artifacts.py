"""Artifacts on disk: canonical JSON and its digest, atomic files and directories, manifests, and the stage marker.

A stage writes its output, then `complete` writes `stage.json` last; `lookup` says whether that output is there and
belongs to this very configuration and these inputs. Everything here is plain files: no pickle, no JAX.
"""

from __future__ import annotations

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import enum
import errno
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MARKER = "stage.json"

# What a result may depend on; the report and every marker name them.
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tokenizers",
    "transformers",
    "subl_jax",
)


class WorkdirError(ValueError):
    """A directory cannot be used: not writable, not a directory, or too little space."""


class WorkdirMismatch(WorkdirError):  # noqa: N818 - reads as what it is
    """A directory holds the output of another configuration or of other inputs."""


# --- Canonical JSON and digests ---------------------------------------------------------------------------------------


def _plain(value: Any, where: str) -> Any:
    """Reduces `value` to JSON types; `where` names it in errors."""
    if isinstance(value, enum.Enum):
        return _plain(value.value, where)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: JSON has no such number; store None or leave the field out")
        return float(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r} of type {type(key).__name__}; keys must be strings")
            plain[key] = _plain(item, f"{where}.{key}")
        return plain
    if isinstance(value, collections.abc.Set):
        # Sets have no order of their own; sort by their canonical text so that equal sets are equal texts.
        return sorted((_plain(item, where) for item in value), key=canonical_json)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(f"{where} is a {type(value).__name__}, which has no JSON form; convert it to a plain value first")


def plain(obj: Any) -> Any:
    """`obj` (dataclasses, mappings, sequences, sets, NumPy values, paths) as plain JSON types.

    Raises:
      ValueError: a NaN or infinite number, a key that is not a string, or a type without JSON form; it is named.
    """
    return _plain(obj, "value")


def canonical_json(obj: Any) -> str:
    """The one JSON text of `obj`: sorted keys, no spaces, ASCII, shortest float form. Equal objects, equal texts."""
    return json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(obj: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `canonical_json(obj)`."""
    return hashlib.sha256(canonical_json(obj).encode("ascii")).hexdigest()[:16]


def differences(stored: Any, wanted: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves at which two plain JSON values differ: (dotted path, stored value, wanted value).

    A key that one side lacks is reported with the string "(absent)" on that side.
    """
    if isinstance(stored, dict) and isinstance(wanted, dict):
        found = []
        for key in sorted(stored.keys() | wanted.keys()):
            below = f"{path}.{key}" if path else key
            if key not in stored or key not in wanted:
                found.append((below, stored.get(key, "(absent)"), wanted.get(key, "(absent)")))
            else:
                found.extend(differences(stored[key], wanted[key], below))
        return found
    return [] if canonical_json(stored) == canonical_json(wanted) else [(path or "value", stored, wanted)]


def describe(found: list[tuple[str, Any, Any]], stored_name: str, wanted_name: str, limit: int = 6) -> str:
    """`differences` as one line, e.g. "model.layers: 2 in the checkpoint, 4 in this run; …"."""
    parts = [f"{path}: {json.dumps(a)} in {stored_name}, {json.dumps(b)} in {wanted_name}" for path, a, b in found]
    more = f"; and {len(parts) - limit} more" if len(parts) > limit else ""
    return "; ".join(parts[:limit]) + more


# --- Atomic files and directories -------------------------------------------------------------------------------------


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file or nothing: a temporary sibling, fsync, rename.

    Raises:
      WorkdirError: the file cannot be written (permission, full disk, missing directory).
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            # mkstemp makes the file private to its owner; an artifact is as readable as any other file here.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise WorkdirError(f"cannot write {path}: {reason(error)}") from error


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; see `write_text_atomic` for errors."""
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomic(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


_REMEDIES = {
    errno.ENOSPC: "free some space or use another directory",
    errno.EDQUOT: "free some of your quota or use another directory",
    errno.EFBIG: "raise the file size limit (ulimit -f) or use another file system",
    errno.EACCES: "make the directory writable or use another one",
    errno.EPERM: "make the directory writable or use another one",
    errno.EROFS: "use another directory",
    errno.ENOTDIR: "a file stands where a directory is needed; remove it or use another directory",
    errno.ENOENT: "create the directory first",
}


def reason(error: BaseException) -> str:
    """An OS error as "cause; remedy" in one line; any other error as the first line of its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}; {_REMEDIES.get(error.errno, 'check the file system')}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@functools.cache
def _umask() -> int:
    # The only portable way to read the umask is to set it; done once.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def partial_path(directory: str | os.PathLike[str]) -> Path:
    """Where the contents of `directory` are written before they are complete: a hidden sibling, same file system."""
    directory = Path(directory)
    return directory.parent / f".{directory.name}.partial"


def publish(partial: Path, final: Path) -> None:
    """Renames a finished `partial` directory to `final`, replacing an older `final` if there is one.

    Nothing half-written is ever visible under the final name; a process killed between the two renames leaves none.
    """
    if final.exists():
        stale = final.parent / f".{final.name}.stale"
        if stale.exists():
            shutil.rmtree(stale)
        os.rename(final, stale)
        os.rename(partial, final)
        shutil.rmtree(stale)
    else:
        os.rename(partial, final)


@contextlib.contextmanager
def atomic_directory(directory: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary directory that becomes `directory` when the block ends, and vanishes if the block raises.

    Raises:
      FileExistsError: `directory` exists, is not empty, and `overwrite` is false.
      OSError: it cannot be created; callers turn this into their own one-line error with `reason`.
    """
    final = Path(directory).absolute()
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists already; delete it or choose another directory")
    partial = partial_path(final)
    if partial.exists():  # left by a killed process
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def file_manifest(directory: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Every file below `directory`: relative path -> [bytes, SHA-256 in hex]."""
    root = Path(directory)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    # hashlib releases the interpreter lock, so large checkpoints are hashed on several cores.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(_sha256, paths))
    return {
        path.relative_to(root).as_posix(): [path.stat().st_size, sha] for path, sha in zip(paths, hashes, strict=True)
    }


def manifest_problem(directory: str | os.PathLike[str], manifest: Mapping[str, list[Any]]) -> str | None:
    """What is wrong with the files of `directory` against their manifest, as "FILE: cause", or None.

    Sizes are compared first, so that a truncated checkpoint is refused before anything is hashed.
    """
    root = Path(directory)
    for name, (size, _) in manifest.items():
        path = root / name
        if not path.is_file():
            return f"{path}: missing"
        actual = path.stat().st_size
        if actual != size:
            return f"{path}: {actual} bytes where {size} were written (truncated or changed)"
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = pool.map(_sha256, [root / name for name in manifest])
        for (name, (_, expected)), actual in zip(manifest.items(), hashes, strict=True):
            if actual != expected:
                return f"{root / name}: checksum differs (corrupt)"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with its own digest under "digest", so that a damaged metadata file is told from a different one."""
    return {**plain(body), "digest": digest(body)}


def unseal(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `sealed` made and checks it.

    Raises:
      ValueError: the file is missing, is not JSON, or does not match its digest; one line, "FILE: cause".
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({reason(error)})") from error
    if not isinstance(body, dict) or body.pop("digest", None) != digest(body):
        raise ValueError(f"{path}: does not match its own digest (corrupt or edited by hand)")
    return body


# --- Work directories and stage markers -------------------------------------------------------------------------------


def check_writable(directory: str | os.PathLike[str], *, free_bytes: int = 0) -> None:
    """Creates `directory` if needed, writes and fsyncs a probe file in it, and checks the free space.

    Raises:
      WorkdirError: one line with path, cause and remedy.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".probe.", dir=directory) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(directory).free
    except FileExistsError as error:
        raise WorkdirError(f"cannot use {directory}: it is a file; remove it or use another --workdir") from error
    except OSError as error:
        raise WorkdirError(f"cannot write in {directory}: {reason(error)}") from error
    if free < free_bytes:
        raise WorkdirError(
            f"{directory} has {free / 1e6:.0f} MB free, {free_bytes / 1e6:.0f} MB are needed; "
            "free some space or use another --workdir"
        )


def workdir(text: str) -> Path:
    """The work directory of a flag.

    Raises:
      WorkdirError: an address of an object store, which `Path` would take for a folder of that name.
    """
    if "://" in text:
        raise WorkdirError(
            f"--workdir={text} is an address; artifacts need a file system, with renames that are whole or not at all: mount "
            "one on every host, such as NFS or Filestore, and give its path"
        )
    return Path(text)


def versions() -> dict[str, str]:
    """The versions of everything a result may depend on, and the platform. A package that is absent is "absent"."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package.removesuffix("-checkpoint")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.removesuffix("-checkpoint")] = "absent"
    found["platform"] = f"{platform.system()}-{platform.machine()}"
    return found


@dataclasses.dataclass(frozen=True)
class Marker:
    """A finished stage.

    Attributes:
      stage: the stage's name, e.g. "teachers/deletion".
      key: the part of the configuration that it depends on.
      inputs: name -> output hash of each stage that it reads.
      output_hash: digest of {stage, key, inputs}; the `inputs` value for whoever reads this stage.
      seconds: how long it took.
      extra: what else the stage wants to say; not part of the hash.
      versions: see `versions`; not part of the hash.
    """

    stage: str
    key: dict[str, Any]
    inputs: dict[str, str]
    output_hash: str
    seconds: float
    extra: dict[str, Any]
    versions: dict[str, str]


def output_hash(stage: str, key: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of a stage's output: what it is, what it depends on, what it read. Known before it runs."""
    return digest({"stage": stage, "key": key, "inputs": inputs})


def complete(
    directory: str | os.PathLike[str],
    *,
    stage: str,
    key: Mapping[str, Any],
    inputs: Mapping[str, str],
    seconds: float,
    extra: Mapping[str, Any] | None = None,
) -> Marker:
    """Marks the stage in `directory` as finished; call it last, after every other file is in place.

    Raises:
      WorkdirError: the marker cannot be written.
    """
    marker = Marker(
        stage=stage,
        key=plain(key),
        inputs=plain(inputs),
        output_hash=output_hash(stage, key, inputs),
        seconds=float(seconds),
        extra=plain(extra or {}),
        versions=versions(),
    )
    write_json_atomic(Path(directory) / MARKER, marker)
    return marker


def lookup(
    directory: str | os.PathLike[str], stage: str, key: Mapping[str, Any], inputs: Mapping[str, str]
) -> Marker | None:
    """The marker of this very stage in `directory`, or None if the directory holds no finished stage.

    Raises:
      WorkdirMismatch: a finished stage of another configuration or of other inputs stands there; every differing field
        is named with both values. Nothing is overwritten.
      WorkdirError: the marker is unreadable.
    """
    path = Path(directory) / MARKER
    remedy = f"use another --workdir or delete {directory}"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        marker = Marker(**stored)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise WorkdirError(f"{path} is unreadable ({reason(error)}); {remedy}") from error
    if marker.output_hash == output_hash(stage, key, inputs):
        return marker
    found = differences(
        {"stage": marker.stage, **marker.key, "inputs": marker.inputs},
        {"stage": stage, **plain(key), "inputs": plain(inputs)},
    )
    what = describe(found, "the directory", "this run") or "the marker's hash does not match its own content"
    raise WorkdirMismatch(f"{directory} was made by another configuration ({what}); {remedy}")
