"""What a teacher cache is bound to: teacher, tokenizer, dataset, temperature and size, as plain JSON to be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from subl_jax import artifacts
from subl_jax.models.config import ModelConfig
from subl_jax.trajectory import Trajectory


class CacheError(ValueError):
    """A teacher cache cannot be written or read; one line with path, cause and remedy."""


class CacheMismatch(CacheError):  # noqa: N818 - reads as what it is
    """A teacher cache is intact but of another teacher, tokenizer, dataset or temperature."""


@runtime_checkable
class Model(Protocol):
    """A model in hand, e.g. `loop.Model`."""

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        ...

    @property
    def params(self) -> Any:
        """Its parameters, adapters included."""
        ...


def parameters_digest(params: Any) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def dataset_digest(trajectories: Sequence[Trajectory]) -> str:
    """SHA-256 over length, tokens and loss mask of every document, in order."""
    sha = hashlib.sha256()
    for item in trajectories:
        sha.update(len(item.tokens).to_bytes(8, "little"))
        sha.update(item.tokens.astype("<i4").tobytes())
        sha.update(np.packbits(item.loss_mask).tobytes())
    return sha.hexdigest()


def model_identity(model: Model) -> dict[str, Any]:
    """Which function a model computes, and its parameters' digest. How it is run (dtype of activations) is left out."""
    adapters = model.config.lora and {"alpha": model.config.lora.alpha, "rank": model.config.lora.rank}
    return {
        "architecture": model.config.architecture(),
        "adapters": adapters,
        "parameters": parameters_digest(model.params),
    }


def identity(
    teacher: Model | None,
    tokenizer_fingerprint: str,
    trajectories: Sequence[Trajectory],
    temperature: float,
    k: int | None,
    shared_tokens: int,
) -> dict[str, Any]:
    """What a cache is bound to, as plain JSON; what `write` is given, and `CacheReader` compares.

    Args:
      teacher: None where it is not at hand: it is then left out, and not compared.
      tokenizer_fingerprint: `chat.tokenizer.fingerprint` of the tokenizer that made the tokens.
      trajectories: the dataset, in its order.
      temperature: divides the logits.
      k: continuations stored per token; None: any number will do.
      shared_tokens: ids from here on have no probability.
    """
    known: dict[str, Any] = {
        "tokenizer": tokenizer_fingerprint,
        "dataset": dataset_digest(trajectories),
        "temperature": float(temperature),
        "shared_tokens": int(shared_tokens),
    }
    if k is not None:
        known["k"] = min(k, shared_tokens)
    if teacher is not None:
        known["teacher"] = model_identity(teacher)
    return artifacts.plain(known)
