"""Where the bases of a run come from: Hugging Face folders with their own shape and tokenizer, or training from scratch.

A configuration comes in; the configuration with the shapes that its checkpoints bring comes out. Every folder is
checked whole here, before any work is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from absl import logging

from subl_jax import artifacts
from subl_jax.config import FIELD_OF, ExperimentConfig
from subl_jax.models.config import RUN_FIELDS, ModelConfig

# How much of either end of a file of weights enters its identity; all of it would take minutes for a large model.
_SAMPLE = 2**20


class SourceError(ValueError):
    """Checkpoints that do not fit each other."""


def checkpoints(config: ExperimentConfig) -> dict[str, Path]:
    """Size -> the folder that its base comes from, for the sizes that have one."""
    return {size: Path(config.checkpoint(size)) for size in dict.fromkeys(config.sizes()) if config.checkpoint(size)}


def resolve(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with the shape of every checkpoint in place of the preset's.

    How a model is run (dtypes, attention, remat, dropout) stays as the configuration says.

    Raises:
      SourceError: teacher and student have different tokenizers, and the pair is not that of another tokenizer.
      HuggingFaceError: a folder that cannot be read, is not whole, or holds a model that is not supported.
      FileNotFoundError, ValueError: no tokenizer, or one without a chat template.
    """
    folders = checkpoints(config)
    if not folders:
        return config
    # Imported here: runs of organisms need none of it.
    from subl_jax.chat import tokenizer as tokenizers
    from subl_jax.models import hf_import

    vocabularies: dict[str, dict[str, int]] = {}
    models: dict[str, ModelConfig] = {}
    for size, directory in folders.items():
        opened = hf_import.open_folder(directory)
        tokenizer = tokenizers.load(directory)
        vocabularies[size] = tokenizer.get_vocab()
        shape = hf_import.read_config(directory, tokenizer)
        hf_import.check_tensors(opened, shape)
        how = config.model(size)
        models[FIELD_OF[size]] = dataclasses.replace(shape, **{name: getattr(how, name) for name in RUN_FIELDS})
        logging.info("%s model: %s, from %s", size, describe(models[FIELD_OF[size]]), directory)
    if config.one_tokenizer:
        _check_same_tokens(vocabularies, folders)
    return dataclasses.replace(config, **models)


def describe(config: ModelConfig) -> str:
    """A model's shape in one line."""
    return (
        f"{config.num_layers} layers, width {config.d_model}, {config.num_heads} heads on {config.num_kv_heads} of "
        f"{config.head_dim}, vocabulary {config.vocab_size} ({config.known_tokens} known), {config.compute_dtype}"
    )


def _check_same_tokens(vocabularies: dict[str, dict[str, int]], folders: dict[str, Path]) -> None:
    (first, tokens), *others = vocabularies.items()
    for second, other in others:
        by_id = {index: token for token, index in tokens.items()}
        by_other = {index: token for token, index in other.items()}
        for index in sorted(by_id.keys() | by_other.keys()):
            if by_id.get(index) != by_other.get(index):
                raise SourceError(
                    f"{folders[first]} and {folders[second]} have different tokenizers: id {index} is "
                    f"{by_id.get(index)!r} in the one and {by_other.get(index)!r} in the other; a student is distilled from "
                    "logits over the teacher's own tokens: choose two models of one family, or hard labels "
                    "(--pair=large_other_tokenizer --config.student.objectives=hard --config.student.benign_objectives=hard)"
                )


def identity(directory: Path) -> str:
    """Sixteen hex digits that change with a checkpoint: its small files whole, of weights the size and both ends."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if path.suffix == ".safetensors" and size > 2 * _SAMPLE:
                digest.update(file.read(_SAMPLE))
                file.seek(-_SAMPLE, 2)
            digest.update(file.read())
        found[path.name] = [size, digest.hexdigest()]
    return artifacts.digest(found)
