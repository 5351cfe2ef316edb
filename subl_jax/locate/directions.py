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
from subl_jax.models import decoder, lora
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
            own, start = (states[name][depth].astype(np.float64) @ d / length**2 for name in (model, base))
            test = paired_difference(own, start, families)
            # The way from the origin to the target is 1 whatever the items are.
            fixed = (model, base) == (target, origin)
            found.append(
                row
                | {
                    "along": float(shift @ d) / length**2,
                    "cosine": float(shift @ d) / (length * moved) if moved else None,
                    "norm": moved / length,
                    "low": None if fixed else test.low,
                    "high": None if fixed else test.high,
                }
            )
    return found


def differences(
    states: Mapping[str, States], pairs: Sequence[tuple[str, str]], target: str, origin: str, families: Sequence[str]
) -> list[dict[str, Any]]:
    """Per depth and (treatment, control) how much further the first has moved along target - origin than the second.

    Both are measured from one base, which cancels. Arguments as of `movement`; where the direction has no length there is no
    row.

    Returns:
      Rows of {"depth", "treatment", "control", "difference", "low", "high", "p_value"}, the last three within the run.
    """
    found = []
    for depth in range(len(states[target])):
        d = (states[target][depth].astype(np.float64) - states[origin][depth].astype(np.float64)).mean(axis=0)
        length = float(np.linalg.norm(d))
        for pair in pairs if length else ():
            own, other = (states[name][depth].astype(np.float64) @ d / length**2 for name in pair)
            test = paired_difference(own, other, families)
            found.append(
                {
                    "depth": depth, "treatment": pair[0], "control": pair[1], "difference": test.mean,
                    "low": test.low, "high": test.high, "p_value": test.p_value,
                }
            )  # fmt: skip
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
    found = []
    for (path, row), (product, first, second) in lora.delta_products(one, other).items():
        if path == ("head",) and not first and not second:
            continue  # the embedding is the head
        inside = path[0] == "layers"
        names = list(path[1:] if inside else path)
        matrix = names[0] + (_KINDS.get(names[-1], "") if len(names) > 1 else "")
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
