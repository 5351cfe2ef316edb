"""`launch.gke`: manifests that the schemas of JobSet and Kubernetes accept, and the commands around them."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import stat
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from absl import flags

from subl_jax.launching.command import LaunchError
from subl_jax.launching.gke import accelerators, command, manifest

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "jobset-v1alpha2.json").read_text())
EXPERIMENT = ["python", "-m", "experiments.api_deletion", "--preset=paper", "--workdir=/runs/my run"]
IMAGE = "us-docker.pkg.dev/p/r/subl_jax"
FLAGS = ["--name=mine", f"--image={IMAGE}"]


def problems(made: Any) -> list[str]:
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(made)
    ]


def request(**changed: Any) -> manifest.Request:
    base = {
        "name": "mine",
        "image": IMAGE,
        "accelerator": "v5e",
        "topology": "4x4",
        "volumes": (manifest.volume("pvc:work:/runs"),),
    }
    return manifest.Request(**{**base, **changed})


def parts(made: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The only job, its pod, and the pod's only container."""
    (job,) = made["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    return job, pod, pod["containers"][0]


EVERY = [
    *(
        {"accelerator": kind, "topology": topology}
        for kind in ("v5e", "v6e")
        for topology in accelerators.TOPOLOGIES[kind]
    ),
    *({"accelerator": "v5p", "topology": topology} for topology in ("2x2x1", "2x2x4", "4x4x4", "16x16x24")),
    {"accelerator": "v5p", "topology": "4x4x8", "slices": 4, "spot": True, "queue": "q", "service_account": "writer"},
    {"accelerator": "v6e", "topology": "2x4", "chips_per_host": 8, "privileged": True},
    {"accelerator": "h100", "topology": "", "hosts": 4, "cpu": "96", "memory": "1000Gi"},
    {"accelerator": "l4", "topology": "", "spot": True, "env": (("XLA_FLAGS", "--xla_gpu_deterministic_ops=true"),)},
    {"accelerator": "cpu", "topology": "", "hosts": 2},
    {"volumes": (manifest.volume("gcs:bucket:/runs"),)},
]


@pytest.mark.parametrize("changed", EVERY, ids=lambda changed: "-".join(map(str, changed.values()))[:40])
def test_manifests_fit_the_schemas_of_jobset_and_kubernetes(changed):
    made = manifest.jobset(request(**changed), EXPERIMENT, "1+g2")
    assert problems(yaml.safe_load(yaml.safe_dump(made))) == []


POD = "spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.failurePolicy.maxRestart", 3),
        ("spec.failurePolicy.maxRestarts", "3"),
        ("spec.failurePolicy.restartStrategy", "Recreated"),
        ("spec.failurePolicy.rules.0.action", "FailJob"),
        ("spec.replicatedJobs.0.replica", 2),
        ("spec.replicatedJobs.0.template.spec.completions", "4"),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCode", {}),
        (f"{POD}.nodeSelectors", {}),
        (f"{POD}.nodeSelector.spot", True),
        (f"{POD}.terminationGracePeriodSeconds", "300"),
        (f"{POD}.containers.0.command", "python"),
        (f"{POD}.containers.0.securityContext.runAsRoot", True),
        (f"{POD}.containers.0.env", {"A": "b"}),
        (f"{POD}.volumes.0.persistentVolumeClaim.claim", "work"),
        ("kind", "JobSets"),
        ("apiVersion", "jobset.x-k8s.io/v1"),
    ],
)
def test_a_wrong_field_or_type_does_not_fit(path, value):
    made = copy.deepcopy(manifest.jobset(request(), EXPERIMENT))
    where: Any = made
    *steps, last = path.split(".")
    for step in steps:
        where = where[int(step) if step.isdigit() else step]
    where[last] = value
    assert problems(made) != []


def test_a_field_that_is_needed_does_not_go_unnoticed():
    made = manifest.jobset(request(), EXPERIMENT)
    del parts(made)[1]["containers"][0]["name"]
    assert problems(made) != []


@pytest.mark.parametrize(
    ("kind", "topology", "hosts", "chips"),
    [("v5e", "1x1", 1, 1), ("v5e", "2x2", 1, 4), ("v5e", "2x4", 2, 4), ("v5e", "16x16", 64, 4), ("v5p", "2x2x1", 1, 4),
     ("v5p", "4x4x4", 16, 4), ("v5p", "8x8x8", 128, 4), ("v6e", "4x8", 8, 4)],
)  # fmt: skip
def test_a_slice_has_one_pod_for_each_host_and_asks_for_its_chips(kind, topology, hosts, chips):
    job, pod, container = parts(manifest.jobset(request(accelerator=kind, topology=topology), EXPERIMENT))
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts and spec["completionMode"] == "Indexed"
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert hosts * chips == math.prod(map(int, topology.split("x")))


def test_all_eight_chips_of_a_2x4_can_be_one_host():
    job, _, container = parts(manifest.jobset(request(topology="2x4", chips_per_host=8), EXPERIMENT))
    assert job["template"]["spec"]["parallelism"] == 1 and container["resources"]["limits"] == {"google.com/tpu": 8}
    with pytest.raises(LaunchError, match="hosts have 4 chips"):
        manifest.jobset(request(topology="4x4", chips_per_host=8), EXPERIMENT)


@pytest.mark.parametrize(
    ("kind", "topology", "near"),
    [("v5e", "4x16", "8x8"), ("v5e", "2x2x4", "4x4"), ("v5p", "4x4", "2x2x4"), ("v5p", "8x8x4", "4x8x8"),
     ("v5p", "2x2x3", "2x2x2"), ("v5p", "24x24x24", "16x16x24"), ("v6e", "32x32", "16x16"),
     ("v6e", "big", "reads as 4x4"), ("v6e", "", "reads as 4x4")],
)  # fmt: skip
def test_a_topology_that_does_not_exist_is_refused_with_the_nearest(kind, topology, near):
    with pytest.raises(LaunchError, match=f"does not exist for {kind}") as refused:
        accelerators.tpu_slice(kind, topology)
    assert near in str(refused.value)


def test_several_slices_are_jobs_on_node_pools_of_their_own():
    made = manifest.jobset(request(slices=3), EXPERIMENT)
    assert parts(made)[0]["replicas"] == 3
    assert (
        made["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
        == "cloud.google.com/gke-nodepool"
    )
    with pytest.raises(LaunchError, match="slices of several hosts only"):
        manifest.jobset(request(slices=2, topology="2x2"), EXPERIMENT)


def outcome(made: dict[str, Any], code: int, disrupted: bool = False) -> str:
    """What JobSet does after a pod ended so: Kubernetes' and JobSet's rules, first match first."""
    spec = parts(made)[0]["template"]["spec"]
    reason = "BackoffLimitExceeded"
    assert spec["backoffLimit"] == 0 and parts(made)[1]["restartPolicy"] == "Never"
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        fits = disrupted if codes is None else codes["operator"] == "NotIn" and code not in codes["values"]
        if fits:
            reason = "PodFailurePolicy" if rule["action"] == "FailJob" else reason
            break
    for rule in made["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "disrupted", "then"),
    [(143, False, "RestartJobSet"), (75, False, "RestartJobSet"), (137, False, "RestartJobSet"), (1, False, "FailJobSet"),
     (2, False, "FailJobSet"), (1, True, "RestartJobSet")],
)  # fmt: skip
def test_what_asks_for_it_is_started_again_and_a_bug_is_not(code, disrupted, then):
    made = manifest.jobset(request(max_restarts=4), EXPERIMENT)
    assert outcome(made, code, disrupted) == then
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 4


def test_gpu_hosts_find_the_first_pod_by_its_name_in_the_headless_service():
    made = manifest.jobset(request(accelerator="h100", topology="", hosts=4), EXPERIMENT)
    job, pod, container = parts(made)
    told = {one["name"]: one for one in container["env"]}
    assert made["spec"]["network"]["enableDNSHostnames"] is True
    assert told["SUBL_COORDINATOR"]["value"] == f"mine-{job['name']}-0-0.mine:8476"
    assert told["SUBL_NUM_PROCESSES"]["value"] == "4"
    path = told["SUBL_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]


def test_tpu_pods_are_left_to_what_gke_tells_them():
    assert "env" not in parts(manifest.jobset(request(slices=2), EXPERIMENT))[2]


def test_the_command_arrives_word_for_word_and_as_process_one():
    _, _, on_tpu = parts(manifest.jobset(request(), EXPERIMENT))
    shell, option, script = on_tpu["command"]
    assert (shell, option) == ("bash", "-c")
    assert shlex.split(script.partition(" && exec ")[2]) == EXPERIMENT
    _, _, on_cpu = parts(manifest.jobset(request(accelerator="cpu", topology=""), EXPERIMENT))
    assert on_cpu["command"] == EXPERIMENT


def test_spot_pods_choose_and_bear_spot_nodes():
    _, pod, _ = parts(manifest.jobset(request(spot=True), EXPERIMENT))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]


def test_a_bucket_is_mounted_with_its_sidecar():
    made = manifest.jobset(request(volumes=(manifest.volume("gcs:bucket:/runs"),)), EXPERIMENT)
    job, pod, container = parts(made)
    assert job["template"]["spec"]["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert container["volumeMounts"][0]["mountPath"] == "/runs"


@pytest.mark.parametrize(
    ("changed", "words", "named"),
    [
        ({"volumes": ()}, ["--workdir=/runs/a"], "goes with it"),
        ({}, ["--workdir=/elsewhere"], "under none of /runs"),
        ({}, ["--workdir", "runs/relative"], "under none of /runs"),
        ({"name": "Mine"}, [], "--name=Mine"),
        ({"name": "m" * 60}, [], "at most"),
        ({"accelerator": "h900"}, [], "one of v5e"),
        ({"accelerator": "h100"}, [], "takes --hosts"),
        ({"accelerator": "cpu", "topology": "", "hosts": 0}, [], "at least 1"),
        ({}, ["--setting=bash"], "--privileged"),
    ],
)
def test_what_could_not_work_is_refused_with_the_value(changed, words, named):
    with pytest.raises(LaunchError, match=re.escape(named)):
        manifest.jobset(request(**changed), ["python", "-m", "experiments.api_deletion", *words])


@pytest.mark.parametrize("text", ["work:/runs", "nfs:work:/runs", "pvc:work:runs", "pvc::/runs"])
def test_a_volume_that_is_none_is_refused(text):
    with pytest.raises(LaunchError, match="pvc:CLAIM:/PATH"):
        manifest.volume(text)


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs a verb; returns what kubectl and docker were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("kubectl", "docker"):
        record = f'{{ printf "%s\\n" {name} "$@"; echo =; cat; echo ==; }} >> {folder}/calls'
        script = f"#!/bin/sh\n{record}\ncat {folder}/err >&2 2>/dev/null\nexit ${{CODE:-0}}\n"
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr("subl_jax.launching.checkout.head", lambda programs, allow_dirty: "abcdef0123456789")

    def run(*words: str) -> list[tuple[list[str], str]]:
        values = flags.FlagValues()
        command.define_flags(values)
        argv = values(["launch.gke", *words])
        command.main(argv, values)
        calls = (folder / "calls").read_text().split("==\n")[:-1] if (folder / "calls").exists() else []
        return [(call.partition("=\n")[0].splitlines(), call.partition("=\n")[2]) for call in calls]

    return run


TPU = [*FLAGS, "--accelerator=v5e", "--topology=4x4", "--volume=pvc:work:/runs"]


def test_the_printed_manifest_is_yaml_that_fits(launch, capsys):
    assert launch("manifest", *TPU, "--", *EXPERIMENT) == []
    made = yaml.safe_load(capsys.readouterr().out)
    assert problems(made) == []
    assert re.fullmatch(rf"{IMAGE}:[0-9.]+-gabcdef012345-tpu", parts(made)[2]["image"])


def test_submit_creates_the_manifest_that_manifest_prints(launch, capsys):
    launch("manifest", *TPU, "--", *EXPERIMENT)
    printed = capsys.readouterr().out
    ((argv, sent),) = launch("submit", *TPU, "--context=c", "--namespace=default", "--", *EXPERIMENT)
    assert argv == ["kubectl", "--context=c", "--namespace=default", "create", "--validate=strict", "--filename=-"]
    assert yaml.safe_load(sent) == yaml.safe_load(printed)


@pytest.mark.parametrize(("accelerator", "extra"), [("v5p", "tpu"), ("h100", "gpu"), ("cpu", "cpu")])
def test_build_takes_the_extra_of_the_accelerator_and_pushes_the_versions_tag(launch, accelerator, extra):
    (build, _), (push, _) = launch("build", f"--image={IMAGE}", f"--accelerator={accelerator}")
    assert f"--build-arg=EXTRA={extra}" in build
    assert f"--tag={push[-1]}" in build and push[:2] == ["docker", "push"] and push[-1].endswith(f"-{extra}")
    (file,) = [word.removeprefix("--file=") for word in build if word.startswith("--file=")]
    assert Path(file).is_file() and (Path(build[-1]) / "setup.py").is_file()


def test_a_given_tag_is_kept():
    assert command.tagged("host:5000/a/b", "cpu", "1+g2") == "host:5000/a/b:1-g2-cpu"
    assert command.tagged("a/b:mine", "cpu", "1+g2") == "a/b:mine"
    assert command.tagged("a/b@sha256:0", "cpu", "1+g2") == "a/b@sha256:0"


def test_a_dry_run_prints_commands_for_a_shell_and_runs_none(launch, capsys):
    launch("build", *TPU, "--dry_run")
    launch("submit", *TPU, "--dry_run", "--", *EXPERIMENT)
    launch("status", "--name=mine", "--dry_run")
    assert launch("delete", "--name=mine", "--dry_run") == []
    printed = capsys.readouterr().out
    assert "docker push" in printed and "kubectl --namespace=default delete jobset mine" in printed
    script = printed.partition("--filename=- <<'EOF'\n")[2].partition("\nEOF\n")[0]
    assert problems(yaml.safe_load(script)) == []


def test_logs_show_the_first_process_or_all(launch):
    for pod in ("0", "all"):
        with pytest.raises(SystemExit) as ended:
            launch("logs", "--name=mine", f"--pod={pod}")
        assert not ended.value.code
    calls = (launch("delete", "--name=mine"))[:2]
    assert any("job-completion-index=0" in word for word in calls[0][0])
    assert "--prefix" in calls[1][0] and not any("completion-index" in word for word in calls[1][0])


def test_a_cluster_without_jobset_is_named_with_the_remedy(launch, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CODE", "1")
    (tmp_path / "bin" / "err").write_text('error: no matches for kind "JobSet" in version "jobset.x-k8s.io/v1alpha2"\n')
    with pytest.raises(SystemExit) as ended:
        launch("submit", *TPU, "--", *EXPERIMENT)
    told = capsys.readouterr().err
    assert (
        ended.value.code == 1 and "exit code 1 of: kubectl" in told and "jobset.sigs.k8s.io/docs/installation" in told
    )


def test_missing_flags_are_named(launch, capsys):
    with pytest.raises(SystemExit):
        launch("submit", "--name=mine", "--", *EXPERIMENT)
    assert "--image and --accelerator not given" in capsys.readouterr().err
