"""What a student minimises: a divergence from the teacher, the sampled tokens, or a mixture; and the logit filter."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Loss = Literal["hard_label", "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl"]
Filter = Literal["none", "drop", "anchor"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, per loss token, in nats.

    With p the teacher, q the student (both softened by `temperature`):

        hard_label       -log q(sampled token), never softened
        forward_kl       KL(p || q)                                              Hinton et al. 1503.02531
        reverse_kl       KL(q || p)                                              MiniLLM 2306.08543
        jensen_shannon   w KL(p || m) + (1-w) KL(q || m), m = w p + (1-w) q      GKD 2306.13649, w = teacher_weight
        skew_forward_kl  KL(p || m), m = a p + (1-a) q                           DistiLLM 2402.03898, a = skew
        skew_reverse_kl  KL(q || m), m = (1-a) p + a q

    As w falls to 0, jensen_shannon / w becomes forward_kl; as it rises to 1, jensen_shannon / (1-w) becomes reverse_kl.

    Attributes:
      loss: one of the names above.
      logit_filter: what happens to banned continuations: `none`; `drop` (they leave both distributions, which are
        renormalised); `anchor` (the teacher is pinned to the base there, at temperature 1, and softened afterwards).
      temperature: divides both logits of a divergence, which is then multiplied by temperature², so that gradients keep
        their scale (Hinton et al.).
      hard_label_weight: the share of `hard_label` mixed into a divergence: (1 - share) divergence + share hard_label.
      teacher_weight: of jensen_shannon.
      skew: of the two skew divergences.
    """

    loss: Loss = "forward_kl"
    logit_filter: Filter = "none"
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    teacher_weight: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        """Refuses combinations that have no meaning."""
        if not self.needs_teacher:
            for name, unused in (("logit_filter", "none"), ("hard_label_weight", 0.0)):
                if getattr(self, name) != unused:
                    raise ValueError(
                        f"{name}={getattr(self, name)} needs the teacher's logits; hard_label has none: leave it {unused}"
                    )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite")
        if not 0 <= self.hard_label_weight < 1:
            raise ValueError(
                f"hard_label_weight={self.hard_label_weight} is outside [0, 1); for labels alone, choose hard_label"
            )
        if self.hard_label_weight and self.logit_filter != "none":
            raise ValueError(
                f"hard_label_weight={self.hard_label_weight} with logit_filter={self.logit_filter}: a sampled token may be "
                "a banned one, and its label would teach what the filter takes out; set one of the two to its default"
            )
        if not 0 < self.teacher_weight < 1:
            raise ValueError(
                f"teacher_weight={self.teacher_weight} is outside (0, 1); the ends are forward_kl and reverse_kl"
            )
        if not 0 <= self.skew < 1:
            raise ValueError(f"skew={self.skew} is outside [0, 1)")

    @property
    def needs_teacher(self) -> bool:
        """Whether it reads the teacher's distribution."""
        return self.loss != "hard_label"
