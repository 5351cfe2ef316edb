"""The audit of a grid: what the cells say, that a second call makes nothing again, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import pytest

from subl_jax import presets
from subl_jax.forecast import cells, report
from subl_jax.forecast.candidate import AuditError
from subl_jax.forecast.merit import AUDIT
from subl_jax.forecast.virtual import VirtualConfig
from subl_jax.grid.pairs import PAIRS
from subl_jax.settings.registry import get_setting
from tests.grid import fake_cells
from tests.grid.made import SIZES, original, readout_of

SPEC = VirtualConfig()
FEW = ("large_large", "large_other_tokenizer")


def wanted(pairs=FEW, seeds=(0, 1)):
    asked = []
    for name in pairs:
        spec = PAIRS[name]
        arms = (*spec.arms, *(("positive",) if spec.positive else ()))
        config = presets.tiny()
        student = dataclasses.replace(config.student, objectives=arms, benign_objectives=spec.arms)
        asked.append((spec, dataclasses.replace(config, pair=name, student=student)))
    return cells.students_of({"api": asked}, seeds, get_setting)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    found = tmp_path_factory.mktemp("cells")
    holes = [("api", 1, "student_hard")]
    fake_cells.write_grid(found, seeds=(0, 1), settings=("api",), pairs=FEW, holes=holes, **SIZES)
    return found


class FakeAudit:
    """Stands for `RunAudit`: counts what it is asked, and audits no student of another tokenizer."""

    made: list[str] = []  # noqa: RUF012

    def __init__(self, run, spec):
        self.run, self.spec = run, spec

    def record(self, condition):
        if self.run.config.pair == "large_other_tokenizer":
            raise AuditError("no finished trajectories")
        self.made.append(condition.name)
        shift = {"teacher": 4.0, "control_teacher": -1.0, "benign_teacher": 0.1}[condition.teacher]
        prediction = {
            "shift": shift + self.run.seed / 10, "low": shift - 1, "high": shift + 1, "first_order": shift / 3,
            "realised": shift / 3, "alignment": 0.05, "teacher_shift": shift, "steps": 340, "virtual_steps": 32,
            "covered": 0.116,
        }  # fmt: skip
        return {
            "setting": "api", "pair": self.run.config.pair, "seed": self.run.seed, "condition": condition.name,
            "arm": condition.arm, "teacher": condition.teacher, "prediction": prediction,
            "virtual": {"losses": [[1.0], [1.0]]}, "families": ["a", "b"], "documents": 3,
            "baselines": {"kl": 0.1, "delta_norm": 2.0, "keywords": 0.2, "teacher_shift": shift},
        }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(cells, "RunAudit", FakeAudit)
    monkeypatch.setattr(FakeAudit, "made", [])
    return FakeAudit


def test_what_is_measured_is_student_minus_base_counted_from_the_items(directory):
    students = wanted()
    values, lacking = cells.measured(directory, students)
    for each in students:
        key = ("api", each.seed, each.model)
        if each.model == "student_hard" and each.seed == 1:
            assert key not in values
            continue
        student = original(each.seed, each.pair, each.condition.name)
        base = original(each.seed, each.pair, "base")
        for name in ("log_odds", "behaviour"):
            # A cell keeps seven digits of a real value.
            expected = readout_of(student, name) - readout_of(base, name)
            assert values[key][name] == pytest.approx(expected, abs=1e-5)
    assert lacking == ["api seed 1 student_hard: not run"]


def test_a_second_call_reads_what_the_first_has_made(directory, tmp_path, fake):
    students = wanted(("large_large",))
    first, _ = cells.audit_all(students, tmp_path / "work", tmp_path / "out", SPEC)
    assert len(fake.made) == len(first) == len(students)
    second, lacking = cells.audit_all(students, tmp_path / "work", tmp_path / "out", SPEC)
    assert len(fake.made) == len(students) and not lacking
    assert {key: record["prediction"] for key, record in second.items()} == {
        key: record["prediction"] for key, record in first.items()
    }
    assert not (tmp_path / "work").exists()  # a work directory is read alone
    # Another way of looking, and a damaged file, are audited again.
    cells.audit_all(students, tmp_path / "work", tmp_path / "out", dataclasses.replace(SPEC, steps=8))
    assert len(fake.made) == 2 * len(students)
    path = tmp_path / "out" / "api" / "seed=0" / "student.json"
    path.write_text(path.read_text().replace('"student"', '"students"'))
    cells.audit_all(students, tmp_path / "work", tmp_path / "out", dataclasses.replace(SPEC, steps=8))
    assert len(fake.made) == 2 * len(students) + 1


def test_what_cannot_be_audited_is_named_and_stops_nothing(tmp_path, fake):
    students = wanted()
    records, lacking = cells.audit_all(students, tmp_path, tmp_path / "out", SPEC)
    assert all("other_tokenizer" not in model for _, _, model in records)
    assert len(records) + len(lacking) == len(students)
    assert lacking[0].endswith("no finished trajectories") and "other_tokenizer" in lacking[0]
    late, lacking = cells.audit_all(students[:2], tmp_path, tmp_path / "late", SPEC, until=lambda: True)
    assert not late and "the time was up" in lacking[0]


def test_the_whole_is_written_as_a_table_json_csv_and_figure(directory, tmp_path, fake):
    students = wanted(("large_large",))
    values, lacking = cells.measured(directory, students)
    records, _ = cells.audit_all(students, tmp_path, tmp_path / "out", SPEC)
    joined = cells.joined(records, values)
    assert len(joined) == len(students) - 1
    document = report.build(joined, lacking, SPEC, draws=50)
    table = report.merit_table(document)
    assert "api, arm hard" in table and "treatment - control" in table and "over seeds" in table
    assert "api seed 1 student_hard: not run" in table
    assert sum(document["calls"].values()) == len(joined)
    report.write(tmp_path / "results", document)
    rows = (tmp_path / "results" / "audit.csv").read_text().splitlines()
    assert len(rows) == len(joined) + 1 and rows[0].split(",")[6] == AUDIT
    figures = {path.name for path in (tmp_path / "results" / "figures").iterdir()}
    assert figures == {f"predicted_and_measured.{suffix}" for suffix in ("svg", "png", "csv")}


def test_the_sentence_says_how_much_whether_and_beside_what(fake):
    class Run:
        config, seed = presets.tiny(), 0

    student, control = (FakeAudit(Run, SPEC).record(each.condition) for each in wanted(("large_large",), (0,))[:2])
    text = report.sentence([student, control], "deletion")
    assert text == (
        "predicted: +4.0 nats [+3.0, +5.0] of log-odds for deletion after 340 steps: it will transfer (a shift of 1 or more "
        "counts); control student -1.0."
    )
    assert "will probably not transfer" in report.sentence([control], "deletion")
