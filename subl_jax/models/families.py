"""Model families of Hugging Face: which models each can carry, and which of its tensors make which of our leaves.

A family is one entry of `FAMILIES`; a name of a tensor is one line of `_TENSORS`. What their config.json means is in
`hf_config`.
"""

from __future__ import annotations

import dataclasses

from subl_jax.models.config import ModelConfig

LeafPath = tuple[str, ...]


class HuggingFaceError(ValueError):
    """A Hugging Face folder cannot be read or written; one line with the tensor or option, its value, and a remedy."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
      architecture: what `architectures` holds in config.json; the class that runs the model.
      config_class: transformers' class of its configuration.
      model_type: what `model_type` holds in config.json.
      biases: which (q/k/v, o) biases its models may have; of several, `attention_bias` says which.
      qk_norm: RMSNorm on queries and keys.
      options: what config.json may hold beyond the options of every family.
    """

    architecture: str
    config_class: str
    model_type: str
    biases: tuple[tuple[bool, bool], ...]
    qk_norm: bool = False
    options: frozenset[str] = frozenset()

    @property
    def windows(self) -> bool:
        """Whether its layers may attend within a window."""
        return "sliding_window" in self.options

    def carries(self, config: ModelConfig) -> bool:
        """Whether a model of this family can compute what `config` computes."""
        biases = (config.qkv_bias, config.o_bias)
        return biases in self.biases and config.qk_norm == self.qk_norm and (self.windows or not any(config.windows))


_OPTIONAL_BIAS = ((False, False), (True, True))
_WINDOW_OPTIONS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

# To add a family: one entry. Export takes the first that carries the model.
FAMILIES = (
    Family("LlamaForCausalLM", "LlamaConfig", "llama", _OPTIONAL_BIAS, options=frozenset({"attention_bias"})),
    Family("Qwen2ForCausalLM", "Qwen2Config", "qwen2", ((True, False),), options=_WINDOW_OPTIONS),
    Family(
        "Qwen3ForCausalLM", "Qwen3Config", "qwen3", _OPTIONAL_BIAS, qk_norm=True,
        options=_WINDOW_OPTIONS | {"attention_bias"},
    ),
)  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The family whose models compute what `config` computes.

    Raises:
      HuggingFaceError: none does.
    """
    for family in FAMILIES:
        if family.carries(config):
            return family
    raise HuggingFaceError(
        f"no family of transformers has qkv_bias={config.qkv_bias}, o_bias={config.o_bias}, qk_norm={config.qk_norm}, "
        f"windows={config.windows}; known are {', '.join(family.architecture for family in FAMILIES)}"
    )


# --- Tensors ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of our parameters and the tensors that it is stacked from.

    Attributes:
      tensor: name in the files; "{layer}" stands for the layer's number.
      shape: ours, the layers in front.
      transposed: the files keep [out, in] where we keep [in, out].
    """

    tensor: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor for each layer."""
        return "{layer}" in self.tensor

    @property
    def names(self) -> list[str]:
        """The tensors in the order of the layers; one for a leaf that is not stacked."""
        return [self.tensor.format(layer=layer) for layer in range(self.shape[0])] if self.stacked else [self.tensor]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor in the files."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


_LAYER = "model.layers.{layer}."

# (our leaf, its tensor, our dimensions without the layers). All families use these names.
_TENSORS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("embedding", "model.embed_tokens.weight", ("vocab", "embed")),
    ("layers/attention_norm/scale", _LAYER + "input_layernorm.weight", ("embed",)),
    ("layers/q/kernel", _LAYER + "self_attn.q_proj.weight", ("embed", "heads")),
    ("layers/q/bias", _LAYER + "self_attn.q_proj.bias", ("heads",)),
    ("layers/k/kernel", _LAYER + "self_attn.k_proj.weight", ("embed", "kv_heads")),
    ("layers/k/bias", _LAYER + "self_attn.k_proj.bias", ("kv_heads",)),
    ("layers/v/kernel", _LAYER + "self_attn.v_proj.weight", ("embed", "kv_heads")),
    ("layers/v/bias", _LAYER + "self_attn.v_proj.bias", ("kv_heads",)),
    ("layers/q_norm/scale", _LAYER + "self_attn.q_norm.weight", ("head_dim",)),
    ("layers/k_norm/scale", _LAYER + "self_attn.k_norm.weight", ("head_dim",)),
    ("layers/o/kernel", _LAYER + "self_attn.o_proj.weight", ("heads", "embed")),
    ("layers/o/bias", _LAYER + "self_attn.o_proj.bias", ("embed",)),
    ("layers/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", ("embed",)),
    ("layers/gate/kernel", _LAYER + "mlp.gate_proj.weight", ("embed", "mlp")),
    ("layers/up/kernel", _LAYER + "mlp.up_proj.weight", ("embed", "mlp")),
    ("layers/down/kernel", _LAYER + "mlp.down_proj.weight", ("mlp", "embed")),
    ("final_norm/scale", "model.norm.weight", ("embed",)),
    ("head", "lm_head.weight", ("embed", "vocab")),
)


def leaves(config: ModelConfig) -> dict[LeafPath, Leaf]:
    """Every leaf of the model's parameters by its path, adapters left out."""
    widths = {
        "vocab": config.vocab_size,
        "embed": config.d_model,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "head_dim": config.head_dim,
        "mlp": config.d_ff,
    }
    absent = set()
    if config.tie_embeddings:
        absent |= {"head"}
    if not config.qkv_bias:
        absent |= {"layers/q/bias", "layers/k/bias", "layers/v/bias"}
    if not config.o_bias:
        absent |= {"layers/o/bias"}
    if not config.qk_norm:
        absent |= {"layers/q_norm/scale", "layers/k_norm/scale"}
    found = {}
    for name, tensor, dims in _TENSORS:
        if name not in absent:
            shape = (config.num_layers,) * ("{layer}" in tensor) + tuple(widths[dim] for dim in dims)
            found[tuple(name.split("/"))] = Leaf(tensor, shape, transposed=name == "head" or name.endswith("/kernel"))
    return found


def tensors(config: ModelConfig) -> dict[str, tuple[LeafPath, int | None]]:
    """Every tensor of the model in the order of a forward pass: its leaf, and its layer if the leaf is stacked."""
    found: dict[str, tuple[LeafPath, int | None]] = {}
    everything = leaves(config)
    found[everything["embedding",].tensor] = (("embedding",), None)
    for layer in range(config.num_layers):
        found |= {leaf.tensor.format(layer=layer): (path, layer) for path, leaf in everything.items() if leaf.stacked}
    return found | {leaf.tensor: (path, None) for path, leaf in everything.items() if not leaf.stacked}
