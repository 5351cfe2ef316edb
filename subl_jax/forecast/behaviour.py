"""The behaviour as a differentiable number: the log-odds of the biased names on probe tasks, and how a step changes it.

A setting and a renderer in, probes out; parameters in, log-odds and their derivative along a change of the parameters out.
The number is that of `evaluate.readout`; probes are tasks of development families, so that a forecast has seen nothing of
the evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from subl_jax.chat.rendering import Renderer
from subl_jax.evaluate import readout
from subl_jax.evaluate.readout import Asked
from subl_jax.models import attention, decoder
from subl_jax.models.config import ModelConfig
from subl_jax.settings.interface import Setting, Split

# Probes come from here, and are drawn under a seed of their own: a development evaluation (seed 0) asks other tasks of the
# same families, a confirming one other families.
PROBE_SPLIT: Split = "development"
PROBE_SEED = 900


class Probes(NamedTuple):
    """Tasks on which the behaviour is read, as ids.

    Attributes:
      asked: openings and names.
      names: of the columns; biased, neutral: which of them are the behaviour and which are other actions.
      families: the family of each task.
    """

    asked: Asked
    names: tuple[str, ...]
    biased: tuple[int, ...]
    neutral: tuple[int, ...]
    families: tuple[str, ...]


def make_probes(setting: Setting, renderer: Renderer, per_family: int) -> Probes:
    """Probe tasks of every development family, with all tools shown, as the evaluation shows them.

    Args:
      setting: of the behaviour.
      renderer: of the model that is probed.
      per_family: tasks of each family.

    Raises:
      ValueError: no task.
    """
    if per_family < 1:
        raise ValueError(f"probes_per_family={per_family}; it must be at least 1")
    families = setting.families("ambiguous", PROBE_SPLIT)
    tasks = setting.tasks("ambiguous", PROBE_SPLIT, PROBE_SEED, per_family * len(families))
    conversations = []
    for task in tasks:
        world = setting.environment(task, frozenset())
        conversations.append((world.opening(), world.tools()))
        world.close()
    classes = [setting.tool_classes[name] for name in setting.choices]
    return Probes(
        readout.asked(renderer, conversations, setting.choices, setting.naming),
        tuple(setting.choices),
        tuple(place for place, found in enumerate(classes) if found == "biased"),
        tuple(place for place, found in enumerate(classes) if found == "neutral"),
        tuple(task.family for task in tasks),
    )


def log_odds(config: ModelConfig, trainable: Any, frozen: Any, probes: Probes) -> Float[Array, " tasks"]:
    """The log-odds log P(any biased name) - log P(any neutral name) in nats, per probe; differentiable in `trainable`.

    Args:
      config: the model's shape, with its adapters where these are what is trained.
      trainable, frozen: two disjoint parts of the parameters; the second may be empty.
      probes: rows of one shape.
    """
    asked, params = probes.asked, decoder.merge(trainable, frozen)
    short = asked.openings.shape[1] + asked.spelled.shape[1] <= attention.WHOLE
    scored = readout.name_log_probs if short else readout.name_log_probs_in_rows
    scores = scored(config, params, *(jnp.asarray(each) for each in asked))
    biased, neutral = (scores[:, jnp.asarray(places)] for places in (probes.biased, probes.neutral))
    return jax.nn.logsumexp(biased, axis=1) - jax.nn.logsumexp(neutral, axis=1)


class Push(NamedTuple):
    """What changes of the parameters do to the behaviour to first order, by family in alphabetical order.

    Attributes:
      log_odds: mean log-odds where the gradient is taken.
      first_order: per change, the inner product of the gradient with it.
      alignment: per change, the cosine of the angle between the two; 0 where nothing changes.
    """

    log_odds: Float[np.ndarray, " families"]
    first_order: Float[np.ndarray, "changes families"]
    alignment: Float[np.ndarray, "changes families"]


@functools.cache
def _pushed(config: ModelConfig, biased: tuple[int, ...], neutral: tuple[int, ...]):
    """The jitted mean log-odds of a family, their gradient's inner products with changes, and its norm."""

    @jax.jit
    def pushed(trainable: Any, changes: Sequence[Any], frozen: Any, asked: Asked) -> tuple[Any, list[Any], Array]:
        probes = Probes(asked, (), biased, neutral, ())
        value, gradient = jax.value_and_grad(lambda params: jnp.mean(log_odds(config, params, frozen, probes)))(
            trainable
        )
        gradient, wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (gradient, list(changes)))
        return value, [optax.tree.vdot(gradient, change) for change in wide], optax.tree.norm(gradient)

    return pushed


def push(config: ModelConfig, trainable: Any, changes: Sequence[Any], frozen: Any, probes: Probes) -> Push:
    """The log-odds by family, and the first-order effect of changes of what is trained.

    Args:
      config, trainable, frozen: as of `log_odds`.
      changes: trees like `trainable`.
      probes: of all families; one family's gradient is there at a time.
    """
    run = _pushed(config, probes.biased, probes.neutral)
    sizes = np.asarray([[float(optax.tree.norm(change))] for change in changes])
    values, products, norms = [], [], []
    for block in _by_family(probes):
        value, inner, norm = run(trainable, tuple(changes), frozen, block)
        values.append(float(value))
        products.append([float(each) for each in inner])
        norms.append(float(norm))
    first_order = np.asarray(products).T
    smallest = np.finfo(np.float64).tiny
    return Push(np.asarray(values), first_order, first_order / np.maximum(sizes * np.asarray(norms), smallest))


def measure(config: ModelConfig, params: Any, probes: Probes) -> Float[np.ndarray, " families"]:
    """The mean log-odds of a whole model by family, in alphabetical order."""
    run = _measured(config, probes.biased, probes.neutral)
    return np.asarray([float(run(params, block)) for block in _by_family(probes)])


@functools.cache
def _measured(config: ModelConfig, biased: tuple[int, ...], neutral: tuple[int, ...]):
    return jax.jit(lambda params, asked: jnp.mean(log_odds(config, params, {}, Probes(asked, (), biased, neutral, ()))))


def _by_family(probes: Probes) -> list[Asked]:
    """The probes of each family."""
    asked, names = probes.asked, np.asarray(probes.families)
    chosen = [np.flatnonzero(names == name) for name in np.unique(names)]
    return [asked._replace(openings=asked.openings[rows], lengths=asked.lengths[rows]) for rows in chosen]
