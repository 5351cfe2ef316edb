"""Progress: a bar on a terminal, sparse lines elsewhere, and one summary line either way."""

from __future__ import annotations

import io
import logging
import time

import pytest
from absl import logging as absl_logging

from subl_jax import metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_files_get_a_summary_and_no_bar():
    stream = io.StringIO()
    assert list(metrics.progress([1, 2, 3], "roll out", unit="task", stream=stream)) == [1, 2, 3]
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("roll out: 3/3 task in 0.0 s") and "\r" not in stream.getvalue()


def test_log_files_get_a_line_every_interval(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with metrics.progress(100, "train", unit="step", stream=stream) as shown:
        for _ in range(100):
            now[0] += 0.25
            shown.advance(loss=0.125)
    assert stream.getvalue().splitlines() == [
        "train: 40/100 step, 10 s [loss=0.125]",
        "train: 80/100 step, 20 s [loss=0.125]",
        "train: 100/100 step in 25.0 s, 4 step/s [loss=0.125]",
    ]


def test_terminals_get_a_bar_that_ends_in_the_summary():
    stream = Terminal()
    assert list(metrics.progress(iter("ab"), "evaluate", stream=stream)) == ["a", "b"]
    text = stream.getvalue()
    assert "\r" in text and "evaluate" in text
    assert text.splitlines()[-1].strip().startswith("evaluate: 2 it in")


def test_an_estimate_of_the_callers_stands_in_plain_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with metrics.progress(4, "roll out", unit="episode", stream=stream, interval_s=0.0) as shown:
        for left in (7260.0, 600.0, 5.4, 0.0):
            now[0] += 1.0
            shown.advance(eta_s=left, occupancy=0.5)
    assert stream.getvalue().splitlines() == [
        "roll out: 1/4 episode, 1 s, 2.0 h to go [occupancy=0.5]",
        "roll out: 2/4 episode, 2 s, 10 min to go [occupancy=0.5]",
        "roll out: 3/4 episode, 3 s, 5 s to go [occupancy=0.5]",
        "roll out: 4/4 episode, 4 s, 0 s to go [occupancy=0.5]",
        "roll out: 4/4 episode in 4.0 s, 1 episode/s [occupancy=0.5]",
    ]


def test_an_estimate_of_the_callers_takes_the_place_of_the_bars():
    stream = Terminal()
    with metrics.progress(4, "roll out", unit="episode", stream=stream) as shown:
        time.sleep(0.25)  # longer than a bar's least time between two drawings
        shown.advance(eta_s=600.0, occupancy=0.5)
    [drawn] = [part for part in stream.getvalue().split("\r") if "to go" in part]
    assert "10 min to go, occupancy=0.5" in drawn and "1/4" in drawn and "<" not in drawn


def test_an_exception_is_shown_as_stopped_and_passes_through():
    stream = io.StringIO()
    with pytest.raises(KeyError), metrics.progress(5, "train", stream=stream) as shown:
        shown.advance(2)
        raise KeyError
    assert stream.getvalue().startswith("train: stopped at 2/5 it in")
    stream = io.StringIO()

    def items():
        yield 1
        raise KeyError

    with pytest.raises(KeyError):
        list(metrics.progress(items(), "read", stream=stream))
    assert stream.getvalue().startswith("read: stopped at 1 it in")


def test_a_total_is_not_iterable():
    with pytest.raises(TypeError, match="advance"):
        iter(metrics.progress(3, "x", stream=io.StringIO())).__next__()


def test_standard_error_is_the_default(capsys):
    list(metrics.progress([1], "read"))
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("read: 1/1")


def test_quiet_drops_routine_records_of_the_named_package_only():
    metrics.quiet("chatty")
    metrics.quiet("chatty")
    logger = absl_logging.get_absl_logger()

    def passes(path: str, level: int) -> bool:
        return bool(logger.filter(logging.LogRecord("absl", level, path, 1, "text", (), None)))

    assert not passes("/site-packages/chatty/core.py", logging.INFO)
    assert passes("/site-packages/chatty/core.py", logging.WARNING)
    assert passes("/site-packages/other/core.py", logging.INFO)
