"""Where a teacher or a student comes from: a Hugging Face folder, one of our checkpoints, or adapters on either.

A folder comes in; what stands there (shape, tokenizer, identity) is read and checked before any work, its parameters only
when they are asked for. Adapters are merged into the model below them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jax
from transformers import PreTrainedTokenizerBase

from subl_jax import artifacts, checkpoint, sources
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import renderer_for
from subl_jax.chat.rendering import Renderer
from subl_jax.distill.loop import Model
from subl_jax.distillation.config import RunOptions
from subl_jax.metrics.progress import progress
from subl_jax.models import axes, convert, decoder, hf_import, lora, peft_config, peft_format
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout

Kind = Literal["folder", "checkpoint", "adapters", "peft"]
# Directories above one of our checkpoints in which its run's tokenizer is looked for: WORKDIR/seed=N/students/NAME/params.
_ABOVE = 6
# How deep adapters may stand on adapters.
_DEPTH = 4


class SourceError(ValueError):
    """A folder that holds no model, or not all of one; one line with cause and remedy."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
      role: teacher or student, for messages.
      directory: where its parameters, or adapters, are.
      kind: what they are.
      config: its shape, adapters merged, and how it is run.
      tokenizer_dir: where its tokenizer lies.
      identity: sixteen hex digits that change with the model.
      base: the model below adapters.
    """

    role: str
    directory: Path
    kind: Kind
    config: ModelConfig
    tokenizer_dir: Path
    identity: str
    base: Source | None = None

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return tokenizers.load(self.tokenizer_dir)

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Its chat format."""
        return renderer_for(self.tokenizer)

    def load(self, layout: Layout) -> Model:
        """Reads the parameters, each to its shard of the mesh."""
        where = _places(self.config, layout)
        if self.kind == "folder":
            folder = hf_import.open_folder(self.directory)
            with progress(folder.nbytes, f"import {self.directory}", unit="B") as shown:
                params = hf_import.import_params(folder, self.config, shardings=where, report=shown.advance)
        elif self.kind == "checkpoint":
            params, _ = checkpoint.load_model(self.directory, sharding=where)
        else:
            assert self.base is not None  # `open_model` saw to it
            below = self.base.load(layout)
            if self.kind == "peft":
                adapter, adapters = peft_format.read_peft(self.directory, below.config, below.params)
                config = dataclasses.replace(below.config, lora=adapter)
            else:
                config, adapters, _ = lora.load_adapters(self.directory)
            together = decoder.merge(adapters, below.params)
            params = lora.merged(config, together if where is None else axes.place(together, config, layout))
        dtype = self.config.param_dtype
        return Model(self.config, jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params))


def _places(config: ModelConfig, layout: Layout) -> Any:
    """Where each parameter goes when it is read; None on a mesh of one device."""
    if layout.mesh.size == 1:
        return None
    axes.check_layout(config, layout)
    abstract: Any = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    return axes.shardings(abstract, layout)


def open_model(
    role: str,
    directory: Path,
    options: RunOptions,
    *,
    base: Path | None = None,
    tokenizer: Path | None = None,
    depth: int = _DEPTH,
) -> Source:
    """Finds out what a folder holds, and checks all that can be checked without reading weights.

    Args:
      role: teacher or student.
      directory: a Hugging Face folder, a PEFT folder, or a checkpoint of ours (or the directory of the stage it is in).
      options: how it is run.
      base: the model below adapters; a PEFT folder may name it itself.
      tokenizer: where it does not lie in the folder, or in the run that made the checkpoint.
      depth: how many models of adapters may still follow below.

    Raises:
      SourceError: nothing that is supported, no tokenizer, one of another model, or no base below adapters.
      HuggingFaceError, CheckpointError: a folder that is damaged or not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise SourceError(f"--{role}={directory} is no directory; give the folder of a model (nothing is downloaded)")
    if (directory / peft_format.CONFIG).is_file():
        return _peft(role, directory, options, base, tokenizer, depth)
    inner = next((path for path in (directory, directory / "params") if (path / checkpoint.METADATA).is_file()), None)
    if inner is not None:
        return _checkpoint(role, inner, options, base, tokenizer, depth)
    if (directory / hf_import.CONFIG).is_file():
        return _folder(role, directory, options, tokenizer)
    raise SourceError(
        f"--{role}={directory} holds no model: neither {hf_import.CONFIG} (a Hugging Face folder), {peft_format.CONFIG} "
        f"(adapters) nor {checkpoint.METADATA} (a checkpoint of ours)"
    )


def _run_with(config: ModelConfig, options: RunOptions, stored: str) -> ModelConfig:
    dtype: Any = stored if options.dtype == "stored" else options.dtype
    return dataclasses.replace(
        config, param_dtype=dtype, compute_dtype=dtype, attention=options.attention, remat=options.remat
    )


def _folder(role: str, directory: Path, options: RunOptions, tokenizer: Path | None) -> Source:
    opened = hf_import.open_folder(directory)
    where = tokenizer or directory
    shape = hf_import.read_config(directory, tokenizers.load(where))
    hf_import.check_tensors(opened, shape)
    config = _run_with(shape, options, opened.dtype)
    return Source(role, directory, "folder", config, where, sources.identity(directory))


def _peft(
    role: str, directory: Path, options: RunOptions, base: Path | None, tokenizer: Path | None, depth: int
) -> Source:
    told = json.loads((directory / peft_format.CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    found = base or (Path(told) if isinstance(told, str) and Path(told).is_dir() else None)
    if found is None:
        raise SourceError(
            f"--{role}={directory} holds adapters of PEFT on {told!r}, which is no folder here; name the model below them "
            f"with --{role}_base=DIR"
        )
    own = directory if (directory / "tokenizer_config.json").is_file() else None
    below = _below(role, found, options, tokenizer or own, depth)
    adapter = peft_config.read(directory / peft_format.CONFIG, below.config)
    config = lora.merged_config(dataclasses.replace(below.config, lora=adapter))
    identity = artifacts.digest([sources.identity(directory), below.identity])
    return Source(role, directory, "peft", config, below.tokenizer_dir, identity, below)


def _below(role: str, directory: Path, options: RunOptions, tokenizer: Path | None, depth: int) -> Source:
    if depth < 1:
        raise SourceError(f"{directory}: adapters on adapters, {_DEPTH} deep; merge them first")
    return open_model(role, directory, options, tokenizer=tokenizer, depth=depth - 1)


def _checkpoint(
    role: str, directory: Path, options: RunOptions, base: Path | None, tokenizer: Path | None, depth: int
) -> Source:
    metadata = checkpoint.read_metadata(directory)
    if "model" not in metadata:
        raise SourceError(
            f"{directory} does not say what model it holds (no 'model' in its metadata); name a checkpoint of parameters, "
            "not one from the middle of a training run"
        )
    identity = artifacts.digest(json.loads((directory / checkpoint.METADATA).read_text(encoding="utf-8")))
    if metadata.get("lora"):
        if base is None:
            raise SourceError(
                f"--{role}={directory} holds adapters; name the model that they were trained on with --{role}_base=DIR"
            )
        below = _below(role, base, options, tokenizer, depth)
        shape, _, _ = lora.load_adapters(directory)  # small; reading them checks them
        _check_base(directory, metadata, shape, below)
        config = dataclasses.replace(lora.merged_config(shape), **_options_of(below.config))
        whole = artifacts.digest([identity, below.identity])
        return Source(role, directory, "adapters", config, below.tokenizer_dir, whole, below)
    where = tokenizer or _tokenizer_of(role, directory)
    found = tokenizers.load(where)
    mark = tokenizers.fingerprint(found)
    if metadata.get("tokenizer") not in (None, mark):
        raise SourceError(
            f"the tokenizer in {where} has fingerprint {mark}, {directory} was made with {metadata['tokenizer']}; name the "
            f"folder of that tokenizer with --{role}_tokenizer=DIR"
        )
    shape = ModelConfig.from_dict(metadata["model"])
    hf_import.known_tokens(found, shape.vocab_size, str(directory))
    layout = artifacts.unseal(directory / checkpoint.METADATA)["layout"]
    stored = "bfloat16" if all(dtype == "bfloat16" for _, dtype in layout.values()) else "float32"
    return Source(role, directory, "checkpoint", _run_with(shape, options, stored), where, identity)


def _options_of(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("param_dtype", "compute_dtype", "attention", "remat")}


def _check_base(directory: Path, metadata: dict[str, Any], shape: ModelConfig, below: Source) -> None:
    """Refuses adapters on a model that they were not trained on."""
    told = dataclasses.replace(shape, lora=None, num_tokens=0).architecture()
    stored: dict[str, Any] = {"model": dataclasses.replace(below.config, num_tokens=0).architecture()}
    asked: dict[str, Any] = {"model": told}
    if metadata.get("tokenizer"):
        stored["tokenizer"], asked["tokenizer"] = tokenizers.fingerprint(below.tokenizer), metadata["tokenizer"]
    own = checkpoint.read_metadata(below.directory) if below.kind == "checkpoint" else {}
    for key, value in (metadata.get("base") or {}).items():
        stored[key], asked[key] = own.get(key), value
    found = artifacts.differences(stored, artifacts.plain(asked))
    if found:
        raise SourceError(
            f"{directory} was not trained on {below.directory} ({artifacts.describe(found, 'the base', 'the adapters')}); "
            "name the model that it was trained on"
        )


def _tokenizer_of(role: str, directory: Path) -> Path:
    """In the checkpoint (`models.convert import`), or in the run that made it."""
    directory = directory.absolute()
    above = [parent / "tokenizer" / "files" for parent in directory.parents[:_ABOVE]]
    for path in (directory / convert.TOKENIZER, *above):
        if (path / "tokenizer_config.json").is_file():
            return path
    raise SourceError(f"{directory} comes without a tokenizer; name its folder with --{role}_tokenizer=DIR")
