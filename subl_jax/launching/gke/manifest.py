"""The JobSet of a run: one job for each slice (or one for all GPU hosts), one pod for each host.

How a run ends decides what follows, by the exit codes of `parallel.contract`:

    0                    done
    143, 75, 137         the job fails for its back-off limit, and the JobSet starts all again, at most `max_restarts` times
    evicted, node gone   the same
    any other code       the job fails for its pod failure policy, and the JobSet fails with it: it would fail again

TPU hosts find one another by what GKE puts into the pods of a JobSet that ask for google.com/tpu (TPU_WORKER_*, and
MEGASCALE_* with several slices); GPU and CPU hosts by the names that the JobSet's headless service gives them.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

from subl_jax.launching.command import LaunchError
from subl_jax.launching.gke import accelerators
from subl_jax.parallel import contract

CONTAINER = "subl"
COORDINATOR_PORT = 8476
# Killed: no memory, or a grace that was too short. Worth another try where a bug is not.
KILLED = 137
RESTARTED = (contract.PEER_LOST, KILLED, contract.REQUEUE)
USER = 1000
# libtpu pins memory; a container's own limit is too small (GKE: "privileged mode" in the TPU guide).
LOCKED_MEMORY_KIB = 68719476736
# Words of commands that run the sandbox, which makes namespaces and mounts of its own: pods are usually denied that.
SANDBOXED = ("experiments.bash_chmod", "--setting=bash")
# Kubernetes allows so much for `<jobset>-<job>-<index>-<pod>-<5 random>`.
NAME_LIMIT = 63


@dataclasses.dataclass(frozen=True)
class Volume:
    """A shared place for work directories: a claim (`pvc`) or a bucket through GCS FUSE (`gcs`), mounted at `path`."""

    kind: str
    source: str
    path: str


def volume(text: str) -> Volume:
    """Reads `pvc:CLAIM:/PATH` or `gcs:BUCKET:/PATH`.

    Raises:
      LaunchError: it is neither.
    """
    found = re.fullmatch(r"(pvc|gcs):([a-z0-9][a-z0-9._-]*):(/[^:]+)", text)
    if not found:
        raise LaunchError(f"--volume={text} is none; it reads pvc:CLAIM:/PATH or gcs:BUCKET:/PATH")
    return Volume(found[1], found[2], found[3].rstrip("/"))


@dataclasses.dataclass(frozen=True)
class Request:
    """What a manifest is made of.

    Attributes:
      name, namespace, image: of the JobSet and its pods.
      accelerator: one of `accelerators.names()`.
      topology: of a TPU slice, in chips.
      slices: of them.
      hosts: of GPUs or CPUs.
      chips_per_host: of a TPU host (0: the usual), or GPUs of a host (0: all).
      cpu, memory: requests of a pod, as Kubernetes spells them; empty: none.
      service_account: of the pods; what may write to buckets.
      queue: a local queue of Kueue.
    """

    name: str
    image: str
    accelerator: str
    topology: str = ""
    slices: int = 1
    hosts: int = 1
    chips_per_host: int = 0
    namespace: str = "default"
    spot: bool = False
    volumes: tuple[Volume, ...] = ()
    cpu: str = ""
    memory: str = ""
    service_account: str = ""
    queue: str = ""
    max_restarts: int = 10
    grace_s: int = 300
    privileged: bool = False
    env: tuple[tuple[str, str], ...] = ()


def workdir(command: Sequence[str]) -> str:
    """The command's --workdir; empty if it names none."""
    for position, word in enumerate(command):
        if word in ("--workdir", "-workdir"):
            return command[position + 1] if position + 1 < len(command) else ""
        if word.startswith(("--workdir=", "-workdir=")):
            return word.partition("=")[2]
    return ""


def _check(request: Request, command: Sequence[str], longest: str) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", request.name) or len(longest) > NAME_LIMIT:
        room = NAME_LIMIT - (len(longest) - len(request.name))
        raise LaunchError(
            f"--name={request.name} is no name of a JobSet here; lower-case letters, digits and dashes, at most {room}"
        )
    if not request.image:
        raise LaunchError("--image is not given; as --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/subl_jax")
    for name, value in (("slices", request.slices), ("hosts", request.hosts)):
        if value < 1:
            raise LaunchError(f"--{name}={value}; at least 1")
    sandboxed = [word for word in command if word in SANDBOXED]
    if sandboxed and not request.privileged:
        raise LaunchError(
            f"{sandboxed[0]} runs commands in a sandbox, which an ordinary pod may not make; pass --privileged"
        )
    place = workdir(command)
    mounted = [one.path for one in request.volumes]
    if place and not any(place == path or place.startswith(f"{path}/") for path in mounted):
        where = f"is under none of {', '.join(mounted)}" if mounted else "lies in the pod, and goes with it"
        raise LaunchError(f"--workdir={place} {where}; mount a volume (--volume=pvc:CLAIM:/runs) and write below it")


def _volumes(request: Request) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of the pod, mounts of the container."""
    held: list[dict[str, Any]] = []
    for number, one in enumerate(request.volumes):
        source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": one.source}}
        if one.kind == "gcs":
            options = f"implicit-dirs,uid={USER},gid={USER}"
            attributes = {"bucketName": one.source, "mountOptions": options}
            source = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
        held.append({"name": f"work-{number}", **source})
    mounts = [{"name": f"work-{number}", "mountPath": one.path} for number, one in enumerate(request.volumes)]
    if request.accelerator in accelerators.GPUS:
        # NCCL talks through shared memory; a container's own is 64 MiB.
        held.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return held, mounts


def _security(request: Request, on_tpu: bool) -> dict[str, Any]:
    """The container's; non-root and without more rights unless something needs them."""
    if request.privileged:
        return {"privileged": True, "runAsUser": 0}
    if on_tpu:
        # Raising the limit of locked memory takes a capability, which only root gets.
        return {"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}}
    return {"runAsUser": USER, "runAsNonRoot": True, "allowPrivilegeEscalation": False}


def _environment(request: Request, job: str, hosts: int, on_tpu: bool) -> list[dict[str, Any]]:
    given: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in request.env]
    if on_tpu or hosts == 1:
        return given
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        *given,
        # <jobset>-<job>-<job index>-<pod index>.<jobset>, as JobSet names its pods.
        {"name": contract.COORDINATOR, "value": f"{request.name}-{job}-0-0.{request.name}:{COORDINATOR_PORT}"},
        {"name": contract.NUM_PROCESSES, "value": str(hosts)},
        {"name": contract.PROCESS_ID, "valueFrom": index},
    ]


def jobset(request: Request, command: Sequence[str], stamp: str = "") -> dict[str, Any]:
    """The manifest.

    Args:
      request: see there.
      command: the experiment.
      stamp: the version, kept as an annotation.

    Raises:
      LaunchError: there is no such accelerator or topology, a name is too long, or the work directory would be lost.
    """
    kind = request.accelerator
    if kind not in accelerators.names():
        raise LaunchError(f"--accelerator={kind or 'nothing'} is none; one of {', '.join(accelerators.names())}")
    on_tpu = kind in accelerators.TOPOLOGIES
    selector: dict[str, str] = {}
    limits: dict[str, Any] = {}
    tolerations: list[dict[str, Any]] = []
    job, replicas, hosts = kind if kind == accelerators.CPU else "gpu", 1, request.hosts
    if on_tpu:
        shape = accelerators.tpu_slice(kind, request.topology, request.chips_per_host)
        job, replicas, hosts = "slice", request.slices, shape.hosts
        if replicas > 1 and hosts == 1:
            raise LaunchError(
                f"--slices={replicas}: GKE joins slices of several hosts only, and {kind} {shape.topology} is one host"
            )
        selector = {
            "cloud.google.com/gke-tpu-accelerator": shape.label,
            "cloud.google.com/gke-tpu-topology": shape.topology,
        }
        limits["google.com/tpu"] = shape.chips
    elif request.topology or request.slices > 1:
        raise LaunchError(f"--topology and --slices are of TPUs; {kind} takes --hosts")
    if kind in accelerators.GPUS:
        gpu = accelerators.GPUS[kind]
        selector = {"cloud.google.com/gke-accelerator": gpu.label}
        limits["nvidia.com/gpu"] = request.chips_per_host or gpu.per_host
    if limits:
        tolerations.append({"key": next(iter(limits)), "operator": "Exists", "effect": "NoSchedule"})
    if request.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    _check(request, command, f"{request.name}-{job}-{replicas - 1}-{hosts - 1}-abcde")

    held, mounts = _volumes(request)
    asked = {name: value for name, value in (("cpu", request.cpu), ("memory", request.memory)) if value}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": request.image,
        # `exec` leaves the command as process 1, which the kubelet's SIGTERM reaches.
        "command": ["bash", "-c", f"ulimit -l {LOCKED_MEMORY_KIB} && exec {shlex.join(command)}"]
        if on_tpu
        else list(command),
        "resources": {"requests": {**asked, **limits}, "limits": limits},
        "securityContext": _security(request, on_tpu),
    }
    container |= {
        name: value
        for name, value in (("env", _environment(request, job, hosts, on_tpu)), ("volumeMounts", mounts))
        if value
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # What a run has to write its checkpoint in after SIGTERM; spot nodes give less, whatever stands here.
        "terminationGracePeriodSeconds": request.grace_s,
        "securityContext": {"fsGroup": USER},
        "containers": [container],
    }
    optional = {
        "nodeSelector": selector, "tolerations": tolerations, "volumes": held, "serviceAccountName": request.service_account,
    }  # fmt: skip
    pod |= {name: value for name, value in optional.items() if value}
    on_fuse = any(one.kind == "gcs" for one in request.volumes)
    metadata = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} if on_fuse else {}
    annotations = {"subl-jax/version": stamp} if stamp else {}
    if on_tpu and hosts > 1:
        # A slice is a node pool of its own; no two jobs may share one.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    spec = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        # A host cannot be replaced alone: the others wait for the one that left.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                # An evicted pod may end with any code; it must not count as a bug.
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "NotIn", "values": sorted(RESTARTED)},
                },
            ]
        },
        "template": {**metadata, "spec": pod},
    }
    labels = {"app.kubernetes.io/name": "subl-jax"} | (
        {"kueue.x-k8s.io/queue-name": request.queue} if request.queue else {}
    )
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": request.name, "namespace": request.namespace, "labels": labels}
        | ({"annotations": annotations} if annotations else {}),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": request.max_restarts,
                # New pods only once the old ones are gone: two of them would share one work directory.
                "restartStrategy": "BlockingRecreate",
                "rules": [{"name": "ownFailure", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": job, "replicas": replicas, "template": {"spec": spec}}],
        },
    }
