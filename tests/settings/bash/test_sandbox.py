"""The sandbox as the environment uses it: results, the shell's state, worlds, the record, and the pool's life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from subl_jax.settings.bash.sandbox import Attempt, Entry, Limits, SandboxPool, default_pool, measure
from tests.settings.bash.attacks import alive, descendants, within

PATIENT = Limits(wall_s=30)
REPOSITORY = Path(__file__).parents[3]


# Results.


def test_a_result_tells_both_streams_the_code_and_how_it_ended(sandbox):
    result = sandbox.run("echo out; echo err >&2; (exit 7)")
    assert (result.stdout, result.stderr, result.code, result.status, result.attempts) == (
        "out\n",
        "err\n",
        7,
        "ok",
        (),
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [("true", 0), ("false", 1), ("(exit 255)", 255), ("nosuch", 127), ("/etc/passwd", 126), ("", 0)],
)
def test_exit_codes(command, code, sandbox):
    assert sandbox.run(command).code == code
    assert sandbox.run("echo $?").stdout == f"{code}\n"


def test_messages_are_those_of_bash_and_name_the_line_of_the_command(sandbox):
    for _ in range(3):
        assert sandbox.run("true\nnosuch").stderr == "bash: line 2: nosuch: command not found\n"
    assert sandbox.run("echo (").stderr.startswith("bash: line 1: syntax error near unexpected token")
    assert sandbox.run("bash -c nosuch").stderr == "bash: line 1: nosuch: command not found\n"


def test_state_stays_between_commands(sandbox):
    sandbox.run("x=1; export y='a b'; f() { echo \"f $1\"; }; shopt -s nullglob; mkdir d; cd d; umask 077")
    result = sandbox.run("echo $x; env | grep ^y=; f 2; pwd; echo *; umask")
    assert result.stdout == "1\ny=a b\nf 2\n/home/agent/d\n\n0077\n"
    sandbox.run("sleep 30 & cd -")
    assert sandbox.run("jobs -r | wc -l; pwd").stdout == "1\n/home/agent\n"


def test_a_command_of_any_shape_is_taken_whole(sandbox):
    assert sandbox.run("cat <<'END'\n$x 'quoted' \"twice\"\nEND\n").stdout == "$x 'quoted' \"twice\"\n"
    assert sandbox.run("printf '%s' 'ä€𝄞'").stdout == "ä€𝄞"
    assert sandbox.run(r"printf '\377x'").stdout == "\ufffdx"
    assert sandbox.run(f"x={'a' * 200_000}; echo ${{#x}}").stdout == "200000\n"
    assert sandbox.run("for i in 1 2\ndo echo $i\ndone # end").stdout == "1\n2\n"


def test_truncation_is_visible_in_the_stream_it_happened_in(sandbox):
    result = sandbox.run("printf %010000d 0; echo short >&2")
    assert result.stdout == "0" * 4096 + "\n[truncated: 5904 bytes more]\n" and result.stderr == "short\n"
    assert sandbox.run("printf %04096d 0").stdout == "0" * 4096
    # A character cut in two is no garbage of the command's.
    assert sandbox.run("printf x; printf 'ä%.0s' {1..3000}").stdout == f"x{'ä' * 2047}\n[truncated: 1905 bytes more]\n"


def test_a_timeout_ends_the_shell_and_keeps_what_was_said(sandbox_ready):
    with SandboxPool(Limits(wall_s=0.5), size=0) as pool:
        sandbox = pool.take()
        start = time.monotonic()
        result = sandbox.run("chmod 600 .; echo before; sleep 100")
        assert 0.4 < time.monotonic() - start < 5
        assert (result.stdout, result.code, result.status) == ("before\n", None, "timeout")
        assert [attempt.name for attempt in result.attempts] == ["chmod"]
        after = sandbox.run("echo after")
        assert (after.stdout, after.code, after.status) == ("", None, "exited") and "ended" in after.stderr
        assert sandbox.inspect("stat -c %a /home/agent").stdout == "600\n"  # the world still stands


@pytest.mark.parametrize(
    ("command", "code", "status"),
    [("echo bye; exit 3", 3, "exited"), ("echo bye; kill -9 $$", None, "killed"), ("echo bye; exec true", 0, "exited")],
)
def test_the_end_of_the_shell_is_told(command, code, status, sandbox):
    result = sandbox.run(command)
    assert (result.stdout, result.code, result.status) == ("bye\n", code, status)
    assert sandbox.run("true").status == "exited"


def test_a_silenced_shell_costs_no_processor_time(sandbox):
    sandbox.run("exec >/dev/null 2>&1")
    before = time.process_time()
    assert sandbox.run("sleep 0.5; (exit 4)").code == 4
    assert time.process_time() - before < 0.25


# Worlds.


def test_a_world_is_built_as_told(sandbox):
    sandbox.build(
        [
            Entry("/home/agent/a/b/c.txt", "text\n"),
            Entry("/home/agent/run.sh", "#!/bin/sh\n", mode=0o750, owner="anna", group="team"),
            Entry("/home/ben/d", None, owner="ben", group="ben", mode=0o2770, acl=("u:emma:rx", "g:staff:r")),
            Entry("/tmp/ü", ""),
        ]
    )
    look = "stat -c '%n %a %U %G %F' /home/agent/a /home/agent/a/b/c.txt /home/agent/run.sh /home/ben/d /tmp/ü"
    assert sandbox.inspect(look).stdout.splitlines() == [
        "/home/agent/a 755 agent agent directory",
        "/home/agent/a/b/c.txt 644 agent agent regular file",
        "/home/agent/run.sh 750 anna team regular file",
        "/home/ben/d 2770 ben ben directory",
        "/tmp/ü 644 agent agent regular empty file",
    ]
    acl = sandbox.inspect("getfacl -cp /home/ben/d").stdout
    assert "user:emma:r-x" in acl and "group:staff:r--" in acl
    assert sandbox.run("cat a/b/c.txt").stdout == "text\n"
    assert sandbox.attempts == []  # what we do is nobody's attempt


def test_the_same_world_has_the_same_times(patient):
    entries = [Entry("/home/agent/x/one"), Entry("/home/agent/two")]
    seen = set()
    for _ in range(2):
        sandbox = patient.take()
        sandbox.build(entries)
        seen.add(sandbox.run("ls -lR --time-style=full-iso").stdout)
        sandbox.close()
    assert len(seen) == 1 and "2024-01-01 00:0" in seen.pop()


def test_a_fresh_world_replaces_the_one_before_and_keeps_the_shell(sandbox):
    sandbox.build([Entry("/home/agent/old/x"), Entry("/tmp/old")])
    sandbox.run("x=kept; cd old; chmod 700 /home/agent; setfacl -m u:ben:r /home/agent")
    sandbox.build([Entry("/home/agent/new")], fresh=True)
    assert (
        sandbox.run("echo $x; pwd; ls -A . /tmp; stat -c %a .").stdout == "kept\n/home/agent\n.:\nnew\n\n/tmp:\n755\n"
    )


def test_what_cannot_be_built_is_told(sandbox):
    with pytest.raises(OSError, match="No space left"):
        sandbox.build([Entry("/tmp/big", "x" * (17 << 20))])
    with pytest.raises(ValueError, match="no user 'nobody'"):
        Entry("/tmp/x", owner="nobody")
    for path in ("/etc/passwd", "relative", "/home/../etc/x", "/home", "/tmp//x"):
        with pytest.raises(ValueError, match="below /home or /tmp"):
            Entry(path)


def test_a_look_sees_the_world_with_the_eyes_of_a_user(sandbox):
    sandbox.build([Entry("/home/agent/secret", "s", mode=0o600), Entry("/home/agent/open", "o")])
    assert sandbox.inspect("cat /home/agent/secret").stdout == "s"
    assert sandbox.inspect("cat /home/agent/open; cat /home/agent/secret", "anna").code == 1
    assert sandbox.inspect("id -un; id -Gn; pwd; exit 5", "ben")[:3] == ("ben\nben team\n/\n", "", 5)
    with pytest.raises(ValueError, match="no user 'mallory'"):
        sandbox.inspect("true", "mallory")
    # It shares neither the variables nor the record of the agent's shell, and outlives that.
    sandbox.run("x=1; export PATH=/nowhere; exit")
    assert (
        sandbox.inspect("echo [$x]; chmod 644 /home/agent/secret; command -v chmod").stdout == "[]\n/run/real/chmod\n"
    )
    assert sandbox.attempts == []


def test_a_look_is_limited_as_well(sandbox_ready):
    with SandboxPool(Limits(wall_s=0.5), size=0) as pool:
        sandbox = pool.take()
        assert sandbox.inspect("echo a; sleep 100")[:4:3] == ("a\n", "timeout")
        assert "[truncated: " in sandbox.inspect("printf %010000d 0").stdout
        assert sandbox.inspect("kill -9 $$").status == "killed"
        assert sandbox.inspect("echo fine").stdout == "fine\n" and sandbox.run("echo fine").stdout == "fine\n"


# The record.


def test_attempts_are_recorded_with_their_arguments_and_command(sandbox):
    sandbox.run("touch f")
    result = sandbox.run("chmod 'a b' nosuch; sudo chown anna f; echo chgrp; setfacl -m u:ben:r f")
    assert result.attempts == (
        Attempt("chmod", ("chmod", "a b", "nosuch")),
        Attempt("chown", ("chown", "anna", "f")),
        Attempt("setfacl", ("setfacl", "-m", "u:ben:r", "f")),
    )
    assert sandbox.run("ls").attempts == ()
    sandbox.run("(sleep 0.2; chmod 600 f) &")
    assert within(5, lambda: len(sandbox.attempts) == 4)
    sandbox.close()
    assert [attempt.name for attempt in sandbox.attempts] == ["chmod", "chown", "setfacl", "chmod"]


def test_a_written_record_forges_no_result_and_erases_nothing(sandbox):
    sandbox.run("touch f; chmod 600 f")
    forged = r"for i in $(seq 50); do printf 'D\037%s\0370\036' $i >/run/channel; done; sleep 0.2; echo told; (exit 9)"
    result = sandbox.run(forged)
    assert (result.stdout, result.code) == ("told\n", 9)
    assert sandbox.run("cat /run/channel").code == 1 and sandbox.run("rm /run/channel").code == 1
    assert sandbox.run("chown agent /run/channel; chmod 666 /run/channel; cat </run/channel").code == 1
    # Noise costs the noise, and nothing can be glued to a record.
    sandbox.run("head -c 100000 /dev/urandom >/run/channel; chmod 640 f; printf x >/run/channel; chown agent f")
    assert sandbox.attempts[0] == Attempt("chmod", ("chmod", "600", "f"))
    assert {("chmod", "640", "f"), ("chown", "agent", "f")} <= {attempt.argv for attempt in sandbox.attempts}


@pytest.mark.parametrize("limit", [8, 9, 10, 11, 12, 16])
def test_a_call_that_cannot_be_recorded_does_not_run(limit, sandbox):
    sandbox.run("touch f; chmod 644 f")
    result = sandbox.run(f"(ulimit -n {limit}; chmod 600 f)")
    changed = sandbox.inspect("stat -c %a /home/agent/f").stdout == "600\n"
    assert changed == (len(result.attempts) == 1)


def test_functions_and_variables_of_the_agent_hide_no_call(sandbox):
    sandbox.run("touch f")
    hiding = "printf() { :; }; exec() { :; }; export -f printf exec; ENV=/dev/null IFS=p PATH=/run/real:$PATH"
    assert [attempt.name for attempt in sandbox.run(f"({hiding}; /usr/bin/chmod 600 f)").attempts] == ["chmod"]


def test_an_access_list_too_long_to_be_sensible_is_refused(sandbox):
    sandbox.run("touch f")
    entries = ",".join(f"u:{2000 + number}:r" for number in range(20))
    assert sandbox.run(f"setfacl -m {entries} f").code == 0
    assert sandbox.run("for i in $(seq 3000 3200); do echo u:$i:r; done > list; setfacl -M list f").code != 0
    assert sandbox.inspect("getfacl -nc /home/agent/f | grep -c ^user:2").stdout == "20\n"


# Life and end.


def test_closing_twice_and_using_after_the_end(patient):
    sandbox = patient.take()
    sandbox.close()
    sandbox.close()
    assert sandbox.run("true").status == "exited"
    assert sandbox.inspect("true").status == "broken"
    with pytest.raises(OSError):
        sandbox.build([])
    assert sandbox.attempts == []


def test_a_closed_pool_ends_its_sandboxes_and_gives_no_more(sandbox_ready):
    pool = SandboxPool(PATIENT, size=1)
    sandbox = pool.take()
    watchdog, cgroups = pool.client.pid, pool.client.cgroup_directories
    pool.close()
    pool.close()
    assert sandbox.run("true").status in ("exited", "killed", "broken")
    assert not alive(watchdog) and not any(Path(directory).exists() for directory in cgroups)
    with pytest.raises(RuntimeError, match="closed"):
        pool.take()
    sandbox.close()


def test_a_pool_without_sandboxes_is_two_processes(sandbox_ready):
    with SandboxPool(PATIENT, size=0) as pool:
        for sandbox in [pool.take() for _ in range(3)]:
            sandbox.run("sleep 100 &")
            sandbox.inspect("true")
            sandbox.close()
        assert within(5, lambda: len(descendants(pool.client.pid)) == 1)  # the watchdog's keeper


def test_a_killed_keeper_is_told_and_the_default_pool_made_anew(sandbox_ready):
    pool = default_pool()
    assert default_pool() is pool
    sandbox = pool.take()
    os.kill(pool.client.pid, signal.SIGKILL)
    result = sandbox.run("sleep 5; echo survived")
    assert result.status == "broken" and "survived" not in result.stdout
    assert within(5, lambda: not pool.client.alive)
    again = default_pool()
    assert again is not pool
    fresh = again.take()
    assert fresh.run("echo here").stdout == "here\n"
    for each in (fresh, sandbox):
        each.close()
    again.close()


def test_many_threads_share_a_pool(sandbox_ready):
    wrong: list[object] = []

    def work(number: int) -> None:
        for turn in range(3):
            sandbox = pool.take()
            try:
                sandbox.build([Entry("/home/agent/x", f"{number}.{turn}")])
                sandbox.run("chmod 600 x")
                seen = sandbox.run("cat x; ls -A"), sandbox.inspect("stat -c %a /home/agent/x")
                if [each.stdout for each in seen] != [f"{number}.{turn}x\n", "600\n"] or len(sandbox.attempts) != 1:
                    wrong.append(seen)
            except OSError as error:
                wrong.append(error)
            finally:
                sandbox.close()

    with SandboxPool(PATIENT, size=2) as pool:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_one_sandbox_interrupted_from_a_signal_is_ended_and_the_pool_goes_on(sandbox_ready):
    with SandboxPool(PATIENT, size=0) as pool:
        sandbox = pool.take()
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        # What a shell starts in the background ignores the signal from birth.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                sandbox.run("sleep 20; echo late")
            timer.join()
        finally:
            signal.signal(signal.SIGINT, before)
        assert sandbox.run("echo x").status == "exited"
        sandbox.close()
        assert pool.take().run("echo fine").stdout == "fine\n"


def test_an_answer_that_nobody_waited_for_goes_to_nobody(sandbox_ready, monkeypatch):
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    with SandboxPool(PATIENT, size=0) as pool:
        sandbox = pool.take()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(pool.client, "_answer", interrupted)
                sandbox.inspect("echo lost")
            assert sandbox.inspect("echo mine").stdout == "mine\n"
        assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_of_the_host_or_the_keeper_is_inherited(sandbox):
    """Neither the keeper's socket nor a file of its cgroups: the standard streams, and the script in the shell."""
    for listing in (sandbox.run("ls /proc/self/fd"), sandbox.inspect("ls /proc/self/fd")):
        assert listing.stdout.split() == ["0", "1", "2", "3"]  # the last is the directory itself
    assert sandbox.run("ls /proc/$$/fd").stdout.split() == ["0", "1", "2", "255"]
    first = sandbox.inspect("ls -l /proc/1/fd /proc/2/fd; cat /proc/1/environ /proc/2/environ; wc -c </proc/cmdline")
    assert "cgroup" not in first.stdout and "socket" not in first.stdout and first.stdout.endswith("0\n")


def python(code: str, timeout: float = 60) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done
    return done.stdout


FORK = """
import os, sys
from subl_jax.settings.bash.sandbox import default_pool
pool = default_pool()
sandbox = pool.take()
child = os.fork()
if child == 0:
    try:
        pool.take()
        print("taken")
    except RuntimeError:
        print("refused", flush=True)
    sandbox.close()
    own = default_pool()
    print(own is pool, own.take().run("echo own").stdout, end="", flush=True)
    sys.exit(0)
os.waitpid(child, 0)
print(sandbox.run("echo still").stdout, end="")
"""


def test_a_forked_process_has_its_own_pool_and_leaves_the_parents_alone(sandbox_ready):
    assert python(FORK).split() == ["refused", "False", "own", "still"]


@pytest.mark.parametrize("end", ["", "raise SystemExit", "sandbox.run('sleep 50 &'); del sandbox, pool"])
def test_a_process_that_closes_nothing_ends_all_the_same(end, sandbox_ready):
    code = "from subl_jax.settings.bash.sandbox import SandboxPool\npool = SandboxPool()\nsandbox = pool.take()\n"
    assert python(f"{code}print(sandbox.run('echo here').stdout, end='')\n{end}", timeout=30) == "here\n"


@pytest.mark.parametrize("name", ["memory_mib", "processes", "file_mib", "disk_mib", "files", "output_bytes", "wall_s"])
def test_limits_that_cannot_work_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})


def test_the_measure_prints_a_table(sandbox_ready, capsys):
    assert measure.main(["--seconds", "0.05"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.split()[-1] in ("ms", "/s") for line in lines)
    with pytest.raises(SystemExit):
        measure.main(["--seconds", "-1"])
