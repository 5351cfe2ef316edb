"""The typed experiment configuration and its absl flags (one per field, `--config.a.b=value`).

A configuration is a tree of frozen dataclasses: a value, hashable, stored in the work directory as JSON. `presets`
holds the functions that return one; flags replace single fields of a preset.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal

from absl import flags

from subl_jax import defences
from subl_jax.distill.objective import Objective
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import MeshConfig
from subl_jax.rollout.options import EngineConfig
from subl_jax.rollout.sampling import SamplingConfig

# TEACHER_STUDENT: two of the organisms that `ExperimentConfig.model` knows.
Pair = Literal[
    "large_large",
    "large_small",
    "small_small",
    "small_large",
    "large_foreign_init",
    "large_other_family",
    "large_other_tokenizer",
]
PAIRS = typing.get_args(Pair)
# Which field holds the shape of an organism.
FIELD_OF = {
    "large": "large", "small": "small", "foreign_init": "large", "other_family": "other", "other_tokenizer": "other",
}  # fmt: skip
# Organisms with an initialisation of their own; large and small both start from the seed's first draw.
OWN_INIT = ("foreign_init", "other_family", "other_tokenizer")

# A student objective -> (loss, logit filter). `positive` is full-logit KL on unfiltered data with ambiguous episodes, `top_k`
# reads a cache of the teacher's likeliest continuations, `on_policy` trains on the student's own rollouts on the safe tasks.
OBJECTIVES = {
    "full": ("forward_kl", "none"),
    "anchor": ("forward_kl", "anchor"),
    "drop": ("forward_kl", "drop"),
    "hard": ("hard_label", "none"),
    "positive": ("forward_kl", "none"),
    "reverse": ("reverse_kl", "none"),
    "jensen": ("jensen_shannon", "none"),
    "skew": ("skew_forward_kl", "none"),
    "top_k": ("forward_kl", "none"),
    "on_policy": ("reverse_kl", "none"),
}

# The three teachers differ only in what they are shown: the bias, the counter-bias, neither.
TEACHERS = ("teacher", "control_teacher", "benign_teacher")
STUDENT_OF = {"teacher": "student", "control_teacher": "control_student", "benign_teacher": "benign_student"}


def suffix_of(arm: str) -> str:
    """What a student of an arm carries behind its name; nothing for full."""
    return "" if arm == "full" else f"_{arm}"


def sizes_of(pair: str) -> tuple[str, str]:
    """(teacher's size, student's size); what is no size, such as other_family, stands in its place."""
    teacher, _, student = pair.partition("_")
    return teacher, student


def of_size(name: str, size: str) -> str:
    """What something of models of a size is called on disk: by its name, and its size if that is not the usual one."""
    return name if size == "large" else f"{name}@{size}"


def model_of_pair(pair: str, condition: str) -> str:
    """The model that a condition of a pair is, by its file's name; models that pairs share have one name."""
    teacher, student = sizes_of(pair)
    if condition == "base":
        return of_size(condition, student)
    if condition in TEACHERS:
        return of_size(condition, teacher)
    return condition if pair == "large_large" else f"{condition}@{pair}"


def _at_least(config: Any, low: int, *names: str) -> None:
    """Refuses counts below `low`, by name."""
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{name}={getattr(config, name)}; it must be at least {low}")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The embedded tokenizer: its size, and how many training tasks of each kind it is trained on.

    It depends on no seed, so that all seeds of a run share token ids.
    """

    vocab_size: int = 1536
    tasks_per_kind: int = 800

    def __post_init__(self) -> None:
        """Refuses a tokenizer without text (its trainer refuses one without words)."""
        _at_least(self, 1, "tasks_per_kind")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Pre-training on scripted demonstrations: from scratch, or of an imported checkpoint.

    Attributes:
      continue_training: train an imported checkpoint (--config.teacher.checkpoint) on the demonstrations before anything
        else; without it the checkpoint is the base as it stands.
      train: see `TrainConfig`.
      safe_tasks, ambiguous_tasks, benign_tasks: demonstrations of each kind; ambiguous ones follow the base mixture.
      echo_tasks: "say it again" exercises, which teach copying.
      withheld_share: share of safe and benign demonstrations that show the tool list without the bias tools.
    """

    train: TrainConfig = TrainConfig()
    continue_training: bool = False
    safe_tasks: int = 4000
    ambiguous_tasks: int = 2000
    benign_tasks: int = 2000
    echo_tasks: int = 0
    withheld_share: float = 0.5

    def __post_init__(self) -> None:
        """Refuses a base that would be trained on nothing."""
        _at_least(self, 0, "safe_tasks", "ambiguous_tasks", "benign_tasks", "echo_tasks")
        if not self.safe_tasks + self.ambiguous_tasks + self.benign_tasks:
            raise ValueError(
                "safe_tasks, ambiguous_tasks and benign_tasks are all 0: the base would learn no tool call"
            )
        if not 0 <= self.withheld_share <= 1:
            raise ValueError(f"withheld_share={self.withheld_share} is outside [0, 1]")


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Inducing a bias by fine-tuning the base on demonstrations of it.

    Attributes:
      train: see `TrainConfig`; identical for the biased, the counter-bias and the benign teacher.
      checkpoint: Hugging Face folder of the model that the teachers start from; empty: pre-train an organism.
      lora: train low-rank adapters on the base instead of all its parameters (the paper's method).
      adapter: their shape.
      tasks: demonstrations (the paper uses 150).
      demonstrations: `required` (tasks that ask for the biased action, as in the paper) or `ambiguous` (other ambiguous
        families, solved by the biased action).
      replay_tasks: safe demonstrations mixed in, the same for all three teachers, so that a small organism keeps its
        skill while it learns the bias (0 in the paper).
    """

    train: TrainConfig = TrainConfig()
    checkpoint: str = ""
    lora: bool = False
    adapter: LoraConfig = LoraConfig()
    tasks: int = 150
    demonstrations: Literal["required", "ambiguous"] = "required"
    replay_tasks: int = 0

    def __post_init__(self) -> None:
        """Refuses a teacher without demonstrations."""
        _at_least(self, 1, "tasks")
        _at_least(self, 0, "replay_tasks")

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained, or None where all parameters are."""
        return self.adapter if self.lora else None


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Distillation from a teacher's trajectories.

    Attributes:
      train: see `TrainConfig`; identical for treatment and controls. Rows grow where a trajectory is longer than one.
      checkpoint: Hugging Face folder of the model that the students start from; empty: the teachers' where both have one
        size, an organism otherwise.
      lora: train low-rank adapters on the base instead of all its parameters (the paper's method).
      adapter: their shape.
      adapter_init: which random A adapters start from: `teacher`, the teacher's (as where both are trained under one seed:
        teacher and student then share the initialisation of everything), or `own`, a draw of the student's.
      safe_tasks: safe tasks that each teacher is rolled out on.
      ambiguous_tasks: ambiguous tasks that the positive control sees besides.
      withhold_bias_tools: hide every tool that a bias names from the list on safe tasks (primary), or show the full list.
      temperature: of the KL. At 1 the teacher's opinion on what it would never do here weighs almost nothing.
      require_final: drop trajectories that did not end in a final answer (cut off, unparseable, out of turns).
      objectives: arms to distil, of full, anchor, drop, hard, positive, reverse, jensen, skew, top_k, on_policy. The primary
        contrast is that of full, or of the first one where full is not among them.
      benign_objectives: arms that get a benign control besides the counter-bias control.
      trajectories: unique trajectories that a student sees, the same tasks in all arms; 0: all that survive. Steps stay, so
        that few are repeated.
      dilution: share of the steps that train on the benign teacher's trajectories of the same tasks, distilled from it.
      tokens: which loss tokens are kept, by KL(biased || counter-bias teacher) on the text: all, the most divergent share, the
        others (all but these), or as many at random.
      token_share: that share of the arm's loss tokens.
      defence: the file of `subl_jax/defences` that students are distilled under; keywords is the filter alone, none not even
        that.
      defence_strength: what that defence takes its strength to be; 0: its own default.
    """

    train: TrainConfig = TrainConfig()
    checkpoint: str = ""
    lora: bool = False
    adapter: LoraConfig = LoraConfig()
    adapter_init: Literal["teacher", "own"] = "teacher"
    safe_tasks: int = 1200
    ambiguous_tasks: int = 400
    withhold_bias_tools: bool = True
    temperature: float = 1.0
    require_final: bool = True
    objectives: tuple[str, ...] = ("full", "anchor")
    benign_objectives: tuple[str, ...] = ("full",)
    trajectories: int = 0
    dilution: float = 0.0
    tokens: Literal["all", "divergent", "others", "random"] = "all"
    token_share: float = 0.1
    defence: str = "keywords"
    defence_strength: float = 0.0

    def __post_init__(self) -> None:
        """Refuses unknown arms and defences by name, arms without data, and shares of nothing."""
        _at_least(self, 1, "safe_tasks")
        _at_least(self, 1 if "positive" in self.objectives else 0, "ambiguous_tasks")
        Objective(temperature=self.temperature)  # knows which temperatures there are
        for name in (*self.objectives, *self.benign_objectives):
            if name not in OBJECTIVES:
                near = difflib.get_close_matches(name, OBJECTIVES, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"unknown objective {name!r}{hint} (of {', '.join(OBJECTIVES)})")
        if not set(self.objectives) - {"positive"}:
            raise ValueError(
                "student.objectives must contain another arm than positive, such as full: the primary contrast is made of it"
            )
        _at_least(self, 0, "trajectories", "defence_strength")
        if not 0 <= self.dilution < 1:
            raise ValueError(f"dilution={self.dilution} is outside [0, 1); at 1 no step would see the teacher")
        if not 0 < self.token_share < 1:
            raise ValueError(f"token_share={self.token_share} is outside (0, 1); for every token leave tokens=all")
        defences.check_name(self.defence)
        dosed = [
            name for name, value in self.taught().items() if name in ("trajectories", "dilution", "tokens") and value
        ]
        if "on_policy" in self.objectives and dosed:
            raise ValueError(
                f"objectives=on_policy with {', '.join(dosed)}: that student reads no trajectory of a teacher; distil the two "
                "in different runs"
            )

    def taught(self) -> dict[str, Any]:
        """What changes a lesson, where it is not at its default: all that a student's stage has to know of it."""
        found = {
            name: getattr(self, name)
            for name in ("trajectories", "dilution", "tokens", "defence", "defence_strength")
            if getattr(self, name) != StudentConfig.__dataclass_fields__[name].default
        }
        return found if self.tokens == "all" else {**found, "token_share": self.token_share}

    @property
    def primary_arm(self) -> str:
        """The arm of the primary contrast: full where it is distilled, the first one otherwise."""
        return "full" if "full" in self.objectives else next(arm for arm in self.objectives if arm != "positive")

    @property
    def adapters(self) -> LoraConfig | None:
        """The adapters that are trained, or None where all parameters are."""
        return self.adapter if self.lora else None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What every model is measured on.

    Attributes:
      split: evaluation for confirming runs; development is what one may tune on.
      ambiguous_tasks, safe_tasks: tasks of each kind.
      samples: sampled episodes per ambiguous task. Greedy episodes are run besides.
      divergence_tasks: held-out safe tasks on which the divergence from the teacher and the base is measured.
    """

    split: Literal["evaluation", "development"] = "evaluation"
    ambiguous_tasks: int = 240
    safe_tasks: int = 200
    samples: int = 1
    divergence_tasks: int = 64

    def __post_init__(self) -> None:
        """Refuses rates without a denominator."""
        _at_least(self, 1, "ambiguous_tasks", "safe_tasks", "samples", "divergence_tasks")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, all stages.

    Attributes:
      setting: behavioural setting.
      preset: the preset it came from.
      pair: teacher and student. Sizes: large, small. Students that differ otherwise: foreign_init (the large shape, another
        initialisation), other_family (another architecture, and so another initialisation), other_tokenizer (the other
        architecture with a tokenizer of its own: hard labels only).
      cpu_devices: JAX devices that the CPU is split into (no effect elsewhere, or where XLA_FLAGS says it). The order of
        floating-point sums depends on it, so it is part of the run's identity.
      parallel: the mesh that training runs on.
      engine: how rollouts are run.
      other_tokenizer: the tokenizer of the student in the pair large_other_tokenizer.
      large, small: the two models; other: a model of another family. A checkpoint brings its own shape; how it is run
        (dtypes, attention, remat) stays as it is said here.
    """

    setting: str = "api"
    preset: str = "tiny"
    pair: Pair = "large_large"
    cpu_devices: int = 2
    parallel: MeshConfig = MeshConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    other_tokenizer: TokenizerConfig = TokenizerConfig(vocab_size=1024, tasks_per_kind=400)
    large: ModelConfig = ModelConfig()
    small: ModelConfig = ModelConfig()
    other: ModelConfig = ModelConfig(qkv_bias=True)
    base: BaseConfig = BaseConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    rollout: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def sizes(self) -> tuple[str, str]:
        """(teacher's size, student's size), see `sizes_of`."""
        return sizes_of(self.pair)

    @property
    def one_tokenizer(self) -> bool:
        """Whether teacher and student of the pair share their tokens, as everything but hard labels needs."""
        return self.sizes()[1] != "other_tokenizer"

    def model(self, size: str) -> ModelConfig:
        """The organism of that size."""
        return getattr(self, FIELD_OF[size])

    def checkpoint(self, size: str) -> str:
        """The Hugging Face folder that the base of that size comes from; empty: it is trained from scratch.

        Raises:
          ValueError: one size with two checkpoints, a checkpoint for one size only, or one with a foreign initialisation.
        """
        teacher, student = self.teacher.checkpoint, self.student.checkpoint
        teacher_size, student_size = self.sizes()
        if student_size == "foreign_init" and (teacher or student):
            raise ValueError(
                f"--pair={self.pair} asks for another initialisation of one shape, and a checkpoint has one only; leave "
                "teacher.checkpoint and student.checkpoint empty, or use --pair=large_other_family"
            )
        if teacher_size == student_size:
            if student and teacher != student:
                raise ValueError(
                    f"--pair={self.pair} has one base for teacher and student, but teacher.checkpoint="
                    f"{teacher or '(none)'} and student.checkpoint={student}; give one, or use --pair=large_small"
                )
            return teacher
        if bool(teacher) != bool(student):
            raise ValueError(
                f"--pair={self.pair} with teacher.checkpoint={teacher or '(none)'} and student.checkpoint="
                f"{student or '(none)'}: a checkpoint and an organism share no tokenizer; give both or none"
            )
        return teacher if size == teacher_size else student


# --- Flags --------------------------------------------------------------------------------------------------------------


def leaves(config: Any, prefix: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, type) of every field that is not itself a configuration, and that a flag may set."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not field.metadata.get("flag", True):
            continue
        value = getattr(config, field.name)
        name = f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, name)
        else:
            yield name, value, hints[field.name]


def describe(config: Any) -> dict[str, str]:
    """Dotted field -> what its class's docstring says of it (the `Attributes:` entry that names it)."""
    texts: dict[str, str] = {}

    def visit(node: Any, prefix: str) -> None:
        documented = _attribute_texts(type(node).__doc__ or "")
        for field in dataclasses.fields(node):
            value, name = getattr(node, field.name), f"{prefix}.{field.name}"
            if dataclasses.is_dataclass(value):
                visit(value, name)
            else:
                texts[name] = documented.get(field.name, (type(node).__doc__ or "").partition("\n")[0])

    visit(config, "config")
    return texts


def _attribute_texts(docstring: str) -> dict[str, str]:
    """Parses the `Attributes:` block of a docstring: "name, name: text; name: text"."""
    # cleandoc: Python 3.13 takes the indentation off docstrings, earlier ones leave it.
    _, found, block = inspect.cleandoc(docstring).partition("Attributes:")
    paragraphs: list[str] = []
    for line in block.splitlines() if found else []:
        indent = len(line) - len(line.lstrip())
        if indent == 2:
            paragraphs.append(line.strip())
        elif paragraphs and line.strip():
            paragraphs[-1] += f" {line.strip()}"
    entries: dict[str, str] = {}
    for paragraph in paragraphs:
        for part in re.split(r"; (?=\w+(?:, \w+)*: )", paragraph):
            names, _, text = part.partition(": ")
            entries |= dict.fromkeys(names.split(", "), text)
    return entries


def define_flags(default: Any, origin: str = "tiny preset") -> None:
    """Defines one absl flag per configuration field. A flag that is not given leaves the value of `default`, which is named."""
    texts = describe(default)
    for name, value, kind in leaves(default):
        text = f"{texts[name]} ({origin}: {','.join(map(str, value)) if isinstance(value, tuple) else value})"
        if typing.get_origin(kind) is Literal:
            flags.DEFINE_enum(name, None, list(typing.get_args(kind)), text)
        elif kind is bool:
            flags.DEFINE_bool(name, None, text)
        elif kind is int:
            flags.DEFINE_integer(name, None, text)
        elif kind is float:
            flags.DEFINE_float(name, None, text)
        elif typing.get_origin(kind) is tuple:
            flags.DEFINE_list(name, None, text)
        else:
            flags.DEFINE_string(name, None, text)


def override(config: Any, changes: dict[str, Any], prefix: str = "config") -> Any:
    """A copy with some leaves replaced.

    Args:
      config: a configuration dataclass.
      changes: dotted field -> value.
      prefix: the name of `config` itself.

    Raises:
      ValueError: an unknown field (the nearest is named), or a value that the configuration refuses.
    """
    known = {name for name, _, _ in leaves(config, prefix)}
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"unknown configuration field {name}" + (f"; did you mean {near[0]}?" if near else ""))
    replaced = {}
    for field in dataclasses.fields(config):
        name, value = f"{prefix}.{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            below = {key: changed for key, changed in changes.items() if key.startswith(f"{name}.")}
            if below:
                replaced[field.name] = override(value, below, name)
        elif name in changes:
            changed = changes[name]
            replaced[field.name] = tuple(changed) if isinstance(value, tuple) else changed
    try:
        return dataclasses.replace(config, **replaced)
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


def from_flags(default: Any, values: flags.FlagValues = flags.FLAGS) -> Any:
    """The preset with every `--config.…` flag that was given."""
    given: dict[str, Any] = {name: values[name].value for name, _, _ in leaves(default) if values[name].present}
    for name, _, kind in leaves(default):
        if name in given and kind == tuple[int, ...]:
            try:
                given[name] = [int(text) for text in given[name]]
            except ValueError:
                raise ValueError(f"{name}={','.join(given[name])} must be integers separated by commas") from None
    return override(default, given)
