"""The teacher cache of a distillation: written where it is missing, and bound to the teacher's folder.

Another student of the same teacher and documents reads it without the teacher's weights: beside the cache stands a note
of the folder that its teacher came from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import logging

from subl_jax import artifacts
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.distill import teacher_cache
from subl_jax.trajectory import Trajectory

if TYPE_CHECKING:
    from subl_jax.distillation.run import Distillation

# What stands in the directory that the user names.
CACHE, NOTE = "top_k", "teacher.json"


def open_cache(run: Distillation, items: Sequence[Trajectory]) -> teacher_cache.CacheReader:
    """The cache of these documents, in their order; the teacher is loaded only where it is not known otherwise.

    Raises:
      CacheMismatch: the directory holds the cache of another teacher, tokenizer, temperature, k, or of other documents.
      CacheError: it is damaged or cannot be written.
    """
    spec = run.spec
    assert spec.teacher_cache is not None and run.teacher is not None
    root = spec.teacher_cache
    mark = tokenizers.fingerprint(run.student.tokenizer)
    temperature, shared = spec.config.objective.temperature, run.shared_tokens

    def identity(teacher: Any) -> dict[str, Any]:
        return teacher_cache.identity(teacher, mark, items, temperature, spec.cache_top_k, shared)

    source = [run.teacher.identity, run.teacher.config.param_dtype]
    told = _note(root / NOTE)
    there = (root / CACHE).is_dir()
    if there and told.get("source") == source:
        expected = {**identity(None), "teacher": told["teacher"]}
    else:
        expected = identity(run.load_teacher())
    if not there:
        root.mkdir(parents=True, exist_ok=True)
        # With the teacher's own rows: students whose vocabularies are padded to other sizes can share the cache.
        layout = None if run.teacher_layout.mesh.size == 1 else run.teacher_layout
        figures = teacher_cache.write(
            root / CACHE, items, run.load_teacher(), k=spec.cache_top_k, temperature=temperature,
            shared_tokens=shared, identity=expected, layout=layout,
        )  # fmt: skip
        logging.info(
            "teacher cache %s: %.1f bytes a token, added KL error %.2e nats", root, figures["bytes_per_token"],
            figures["added_error"],
        )  # fmt: skip
    reader = teacher_cache.CacheReader(root / CACHE, expected)
    if told.get("source") != source:
        artifacts.write_json_atomic(root / NOTE, {"source": source, "teacher": expected["teacher"]})
    return reader


def _note(path: Any) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
