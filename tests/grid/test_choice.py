"""Which pairs a grid has where it starts from checkpoints, and which it leaves out with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from absl import flags

from subl_jax import presets
from subl_jax.evaluate import power
from subl_jax.grid import choice, command
from subl_jax.grid.pairs import PAIRS
from tests.distillation import folders
from tests.grid.fake_cells import fake_protocol


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three models: two of one tokenizer, and one of another."""
    where = tmp_path_factory.mktemp("models")
    return {
        "large": folders.model(where / "large", padding=0, width=16),
        "small": folders.model(where / "small", padding=4, width=8),
        "other": folders.model(where / "other", padding=0, width=16, known=280),
    }


def chosen(monkeypatch: pytest.MonkeyPatch, *given: str) -> tuple[dict[str, list[str]], list[str]]:
    """The pairs of a grid of the paper preset with these flags, and what is left out."""
    values = flags.FlagValues()
    flags.DEFINE_list("settings", ["api"], "", flag_values=values)
    flags.DEFINE_list("pairs", list(PAIRS), "", flag_values=values)
    for size in ("large", "small", "other"):
        flags.DEFINE_string(f"{size}_checkpoint", "", "", flag_values=values)
    values(["grid", *given])
    monkeypatch.setattr(flags, "FLAGS", values)
    pairs = choice.pairs_from_flags()
    left, left_out = choice.allowed_by_checkpoints({name: presets.paper(name) for name in pairs}, pairs)
    return {setting: [spec.name for spec in specs] for setting, specs in left.items()}, left_out


def test_by_default_the_pairs_are_those_that_the_checkpoints_allow(monkeypatch, models):
    left, told = chosen(monkeypatch, f"--large_checkpoint={models['large']}", f"--small_checkpoint={models['small']}")
    assert left == {"api": ["large_large", "small_small", "large_small", "small_large"]}
    assert [line.partition(" is left out: ")[::2] for line in told] == [
        ("large_foreign_init", "it asks for another initialisation of one shape, and a checkpoint has one only."),
        ("large_other_family", "--other_checkpoint is not given."),
        ("large_other_tokenizer", "--other_checkpoint is not given."),
    ]


@pytest.mark.parametrize(
    ("other", "left", "why"),
    [
        ("other", "large_other_tokenizer", "have different tokenizers: id "),
        ("small", "large_other_family", "its student has the teacher's tokenizer; that is large_other_family"),
    ],
)
def test_the_tokenizer_of_the_other_family_says_which_pair_it_is(monkeypatch, models, other, left, why):
    found, told = chosen(monkeypatch, f"--large_checkpoint={models['large']}", f"--other_checkpoint={models[other]}")
    assert found == {"api": ["large_large", left]}
    assert sum(why in line for line in told) == 1
    assert sum("--small_checkpoint is not given" in line for line in told) == 3


def test_a_pair_that_is_asked_for_by_name_is_never_left_out_in_silence(monkeypatch, models):
    large = f"--large_checkpoint={models['large']}"
    assert chosen(monkeypatch, large, "--pairs=large_large") == ({"api": ["large_large"]}, [])
    with pytest.raises(
        ValueError, match="--pairs names large_small, which cannot be run: --small_checkpoint is not given"
    ):
        chosen(monkeypatch, large, "--pairs=large_large,large_small")
    with pytest.raises(ValueError, match="--large_checkpoint names none"):
        chosen(monkeypatch)


# --- What is announced ------------------------------------------------------------------------------------------------


def test_the_power_of_nulls_is_announced_at_the_margin_of_the_protocol():
    protocol = fake_protocol(seeds=(0, 1, 2, 3, 4))
    wide = {
        place: dataclasses.replace(own, targets=dataclasses.replace(own.targets, control_margin=0.15))
        if place[0] == "bash"
        else own
        for place, own in protocol.protocols.items()
    }
    text = "\n".join(command._announcement({}, [], dataclasses.replace(protocol, protocols=wide)))
    for setting, margin in (("api", 0.08), ("bash", 0.15)):
        (row,) = [line for line in text.splitlines() if line.startswith(f"{setting}, earlier runs")]
        sd = command.ASSUMED_SPREAD[setting]
        assert row.split()[-1] == f"{power.equivalence_power(margin, sd, 5, alpha=0.025):.2f}"
        assert f"equal within ±{100 * margin:g} at 0.025" in text
    assert text.count("Power with 5 seeds") == 2
