"""Progress: a bar on a terminal, sparse lines elsewhere, and one summary line either way."""

from __future__ import annotations

import io
import logging

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
