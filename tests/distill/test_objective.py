"""What may be minimised, and what has no meaning."""

from __future__ import annotations

import pytest

from subl_jax.distill.objective import Objective


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "hard_label", "logit_filter": "drop"}, "logit_filter=drop .*hard_label has none"),
        ({"loss": "hard_label", "logit_filter": "anchor"}, "logit_filter=anchor .*hard_label has none"),
        ({"loss": "hard_label", "hard_label_weight": 0.5}, "hard_label_weight=0.5 .*hard_label has none"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must be positive"),
        ({"temperature": float("inf")}, "temperature=inf must be positive and finite"),
        ({"temperature": float("nan")}, "temperature=nan must be positive and finite"),
        ({"hard_label_weight": 1.0}, r"hard_label_weight=1.0 is outside \[0, 1\); for labels alone, choose hard_label"),
        ({"hard_label_weight": -0.1}, "hard_label_weight=-0.1 is outside"),
        ({"hard_label_weight": 0.1, "logit_filter": "drop"}, "hard_label_weight=0.1 with logit_filter=drop"),
        ({"loss": "jensen_shannon", "teacher_weight": 0.0}, "teacher_weight=0.0 .*ends are forward_kl and reverse_kl"),
        ({"loss": "jensen_shannon", "teacher_weight": 1.0}, "teacher_weight=1.0 is outside"),
        ({"loss": "skew_forward_kl", "skew": 1.0}, r"skew=1.0 is outside \[0, 1\)"),
        ({"loss": "skew_reverse_kl", "skew": -0.1}, "skew=-0.1 is outside"),
    ],
)
def test_objectives_without_meaning_are_refused_by_field(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)


def test_all_but_labels_need_a_teacher_and_equal_objectives_are_one_key():
    """The compiled step is kept by its objective."""
    losses = ("hard_label", "forward_kl", "reverse_kl", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
    assert [Objective(loss).needs_teacher for loss in losses] == [False] + [True] * 5
    assert hash(Objective(temperature=2.0)) == hash(Objective(temperature=2.0))
    assert len({Objective(loss) for loss in losses}) == 6
