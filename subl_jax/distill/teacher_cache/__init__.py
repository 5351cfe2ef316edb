"""The teacher cache: what a teacher thinks of every loss token of a dataset, on disk, for any number of students."""

from subl_jax.distill.teacher_cache.identities import CacheError, CacheMismatch, Model, identity
from subl_jax.distill.teacher_cache.records import Targets
from subl_jax.distill.teacher_cache.store import CacheReader, write

__all__ = ["CacheError", "CacheMismatch", "CacheReader", "Model", "Targets", "identity", "write"]
