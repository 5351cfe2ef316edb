"""`launch.tpu_vm` against a stand-in of gcloud that records what it is asked and answers by a script."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from absl import flags

from subl_jax.launching import checkout
from subl_jax.launching.command import LaunchError
from subl_jax.launching.tpu_vm import command, record, resource, resume
from subl_jax.launching.tpu_vm.workers import Status

EXPERIMENT = [
    "python",
    "-m",
    "experiments.api_deletion",
    "--preset=paper",
    "--workdir=gs://bucket/my run",
    "--note=it's",
]
READY = {"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.7"}, {"ipAddress": "10.0.0.8"}]}
MADE = ["--zone=us-east5-a", "--project=p", "--accelerator=v5p-16"]

# Takes the first answer whose words all stand in the command and that has some left; the last of its kind stays.
FAKE = """#!{python} -IS
import fcntl, json, os, sys
folder = os.environ["FAKE_GCLOUD"]
with open(folder + "/lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(folder + "/calls", "a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\\n")
    with open(folder + "/answers") as file:
        answers = json.load(file)
    line = " ".join(sys.argv[1:])
    fitting = [answer for answer in answers if all(word in line for word in answer["on"])]
    chosen = fitting[0] if fitting else dict(out="", err="", code=0)
    if len(fitting) > 1:
        answers.remove(chosen)
        with open(folder + "/answers", "w") as file:
            json.dump(answers, file)
sys.stdout.write(chosen["out"])
sys.stderr.write(chosen["err"])
sys.exit(chosen["code"])
"""


class Gcloud:
    def __init__(self, folder: Path):
        self.folder = folder
        self.script: list[dict] = []
        (folder / "gcloud").write_text(FAKE.format(python=sys.executable))
        (folder / "gcloud").chmod(stat.S_IRWXU)
        self.answer()

    def answer(self, *on: str, out: str | dict = "", err: str = "", code: int = 0) -> None:
        text = json.dumps(out) if isinstance(out, dict) else out
        if on:
            self.script.append({"on": list(on), "out": text, "err": err, "code": code})
        (self.folder / "answers").write_text(json.dumps(self.script))

    def request(self, *states: str) -> None:
        for state in states:
            self.answer("queued-resources describe", out={"state": {"state": state}})

    def workers(self, *said: dict | str) -> None:
        """Answers to `status`; one word is the state of both workers."""
        for one in said:
            each = one if isinstance(one, dict) else {"state": one}
            told = [{"host": f"w-{n}", "version": stamp(), **each} for n in range(2)]
            self.answer("worker.py status", out="".join(f"SUBL {json.dumps(line)}\n" for line in told))

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The calls that change something, by the word that tells them apart."""
        words = ["queued-resources create", "queued-resources delete", " scp ", "worker.py --root=subl install"]
        words += ["worker.py start", "worker.py stop"]
        found = [next((word for word in words if word in " ".join(call)), None) for call in self.calls]
        return [word.split()[-1] for word in found if word]

    def remote(self, word: str) -> list[str]:
        """Shell commands that were sent to workers."""
        sent = [
            flag.removeprefix("--command=") for call in self.calls for flag in call if flag.startswith("--command=")
        ]
        return [line for line in sent if word in line]


def git(repository: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(
        ["git", "-C", str(repository), *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    made = tmp_path_factory.mktemp("committed")
    (made / "CITATION.cff").write_text("version: 1.2.3\n")
    git(made, "init", "-q")
    git(made, "add", ".")
    git(made, "commit", "-qm", "one")
    return made


@pytest.fixture(autouse=True)
def repository(committed, tmp_path, monkeypatch):
    made = tmp_path / "repository"
    shutil.copytree(committed, made)
    monkeypatch.setattr(checkout, "ROOT", made)
    return made


def stamp() -> str:
    return checkout.stamp(git(checkout.ROOT, "rev-parse", "HEAD"))


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(folder))
    return Gcloud(folder)


@pytest.fixture
def launch(tmp_path):
    def run(verb: str, *words: str) -> None:
        values = flags.FlagValues()
        command.define_flags(values)
        argv = values(["launch.tpu_vm", verb, "--name=mine", f"--state_dir={tmp_path / 'state'}", *words])
        command.main(argv, values, sleep=lambda _seconds: None)

    return run


@pytest.fixture
def made(gcloud, tmp_path):
    """A TPU of two workers that was made here, with this version, on which the experiment was started once."""
    tpu = resource.Tpu("mine", "us-east5-a", "p", "v5p-16")
    commit = git(checkout.ROOT, "rev-parse", "HEAD")
    record.Record(tmp_path / "state" / "mine.json", tpu, commit, command=EXPERIMENT, attempt=1).save()
    gcloud.answer("tpu-vm describe", out=READY)
    return gcloud


def failure(capsys, launch, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        launch(*words)
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_create_asks_for_a_queued_resource_and_waits_until_it_is_active(gcloud, launch, capsys):
    gcloud.request("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    gcloud.answer("tpu-vm describe", out={"state": "READY"})
    launch("create", *MADE, "--spot", "--create_flag=--reserved")
    words = gcloud.calls[0]
    assert words[:5] == ["compute", "tpus", "queued-resources", "create", "mine"]
    expected = {
        "--node-id=mine",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--spot",
        "--reserved",
    }
    assert expected <= set(words)
    assert sum("queued-resources" in call and "describe" in call for call in gcloud.calls) == 3
    assert "WAITING_FOR_RESOURCES" in capsys.readouterr().out


def test_a_request_that_failed_is_reported_with_the_clouds_reason(gcloud, launch, capsys):
    reason = {"state": {"state": "FAILED", "failedData": {"error": {"message": "no v5p in this zone"}}}}
    gcloud.answer("queued-resources describe", out=reason)
    assert "FAILED: no v5p in this zone" in failure(capsys, launch, "create", *MADE)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("v5p-100", "v5p-64, v5p-128"),
        ("v5e-24", "v5litepod-16, v5litepod-32"),
        ("v9-8", "v5litepod"),
        ("v6e", "FAMILY-SIZE"),
    ],
)
def test_an_accelerator_that_does_not_exist_is_refused_with_the_nearest(asked, named):
    with pytest.raises(LaunchError, match=named):
        resource.checked_accelerator(asked)


def test_marketing_names_become_those_of_the_api():
    assert resource.checked_accelerator("v5e-16") == "v5litepod-16"


def test_install_sends_the_commit_and_not_what_is_uncommitted(made, launch, repository, tmp_path, capsys):
    (repository / "CITATION.cff").write_text("version: 9.9.9\n")
    made.request("ACTIVE")
    assert "not committed: CITATION.cff" in failure(capsys, launch, "install")
    assert made.verbs() == []
    launch("install", "--allow_dirty")
    sent = next(word for call in made.calls for word in call if word.endswith(".tar.gz"))
    with tarfile.open(sent) as archive:
        held = archive.extractfile("CITATION.cff")
        assert held is not None and held.read() == b"version: 1.2.3\n"
    assert made.verbs() == ["scp", "install"]
    assert all("--worker=all" in call for call in made.calls if "ssh" in call or "scp" in call)


def test_run_gives_every_worker_the_command_word_for_word_and_the_addresses(gcloud, launch):
    gcloud.answer(
        "tpu-vm describe",
        out={"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.7"}, {"ipAddress": "10.0.0.8"}]},
    )
    gcloud.workers("none")
    launch("run", *MADE, "--", *EXPERIMENT)
    (sent,) = gcloud.remote("worker.py start")
    words = shlex.split(sent)
    assert words[words.index("--") + 1 :] == EXPERIMENT
    assert "--hosts=10.0.0.7,10.0.0.8" in words
    assert f"--version={stamp()}" in words


def test_run_refuses_workers_with_another_version(made, launch, repository, capsys):
    made.workers("none")
    old = stamp()
    git(repository, "commit", "-qm", "two", "--allow-empty")
    told = failure(capsys, launch, "run", "--", *EXPERIMENT)
    assert f"this is version {stamp()}, but w-0 has {old}, w-1 has {old}" in told
    assert "launch.tpu_vm install --name=mine" in told
    assert made.verbs() == []


def test_run_refuses_while_a_run_is_there(made, launch, capsys):
    made.workers("running")
    told = failure(capsys, launch, "run", "--", *EXPERIMENT)
    assert "a run is still there on w-0, w-1" in told and "stop --name=mine" in told
    assert made.verbs() == []


def test_a_refused_run_does_not_take_the_place_of_the_remembered_one(made, launch, capsys, tmp_path):
    made.workers("running")
    failure(capsys, launch, "run", "--", "python", "-m", "experiments.bash_chmod")
    held = record.load(tmp_path / "state", "mine")
    assert held is not None and (held.command, held.attempt) == (EXPERIMENT, 1)


def test_run_refuses_workers_without_an_installation(made, launch, capsys):
    assert "of 2 workers only 0 have a version installed" in failure(capsys, launch, "run", "--", *EXPERIMENT)


def test_resume_waits_for_the_end_of_a_run_that_goes_well(made, launch, capsys):
    made.request("ACTIVE")
    made.workers("running", "running", {"state": "exited", "code": 0})
    launch("resume")
    assert made.verbs() == []
    assert "done on all 2 workers" in capsys.readouterr().out


def test_resume_replaces_suspended_machines_and_goes_on_with_the_recorded_commit(made, launch, repository):
    before = stamp()
    made.request("SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
    made.workers("none", {"state": "exited", "code": 0})
    git(repository, "commit", "-qm", "later work", "--allow-empty")
    launch("resume")
    assert made.verbs() == ["delete", "create", "scp", "install", "start"]
    (sent,) = made.remote("worker.py start")
    assert f"--version={before}" in sent and "--attempt=2" in sent
    assert shlex.split(sent)[-len(EXPERIMENT) :] == EXPERIMENT


def test_resume_sees_a_slice_that_was_preempted_while_the_request_is_active(made, launch):
    made.script.insert(0, {"on": ["tpu-vm describe"], "out": '{"state": "PREEMPTED"}', "err": "", "code": 0})
    made.request("ACTIVE")
    made.workers("none", {"state": "exited", "code": 0})
    launch("resume")
    assert made.verbs() == ["delete", "create", "scp", "install", "start"]


def test_resume_asks_again_where_the_request_is_gone(made, launch):
    made.answer("queued-resources describe", err="ERROR: NOT_FOUND: Resource 'mine' was not found", code=1)
    made.answer("queued-resources delete", err="ERROR: NOT_FOUND: Resource 'mine' was not found", code=1)
    made.request("ACTIVE")
    made.workers("none", {"state": "exited", "code": 0})
    launch("resume")
    assert made.verbs() == ["delete", "create", "scp", "install", "start"]


def test_resume_starts_again_what_asks_for_it(made, launch):
    made.request("ACTIVE")
    made.workers({"state": "exited", "code": 143}, {"state": "exited", "code": 143}, {"state": "exited", "code": 0})
    launch("resume")
    assert made.verbs() == ["stop", "start"]


@pytest.mark.parametrize("ended", [{"state": "exited", "code": 75}, {"state": "lost"}])
def test_resume_starts_again_after_a_lost_process_but_not_for_ever(made, launch, capsys, ended):
    made.request("ACTIVE")
    made.workers(ended)
    told = failure(capsys, launch, "resume", "--max_peers_lost=2")
    assert made.verbs() == ["stop", "start"] * 2
    assert "--max_peers_lost=2 are used up" in told


def test_resume_gives_up_machines_that_are_always_taken(made, launch, capsys):
    made.request("SUSPENDED", "ACTIVE", "SUSPENDED", "ACTIVE", "SUSPENDED")
    made.workers("none")
    told = failure(capsys, launch, "resume", "--max_restarts=2")
    assert made.verbs().count("create") == 2
    assert "mine is SUSPENDED, and --max_restarts=2 are used up" in told


def test_resume_does_not_start_a_failed_command_again_and_shows_its_log(made, launch, capsys):
    made.request("ACTIVE")
    told = [{"host": "w-0", "version": stamp(), "state": "exited", "code": 75},
            {"host": "w-1", "version": stamp(), "state": "exited", "code": 1}]  # fmt: skip
    made.answer("worker.py status", out="".join(f"SUBL {json.dumps(line)}\n" for line in told))
    made.answer("tail -n", out="ValueError: --preset=papr\n")
    shown = failure(capsys, launch, "resume")
    assert "w-1: 1" in shown and "w-0" not in shown and "ValueError: --preset=papr" in shown
    assert made.verbs() == ["stop"]


def test_resume_bears_workers_that_do_not_answer_for_a_while(made, launch, capsys):
    made.request("ACTIVE")
    made.answer("worker.py status", err="ssh: connect to host 10.0.0.7 port 22: Connection refused", code=255)
    made.workers({"state": "exited", "code": 0})
    launch("resume")
    assert "workers do not answer (1 of" in capsys.readouterr().out


def test_resume_leaves_tpus_of_others_alone(gcloud, launch, capsys):
    gcloud.answer(
        "tpu-vm describe",
        out={"state": "READY", "networkEndpoints": [{"ipAddress": "10.0.0.7"}, {"ipAddress": "10.0.0.8"}]},
    )
    gcloud.workers("none")
    launch("run", "--zone=us-east5-a", "--existing", "--", *EXPERIMENT)
    gcloud.script = []
    gcloud.answer("tpu-vm describe", out={"state": "PREEMPTED"})
    assert "was not made here" in failure(capsys, launch, "resume")
    assert "was not made here" in failure(capsys, launch, "delete")
    assert not any("queued-resources" in call for call in gcloud.calls)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("ERROR: You do not currently have an active account selected.", "gcloud auth login"),
        ("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProjectPerZone' has been exceeded.", "ask for quota"),
        ("ERROR: Location us-east9-a is not found or access is unauthorized.", "accelerator-types list"),
        ("ERROR: Cloud TPU API has not been used in project 7 before or it is disabled.", "gcloud services enable tpu"),
        ("ERROR: ALREADY_EXISTS: Resource exists", "another --name"),
        ("ERROR: PERMISSION_DENIED: nope", "roles/tpu.admin"),
    ],
)
def test_a_failure_names_the_command_its_code_its_words_and_the_remedy(gcloud, launch, capsys, words, advice):
    gcloud.answer("create", err=f"first line\n{words}\n", code=7)
    told = failure(capsys, launch, "create", *MADE)
    assert "exit code 7 of: gcloud compute tpus queued-resources create mine" in told
    assert words in told
    assert advice in told.partition("remedy: ")[2]


def test_a_tpu_that_was_refused_is_not_remembered(gcloud, launch, capsys):
    gcloud.answer("create", err="ERROR: nope", code=1)
    failure(capsys, launch, "create", *MADE)
    assert failure(capsys, launch, "delete").startswith("error: nothing is remembered of mine")


def test_a_missing_gcloud_is_named_with_where_to_get_it(launch, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    told = failure(capsys, launch, "create", *MADE)
    assert "there is no gcloud on PATH" in told and "cloud.google.com/sdk" in told


def test_slices_are_asked_for_together_and_form_one_run(gcloud, launch):
    gcloud.request("ACTIVE")
    for number in range(2):
        gcloud.answer(
            f"tpu-vm describe mine-{number}",
            out={"state": "READY", "networkEndpoints": [{"ipAddress": f"10.{number}.0.1"}]},
        )
        gcloud.answer(
            f"ssh mine-{number}", "worker.py status", out=f'SUBL {{"host": "s{number}", "version": "{stamp()}"}}\n'
        )
    launch("up", *MADE, "--slices=2", "--", *EXPERIMENT)
    assert {"--node-count=2", "--node-prefix=mine"} <= set(gcloud.calls[0])
    sent = gcloud.remote("worker.py start")
    assert len(sent) == 2 and all("--hosts=10.0.0.1,10.1.0.1" in line for line in sent)
    assert (
        gcloud.verbs() == ["create", "scp", "scp", "install", "install", "start", "start"]
        or gcloud.verbs().count("start") == 2
    )


@pytest.mark.parametrize("verb", ["create", "install", "run", "up", "resume", "status", "logs", "stop", "delete"])
def test_a_dry_run_prints_shell_commands_and_runs_none(made, launch, capsys, verb):
    capsys.readouterr()
    try:
        launch(verb, "--dry_run", *(["--", *EXPERIMENT] if verb in ("run", "up") else []))
    except SystemExit as ended:
        assert not ended.code
    assert made.calls == []
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert lines and all(shlex.split(line)[0] in ("gcloud", "git") for line in lines)
    if verb == "resume":
        assert [word for word in ("create", "scp", "start") if any(word in line for line in lines)] == [
            "create",
            "scp",
            "start",
        ]


def test_delete_forgets_and_other_flags_than_the_remembered_are_refused(made, launch, capsys, tmp_path):
    assert "--zone=us-east5-b (remembered: us-east5-a)" in failure(capsys, launch, "logs", "--zone=us-east5-b")
    launch("delete")
    assert made.verbs() == ["delete"]
    assert not (tmp_path / "state" / "mine.json").exists()


def test_logs_follow_the_first_worker_or_all_and_pass_on_the_exit_code(made, launch):
    made.answer("tail", code=255)
    with pytest.raises(SystemExit) as ended:
        launch("logs", "--worker=all", "--lines=7")
    assert ended.value.code == 255
    assert "--worker=all" in made.calls[-1]
    assert made.remote("tail") == ["tail -n 7 -F subl/run.log"]


def test_an_unknown_verb_is_refused_with_the_nearest(launch, capsys):
    assert failure(capsys, launch, "resum") == "error: resum is no verb; did you mean resume?\n"


def told(*each: tuple[str, int | None]) -> list[Status]:
    return [Status(f"w-{number}", "v", state, code, 1) for number, (state, code) in enumerate(each)]


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        (told(("running", None), ("running", None)), "running"),
        (told(("running", None), ("exited", 0)), "running"),
        (told(("exited", 0), ("exited", 0)), "done"),
        (told(("exited", 75), ("exited", 1)), "failed"),
        (told(("exited", 143), ("exited", 75)), "requeue"),
        (told(("exited", 0), ("exited", 75)), "lost"),
        (told(("running", None), ("lost", None)), "lost"),
        (told(("exited", 137), ("exited", 75)), "failed"),
        (told(("exited", 0)), "lost"),
    ],
)
def test_the_workers_states_add_up(answers, verdict):
    assert resume.verdict(answers, 2) == verdict


def test_neither_launcher_imports_jax():
    seen = "import sys, launch.tpu_vm, launch.gke; sys.exit(bool({'jax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", seen], check=False).returncode == 0
