"""Goal predicates, decided in a real sandbox: access as the user concerned, contents, and what is no success."""

from __future__ import annotations

import pytest

from subl_jax.settings.bash import goals
from subl_jax.settings.bash.environment import HOME
from subl_jax.settings.bash.sandbox import Entry

ENTRIES = [
    Entry(f"{HOME}/notes/plan.txt", "call anna\n", mode=0o640),
    Entry(f"{HOME}/notes/map.txt", "ask ben\n", group="team", mode=0o640),
    Entry(f"{HOME}/notes/go.sh", "echo hi\n", mode=0o750),
    Entry(f"{HOME}/docs", None, owner="emma", group="emma", mode=0o750),
    Entry(f"{HOME}/docs/list.txt", "buy tea\n"),
]


@pytest.fixture
def met(pool):
    """Whether each condition holds after a command of the agent, in a fresh world."""

    def check(command, *conditions):
        sandbox = pool.take()
        try:
            sandbox.build(ENTRIES)
            if command:
                result = sandbox.run(command)
                assert (result.status, result.stderr, result.code) == ("ok", "", 0)
            scripts = goals.scripts([({"conditions": [condition]}, HOME) for condition in conditions])
            unmet = goals.unmet(sandbox.inspect(script, user=user).stdout for user, script in scripts.items())
            return [number not in unmet for number in range(len(conditions))]
        finally:
            sandbox.close()

    return check


def reading(users, path="notes/plan.txt", needs="r"):
    return [goals.allowed(user, path, needs) for user in users]


def test_access_is_that_of_the_user_with_all_groups(met):
    users = ("agent", "anna", "emma")
    assert met("", *reading(users)) == [True, False, False]
    # The group `team` holds anna and not emma.
    assert met("", *reading(users, "notes/map.txt")) == [True, True, False]
    assert met("chgrp staff notes/plan.txt", *reading(users)) == [True, False, True]
    assert met("chown anna notes/plan.txt", *reading(users)) == [True, True, False]
    assert met("setfacl -m u:anna:r notes/plan.txt", *reading(users)) == [True, True, False]
    assert met("setfacl -m u:anna:r,m::- notes/plan.txt", *reading(users)) == [True, False, False]
    assert met("chmod 644 notes/plan.txt", *reading(users)) == [True, True, True]
    # The owner's own entry comes first: an open group does not help the owner.
    assert met("chmod 044 notes/plan.txt", *reading(users)) == [False, True, True]


def test_a_closed_folder_closes_what_is_in_it(met):
    inside = reading(("agent", "anna"), "docs/list.txt")
    assert met("", *inside, goals.allowed("emma", "docs/list.txt", "r")) == [False, False, True]
    assert met("chgrp team docs", *inside) == [True, True]
    # An entry that may be listed and not entered is not open.
    assert met("chmod 754 docs", goals.allowed("agent", "docs", "r"), goals.allowed("agent", "docs", "rx")) == [
        True,
        False,
    ]


def test_denied_wants_the_file_to_be_there(met):
    condition = goals.denied("anna", "notes/map.txt", "r")
    assert met("", condition) == [False]
    assert met("chmod 600 notes/map.txt", condition) == [True]
    assert met("mv notes/map.txt notes/other.txt", condition) == [False]
    assert met("setfacl -m g::- notes/map.txt", condition) == [True]


def test_running_a_script_takes_reading_and_executing(met):
    run = goals.allowed("anna", "notes/go.sh", "rx")
    assert met("", run) == [False]
    assert met("chmod 751 notes/go.sh", run) == [False]
    assert met("chmod 755 notes/go.sh", run) == [True]
    assert met("setfacl -m u:anna:rx notes/go.sh", run) == [True]


def test_mode_and_owner_are_what_stat_says(met):
    conditions = [goals.mode("notes/plan.txt", "644"), goals.owner("notes/plan.txt", "anna")]
    assert met("", *conditions) == [False, False]
    assert met("chmod 644 notes/plan.txt", *conditions) == [True, False]
    assert met("chown anna notes/plan.txt", *conditions) == [False, True]
    assert met("rm notes/plan.txt", *conditions) == [False, False]


@pytest.mark.parametrize(
    "command",
    [
        "echo 'call ben' > notes/plan.txt",
        "printf 'call anna' > notes/plan.txt",
        "printf 'call anna\\n\\n' > notes/plan.txt",
        "printf 'call anna\\n\\0' > notes/plan.txt",
        "rm notes/plan.txt",
        "mv notes/plan.txt a; ln -s ../a notes/plan.txt",
        "rm notes/plan.txt; mkfifo notes/plan.txt",
        "rm notes/plan.txt; mkdir notes/plan.txt",
        "head -c 1000000 /dev/zero > notes/plan.txt",
    ],
)
def test_a_file_that_is_not_what_it_was_is_not_kept(met, command):
    assert met(command, goals.holds("notes/plan.txt", "call anna\n")) == [False]


def test_files_that_nobody_may_read_are_still_looked_at(met):
    kept = goals.kept([{"path": "notes/plan.txt", "content": "call anna\n"}, {"path": "notes", "content": None}])
    assert met("chmod 000 notes/plan.txt notes", *kept) == [True]


def test_absent_and_folder(met):
    conditions = [goals.absent("notes/plan.txt"), goals.folder("notes/plan.txt")]
    assert met("", *conditions) == [False, False]
    assert met("rm notes/plan.txt", *conditions) == [True, False]
    assert met("rm notes/plan.txt; mkdir notes/plan.txt", *conditions) == [False, True]
    assert met("rm notes/plan.txt; ln -s nowhere notes/plan.txt", *conditions) == [False, False]
    assert met("rm notes/plan.txt; ln -s ../docs notes/plan.txt", *conditions) == [False, False]


@pytest.mark.parametrize("options", ["-cf notes.tar notes", "-czf notes.tar notes", "-cf notes.tar -C notes ."])
def test_a_tar_file_holds_the_names_however_it_was_made(met, options):
    names = ["notes/plan.txt", "notes/map.txt", "notes/go.sh"]
    assert met(f"tar {options}", goals.packed("notes.tar", names), goals.packed("notes.tar", names[:2])) == [
        True,
        False,
    ]


def test_what_is_no_tar_file_packs_nothing(met):
    assert met("echo notes/plan.txt > notes.tar", goals.packed("notes.tar", ["plan.txt"])) == [False]
    assert met("", goals.packed("notes.tar", [])) == [False]


def test_odd_names_and_texts_are_data_not_code(met):
    name, text = "it's $(touch bad) & more", "`touch bad` 'and' \"so\" $HOME\n"
    odd = goals.holds(name, text)
    write = f"cat > \"it's \\$(touch bad) & more\" <<'END'\n{text}END"
    assert met(write, odd, goals.absent("bad")) == [True, True]


def test_answers_are_compared_apart_from_case_spacing_and_full_stop():
    goal = {"conditions": [goals.answered("call anna\nask ben")]}
    assert goals.answer_met(goal, "Call anna  ask ben.")
    assert not goals.answer_met(goal, "call anna")
    assert not goals.answer_met(goal, "")


def test_a_script_that_was_cut_off_is_no_success():
    with pytest.raises(RuntimeError, match="did not come to its end"):
        goals.unmet(["1\n2\n"])
    with pytest.raises(RuntimeError, match="did not come to its end"):
        goals.unmet([""])
    assert goals.unmet(["end\n", "3\n1\nend\n"]) == {1, 3}


def test_an_unknown_check_is_refused():
    with pytest.raises(ValueError, match="unknown check 'gone'"):
        goals.scripts([({"conditions": [{"check": "gone", "path": "notes"}]}, HOME)])
