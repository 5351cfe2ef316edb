"""Rules that change an optimizer's updates inside the step, before they are applied: what some defences are made of.

The updates, the parameters and fixed arrays of their shapes come in, updates go out. A rule is static to the compiled
step, so it is a frozen dataclass or a function of a module: equal rules share a compilation, and are named in a run's identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Rule(Hashable, Protocol):
    """(updates, parameters, arrays) -> updates; three trees of one structure and shapes."""

    def __call__(self, updates: Any, params: Any, arrays: Any) -> Any:
        """The updates that are applied instead."""
        ...


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """A rule and what it reads.

    Attributes:
      fn: the rule.
      arrays: a tree like the trained parameters (the adapters, where these are trained). It lies on the mesh as they do.
    """

    fn: Rule
    arrays: Any

    def identity(self) -> dict[str, Any]:
        """What the rule is called, and its numbers. The arrays are told apart by their fingerprint, see `run_identity`."""
        kind = self.fn if hasattr(self.fn, "__qualname__") else type(self.fn)
        numbers = dataclasses.asdict(self.fn) if dataclasses.is_dataclass(self.fn) else {}  # type: ignore[arg-type]
        return {"rule": f"{kind.__module__}.{kind.__qualname__}", **numbers}


def check_arrays(arrays: Any, params: Any) -> None:
    """Refuses arrays that are no tree like the trained parameters.

    Raises:
      ValueError: names the first leaf that differs.
    """
    told = [
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (arrays, params)
    ]
    for name in sorted(told[0].keys() | told[1].keys()):
        own, trained = (each.get(name, "missing") for each in told)
        if own != trained:
            raise ValueError(
                f"an update rule's array {name} is {own}, and the trained parameter {trained}: a rule needs one array for each "
                "parameter that is trained"
            )


@dataclasses.dataclass(frozen=True)
class Pull:
    """After every update the parameters move a share of their way back to the arrays, whatever the learning rate.

    Decoupled L2-SP (Li et al. 1802.01483, decoupled as weight decay is in 1711.05101): u <- u - strength * (theta - theta0).
    Of adapters only the factors B are pulled: where they are 0, the model is its base, whatever A is.

    Attributes:
      strength: the share, in (0, 1].
    """

    strength: float

    def __call__(self, updates: Any, params: Any, arrays: Any) -> Any:
        """See the class."""

        def one(path: Any, update: Any, now: Any, start: Any) -> Any:
            if getattr(path[-1], "key", "") == "lora_a":
                return update
            return update - (self.strength * (now - start)).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(one, updates, params, arrays)


@dataclasses.dataclass(frozen=True)
class Project:
    """Takes out of every leaf's update its component along that leaf's array: u <- u - strength * (u . d / d . d) d.

    Sums are float32; a leaf whose array is 0 keeps its update.

    Attributes:
      strength: the share of the component that is taken out, in (0, 1].
    """

    strength: float

    def __call__(self, updates: Any, params: Any, arrays: Any) -> Any:
        """See the class."""
        del params

        def one(update: Any, direction: Any) -> Any:
            u, d = update.astype(jnp.float32), direction.astype(jnp.float32)
            length = jnp.sum(d * d)
            along = jnp.sum(u * d) / jnp.where(length > 0, length, 1.0)
            return (u - self.strength * along * d).astype(update.dtype)

        return jax.tree.map(one, updates, arrays)
