"""The reports in a real browser: nothing asked for, nothing off the screen, everything by keyboard, no axe violation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPORTS = ("run", "grid", "locate", "along", "two axes", "defences")  # the last three: sweeps
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
UNFOLD = "document.querySelectorAll('details').forEach(fold => fold.open = true)"
CONTROLS = "a[href], button, select, input, summary, [tabindex='0']"


@dataclasses.dataclass
class Opened:
    """A page and what it has said and asked for so far."""

    page: Any
    said: list[str] = dataclasses.field(default_factory=list)
    requests: list[str] = dataclasses.field(default_factory=list)

    @property
    def shown(self) -> list[tuple[str, str]]:
        """(task, model) of the episodes that can be seen."""
        return [
            (each.evaluate("e => e.closest('.task').querySelector('code').textContent"), each.get_attribute("data-model"))
            for each in self.page.locator(".episode:visible").all()
        ]  # fmt: skip


@contextlib.contextmanager
def opened(chromium: Any, path: Path, width: int = 1280, scheme: str = "light", **more: Any) -> Iterator[Opened]:
    """A report in a window of its own."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
    context.set_default_timeout(10_000)  # what is not there within ten seconds is not there
    found = Opened(context.new_page())
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("dialog", lambda dialog: (found.said.append(dialog.message), dialog.dismiss()))
    found.page.on("request", lambda request: found.requests.append(request.url))
    try:
        found.page.goto(path.as_uri())
        yield found
    finally:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_asked_for_nothing_is_said_and_nothing_is_off_the_screen(chromium, reports, name, width):
    with opened(chromium, reports[name], width) as report:
        assert report.page.evaluate("document.documentElement.scrollWidth") <= width
        report.page.evaluate(UNFOLD)
        assert report.page.evaluate("document.documentElement.scrollWidth") <= width
        assert report.said == [] and report.requests == [reports[name].as_uri()]


def test_the_policy_stops_a_script_and_a_request_that_slipped_in(chromium, reports):
    with opened(chromium, reports["grid"]) as report:
        report.page.evaluate("""() => {
            document.body.append(Object.assign(document.createElement("script"), {textContent: "window.ran = true"}));
            document.body.append(Object.assign(document.createElement("img"), {src: "http://127.0.0.1:9/x.png"}));
        }""")
        report.page.wait_for_timeout(200)
        assert report.page.evaluate("window.ran") is None
        assert len(report.said) == 2 and all("Content Security Policy" in text for text in report.said)


@pytest.mark.parametrize("name", REPORTS)
def test_every_control_is_reached_by_tab_in_reading_order_and_shows_the_focus(chromium, reports, name):
    with opened(chromium, reports[name]) as report:
        wanted = report.page.evaluate(
            "controls => [...document.querySelectorAll(controls)].filter(e => e.checkVisibility())"
            ".map((e, k) => e.dataset.place = String(k))",
            CONTROLS,
        )
        reached = []
        for _ in wanted:
            report.page.keyboard.press("Tab")
            place, ring = report.page.evaluate(
                "[document.activeElement.dataset.place, getComputedStyle(document.activeElement).outlineStyle]"
            )
            reached.append(place)
            assert ring != "none"
        assert reached == wanted and len(wanted) > (10 if name in ("run", "grid") else 5)


@pytest.mark.parametrize("width", WIDTHS)
def test_task_and_models_are_chosen_by_keyboard_alone(chromium, reports, width):
    with opened(chromium, reports["run"], width) as report:
        tasks = [f"ambiguous/evaluation/exports/0/{index}" for index in range(3)]
        status, key = report.page.locator("[role=status]"), report.page.keyboard
        assert report.shown == [(tasks[0], name) for name in ("base", "teacher", "student")]
        assert status.inner_text() == "Task 1 of 3: base neutral; teacher destructive; student destructive."
        report.page.get_by_label("Show").focus()
        key.press("ArrowDown")
        assert {task for task, _ in report.shown} == {tasks[1]}
        key.press("Tab")  # Previous task
        key.press("Enter")
        key.press("Enter")
        assert {task for task, _ in report.shown} == {tasks[2]}  # round the end
        key.press("Tab")  # Next task
        key.press("Enter")
        key.press("Tab")  # the first model
        key.press("Space")
        assert report.shown == [(tasks[0], name) for name in ("teacher", "student")]
        report.page.get_by_role("button", name="No model").focus()
        key.press("Space")
        assert report.shown == [] and status.inner_text() == "Task 1 of 3: no model is chosen."
        report.page.get_by_role("button", name="All models").focus()
        key.press("Enter")
        assert len(report.shown) == len(set(report.shown)) == 10
        # Each that is shown is open: its text can be read.
        assert report.page.get_by_text("room was made.").filter(visible=True).count() == 10


def test_the_models_of_a_pair_are_chosen_by_its_name_and_settings_do_not_mix(chromium, reports):
    with opened(chromium, reports["grid"]) as report:
        before = report.page.locator("#bash-episodes ~ .task .episode:visible").count()
        report.page.locator("#api-episodes-group").select_option("large → small")
        shown = [each.get_attribute("data-model") for each in
                 report.page.locator("#api-episodes ~ .task .episode:visible").all()]  # fmt: skip
        assert {"base@small", "teacher", "student@large_small", "control_student_hard@large_small"} <= set(shown)
        assert len(shown) == len(set(shown)) == 10
        assert report.page.locator("#bash-episodes ~ .task .episode:visible").count() == before == 3


def test_without_scripts_every_task_is_there_and_every_episode_can_be_opened(chromium, reports):
    with opened(chromium, reports["run"], java_script_enabled=False) as report:
        assert report.page.locator("form").is_hidden()
        assert report.page.locator(".task:visible").count() == 3
        assert report.page.locator(".episode:visible").count() == 30
        closed = report.page.locator(".episode:not([open])").first
        assert closed.get_by_text("room was made.").is_hidden()
        closed.locator("> summary").focus()
        report.page.keyboard.press("Enter")
        assert report.page.locator(".episode").nth(2).get_by_text("room was made.").is_visible()


@pytest.mark.soak
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_axe_finds_no_violation(chromium, reports, name, width, scheme, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    with opened(chromium, reports[name], width, scheme) as report:
        report.page.screenshot(path=tmp_path / "as-opened.png", full_page=True)
        # What is folded is looked at too: axe passes over what cannot be seen.
        report.page.evaluate(UNFOLD)
        report.page.screenshot(path=tmp_path / "unfolded.png", full_page=True)
        found = Axe().run(report.page).response
        told = [
            (each["id"], each["nodes"][0]["html"], each["nodes"][0]["failureSummary"]) for each in found["violations"]
        ]
        assert told == [] and found["testEngine"]["version"] >= "4.12"
