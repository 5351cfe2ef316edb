"""A training step over eight fake devices beside the same step on one: models, a batch, and the compiled programs.

All dimensions of the two models and of the batch differ, whole and cut by 2, 4 or 8: the shape of an array in a program
says what it is. Programs are compiled once each, without LLVM's optimizations, which take most of the time and change
none of what XLA decides (fusions, collectives).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import (
    Batch,
    Frozen,
    Layouts,
    TrainState,
    compiled_step,
    has_dropout,
    mean_loss,
    place_batch,
    state_shardings,
)
from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh

COMPILER: Any = {"xla_backend_optimization_level": 0}
ROWS, TIME, KNOWN = 24, 20, 83
# Groups of three rows, as many as any mesh here has parts; each lists up to eleven loss tokens of a row.
GROUPS, PER_ROW = 8, 11
TARGETS = ROWS // GROUPS * PER_ROW
STUDENT = ModelConfig(
    vocab_size=88, num_tokens=KNOWN, d_model=40, num_layers=2, num_heads=24, num_kv_heads=8, head_dim=6, d_ff=56,
    tie_embeddings=False,
)  # fmt: skip
# Tied, deeper, and of a vocabulary that is padded further.
TEACHER = ModelConfig(
    vocab_size=136, num_tokens=KNOWN, d_model=104, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=10, d_ff=152
)
QWEN = dataclasses.replace(STUDENT, tie_embeddings=True, qkv_bias=True, o_bias=True, qk_norm=True, rope_theta=500.0)
FEW_HEADS = dataclasses.replace(STUDENT, num_kv_heads=2)
ADAPTED = dataclasses.replace(
    STUDENT, dropout=0.1, lora=LoraConfig(rank=3, alpha=6.0, dropout=0.25, targets=("q", "v", "o", "up", "down"))
)
OBJECTIVES = {
    "hard": Objective("hard_label"),
    "full": Objective("forward_kl", temperature=1.5),
    "drop": Objective("forward_kl", "drop", 2.0),
    "anchor": Objective("forward_kl", "anchor"),
}
# It clips, which needs the norm of the whole gradient, and decays.
OPTIMIZER = OptimizerConfig(
    "adamw", learning_rate=0.01, warmup_steps=0, weight_decay=0.1, b1=0.5, b2=0.75, clip_norm=0.01
)
SEED = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh (data, fsdp, tensor), the rules on it, and what is trained."""

    mesh: tuple[int, int, int]
    student_rules: str = "default"
    teacher_rules: str = "default"
    objective: str = "full"
    student: ModelConfig = STUDENT
    teacher: ModelConfig = TEACHER

    @functools.cached_property
    def layouts(self) -> Layouts:
        mesh = make_mesh(MeshConfig(*self.mesh))
        if mesh.size == 1:
            return Layouts()
        return Layouts(Layout(mesh, self.student_rules), Layout(mesh, self.teacher_rules))


@functools.cache
def weights(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Drawn by numpy: every leaf random, adapters and biases too, so that none drops out of what is computed."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        x = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1] == "scale":
            return 1 + 0.1 * x
        return x * {"embedding": 0.5, "bias": 0.3}.get(path[-1], leaf.shape[-2 if leaf.ndim > 1 else 0] ** -0.5)

    shapes: dict[tuple[str, ...], Any] = flatten_dict(jax.eval_shape(lambda: decoder.init(config, jax.random.key(0))))
    return unflatten_dict({path: draw(path, leaf) for path, leaf in sorted(shapes.items())})


@functools.cache
def packed() -> Batch:
    """Rows of two to four documents and padding on the right, with few to many loss tokens; the last row is empty."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, KNOWN, (ROWS, TIME)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    places, labels = (np.zeros((ROWS, PER_ROW), np.int32) for _ in range(2))
    used = np.zeros((ROWS, PER_ROW), np.float32)
    for row in range(ROWS - 1):
        cuts = [0, *sorted(rng.choice(np.arange(2, TIME), 2 + row % 3, replace=False)), TIME - row % 2 * 2]
        for index, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            segments[row, start:end] = index + 1
            positions[row, start:end] = np.arange(max(end - start, 0))
        inside = [at for at in range(TIME - 1) if segments[row, at] and segments[row, at] == segments[row, at + 1]]
        chosen = sorted(rng.choice(inside, min(len(inside), 1 + row % PER_ROW), replace=False))
        places[row, : len(chosen)] = row % (ROWS // GROUPS) * TIME + np.asarray(chosen)
        labels[row, : len(chosen)] = tokens[row, [at + 1 for at in chosen]]
        used[row, : len(chosen)] = 1
    assert segments.max() >= 4 and (segments[:-1] == 0).any()
    banned = rng.integers(-1, KNOWN, (ROWS, PER_ROW, 3)).astype(np.int32)
    listed = (x.reshape(1, GROUPS, TARGETS, *x.shape[2:]) for x in (places, labels, used, banned))
    arrays: Any = (tokens[None], segments[None], positions[None], *listed)
    return Batch(*arrays)


def parts(case: Case) -> tuple[dict[str, Any], Frozen]:
    """(what is trained, what is not), on the host."""
    trained, below = weights(case.student, 1), None
    if case.student.lora is not None:
        trained, below = lora.split(trained)
    objective = OBJECTIVES[case.objective]
    plain = dataclasses.replace(case.student, lora=None)
    return trained, Frozen(
        weights(case.teacher, 2) if objective.needs_teacher else None,
        weights(plain, 3) if objective.logit_filter == "anchor" else None,
        below,
    )


@functools.cache
def alone(objective: str, student: ModelConfig, teacher: ModelConfig) -> tuple[float, Any]:
    """(loss, gradient) on one device, in float64 for what follows: a plain derivative of the loss, no step, no mesh."""
    trained, frozen = parts(Case((1, 1, 1), objective=objective, student=student, teacher=teacher))

    def loss(params: Any, frozen: Frozen, batch: Batch) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(SEED), 0) if has_dropout(student) else None
        return mean_loss(OBJECTIVES[objective], student, teacher, params, frozen, batch, key)

    arguments = (trained, frozen, packed())
    value, gradient = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(COMPILER)(*arguments)
    return float(value), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)


def placed(case: Case) -> tuple[TrainState, Frozen, Batch]:
    """The arguments of a step where the layouts want them, as the training loop places them."""
    trained, frozen = parts(case)
    student, teacher = case.layouts
    transformation = make_optimizer(OPTIMIZER, 10)
    moments = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(transformation.init, trained))
    state = TrainState(trained, moments, np.zeros((), np.int32))  # type: ignore[arg-type]
    if student is None or teacher is None:
        return jax.device_put((state, frozen, packed()))
    state = jax.device_put(state, state_shardings(transformation, state, student))
    frozen = Frozen(
        axes.place(frozen.teacher, case.teacher, teacher),
        axes.place(frozen.base, case.student, student),
        axes.place(frozen.student, case.student, student),
    )
    return state, frozen, place_batch(packed(), case.layouts)


@functools.cache
def program(case: Case) -> jax.stages.Compiled:
    """The compiled step of the library, for arguments that lie as `placed` puts them."""
    teacher = case.teacher if case.objective != "hard" else None
    seed = SEED if has_dropout(case.student) else 0
    step: Any = compiled_step(OBJECTIVES[case.objective], case.student, teacher, OPTIMIZER, 10, seed, case.layouts)
    return step.lower(*placed(case)).compile(COMPILER)


def text_of(case: Case) -> str:
    """The program after all of XLA's passes, as one device runs it."""
    text = program(case).as_text()
    assert text
    return text


class Done(NamedTuple):
    """What a step left behind, and the frozen parameters that it was given."""

    state: TrainState
    metrics: dict[str, float]
    frozen: Frozen


@functools.cache
def stepped(case: Case) -> Done:
    """One step. It is waited for: steps that overlap on CPU devices can starve each other's collectives."""
    state, frozen, batch = placed(case)
    after, metrics = jax.block_until_ready(program(case)(state, frozen, batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # donated: a step needs no second copy
    return Done(after, {name: float(value) for name, value in metrics.items()}, frozen)


def first_moment(state: TrainState) -> Any:
    """Adam's first moment, as numpy; after one step it is (1 - b1) times the clipped gradient."""
    (mu,) = (
        node.mu for node in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(node, "mu")
    )
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mu)


def clipped(gradient: Any) -> Any:
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda leaf: leaf * min(1.0, OPTIMIZER.clip_norm / norm), gradient)


def updated(params: Any, gradient: Any) -> Any:
    """AdamW's first step spelled out in numpy: both bias corrections cancel, matrices of layers decay."""

    def leaf(before: np.ndarray, g: np.ndarray) -> np.ndarray:
        decay = OPTIMIZER.weight_decay * before if before.ndim > 2 else 0.0
        return before - OPTIMIZER.learning_rate * (g / (np.abs(g) + 1e-8) + decay)

    return jax.tree.map(leaf, params, clipped(gradient))


def distance(found: Any, expected: Any) -> float:
    """Relative L2 distance of two trees of the same structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    a, b = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- What a compiled program says -------------------------------------------------------------------------------------

_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    r"|ragged-all-to-all)(-start)?\("
)
_SHAPE = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\d,]*)\]")
# Each device by itself: the look-up of the embedding writes its collectives down for axes of one device too.
_NOBODY_ELSE = re.compile(r"replica_groups=\{\{\d+\}(,\{\d+\})*\}")


class Collective(NamedTuple):
    """One collective operation: what kind, and the shapes of its results on one device."""

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The element type and the dimensions of every array that is written down in a program, or in a part of it."""
    return [
        (found["dtype"], tuple(map(int, filter(None, found["sizes"].split(","))))) for found in _SHAPE.finditer(text)
    ]


def collectives(text: str) -> list[Collective]:
    """Every collective of a program between at least two devices; one inside a loop counts once."""
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match and not _NOBODY_ELSE.search(line):
            results = shapes(match["result"])
            found.append(Collective(match["kind"], results[0][0], tuple(shape for _, shape in results)))
    return found


def sizes(text: str) -> set[int]:
    """Every size of every dimension of every array in a program."""
    lines = (line.split(", metadata=")[0] for line in text.splitlines())
    return {size for line in lines for _, shape in shapes(line) for size in shape}


def matrices(config: ModelConfig, tensor: int) -> Mapping[str, tuple[int, int]]:
    """What one device computes with of each matrix, by hand: all of d_model, a part of the other dimension."""
    d, query = config.d_model, config.num_heads * config.head_dim // tensor
    kv, ff = config.num_kv_heads * config.head_dim // tensor, config.d_ff // tensor
    return {
        "q": (d, query), "k": (d, kv), "v": (d, kv), "o": (query, d), "gate": (d, ff), "up": (d, ff), "down": (ff, d),
        "head": (d, config.vocab_size // tensor),
    }  # fmt: skip
