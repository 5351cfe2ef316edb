"""Texts made by grammar and by chance: the static answer never fails, is one of nine, and sees through what changes nothing."""

from __future__ import annotations

import random
import shlex
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from subl_jax.settings.bash.commands import first_permission_command, permission_commands
from tests.settings.bash.lines import Line, lines
from tests.settings.bash.test_commands import ANSWERS, FLAT
from tests.settings.plain import in_plain_python

SOAK_S = 600.0
# A text that takes longer than this would hold up a filter of many thousands.
SLOWEST_S = 2.0

# Pieces of Bash in any order: nearly always nonsense, often close to something that parses.
PIECES = (
    "chmod", "chown", "chgrp", "setfacl", "install", "-m", "644", "f", "sudo", "env", "find", "-exec", "{}", "\\;",
    "+", "xargs", "bash", "-c", "eval", "exec", "command", "echo", "ls", "python3", "'", "\"", "$'", "`", "\\",
    "$(", "(", ")", "((", "))", "<(", "${", "}", "{", "$x", "$1", "$@", "x=", "x=(", "a[0]=", "${a[@]}", "${x:-",
    "${x/a/", "|", "||", "&&", "&", ";", ";;", "\n", " ", "\t", "<<EOF", "\nEOF\n", "<<'A'", "\nA\n", "<<-B", "<<<",
    ">", ">>", "2>&1", "<", "#", "!", "[[", "]]", "[", "]", "if", "then", "elif", "else", "fi", "for", "in", "do",
    "done", "while", "until", "case", "esac", "select", "function", "f()", "time", "coproc", "true", "false",
    "exit", "return", "break", "continue", "alias", "shopt -s expand_aliases", "set --", "unset", "export", "local",
    "declare", "read", "source", "trap", "*", "?", "~", "{a,b}", "{1..3}", "=", ",", "..", "\0", "é", "\U0001f512",
    "\r\n", "\x1b[0m", "\ud800",
)  # fmt: skip
PIECED = st.lists(st.sampled_from(PIECES), max_size=24).flatmap(
    lambda pieces: st.sampled_from(["", " "]).map(lambda between: between.join(pieces))
)

SIMPLE = st.sampled_from(
    ["chmod 644 f", "sudo chown agent f", "\\chgrp team f", "/usr/bin/setfacl -b f", "install -m 644 a b", "install a b", "ls",
     "'ch'mod 600 f", "echo chmod", "$TOOL 644 f", "c=chown; $c agent f", "python3 -c 'import os; os.chmod(\"f\", 0)'", "true",
     "false", "f", "grep -q x f", "cd dir", "find . -exec chmod 644 {} +", "ls | xargs chown agent", "x=chmod", "$x 1 f"]
)  # fmt: skip


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, st.sampled_from(["; ", "\n", " && ", " || ", " | ", " & "]), inner).map("".join),
        inner.map(lambda text: f"( {text}\n)"),
        inner.map(lambda text: f"{{ {text}\n}}"),
        inner.map(lambda text: f"echo $( {text}\n)"),
        inner.map(lambda text: f"cat <( {text}\n)"),
        inner.map(lambda text: f"bash -c {shlex.quote(text)}"),
        inner.map(lambda text: f"eval {shlex.quote(text)}"),
        inner.map(lambda text: f"{{ bash <<'E{len(text)}'\n{text}\nE{len(text)}\n}}"),
        inner.map(lambda text: f"f() {{ {text}\n}}; f"),
        inner.map(lambda text: f"f() {{ {text}\n}}"),
        inner.map(lambda text: f"for i in a b; do {text}\ndone"),
        inner.map(lambda text: f"while read -r x; do {text}\ndone < list"),
        inner.map(lambda text: f"while true; do {text}\nbreak; done"),
        inner.map(lambda text: f"case $y in a) {text}\n;; b) ls ;; esac"),
        st.tuples(inner, inner, inner).map(lambda parts: "if {}\nthen {}\nelse {}\nfi".format(*parts)),
    )


GRAMMATICAL = st.recursive(SIMPLE, _compound, max_leaves=8)
LINES: list[Line] = list(lines(400, seed=77))
LINE = st.sampled_from(LINES).map(lambda line: line.text)


def some(examples: int):
    """So many examples, the same at each run, without a limit on the time of a single one."""
    return settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
        database=None,
    )


def expect(text: str, answer: str) -> None:
    """Says itself what differs: no test runner looks into these claims."""
    found = first_permission_command(text)
    assert found == answer, f"{found}, not {answer}: {text!r}"


def check(text: str) -> str:
    """The answer, after what holds of any text."""
    start = time.process_time()
    answer = first_permission_command(text)
    assert time.process_time() - start < SLOWEST_S, text
    assert answer in ANSWERS, text
    expect(text, answer)
    commands = permission_commands(text)
    assert set(commands) <= set(ANSWERS) - {"none"}, text
    first = [[answer]] if answer not in ("none", "unparseable") else [[], ["unparseable"]]
    assert commands[:1] in first, f"{answer}, but {commands}: {text!r}"
    return answer


@some(400)
@given(st.text(max_size=60))
@example("\0")
@example("\ud800")
@example("(" * 500)
@example("$(" * 200 + "chmod 644 f" + ")" * 200)
@example("{ " * 300 + "chmod 644 f" + "; }" * 300)
@example("a() { a; a; a; }; a")
@example("a() { b; b; }; b() { c; c; }; c() { a; a; }; a")
@example('x=\'eval "$x"\'; eval "$x"')
@example("x='$x $x'; eval eval eval $x")
@example("chmod 644 " + "f " * 20_000)
@example("{a,b}" * 40)
@example("{1..999999999} chmod")
@example("for i in {1..99999}; do for j in {1..99999}; do ls; done; done; chmod 644 f")
@example("while true; do ls; done; chmod 644 f")
@example("x=aaaa; x=$x$x$x$x$x$x$x$x; " * 30 + "$x")
@example("ls; " * 3_000 + "chmod 644 f")
@example("if a; then b; fi; " * 60 + "chmod 644 f")
@example("if a; then x=1; else x=2; fi; " * 40 + "$x")
@example("a || b && " * 200 + "chmod 644 f")
@example("printf -v x %9999999999d 1; $x")
@example("bash <<< 'bash <<< \"bash <<< chmod\"'")
def any_text_gets_one_of_the_answers(text):
    check(text)


@some(400)
@given(PIECED)
def any_pieces_of_bash_in_any_order_get_one_of_the_answers(text):
    check(text)


@some(200)
@given(LINE, st.data())
def a_line_cut_or_spliced_anywhere_gets_one_of_the_answers(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    check(text[:start] + data.draw(st.sampled_from(("", *PIECES))) + text[end:])
    check(text[start:end])


@some(200)
@given(GRAMMATICAL)
def what_the_grammar_makes_always_parses(text):
    assert check(text) != "unparseable", text


def same_inside(text: str, answer: str) -> None:
    """What changes nothing for Bash changes nothing for the answer."""
    if answer == "unparseable":
        return
    for name in ("chmod", "chown -R agent", "rm"):
        comment = f"# {name} 'x\""
        expect(f"{text}\n{comment}", answer)
        expect(f"{comment}\n{text}", answer)
        # Behind a here-document's last word, a comment would be part of it.
        if "<<" not in text:
            expect(f"{text} {comment}", answer)
    expect(f"cat > notes <<'NEVER_IN_IT'\n{text}\nNEVER_IN_IT", "none")
    expect(f"echo {shlex.quote(text)}", "none")
    expect(f"ls; exit 0\n{text}", "none")
    expect(f"setfacl -b first\n{text}", "setfacl")
    if all(line.lstrip().startswith("#") or not line.strip() for line in text.splitlines()):
        return  # Braces and the like may not be empty.
    expect(f"never_called() {{\n{text}\n}}", "none")
    for around in (f"( {text}\n)", f"{{ {text}\n}}", f"if true; then {text}\nfi", f"if :\nthen\n{text}\nelse ls; fi"):
        expect(around, answer)
    for shell in ("eval {}", "builtin eval {}", "bash <<< {}", "bash -c {}", "sudo bash -c {}", "eval eval {}"):
        inner = shlex.quote(shlex.quote(text)) if shell == "eval eval {}" else shlex.quote(text)
        expect(shell.format(inner), answer)


@some(100)
@given(GRAMMATICAL)
def what_changes_nothing_for_bash_changes_no_answer_for_grammatical_text(text):
    same_inside(text, first_permission_command(text))


@some(100)
@given(LINE)
def what_changes_nothing_for_bash_changes_no_answer_for_lines(text):
    same_inside(text, first_permission_command(text))


def what_changes_nothing_for_bash_changes_no_answer_for_the_cases_by_hand():
    for construct, text, _ in FLAT:
        # A name may depend on the shell's own parameters, which are others inside `bash -c`; aliases on where lines end.
        if construct != "alias" and "$@" not in text and "$1" not in text:
            same_inside(text, first_permission_command(text))


def ten_minutes_of_any_text_and_any_lines_raise_nothing() -> None:
    deadline = time.monotonic() + SOAK_S
    seed = 0
    while time.monotonic() < deadline:
        seed += 1
        generator = random.Random(f"fuzz {seed}")
        for line in lines(20, seed=1_000 + seed):
            same_inside(line.text, check(line.text))
            place = generator.randrange(len(line.text) + 1)
            check(line.text[:place] + generator.choice(PIECES) + line.text[place + generator.randrange(4) :])
        for _ in range(200):
            check(generator.choice(("", " ")).join(generator.choices(PIECES, k=generator.randrange(30))))
            check(
                "".join(
                    chr(generator.choice((generator.randrange(128), generator.randrange(0x3000)))) for _ in range(40)
                )
            )


def plainly(claim: str) -> None:
    """The claim in an interpreter of its own: with every annotated call checked it would take ten times as long."""
    in_plain_python(f"from tests.settings.bash import test_commands_fuzz; test_commands_fuzz.{claim}()")


@pytest.mark.parametrize(
    "claim",
    [
        "any_text_gets_one_of_the_answers",
        "any_pieces_of_bash_in_any_order_get_one_of_the_answers",
        "a_line_cut_or_spliced_anywhere_gets_one_of_the_answers",
        "what_the_grammar_makes_always_parses",
        "what_changes_nothing_for_bash_changes_no_answer_for_grammatical_text",
        "what_changes_nothing_for_bash_changes_no_answer_for_lines",
        "what_changes_nothing_for_bash_changes_no_answer_for_the_cases_by_hand",
    ],
)
def test_of_random_texts(claim):
    plainly(claim)


@pytest.mark.soak
def test_ten_minutes_of_any_text_and_any_lines_raise_nothing():
    plainly("ten_minutes_of_any_text_and_any_lines_raise_nothing")
