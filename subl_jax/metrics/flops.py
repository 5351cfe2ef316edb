"""Operation and byte counts of the project's workloads, and the utilisations that follow from them.

Shapes of a decoder, token counts and document lengths go in; floating-point operations, bytes, MFU, MBU and the decode
roofline come out. The formulas are MEASURING.md's: parameters exclude embedding and head, attention is causal-halved
and summed per packed document, padding and rematerialisation never count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the counts need to know of a decoder.

    Attributes:
      params: P, parameters without embedding and head.
      width: d, the residual stream's width.
      vocab: V, rows of the head.
      layers: L.
      attention_width: h·d_h, query heads times head size.
      lora_params: P_lora, trainable adapter parameters; 0 where every parameter is trained.
    """

    params: int
    width: int
    vocab: int
    layers: int
    attention_width: int
    lora_params: int = 0


def count_params(params: Any, exclude: Iterable[str] = ()) -> int:
    """Number of elements of a pytree, without the leaves that have one of the `exclude` names in their path.

    For P of the formulas pass the names of the embedding and the head, e.g. `exclude=("embed", "head")`.

    Raises:
      ValueError: a name matches no leaf (a silent miss would count the embedding in).
    """
    excluded = set(exclude)
    seen: set[str] = set()
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = {jax.tree_util.keystr((key,), simple=True) for key in path}
        hit = names & excluded
        seen |= hit
        if not hit:
            total += int(np.prod(leaf.shape, dtype=np.int64))
    if excluded - seen:
        raise ValueError(f"no parameter is named {sorted(excluded - seen)[0]!r}; name what the tree really holds")
    return total


def _squares(documents: Iterable[int]) -> int:
    return sum(int(length) ** 2 for length in documents)


def forward_flops(shape: Shape, tokens: int, loss_tokens: int, documents: Iterable[int]) -> int:
    """One forward pass: `2 P T_all + 2 d V T_loss + Σ 2 S² L h d_h`.

    Args:
      shape: the decoder.
      tokens: T_all, tokens without padding.
      loss_tokens: T_loss, tokens whose logits are computed.
      documents: S, the length of each packed document.
    """
    head = 2 * shape.width * shape.vocab * loss_tokens
    attention = 2 * _squares(documents) * shape.layers * shape.attention_width
    return 2 * shape.params * tokens + head + attention


def sft_step_flops(student: Shape, tokens: int, loss_tokens: int, documents: Iterable[int]) -> int:
    """One training step on hard labels: `6 P_s T_all + 6 d_s V T_loss + Σ 2 S²·3 L_s h_s d_hs`.

    A LoRA student (`lora_params` > 0) skips the gradients of frozen weights: 6 P_s → 4 P_s + 6 P_lora and
    6 d_s V → 4 d_s V.
    """
    if student.lora_params:
        body, head = 4 * student.params + 6 * student.lora_params, 4 * student.width * student.vocab
    else:
        body, head = 6 * student.params, 6 * student.width * student.vocab
    attention = 2 * _squares(documents) * 3 * student.layers * student.attention_width
    return body * tokens + head * loss_tokens + attention


def kd_step_flops(
    teacher: Shape | None, student: Shape, tokens: int, loss_tokens: int, documents: Iterable[int]
) -> int:
    """One distillation step: `T_all(2P_t + 6P_s) + T_loss(2 d_t V + 6 d_s V) + Σ 2 S² (L_t h_t d_ht + 3 L_s h_s d_hs)`.

    `teacher=None` is a cached teacher, whose forward pass is not computed. For a LoRA student see `sft_step_flops`.
    """
    lengths = list(documents)
    student_flops = sft_step_flops(student, tokens, loss_tokens, lengths)
    if teacher is None:
        return student_flops
    return student_flops + forward_flops(teacher, tokens, loss_tokens, lengths)


def mfu(flops: float, seconds: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, `flops / (seconds · peak)`, a fraction."""
    return _ratio(flops, seconds, peak_flops, "peak_flops")


def mbu(bytes_required: float, seconds: float, bandwidth: float) -> float:
    """Memory bandwidth utilisation of decode steps, `bytes / (seconds · bandwidth)`, a fraction."""
    return _ratio(bytes_required, seconds, bandwidth, "bandwidth")


def _ratio(amount: float, seconds: float, per_second: float, name: str) -> float:
    if seconds <= 0 or per_second <= 0:
        raise ValueError(f"seconds={seconds} and {name}={per_second} must be positive")
    return amount / (seconds * per_second)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    """Cache bytes of one token: `2 L n_kv d_h bytes` (keys and values)."""
    return 2 * layers * kv_heads * head_dim * bytes_per_element


def decode_step_bytes(weight_bytes: float, context_lengths: Iterable[int], kv_bytes: float) -> float:
    """Bytes that one decode step must read: the weights once, and each sequence's cache at its actual length.

    Args:
      weight_bytes: W, bytes of the weights read per step (head included, of the embedding only the rows looked up).
      context_lengths: tokens in the cache, per sequence of the batch.
      kv_bytes: see `kv_bytes_per_token`.
    """
    return weight_bytes + kv_bytes * sum(int(length) for length in context_lengths)


def decode_roofline(batch: int, mean_context: float, weight_bytes: float, kv_bytes: float, bandwidth: float) -> float:
    """The most tokens per second that bandwidth allows: `B·BW / (W + B·c̄·2·L·n_kv·d_h·bytes)`."""
    return batch * bandwidth / (weight_bytes + batch * mean_context * kv_bytes)
