"""The grid's page: the paper beside ours, what the tables say is what the document holds, holes and invalid rows are told."""

from __future__ import annotations

import re

import pytest

from subl_jax.grid.pairs import PAIRS
from subl_jax.report import grid, page, panels, table
from tests.grid.fake_cells import fake_document
from tests.report.parsed import parsed

EVIL = "<img src=x onerror=alert(1)>"


def spoken(text: str) -> str:
    """Text with the line breaks and spaces that cannot be seen removed."""
    return re.sub(r"\s+", " ", text.replace("\u00a0", " "))


@pytest.fixture
def shown(document, episodes):
    return parsed(grid.render(document, episodes, {"api": {"learning_rate": 3e-4}}))


def line(document, setting: str, pair: str, arm: str):
    """The primary contrast."""
    wanted = {"setting": setting, "pair": pair, "arm": arm, "role": "primary"}
    (found,) = [each for each in document["contrasts"] if wanted.items() <= each.items()]
    return found


def test_the_page_loads_nothing_and_runs_only_the_browser_of_episodes(shown, document):
    shown.is_self_contained()
    assert shown.scripts == [page.browser_script()]
    without = parsed(grid.render(document))
    without.is_self_contained()
    assert without.scripts == [] and without.text.count("No episodes were kept") == 2


def test_the_answers_and_the_paper_s_table_come_first(shown, document):
    text = shown.text
    for setting in ("api", "bash"):
        assert text.index(grid.answer(document, setting)) < text.index("API: the paper's table beside ours")
    assert text.index("Bash: the paper's table beside ours") < text.index(
        "Every pair: base, teachers, controls and students"
    )


def test_a_row_of_the_table_holds_the_paper_s_figures_and_ours(document):
    row = next(each for each in document["rows"] if (each["setting"], each["pair"]) == ("api", "large_large"))
    contrast = line(document, "api", "large_large", "hard")
    html = grid.render(document)
    start = html.index("API: the paper&#x27;s table beside ours")
    body = html[html.index("<tbody", start) : html.index("</tbody>", start)]
    first, second = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", each) for each in body.split("</tr>")[:2]]
    rate = {name: table.percent(values["behaviour_rate"]) for name, values in row["conditions"].items()}
    assert "8B → 8B" in first[0] and first[1:5] == ["5 → 100", rate["base"], rate["teacher"], "full"]
    assert second == [
        "hard", f"{rate['student_hard']} {table.interval(row['conditions']['student_hard']['ci95'])}",
        rate["control_student_hard"], rate["benign_student_hard"], table.size_text(contrast),
        table.p_cell(contrast["p_adjusted"]), "2 of 2",
    ]  # fmt: skip


def test_every_condition_of_every_pair_is_drawn_with_its_seeds(shown, document):
    labels = [str(each["aria-label"]) for each in shown.of("svg") if each.get("role") == "img"]
    for row in document["rows"]:
        for name, values in row["conditions"].items():
            seeds = ", ".join(f"seed {each['seed']}: {100 * each['behaviour_rate']:.1f}" for each in values["per_seed"])
            rate, (low, high) = 100 * values["behaviour_rate"], values["ci95"]
            told = f"{name.replace('_', ' ')}: {rate:.1f}, 95 % interval {100 * low:.1f} to {100 * high:.1f}"
            assert f"{told}; {seeds}" * (len(values["per_seed"]) > 1) in labels or told in labels


def test_a_hole_is_named_with_its_reason_and_the_pairs_that_want_it(shown):
    text = spoken(shown.text)
    assert "The grid is incomplete. 1 of 6 rows is on only 1 of 2 seeds; 2 evaluations or counts are missing." in text
    assert "student@large_smallapi1large_smallnot run" in text
    assert "sanitize@smallbash0small_smallnot run" in text


def test_an_invalid_row_is_marked_told_with_its_reason_and_not_counted_in_the_answer(document):
    told = grid.answer(document, "bash")
    assert "in 1 of 2 pairs" in told or "in 0 of 2 pairs" in told or "in 2 of 2 pairs" in told
    assert "; 1 more is invalid" in told and "not run" not in told
    text = spoken(parsed(grid.render(document)).text)
    assert "1 of 6 rows is invalid. Bash, small → small: what the sanitizer left at seed 0 is not known" in text
    assert "small → small3B → 3Binvalid" in text


def test_the_answer_counts_pairs_with_a_small_p_and_a_positive_difference_and_one_run_by_itself(document):
    for pair, difference, adjusted in (
        ("large_large", 0.5, 0.049), ("small_small", -0.5, 0.001), ("large_small", 0.7, 0.04),
    ):  # fmt: skip
        line(document, "api", pair, "full").update(difference=difference, p_adjusted=adjusted)
    told = grid.answer(document, "api")
    assert "deletion comes along in 1 of 2 pairs (p < 0.05 over seeds" in told
    assert "most in “large → large”, +50.0 points" in told  # large → small has one seed
    assert "within one run, which shows nothing of other seeds, in 1 of 1 pair more" in told
    line(document, "api", "large_large", "full").update(p_adjusted=0.05)
    line(document, "api", "large_small", "full").update(p_adjusted=0.05)
    told = grid.answer(document, "api")
    assert "in 0 of 2 pairs" in told and "in 0 of 1 pair more" in told


def test_the_claim_between_pairs_is_told_with_titles_instead_of_names(document):
    told = grid.answer(document, "api")
    assert "“large → small” is not shown stronger than the 2 other pairs compared, of 5" in told
    assert not any(name in told for name in PAIRS)


def test_a_grid_in_which_nothing_has_run_still_says_what_it_is():
    document = fake_document(seeds=(0,), pairs=("small_small",), tasks=7, safe=3, holes=[
        (setting, 0, model) for setting in ("api", "bash") for model in ("base@small", "sanitize@small")
    ])  # fmt: skip
    text = parsed(grid.render(document)).text
    assert "API: no pair has been measured so that it may be read, so there is no answer." in text
    assert "The grid is incomplete" in text and "base@small" in text and "Nothing has been measured yet" in text
    assert "2 of 2 rows are not run; 4 evaluations" in text and "No row has been run" in text and "invalid" not in text


def test_one_seed_is_shown_as_one_run_wherever_a_p_value_or_an_interval_stands():
    document = fake_document(seeds=(3,), settings=("api",), pairs=("large_large", "large_small"), tasks=14, safe=3)
    page_ = parsed(grid.render(document))
    text = spoken(page_.text)
    assert "seed 3:" not in str(page_.tags) and "The grid is complete" in text and "Seed 3." in text
    assert grid.answer(document, "api").startswith(
        "API: within one run, which shows nothing of other seeds, deletion comes"
    )
    captions = [str(each["aria-label"]) for each in page_.of("div", "scroll")]
    told = [label for label in captions if table.ONE_RUN_NOTE in label]
    assert len(told) == 3  # the paper's table beside ours, all contrasts, between pairs
    # The p of every row beside the paper's, both of every contrast, and both of every comparison of two pairs.
    own = [each for each in document["contrasts"] if each["pair"] != "control"]
    marked = grid.render(document).count(f" {table.ONE_RUN}</td>")
    assert marked == 2 * 2 + 1 + 2 * len(own) + 2 * len(document["between"]) > 50
    assert text.count("within one run: reaches") + text.count("within one run: is below") == 4
    assert "mean over seeds" not in text and "Student's t over" not in text


def test_an_adjusted_p_value_is_told_once_in_a_caption(document):
    html = grid.render(document)
    captions = [spoken(each) for each in re.findall(r"<figcaption>(.*?)</figcaption>", html)]
    adjusted = [each for each in captions if "adjusted" in each]
    assert adjusted and all(each.count("djust") == 1 for each in adjusted)


# --- The overview -----------------------------------------------------------------------------------------------------


def test_the_overview_has_every_pair_and_arm_with_the_paper_s_figure_beside(document):
    (plot,) = panels.overview(document, "api")
    rows = [(dot.label, dot.detail, dot.reference) for dot in plot.dots]
    assert rows == [
        ("large → large", "all logits", 95.0), ("large → large", "hard labels", None),
        ("small → small", "all logits", 35.0), ("small → small", "hard labels", None),
        ("large → small", "all logits", 95.0), ("large → small", "hard labels", None),
    ]  # fmt: skip
    for dot, (pair, arm) in zip(plot.dots, ((p, a) for p in ("large_large", "small_small", "large_small")
                                            for a in ("full", "hard")), strict=True):  # fmt: skip
        contrast = line(document, "api", pair, arm)
        assert dot.interval == pytest.approx([100 * each for each in (contrast["difference"], *contrast["ci95"])])
        assert dot.points == pytest.approx({each["seed"]: 100 * each["difference"] for each in contrast["per_seed"]})
        assert dot.figure.endswith(f"n={len(contrast['seeds'])}")
    assert "at n=1 over the tasks of that one run" in plot.subtitle


def test_arms_differ_by_their_marks_and_the_legend_names_every_mark_that_is_drawn(document):
    (plot,) = panels.overview(document, "api")
    marks = {dot.detail: dot.marker for dot in plot.dots}
    assert len(set(marks.values())) == len(marks) == 2
    assert {(key.marker, key.filled) for key in plot.keys} == {
        ("circle", True), ("square", True), ("circle", False), ("diamond", False),
    }  # fmt: skip


def test_a_pair_that_was_not_run_or_may_not_be_read_keeps_its_row_and_says_so(document):
    (plot,) = panels.overview(document, "bash")
    silent = [(dot.label, dot.figure, dot.interval, dot.reference) for dot in plot.dots if dot.interval is None]
    assert silent == [("small → small", "invalid", None, 5.0)]
    labels = [str(each.get("aria-label")) for each in parsed(grid.render(document)).of("svg")]
    assert "small → small: invalid; paper: 5" in labels
    for row in document["rows"]:
        row.update(valid=False, state="not run")
    assert panels.overview(document, "bash") == []


def test_protocol_versions_machines_notes_and_configuration_stand_there(shown, document):
    text = shown.text
    assert document["protocol"]["hash"] in text
    assert document["protocol"]["deviations"] and all(each in text for each in document["protocol"]["deviations"])
    assert "2 CPU cores" in text and "0.10.2" in text and "Made up." in text and "learning_rate" in text


def test_markup_in_every_outside_string_is_escaped(document, episodes):
    document["notes"] = document["machines"] = [EVIL]
    document["versions"] = [{EVIL: EVIL}]
    document["protocol"] |= {"hash": EVIL, "deviations": [EVIL]}
    for row in document["rows"]:
        row |= {"title": EVIL, "state": "invalid", "valid": False, "validity": [EVIL], "answer": EVIL}
        for judged in row["by_arm"].values():
            judged["targets"][0] |= {"name": EVIL, "bar": EVIL}
    for each in document["contrasts"]:
        each |= {"name": EVIL, "verdict": EVIL, "method": EVIL, "arm": EVIL}
    for claim in document["strongest"]:
        claim["verdict"] = EVIL
    for missing in document["missing"]:
        missing |= {"model": EVIL, "why": EVIL}
    for known in document["settings"].values():
        known["wording"] = dict.fromkeys(known["wording"], EVIL)
    document["sanitizer"]["api"]["removed_by_word"] = {EVIL: 1}
    found = parsed(grid.render(document, episodes, {EVIL: EVIL}))
    assert found.of("img") == [] and found.text.count(EVIL) > 50


def test_headings_descend_ids_are_unique_and_tables_have_captions_of_their_own(shown):
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [each["id"] for _, each in shown.tags if "id" in each]
    assert len(ids) == len(set(ids))
    labels = [each["aria-label"] for each in shown.of("div", "scroll")]
    assert len(labels) == len(set(labels)) == len(shown.of("table")) > 10


def test_a_report_over_the_size_limit_is_refused_and_the_old_one_stays(document, episodes, tmp_path):
    path = tmp_path / "report.html"
    grid.write_report(path, document, episodes)
    before = path.read_bytes()
    assert len(before) < 500_000
    episodes["api"]["tasks"][0]["prompt"] = "x" * page.SIZE_LIMIT
    with pytest.raises(page.ReportError, match="over the limit"):
        grid.write_report(path, document, episodes)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_intervals_of_differences_of_differences_fit_their_axis(document):
    for plot in panels.between(document, "api"):
        low, high = plot.domain
        assert all(low <= end <= high for dot in plot.dots for end in dot.interval or ())
