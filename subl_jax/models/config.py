"""The shape of a decoder, and how it is run. One frozen record, stored in every checkpoint, that rebuilds a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

Dtype = Literal["float32", "bfloat16"]
Backend = Literal["auto", "xla", "cudnn", "splash"]
Remat = Literal["none", "dots", "full"]

# The matrices that an adapter may sit on, by the names of our parameter tree: those of a layer, and the vocabulary head.
LAYER_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
LORA_TARGETS = (*LAYER_TARGETS, "head")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2106.09685): W x + (alpha / rank) B A dropout(x), with A, B trained and W frozen.

    Attributes:
      rank: of the update; alpha: its scale is alpha / rank.
      dropout: rate on the adapter's input, active only when a dropout key is given.
      targets: matrices with an adapter, of q, k, v, o, gate, up, down, head. On a tied head only the head is adapted: the
        embedding that it shares its weights with stays as it is.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self) -> None:
        """Refuses adapters that could not be trained."""
        if self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank}; it must be at least 1 (to train all weights, leave lora off)")
        if not 0 < self.alpha < math.inf:
            raise ValueError(
                f"adapter.alpha={self.alpha}; it must be positive and finite: the adapter's scale is alpha / rank"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"adapter.dropout={self.dropout} is outside [0, 1)")
        wrong = [name for name in self.targets if name not in LORA_TARGETS]
        if wrong or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(
                f"adapter.targets={','.join(self.targets)}: name each matrix once, of {','.join(LORA_TARGETS)}"
            )

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family (RMSNorm, RoPE, grouped-query attention, SwiGLU) with Qwen's options.

    Attributes:
      vocab_size: rows of the embedding and columns of the head, padding included.
      num_tokens: how many of them the tokenizer knows; the rest is padding that is never sampled and weighs nothing in
        a loss. 0: all of them.
      d_model, num_layers, num_heads, num_kv_heads, head_dim, d_ff: the usual widths; `num_heads` query heads share
        `num_kv_heads` key/value heads. num_heads * head_dim need not be d_model.
      rope_theta: base of the rotary frequencies. Small organisms use a small base: their contexts are short.
      rope_factor: Llama 3's scaling of the rotary frequencies; 1 turns it off.
      rope_low_freq, rope_high_freq, rope_original_context: its band: wavelengths over original_context / low_freq are
        stretched by the factor, those under original_context / high_freq are kept, between them it is interpolated.
      rms_eps: added to the mean square in RMSNorm.
      tie_embeddings: the head is the transposed embedding.
      qkv_bias, o_bias: biases on the attention's projections (Qwen2 has the first).
      qk_norm: RMSNorm on each query and key head before the rotation (Qwen3).
      windows: per layer, how many tokens a query sees, itself included; 0 is all. Empty: all, in every layer.
      dropout: residual dropout rate, active only when a dropout key is given.
      init_scale: standard deviation of the embedding at initialisation; matrices use 1/sqrt(fan_in).
      scan_unroll: layers unrolled per scan step; num_layers unrolls all, so that no loop is left. It saves the scan's
        copies on a CPU.
      param_dtype: in which weights that are not trained are held (teachers, bases, rollouts).
      compute_dtype: of activations and matrix products; norms, softmax, rotations and losses are in float32.
      attention: backend of the attention over whole documents, see `models.attention`.
      remat: what the backward pass recomputes: none keeps every activation, dots keeps the results of matrix products,
        full keeps each layer's input only.
      lora: adapters that the parameters hold besides; None: none.
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
    num_tokens: int = 0
    rope_factor: float = 1.0
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_context: int = 8192
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    attention: Backend = "auto"
    remat: Remat = "none"
    lora: LoraConfig | None = dataclasses.field(default=None, metadata={"flag": False})

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
        if not 0 <= self.num_tokens <= self.vocab_size:
            raise ValueError(
                f"model.num_tokens={self.num_tokens} exceeds model.vocab_size={self.vocab_size}: the tokenizer knows "
                "ids that the model has no row for; use the tokenizer that belongs to the model"
            )
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(
                f"model.windows={self.windows} must hold one number >= 0 for each of {self.num_layers} layers"
            )
        if self.rope_factor < 1 or self.rope_high_freq <= self.rope_low_freq or self.rope_original_context < 1:
            raise ValueError(
                f"rope_factor={self.rope_factor} (at least 1), rope_low_freq={self.rope_low_freq} < "
                f"rope_high_freq={self.rope_high_freq}, rope_original_context={self.rope_original_context} (positive)"
            )
        for name, kind in (("param_dtype", Dtype), ("compute_dtype", Dtype), ("attention", Backend), ("remat", Remat)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"model.{name}={getattr(self, name)!r} is none of {', '.join(get_args(kind))}")

    @property
    def known_tokens(self) -> int:
        """How many rows of the vocabulary are tokens, the rest being padding."""
        return self.num_tokens or self.vocab_size

    @property
    def adapts_head(self) -> bool:
        """Whether an adapter sits on the vocabulary head."""
        return self.lora is not None and "head" in self.lora.targets

    def architecture(self) -> dict[str, Any]:
        """The fields that say which function the parameters compute, as plain JSON; how it is run is left out."""
        return {name: value for name, value in self.to_dict().items() if name not in RUN_FIELDS}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, as stored in checkpoints."""
        fields = dataclasses.asdict(self)
        fields["windows"] = list(self.windows)
        if self.lora is not None:
            fields["lora"]["targets"] = list(self.lora.targets)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`; an unknown field is an error, since it would change the model silently."""
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"model configuration has unknown fields {unknown}; was it written by a newer version?")
        lora = fields.get("lora")
        if lora is not None:
            lora = LoraConfig(**{**lora, "targets": tuple(lora["targets"])})
        return cls(**{**fields, "windows": tuple(fields.get("windows", ())), "lora": lora})


# What may differ between the run that wrote a checkpoint and the one that reads it. `lora` is told by the checkpoint
# itself: an adapter checkpoint holds adapters only.
RUN_FIELDS = (
    "dropout",
    "init_scale",
    "scan_unroll",
    "param_dtype",
    "compute_dtype",
    "attention",
    "remat",
    "lora",
)
