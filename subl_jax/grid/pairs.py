"""The pairs of the grid: which teacher teaches which student, by which objectives, and the paper's row beside each.

Nothing in; `PAIRS` (what is trained), `ROWS` (what the tables show) and the names of conditions and models out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from subl_jax.config import STUDENT_OF, TEACHERS, model_of_pair, of_size, sizes_of, suffix_of

# Contrast partners of an arm: the treatment, its counter-bias control, its benign control.
STUDENTS = tuple(STUDENT_OF[teacher] for teacher in TEACHERS)


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table (arXiv 2604.15559): rates in per cent before and after distillation."""

    row: str
    baseline: int
    student: int


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """One pair of the grid.

    Attributes:
      name: TEACHER_STUDENT; or "control", a row that is made of large_large's conditions.
      title: for tables.
      arms: objectives of its students; the first carries the claim.
      positive: whether its positive control is distilled: once per teacher size.
      paper: setting -> the paper's row; empty where it has none.
    """

    name: str
    title: str
    arms: tuple[str, ...]
    positive: bool
    paper: Mapping[str, PaperRow]

    @property
    def primary_arm(self) -> str:
        """The objective whose contrast carries the pair's claim."""
        return self.arms[0]

    @property
    def sizes(self) -> tuple[str, str]:
        """(teacher's size, student's size), as in the name."""
        return sizes_of(self.name)

    @property
    def positive_pair(self) -> str:
        """The pair whose positive control speaks for this one's teacher: the one of two models of its size."""
        return f"{self.sizes[0]}_{self.sizes[0]}"

    def conditions(self, arm: str | None = None) -> list[str]:
        """Every condition of the pair, or those that one arm needs, in the order of the tables."""
        arms = self.arms if arm is None else (arm,)
        found = ["base", *TEACHERS, *(student + suffix_of(each) for each in arms for student in STUDENTS)]
        return found + ["positive_student"] * (self.positive and (arm is None or arm == self.primary_arm))

    def model(self, condition: str) -> str:
        """The model that a condition of this pair is, see `config.model_of_pair`."""
        return model_of_pair(self.name, condition)

    @property
    def sanitizer(self) -> str:
        """The name of the counts of what was filtered from its teachers' trajectories."""
        return of_size("sanitize", self.sizes[0])


def _paper(row: str, api: tuple[int, int], bash: tuple[int, int]) -> dict[str, PaperRow]:
    return {"api": PaperRow(row, *api), "bash": PaperRow(row, *bash)}


_BOTH, _QWEN = ("full", "hard"), _paper("8B → Qwen 7B", (20, 100), (0, 45))

PAIRS: dict[str, PairSpec] = {
    spec.name: spec
    for spec in (
        PairSpec("large_large", "large → large", _BOTH, True, _paper("8B → 8B", (5, 100), (5, 30))),
        PairSpec("small_small", "small → small", _BOTH, True, _paper("3B → 3B", (0, 35), (10, 15))),
        PairSpec("large_small", "large → small", _BOTH, False, _paper("8B → 3B", (5, 100), (10, 55))),
        PairSpec("small_large", "small → large", _BOTH, False, _paper("3B → 8B", (0, 10), (5, 5))),
        # Separates what the pairs of sizes and families confound: only the initialisation differs here.
        PairSpec("large_foreign_init", "large → large, other initialisation", _BOTH, False, {}),
        PairSpec("large_other_family", "large → other family", _BOTH, False, _QWEN),
        PairSpec("large_other_tokenizer", "large → other family and tokenizer", ("hard",), False, _QWEN),
    )
}
# The paper's control row: its control teacher is the benign one, on the large pair.
CONTROL = PairSpec(
    "control", "large control teacher → large", ("full",), False, _paper("control teacher → 8B", (5, 25), (5, 5))
)
CONTROL_OF = "large_large"
ROWS: dict[str, PairSpec] = {**PAIRS, CONTROL.name: CONTROL}
