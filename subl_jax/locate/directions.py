"""How far models move along their teacher's direction, depth by depth, in activations.

Mean states of several models at the same places of the same texts in; per depth and model three numbers out. The direction
at a depth is d = mean(target) - mean(origin); a model's shift is mean(model) - mean(its own base). Everything is worked
out in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from subl_jax.evaluate.statistics import paired_difference
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig

States = Float[np.ndarray, "depths items d_model"]


def refusal(config: ModelConfig, reference: ModelConfig) -> str | None:
    """Why the activations of two models cannot be compared; None where they can."""
    found = [
        f"{name} {getattr(config, name)} against {getattr(reference, name)}"
        for name in ("d_model", "num_layers", "known_tokens")
        if getattr(config, name) != getattr(reference, name)
    ]
    return f"the activations have no common axes: {', '.join(found)}" if found else None


def movement(
    states: Mapping[str, States], base_of: Mapping[str, str], target: str, origin: str, families: Sequence[str]
) -> list[dict[str, Any]]:
    """Per depth and model how far it has moved along target - origin.

    `along` is <shift, d> / ‖d‖²: 1 is as far as from the origin to the target. `cosine` is that between shift and d, `norm`
    is ‖shift‖ / ‖d‖. The interval of `along` is within the run: clustered by family, with d taken as known.

    Args:
      states: model -> mean states of every item; the same items for all.
      base_of: model -> the model that its shift is measured from; those without one are not listed.
      target, origin: of the direction.
      families: of the items.

    Returns:
      Rows of {"depth", "model", "along", "cosine", "norm", "direction_norm", "low", "high"}; a number that is not defined
      (a direction or a shift of no length) is None.
    """
    found = []
    means = {name: each.astype(np.float64).mean(axis=1) for name, each in states.items()}
    for depth in range(len(means[target])):
        d = means[target][depth] - means[origin][depth]
        length = float(np.linalg.norm(d))
        for model, base in base_of.items():
            shift = means[model][depth] - means[base][depth]
            moved = float(np.linalg.norm(shift))
            row: dict[str, Any] = {"depth": depth, "model": model, "direction_norm": length}
            if length == 0.0:
                found.append(row | dict.fromkeys(("along", "cosine", "norm", "low", "high")))
                continue
            items = [states[name][depth].astype(np.float64) @ d / length**2 for name in (model, base)]
            test = paired_difference(*items, families)
            found.append(
                row
                | {
                    "along": float(shift @ d) / length**2,
                    "cosine": float(shift @ d) / (length * moved) if moved else None,
                    "norm": moved / length,
                    "low": test.low,
                    "high": test.high,
                }
            )
    return found


# --- Weights ----------------------------------------------------------------------------------------------------------

_KINDS = {"kernel": "", "bias": " bias", "scale": ""}


def weight_changes(
    one: tuple[ModelConfig, decoder.Params, decoder.Params], other: tuple[ModelConfig, decoder.Params, decoder.Params]
) -> list[dict[str, Any]]:
    """The angle between the changes of two models and the length of the first, matrix by matrix and layer by layer.

    Args:
      one, other: (configuration, parameters, base parameters) as of `lora.delta_cosine`: a student, and its teacher.

    Returns:
      Rows of {"layer" (from 1; None for what lies outside the layers), "matrix", "cosine", "norm", "teacher_norm"}; no cosine
      where one of the two has not moved. Norm scales and biases are matrices of their own.
    """
    from subl_jax.models import lora

    found = []
    for (path, row), (product, first, second) in lora.delta_products(one, other).items():
        inside = path[0] == "layers"
        names = path[1:] if inside else path
        matrix = names[0] + _KINDS.get(names[-1], "") if len(names) > 1 else names[0]
        found.append(
            {
                "layer": row + 1 if inside else None,
                "matrix": matrix,
                "cosine": product / (first * second) ** 0.5 if first and second else None,
                "norm": first**0.5,
                "teacher_norm": second**0.5,
            }
        )
    return found
