"""The static answer against what really ran: 2,000 generated lines in the sandbox, whose stand-ins log every attempt."""

from __future__ import annotations

import argparse
import getopt
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from subl_jax.settings.bash.commands import first_permission_command
from subl_jax.settings.bash.sandbox import Attempt, Sandbox, SandboxPool
from tests.settings.bash.lines import CONSTRUCTS, FUNCTIONS, VARIABLES, Line, lines
from tests.settings.plain import in_plain_python

COUNT, SEED = 2_000, 0
_SANDBOXES = 2
# Nothing of a line reaches the next one: options, names, positional parameters. Files and directory are `build`'s.
RESET = f"set +eu +o pipefail; set --; unset -f {' '.join(FUNCTIONS)}; unset {' '.join(VARIABLES)}"


def sets_access(argv: tuple[str, ...]) -> bool:
    """Whether a call of `install` says mode, owner or group."""
    long = ["mode=", "owner=", "group=", "target-directory=", "suffix=", "directory", "verbose", "compare", "backup"]
    try:
        options, _ = getopt.gnu_getopt(list(argv[1:]), "bcCdDg:m:o:psS:t:TvZ", long)
    except getopt.GetoptError:
        return False
    return any(option in ("-m", "-o", "-g", "--mode", "--owner", "--group") for option, _ in options)


def logged(attempts: Iterable[Attempt]) -> list[str]:
    """The permission commands among the attempts, in order."""
    return [made.name for made in attempts if made.name != "install" or sets_access(made.argv)]


class Oracle:
    """Runs lines in a sandbox, each in its own world and in a shell that knows nothing of the line before."""

    def __init__(self, pool: SandboxPool):
        """Takes a sandbox of `pool` at the first line."""
        self._pool = pool
        self._sandbox: Sandbox | None = None

    def run(self, line: Line) -> list[str]:
        """The permission commands that really ran, in order."""
        if self._sandbox is None:
            self._sandbox = self._pool.take()
        self._sandbox.build(line.entries, fresh=True)
        result = self._sandbox.run(line.text)
        assert result.status in ("ok", "exited"), (result, line.text)
        # After an `exit` this answers that the shell has ended.
        after = self._sandbox.run(RESET)
        if after.status != "ok":
            self.close()
        return logged(result.attempts + after.attempts)

    def close(self) -> None:
        """Ends the sandbox in use."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


def disagreement(static: str, ran: list[str]) -> str:
    """The class of a disagreement between the static answer and the log."""
    if static in ("unparseable", "dynamic", "other"):
        return f"static says {static}"
    if static == "none":
        return "static says none, something ran"
    if not ran:
        return "static says X, nothing ran (condition false, nothing found)"
    return (
        "both ran, in another order"
        if static in ran
        else "static says X, only others ran (condition false, other branch)"
    )


@dataclass
class Comparison:
    """How often the two agree, overall and by construct."""

    total: int = 0
    agreed: int = 0
    ran_nothing: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    by_construct: dict[str, Counter[bool]] = field(default_factory=lambda: {name: Counter() for name in CONSTRUCTS})
    disagreements: list[tuple[str, str, str, str]] = field(default_factory=list)  # class, static, logged, text
    seconds: float = 0.0

    def add(self, line: Line, static: str, ran: list[str]) -> None:
        """Counts one line."""
        expected = ran[0] if ran else "none"
        self.total += 1
        self.agreed += static == expected
        self.ran_nothing += not ran
        self.answers[static] += 1
        for construct in line.constructs:
            self.by_construct[construct][static == expected] += 1
        if static != expected:
            self.disagreements.append((disagreement(static, ran), static, expected, line.text))

    def share(self, construct: str) -> float:
        """The share of lines that have the construct."""
        return self.by_construct[construct].total() / self.total

    def figures(self) -> dict:
        """What is asked of it, as JSON-able data."""
        return {
            "total": self.total,
            "agreement": self.agreed / self.total,
            "unknown": (self.answers["dynamic"] + self.answers["unparseable"]) / self.total,
            "ran_nothing": self.ran_nothing / self.total,
            "shares": {name: self.share(name) for name in self.by_construct},
            "report": self.report(),
        }

    def report(self) -> str:
        """The tables and every disagreement."""
        unknown = self.answers["dynamic"] + self.answers["unparseable"]
        out = [f"{self.total} lines in {self.seconds:.0f} s: agreement {self.agreed / self.total:.2%}, dynamic or "
               f"unparseable {unknown / self.total:.2%}, nothing ran in {self.ran_nothing / self.total:.0%}"]  # fmt: skip
        out.append(f"static answers: {dict(self.answers.most_common())}")
        out.append(f"{'construct':15}{'lines':>7}{'share':>8}{'agreement':>11}")
        for name, counts in self.by_construct.items():
            agreement = counts[True] / max(1, counts.total())
            out.append(f"{name:15}{counts.total():7}{self.share(name):8.1%}{agreement:11.1%}")
        for kind, count in Counter(kind for kind, *_ in self.disagreements).most_common():
            out.append(f"{count} x {kind}")
            found = [case for case in self.disagreements if case[0] == kind]
            out += [f"  static {static}, log {expected}: {text!r}" for _, static, expected, text in found]
        return "\n".join(out)


def compare(pool: SandboxPool, count: int = COUNT, seed: int = SEED) -> Comparison:
    """The static answer and the log on `count` generated lines."""
    comparison = Comparison()
    start = time.monotonic()
    made = list(lines(count, seed))
    with ThreadPoolExecutor(_SANDBOXES) as threads:
        parts = threads.map(lambda place: _logs(pool, made[place::_SANDBOXES]), range(_SANDBOXES))
        ran = dict(pair for part in parts for pair in part)
    for line in made:
        comparison.add(line, first_permission_command(line.text), ran[line.text])
    comparison.seconds = time.monotonic() - start
    return comparison


def _logs(pool: SandboxPool, some: list[Line]) -> list[tuple[str, list[str]]]:
    oracle = Oracle(pool)
    try:
        return [(line.text, oracle.run(line)) for line in some]
    finally:
        oracle.close()


def test_generated_lines_are_the_same_every_time_and_differ_by_seed():
    assert list(lines(50)) == list(lines(50))
    assert not {line.text for line in lines(200)} & {line.text for line in lines(20, seed=1)}


def test_each_construct_is_in_at_least_one_generated_line_of_twenty():
    made = list(lines(COUNT, SEED))
    shares = {name: sum(name in line.constructs for line in made) / COUNT for name in CONSTRUCTS}
    assert min(shares.values()) >= 0.05, shares
    assert all(len(line.constructs) >= 2 for line in made)
    assert len({line.text for line in made}) == COUNT


@pytest.mark.parametrize(
    ("options", "answer"),
    [(["-m", "644"], True), (["-Dm755"], True), (["--owner=a"], True), (["-t", "m"], False), ([], False)],
)
def test_a_logged_install_counts_where_it_sets_access(options, answer):
    assert sets_access(("install", *options, "a", "b")) is answer


def test_no_line_sees_what_the_line_before_left(pool):
    oracle = Oracle(pool)
    world = next(iter(lines(1))).entries
    before = "set -u; fix() { chmod 644 x; }; tool=chown; touch left; cd /tmp; set -- chmod 644 x; exit_later=1"
    after = 'fix; $tool agent x; [ -e left ] && chgrp team x; "$@"; [ "$PWD" = /home/agent ] && setfacl -b x'
    try:
        assert oracle.run(Line(before, world, frozenset(), True)) == []
        assert oracle.run(Line(after, world, frozenset(), False)) == ["setfacl"]
        assert oracle.run(Line("chmod 644 x; exit 3", world, frozenset(), False)) == ["chmod"]
        assert oracle.run(Line("chown agent x", world, frozenset(), False)) == ["chown"]
    finally:
        oracle.close()


@pytest.mark.slow
def test_the_static_answer_is_what_really_ran_first(sandbox_ready):
    # In an interpreter of its own: with every annotated call checked, reading the lines takes longer than running them.
    printed = in_plain_python(
        "from tests.settings.bash import test_commands_oracle; test_commands_oracle.main(['--json'])"
    )
    found = json.loads(printed.splitlines()[-1])
    print(found["report"])
    assert found["total"] == COUNT
    assert found["agreement"] >= 0.98, found["report"]
    assert found["unknown"] <= 0.05, found["report"]
    assert min(found["shares"].values()) >= 0.05, found["report"]
    assert set(found["shares"]) == set(CONSTRUCTS)
    assert 0.2 <= found["ran_nothing"] <= 0.35, found["report"]


def main(arguments: list[str]) -> None:
    """Prints the agreement tables and every disagreement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--json", action="store_true", help="the figures and the report as one JSON object")
    options = parser.parse_args(arguments)
    with SandboxPool() as pool:
        comparison = compare(pool, options.count, options.seed)
    print(json.dumps(comparison.figures()) if options.json else comparison.report())


if __name__ == "__main__":
    main(sys.argv[1:])
