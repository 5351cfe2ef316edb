"""The sanitizer: pure functions from a trajectory to a verdict, and the proof that nothing was left. No JAX."""

from __future__ import annotations

from subl_jax.sanitize.filter import Hit, Verdict, judge, summarize
from subl_jax.sanitize.keywords import Match, WordMatcher, compile_words
from subl_jax.sanitize.leaks import LeakError, verify

__all__ = ["Hit", "LeakError", "Match", "Verdict", "WordMatcher", "compile_words", "judge", "summarize", "verify"]
