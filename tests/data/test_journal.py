"""The journal: what was appended survives any kill, exactly and once; a foreign or damaged file is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import random
import resource
import struct
import subprocess
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

from subl_jax.data import Journal, JournalError
from subl_jax.trajectory import Trajectory
from tests.data.episodes import assert_same, environment, failed, malformed, python, run_python, trajectory

IDENTITY = {"seed": 0, "model": {"layers": 2, "width": 64}}


def fill(path: Path, items: list[Trajectory]) -> None:
    with Journal.open(path, IDENTITY) as journal:
        for item in items:
            journal.append(item)


def stored(path: Path) -> list[Trajectory]:
    with Journal.open(path, IDENTITY) as journal:
        return journal.read()


def assert_all_same(actual: list[Trajectory], expected: list[Trajectory]) -> None:
    for left, right in zip(actual, expected, strict=True):
        assert_same(left, right)


def keys_by_hand(path: Path) -> list[tuple[int, int]]:
    """(episode, sample) per whole line in file order, each line's checksum verified, without the journal's own code."""
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        text = line[line.index(b'"record":') + len(b'"record":') : -1]
        assert json.loads(line)["crc32"] == format(zlib.crc32(text), "08x")
        record = json.loads(line.decode("ascii"))["record"]
        found.append((record.get("episode"), record.get("sample")))
    return found[1:]  # the header holds none


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rollout" / "process-0.jsonl"


# --- What comes back --------------------------------------------------------------------------------------------------


def test_episodes_come_back_exactly_and_sorted(path):
    extremes = np.array([0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf], "f4")
    items = [
        trajectory(4, 1, length=9, logprobs=extremes),
        trajectory(4, 0, text="lone \ud800 surrogate, \x00\x1f\x7f, 漢字 🙂 and\nnewlines\u2028"),
        failed(3, "tool_error", "OSError: 'fil\udce9'"),
        failed(7, "tool_timeout", "no answer within 30 s"),
        dataclasses.replace(trajectory(0), tools=[]),
        trajectory(2, length=50_000),
    ]
    fill(path, items)
    back = stored(path)
    assert_all_same(back, sorted(items, key=lambda item: (item.episode, item.sample)))
    assert path.read_bytes().isascii()
    back[0].tokens[0] = 1  # arrays are the caller's own
    assert back[3].tools is back[4].tools  # equal lists are stored often, and held once


def test_the_file_can_be_read_with_json_and_struct_alone(path):
    item = trajectory(5, length=3)
    fill(path, [item])
    header, record = (json.loads(line)["record"] for line in path.read_text("ascii").splitlines())
    assert (header["format"], header["identity"]) == (1, IDENTITY)
    assert struct.unpack("<3i", base64.b64decode(record["tokens"])) == tuple(item.tokens.tolist())
    assert struct.unpack("<3f", base64.b64decode(record["logprobs"])) == tuple(item.logprobs.tolist())
    assert base64.b64decode(record["loss_mask"]) == bytes([0, 1, 1])
    assert (record["messages"], record["status"], record["error"]) == (item.messages, "final", "")


def test_a_reopened_journal_knows_what_is_finished_and_takes_the_rest(path):
    fill(path, [trajectory(3), trajectory(0, 1)])
    with Journal.open(path, {"model": {"width": 64, "layers": 2}, "seed": 0}) as journal:  # the order means nothing
        assert journal.finished == {(3, 0), (0, 1)}
        journal.append(trajectory(1))
        assert journal.finished == {(3, 0), (0, 1), (1, 0)}
        assert_all_same(journal.read(), [trajectory(0, 1), trajectory(1), trajectory(3)])
        journal.append(trajectory(2))  # reading moves nothing
    assert keys_by_hand(path) == [(3, 0), (0, 1), (1, 0), (2, 0)]


def test_an_episode_is_never_written_twice(path):
    with Journal.open(path, IDENTITY) as journal:
        journal.append(trajectory(1))
        before = path.read_bytes()
        with pytest.raises(JournalError, match=r"holds episode 1 .* already; skip what is in `finished`"):
            journal.append(trajectory(1, text="another"))
        assert path.read_bytes() == before


def test_a_malformed_episode_is_refused(path):
    with Journal.open(path, IDENTITY) as journal:
        for bad, message in (
            (malformed(tokens=np.zeros(7, np.int64)), "tokens is int64"),
            (malformed(logprobs=np.zeros(6, np.float32)), "logprobs has 6 entries for 7 tokens"),
            (trajectory(0, length=0), "no tokens and status final"),
        ):
            with pytest.raises(JournalError, match=message):
                journal.append(bad)
        assert journal.finished == set()
    assert keys_by_hand(path) == []


def test_delete_removes_the_file_and_a_closed_journal_says_so(path):
    with Journal.open(path, IDENTITY) as journal:
        journal.append(trajectory(0))
        journal.delete()
        assert not path.exists()
        journal.close()
        for use in (journal.read, lambda: journal.append(trajectory(1))):
            with pytest.raises(JournalError, match="is closed; open it again"):
                use()
    with Journal.open(path, IDENTITY) as journal:
        assert journal.finished == set()


# --- Kills ------------------------------------------------------------------------------------------------------------

# Appends an episode for every line of input, and acknowledges each. Large ones, so that a kill may strike within one.
ROLL = """
    import sys
    from subl_jax.data import Journal
    from tests.data.episodes import trajectory
    with Journal.open(sys.argv[1], {"seed": 0, "model": {"layers": 2, "width": 64}}) as journal:
        for episode in range(int(sys.argv[2])):
            if (episode, 0) not in journal.finished and sys.stdin.readline():
                journal.append(trajectory(episode, length=100_000))
                sys.stdout.write(f"{episode}\\n")
                sys.stdout.flush()
"""


def test_kill_9_loses_no_appended_episode_and_nothing_is_written_twice(path):
    chance = random.Random(0)
    count, pipe = 24, subprocess.PIPE
    command = python(ROLL, str(path), str(count))
    done: list[int] = []
    for appends in (1, 9, 5):
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment(), text=True) as child:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n" * (appends + 1))  # one more than is waited for: it is in flight when the kill comes
            child.stdin.flush()
            done += [int(child.stdout.readline()) for _ in range(appends)]
            time.sleep(chance.random() * 0.01)
            child.kill()
        left = keys_by_hand(path)
        assert left[: len(done)] == [(episode, 0) for episode in done]
        assert len(left) <= len(done) + 1  # appended, and killed before it was acknowledged
        done = [episode for episode, _ in left]
    last = subprocess.run(command, input="\n" * count, capture_output=True, env=environment(), text=True, timeout=60)
    assert last.returncode == 0, last.stderr
    assert [int(line) for line in last.stdout.split()] == [e for e in range(count) if e not in done]
    assert sorted(keys_by_hand(path)) == [(episode, 0) for episode in range(count)]
    assert_all_same(stored(path), [trajectory(episode, length=100_000) for episode in range(count)])


def test_a_last_line_torn_at_any_byte_is_cut_off_and_can_be_written_again(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of them
    fill(path, [trajectory(0), trajectory(1)])
    two = path.read_bytes()
    fill(path, [trajectory(2, length=2)])
    three = path.read_bytes()
    assert len(three) > len(two) + 300
    for end in range(len(two), len(three)):
        path.write_bytes(three[:end])
        with Journal.open(path, IDENTITY) as journal:
            assert journal.finished == {(0, 0), (1, 0)}
            assert path.read_bytes() == two
            journal.append(trajectory(2, length=2))
        assert path.read_bytes() == three


def test_a_header_torn_at_any_byte_begins_anew(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    fill(path, [])
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        fill(path, [])
        assert path.read_bytes() == whole


def test_what_was_appended_reaches_the_disk_within_seconds_and_at_the_end(path, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr("subl_jax.data.journal.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(len(keys_by_hand(path))))
    with Journal.open(path, IDENTITY) as journal:
        for episode in range(90):
            now[0] += 0.1
            journal.append(trajectory(episode))
    assert synced[-1] == 90
    assert 3 <= len(synced) - 1 <= 9  # 9 seconds of appending
    assert max(np.diff([0, *synced])) <= 30


# --- Files that are refused -------------------------------------------------------------------------------------------


def refusal(path: Path, identity: dict | None = None) -> str:
    before = path.read_bytes()
    with pytest.raises(JournalError) as caught:
        Journal.open(path, IDENTITY if identity is None else identity)
    assert path.read_bytes() == before  # nothing is lost by being refused
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_rollouts_journal_is_refused_and_the_first_difference_named(path):
    fill(path, [trajectory(0)])
    other = {"seed": 1, "model": {"layers": 4, "width": 64}}
    assert refusal(path, other) == (
        f"{path} belongs to another rollout: model.layers: 2 in the journal, 4 in this run; "
        f"delete {path} to roll out from the beginning, or use another --workdir"
    )
    assert 'extra: "(absent)" in the journal, true in this run' in refusal(path, {**IDENTITY, "extra": True})
    assert_all_same(stored(path), [trajectory(0)])


def test_another_format_is_refused(path):
    fill(path, [])
    line = json.loads(path.read_text("ascii"))
    line["record"]["format"] = 2
    text = json.dumps(line["record"])
    path.write_text(f'{{"crc32":"{zlib.crc32(text.encode()):08x}","record":{text}}}\n')
    assert "format 2 where this version reads 1; delete" in refusal(path)


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_flipped_bit_anywhere_in_a_line_is_refused_and_the_line_named(path, line):
    fill(path, [trajectory(0, length=2), trajectory(1, length=2), trajectory(2, length=2)])
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    start = len(b"".join(lines[: line - 1]))
    for place in [*range(0, len(lines[line - 1]), 13), len(lines[line - 1]) - 1]:
        damaged = bytearray(content)
        damaged[start + place] ^= 4
        path.write_bytes(damaged)
        assert f"line {line} is corrupt, its checksum differs; delete the file" in refusal(path)


def test_damage_after_opening_is_found_by_reading(path):
    with Journal.open(path, IDENTITY) as journal:
        journal.append(trajectory(0))
        content = bytearray(path.read_bytes())
        content[-30] ^= 1
        path.write_bytes(content)
        with pytest.raises(JournalError, match="line 2 is corrupt"):
            journal.read()


def test_a_repeated_episode_is_refused(path):
    fill(path, [trajectory(0), trajectory(1)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    assert "line 4 repeats episode 0, sample 0" in refusal(path)


@pytest.mark.parametrize("content", [b"notes", b"notes\nmore\n", b'{"crc32": "', b"\0" * 100])
def test_a_file_that_is_no_journal_is_left_alone(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    assert "; delete the file" in refusal(path)


def test_a_journal_in_use_is_refused_until_its_process_lets_go(path):
    attempt = """
        import sys
        from subl_jax.data import Journal, JournalError
        try:
            Journal.open(sys.argv[1], {"seed": 0, "model": {"layers": 2, "width": 64}})
        except JournalError as error:
            print(error)
    """
    with Journal.open(path, IDENTITY) as journal:
        journal.append(trajectory(0))
        journal.read()  # must not give the lock away
        assert "is in use by another process; stop it" in run_python(attempt, str(path)).stdout
    assert run_python(attempt, str(path)).stdout == ""


# --- Disks that refuse ------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_whole_episode_and_appending_goes_on_when_there_is_room(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal.open(path, IDENTITY) as journal:
        try:
            # As a disk does when it fills up: part of the line is taken, then comes the error.
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            with pytest.raises(JournalError) as caught:
                for episode in range(100):
                    journal.append(trajectory(episode))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(caught.value).startswith(f"cannot write {path}: File too large; raise the file size limit")
        count = len(journal.finished)
        assert 3 < count < 30
        assert keys_by_hand(path) == [(episode, 0) for episode in range(count)]
        assert path.read_bytes().endswith(b"}\n")
        assert_all_same(journal.read(), [trajectory(episode) for episode in range(count)])
        journal.append(trajectory(count))
    assert_all_same(stored(path), [trajectory(episode) for episode in range(count + 1)])


def test_a_disk_that_refuses_at_fsync_is_heard(path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    fill(path, [trajectory(0)])
    before = path.read_bytes()
    journal = Journal.open(path, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr("subl_jax.data.journal.SYNC_SECONDS", 0)
        patch.setattr(os, "fsync", full)
        with pytest.raises(JournalError, match="No space left on device; free some space"):
            journal.append(trajectory(1))
        assert journal.finished == {(0, 0)}
        with pytest.raises(JournalError, match="No space left on device; free some space"):
            journal.close()
    assert path.read_bytes() == before
    assert_all_same(stored(path), [trajectory(0)])


def test_a_folder_that_may_not_be_written_is_one_line_with_a_remedy(tmp_path):
    denied = run_python(
        """
        import os, sys
        from subl_jax.data import Journal, JournalError
        os.chmod(sys.argv[1], 0o500)
        if os.geteuid() == 0:
            os.setuid(65534)  # permissions do not bind root
        try:
            Journal.open(sys.argv[1] + "/deeper/journal", {})
        except JournalError as error:
            print(error)
        """,
        str(tmp_path),
    )
    assert denied.stdout == (
        f"cannot open the journal {tmp_path}/deeper/journal: Permission denied; "
        "make the directory writable or use another one\n"
    ), denied.stderr
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="a file stands where its folder is needed"):
        Journal.open(tmp_path / "file" / "journal", IDENTITY)
