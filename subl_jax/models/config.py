"""The shape of a decoder. One frozen record, stored in every checkpoint, from which a model is rebuilt."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-architecture decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU).

    Attributes:
      vocab_size: rows of the embedding and columns of the head.
      d_model, num_layers, num_heads, num_kv_heads, head_dim, d_ff: the usual widths; `num_heads` query heads share
        `num_kv_heads` key/value heads.
      rope_theta: base of the rotary frequencies. Small organisms use a small base: their contexts are short.
      rms_eps: added to the mean square in RMSNorm.
      tie_embeddings: the head is the transposed embedding.
      dropout: residual dropout rate, active only when a dropout key is given.
      init_scale: standard deviation of the embedding at initialisation; matrices use 1/sqrt(fan_in).
      scan_unroll: layers unrolled per scan step. Unrolling a two-layer organism saves the scan's copies on CPU.
    """

    vocab_size: int = 1024
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    d_ff: int = 176
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-5
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_scale: float = 0.02
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        """Refuses shapes that no forward pass could use."""
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd; rotary embeddings rotate pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout={self.dropout} is outside [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, as stored in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; an unknown field is an error, since it would change the model silently."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"model configuration has unknown fields {unknown}; was it written by a newer version?")
        return cls(**fields)
