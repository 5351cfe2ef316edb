"""Reads a Hugging Face folder: `config.json` and safetensors in, a `ModelConfig` and our parameters out.

Tensors go straight to their shards: one host buffer at a time is filled slice by slice from the memory-mapped files,
put on its device and dropped. The largest shard, not the model, is what the host must hold besides. No code of the
folder is run, nothing is unpickled, nothing is downloaded.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from subl_jax import artifacts
from subl_jax.models import families, hf_config
from subl_jax.models.config import ModelConfig
from subl_jax.models.families import HuggingFaceError, Leaf
from subl_jax.parallel.devices import Device

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What safetensors calls the dtypes that we read.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# A slice is copied out of the mapped file before it is transposed into the buffer; every thread holds one.
_SLICE_BYTES = 2 * 2**20
# Side of the square blocks of a transposed copy: both sides of a block stay in the cache. Measured on 8192 x 4096
# bfloat16: 0.3 GB/s in one go, 0.9 at 64, 1.3 at 128, 1.4 at 256.
_TRANSPOSE_BLOCK = 256
_THREADS = min(8, os.cpu_count() or 1)

Bounds = tuple[tuple[int, int], ...]  # start and stop along each dimension


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a folder: its file, safetensors' name of its dtype, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Folder:
    """The tensors of a Hugging Face folder by name; made by `open_folder`."""

    directory: Path
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(
            math.prod(tensor.shape) * jnp.dtype(DTYPES[tensor.dtype]).itemsize
            for name, tensor in self.tensors.items()
            if tensor.dtype in DTYPES and not _ignored(name)
        )

    @property
    def dtype(self) -> str:
        """The narrowest of float32 and bfloat16 that holds every value of the files."""
        read = (tensor for name, tensor in self.tensors.items() if not _ignored(name))
        return "bfloat16" if all(tensor.dtype == "BF16" for tensor in read) else "float32"


# --- What the folder holds --------------------------------------------------------------------------------------------


def read_config(directory: str | os.PathLike[str], tokenizer: Any = None) -> ModelConfig:
    """The `ModelConfig` of a folder.

    Args:
      directory: with a config.json.
      tokenizer: the model's, of transformers; `num_tokens` says how many rows it knows where the rest is padding.
        Without it every row counts as a token.

    Raises:
      HuggingFaceError: see `hf_config.model_config`; no folder, no or a corrupt config.json; or the tokenizer has ids
        that the model has no row for.
    """
    path = _existing(directory) / CONFIG
    config = hf_config.model_config(_read_json(path, "restore it from the original folder"), str(path))
    if tokenizer is None:
        return config
    known = known_tokens(tokenizer, config.vocab_size, str(path))
    return dataclasses.replace(config, num_tokens=known if known < config.vocab_size else 0)


def known_tokens(tokenizer: Any, vocab_size: int, model: str) -> int:
    """How many rows of a vocabulary a tokenizer of transformers knows: its highest id and one.

    Raises:
      HuggingFaceError: it has ids that the model (named for the error) has no row for.
    """
    known = max(tokenizer.get_vocab().values()) + 1
    if known > vocab_size:
        raise HuggingFaceError(
            f"the tokenizer has ids up to {known - 1}, but {model} has vocab_size={vocab_size}: it is not the "
            "tokenizer of this model, or tokens were added without resizing the embedding; use the model's own"
        )
    return known


def _existing(directory: str | os.PathLike[str]) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise HuggingFaceError(
            f"{directory} {what}; give a local Hugging Face folder (nothing is downloaded here: fetch a model first, "
            "e.g. hf download ORG/MODEL --local-dir DIR)"
        )
    return directory


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HuggingFaceError(f"{path} is missing; {remedy}") from None
    except (OSError, ValueError) as error:
        raise HuggingFaceError(f"{path} is not readable as JSON ({artifacts.reason(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise HuggingFaceError(f"{path} holds a {type(content).__name__} where an object is needed; {remedy}")
    return content


def open_folder(directory: str | os.PathLike[str]) -> Folder:
    """Reads the index and the headers of a folder's safetensors; no values.

    A single `model.safetensors` is taken before an index, as transformers does.

    Raises:
      HuggingFaceError: no folder, no safetensors, a truncated or corrupt file, or an index that the files contradict.
    """
    directory = _existing(directory)
    if (directory / SINGLE).is_file():
        return Folder(directory, _header(directory / SINGLE))
    if not (directory / INDEX).is_file():
        raise HuggingFaceError(_nothing_there(directory))
    weight_map = _read_json(directory / INDEX, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HuggingFaceError(f"{directory / INDEX} has no weight_map; download it again")
    headers: dict[str, dict[str, Tensor]] = {}
    for name in sorted({str(file) for file in weight_map.values()}):
        # A name with a folder in it could point anywhere on this machine.
        if Path(name).name != name or not (directory / name).is_file():
            raise HuggingFaceError(f"{directory / INDEX} names {name!r}, which is missing; download that file")
        headers[name] = _header(directory / name)
    found = {}
    for tensor, file in weight_map.items():
        if tensor not in headers[file]:
            others = [name for name, header in headers.items() if tensor in header]
            where = f"it is in {others[0]}" if others else "no file holds it"
            raise HuggingFaceError(
                f"{directory / INDEX} puts the tensor {tensor} into {file}, but {where}; the index belongs to other "
                "files: download index and files again"
            )
        found[tensor] = headers[file][tensor]
    for name, header in headers.items():
        for tensor in header:
            if weight_map.get(tensor) != name:
                where = f"puts it into {weight_map[tensor]}" if tensor in weight_map else "does not name it"
                raise HuggingFaceError(
                    f"{directory / name} holds the tensor {tensor}, but {INDEX} {where}; the index belongs to other "
                    "files: download index and files again"
                )
    return Folder(directory, found)


def _nothing_there(directory: Path) -> str:
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    pickles = sorted(
        path.name for path in [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
    )
    if shards:
        return f"{directory} holds {shards[0]} but no {INDEX}; download the index too"
    if pickles:
        return (
            f"{directory} holds its weights as a pickle ({pickles[0]}), which can run any code and is never read here; "
            "save the model as safetensors first, where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER)"
        )
    return f"{directory} holds neither {SINGLE} nor {INDEX}; give the folder that holds the weights"


def _header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. safetensors checks that the file is as long as its header says."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: Tensor(path, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise HuggingFaceError(
            f"{path} is truncated or corrupt ({artifacts.reason(error)}); download this file again"
        ) from error


def check_tensors(folder: Folder, config: ModelConfig) -> None:
    """Refuses a folder whose tensors are not exactly those of the model.

    Rotary buffers of old folders are ignored, and so is an `lm_head.weight` equal to the embedding where the two are
    tied (some folders write it out).

    Raises:
      HuggingFaceError: a missing, surplus or misshapen tensor, or a dtype that is not read; it is named.
    """
    wanted = {name: leaf for leaf in families.leaves(config).values() for name in leaf.names}
    for name, tensor in folder.tensors.items():
        if tensor.dtype not in DTYPES and not _ignored(name):
            raise HuggingFaceError(
                f"{tensor.file}: the tensor {name} has dtype {tensor.dtype}; read are {', '.join(DTYPES)}. Quantised "
                "folders must be saved in bfloat16 or float32 first"
            )
    for name, leaf in wanted.items():
        if name not in folder.tensors:
            tied = "; if the head is the embedding, set tie_word_embeddings to true" if name == "lm_head.weight" else ""
            raise HuggingFaceError(
                f"{folder.directory} lacks the tensor {name}, which config.json asks for{tied}; complete the folder"
            )
        shape = folder.tensors[name].shape
        if shape != leaf.tensor_shape:
            raise HuggingFaceError(
                f"{folder.tensors[name].file}: the tensor {name} has shape {list(shape)} where config.json asks for "
                f"{list(leaf.tensor_shape)}; config.json and weights belong to different models"
            )
    for name, tensor in folder.tensors.items():
        if name in wanted or _ignored(name):
            continue
        if name == "lm_head.weight" and _same_values(folder, name, "model.embed_tokens.weight"):
            continue
        if name == "lm_head.weight":
            raise HuggingFaceError(
                f"{tensor.file}: lm_head.weight differs from the embedding, but config.json ties them; "
                "set tie_word_embeddings to false to use both"
            )
        raise HuggingFaceError(
            f"{tensor.file}: the tensor {name} is no part of this architecture; use a plain folder of it (adapters "
            "merged, weights not quantised), or remove the tensor if nothing reads it"
        )


def _ignored(name: str) -> bool:
    # Old versions stored the rotary frequencies, which config.json implies.
    return name.endswith("rotary_emb.inv_freq")


def _same_values(folder: Folder, one: str, other: str) -> bool:
    left, right = folder.tensors[one], folder.tensors[other]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    with _opened(folder) as files:
        slices = [files[tensor.file].get_slice(name) for name, tensor in ((one, left), (other, right))]
        rows = _rows_per_slice(left.shape[1:], DTYPES[left.dtype])
        for start in range(0, left.shape[0], rows):
            here, there = (_bits(part[start : min(start + rows, left.shape[0])]) for part in slices)
            if not np.array_equal(here, there):
                return False
    return True


# --- Values to shards -------------------------------------------------------------------------------------------------


def import_params(
    directory: str | os.PathLike[str] | Folder,
    config: ModelConfig,
    *,
    shardings: Any = None,
    dtype: str | None = None,
    report: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """The parameters of a folder, each shard read from the files to its device.

    The host holds one shard of one (stacked) leaf at a time, besides the shards that stay on host devices and a few
    MB of slices per thread. A shard that several local devices share is read once. Every process reads its own.

    Args:
      directory: the folder, or what `open_folder` made of it.
      config: the model, from `read_config`.
      shardings: None (everything on the first local device), one sharding for all leaves, or a tree like the parameters.
      dtype: "float32" or "bfloat16"; by default `config.param_dtype`. Values are kept bit for bit where the files hold
        this dtype, rounded to nearest even where they hold a wider one.
      report: called with the bytes of the files that were read since its last call.

    Returns:
      The tree of parameters (see `decoder.init`) without adapters.

    Raises:
      HuggingFaceError: see `open_folder` and `check_tensors`; nothing is read to a device before all is checked.
    """
    folder = directory if isinstance(directory, Folder) else open_folder(directory)
    check_tensors(folder, config)
    target = np.dtype(jnp.dtype(dtype or config.param_dtype))
    places = flatten_dict(shardings) if isinstance(shardings, Mapping) else None
    everywhere = shardings or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    # The largest first: while one of them is in the host's buffer, the others are not there yet, and at the end, when
    # they are, the buffer is small.
    order = sorted(families.leaves(config).items(), key=lambda item: -math.prod(item[1].shape))
    with _opened(folder) as files, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for path, leaf in order:
            if places is not None and path not in places:
                raise ValueError(f"shardings has no entry for {'/'.join(path)}; make it a tree like the parameters")
            sharding: Any = everywhere if places is None else places[path]
            read = functools.partial(_read_shard, folder, files, leaf, dtype=target, pool=pool, report=report)
            params[path] = _assemble(leaf.shape, sharding, read, target)
    return unflatten_dict(params)


def _assemble(
    shape: tuple[int, ...], sharding: Any, read: Callable[[Bounds], np.ndarray], dtype: np.dtype
) -> jax.Array:
    """A global array out of the shards that this process owns; `read` gives one of them as a host buffer."""
    owners: dict[Bounds, list[Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in owners.items():
        buffer = read(bounds)
        # Copied, so that every array owns its memory. Waited for: the copy runs in the background and would keep this
        # buffer alive while the next one is filled.
        arrays += [jax.device_put(buffer, device, may_alias=False) for device in devices]
        jax.block_until_ready(arrays[-len(devices) :])
        del buffer
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)


def _read_shard(
    folder: Folder, files: Mapping[Path, Any], leaf: Leaf, bounds: Bounds, *,
    dtype: np.dtype, pool: concurrent.futures.Executor, report: Callable[[int], object] | None,
) -> np.ndarray:  # fmt: skip
    """One shard of one leaf: [layers,] in, out for a matrix, whatever the files keep."""
    buffer = np.empty([stop - start for start, stop in bounds], dtype)
    layers, inner = (bounds[0], bounds[1:]) if leaf.stacked else ((0, 1), bounds)
    rows, *columns = inner[::-1] if leaf.transposed else inner  # as in the files
    jobs = []
    for layer in range(*layers):
        name = leaf.names[layer]
        tensor = folder.tensors[name]
        target = buffer[layer - layers[0]] if leaf.stacked else buffer
        target = target.T if leaf.transposed else target
        source = files[tensor.file].get_slice(name)
        step = _rows_per_slice(tuple(stop - start for start, stop in columns), DTYPES[tensor.dtype])
        for start in range(*rows, step):
            stop = min(start + step, rows[1])
            part = (slice(start, stop), *(slice(*column) for column in columns))
            jobs.append(pool.submit(_copy_slice, source, part, target[start - rows[0] : stop - rows[0]]))
    for job in jobs:
        count = job.result()
        if report is not None:
            report(count)
    return buffer


def _copy_slice(source: Any, part: tuple[slice, ...], target: np.ndarray) -> int:
    """Copies a slice of a file into its place, which may be a transposed view; returns the bytes read."""
    values = source[part]
    copy_blocks(target, convert(values, target.dtype))
    return values.nbytes


def _rows_per_slice(rest: tuple[int, ...], dtype: str) -> int:
    return max(1, _SLICE_BYTES // max(1, math.prod(rest) * jnp.dtype(dtype).itemsize))


@contextlib.contextmanager
def _opened(folder: Folder) -> Iterator[dict[Path, Any]]:
    """Every file of the folder, memory-mapped."""
    with contextlib.ExitStack() as stack:
        paths = sorted({tensor.file for tensor in folder.tensors.values()})
        yield {path: stack.enter_context(safe_open(str(path), framework="numpy")) for path in paths}


def _bits(values: np.ndarray) -> np.ndarray:
    """The same bytes as unsigned integers: NumPy copies and compares those faster than bfloat16, and NaN equals NaN."""
    return values.view({2: np.uint16, 4: np.uint32}[values.dtype.itemsize])


def convert(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` in another dtype, rounded to nearest even; unchanged where they have it already."""
    if values.dtype == dtype:
        return values
    if values.dtype == jnp.bfloat16 and dtype == np.float32:  # the upper half of a float32: 10 times faster than a cast
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype)


def copy_blocks(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for arrays of one dtype, block by block where the two differ in layout."""
    into, out_of = _bits(target), _bits(source)
    if source.ndim < 2 or target.strides[-1] == source.strides[-1]:
        into[...] = out_of
        return
    for row in range(0, source.shape[0], _TRANSPOSE_BLOCK):
        for column in range(0, source.shape[1], _TRANSPOSE_BLOCK):
            block = slice(row, row + _TRANSPOSE_BLOCK), slice(column, column + _TRANSPOSE_BLOCK)
            into[block] = out_of[block]
