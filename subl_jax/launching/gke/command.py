"""The verbs of `launch.gke` and their flags."""

from __future__ import annotations

import sys

import yaml
from absl import flags

from subl_jax.launching import checkout, verbs
from subl_jax.launching.command import LaunchError
from subl_jax.launching.gke import accelerators, manifest
from subl_jax.launching.programs import Programs

VERBS = ("manifest", "build", "submit", "status", "logs", "delete")
# Those that take a command.
STARTING = ("manifest", "submit")
DOCKERFILE = "launch/Dockerfile"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Declares the flags; called by the program, not on import."""
    flags.DEFINE_string("name", None, "The JobSet's name.", flag_values=values)
    flags.DEFINE_string("namespace", "default", "Its namespace.", flag_values=values)
    flags.DEFINE_string("context", None, "kubectl's context; the current one if not given.", flag_values=values)
    flags.DEFINE_string(
        "image", None, "The image; without a tag, the one that `build` gives this version.", flag_values=values
    )
    flags.DEFINE_enum("accelerator", None, accelerators.names(), "TPU generation, GPU, or cpu.", flag_values=values)
    flags.DEFINE_string(
        "topology", "", "TPU: the slice's shape in chips, as 4x4 (v5e, v6e) or 2x2x4 (v5p).", flag_values=values
    )
    flags.DEFINE_integer("slices", 1, "TPU: slices of that shape, one run over all of them.", flag_values=values)
    flags.DEFINE_integer("hosts", 1, "GPU and CPU: hosts.", flag_values=values)
    flags.DEFINE_integer(
        "chips_per_host",
        0,
        "TPU: 8 for a 2x4 in one host; GPU: of each host. 0: the usual.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_bool("spot", False, "Spot nodes.", flag_values=values)
    flags.DEFINE_multi_string(
        "volume", [], "pvc:CLAIM:/PATH or gcs:BUCKET:/PATH, for --workdir; repeatable.", flag_values=values
    )
    flags.DEFINE_multi_string("env", [], "NAME=VALUE for the command; repeatable.", flag_values=values)
    flags.DEFINE_string("cpu", "", "CPUs that a pod asks for, as 32 or 500m.", flag_values=values)
    flags.DEFINE_string("memory", "", "Memory that a pod asks for, as 100Gi.", flag_values=values)
    flags.DEFINE_string(
        "service_account",
        "",
        "Kubernetes service account of the pods, for buckets (Workload Identity).",
        flag_values=values,
    )
    flags.DEFINE_string("queue", "", "A local queue of Kueue.", flag_values=values)
    flags.DEFINE_integer(
        "max_restarts",
        10,
        "Restarts of the whole after exit codes 143, 75, 137 and evictions.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "grace_s", 300, "Seconds between SIGTERM and SIGKILL, for the checkpoint.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool(
        "privileged",
        False,
        "A privileged pod: the Bash setting's sandbox; TPUs of clusters before 1.28.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "allow_dirty",
        False,
        "build: even with changes that are not committed; they get into the image.",
        flag_values=values,
    )
    flags.DEFINE_string("pod", "0", "logs: 0 (the first process) or all.", flag_values=values)
    flags.DEFINE_integer("lines", 50, "logs: so many lines of what is there.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("follow", True, "logs: go on with what comes.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Print the commands and run none.", flag_values=values)


def extra(accelerator: str) -> str:
    """The Dockerfile's EXTRA for an accelerator."""
    return "tpu" if accelerator in accelerators.TOPOLOGIES else "gpu" if accelerator in accelerators.GPUS else "cpu"


def tagged(image: str, accelerator: str, stamp: str) -> str:
    """The image with a tag: the given one, or version and extra, since a tag that moves hides which version ran."""
    if "@" in image or ":" in image.rpartition("/")[2]:
        return image
    return f"{image}:{stamp.replace('+', '-')}-{extra(accelerator)}"


def _need(**values: str | None) -> None:
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        raise LaunchError(f"{' and '.join(missing)} not given")


def text(values: flags.FlagValues, command: list[str], commit: str) -> str:
    """The manifest as YAML.

    Raises:
      LaunchError: the flags describe none.
    """
    _need(name=values.name, image=values.image, accelerator=values.accelerator)
    stamp = checkout.stamp(commit)
    pairs = [pair.partition("=") for pair in values.env]
    if bad := [name for name, sign, _ in pairs if not (sign and name)]:
        raise LaunchError(f"--env={bad[0]} is none; it reads NAME=VALUE")
    request = manifest.Request(
        name=values.name,
        image=tagged(values.image, values.accelerator, stamp),
        accelerator=values.accelerator,
        topology=values.topology,
        slices=values.slices,
        hosts=values.hosts,
        chips_per_host=values.chips_per_host,
        namespace=values.namespace,
        spot=values.spot,
        volumes=tuple(map(manifest.volume, values.volume)),
        cpu=values.cpu,
        memory=values.memory,
        service_account=values.service_account,
        queue=values.queue,
        max_restarts=values.max_restarts,
        grace_s=values.grace_s,
        privileged=values.privileged,
        env=tuple((name, value) for name, _, value in pairs),
    )
    return yaml.safe_dump(manifest.jobset(request, command, stamp), sort_keys=False, width=120)


def _kubectl(values: flags.FlagValues, *words: str) -> list[str]:
    where = [f"--context={values.context}"] if values.context else []
    return ["kubectl", *where, f"--namespace={values.namespace}", *words]


def _build(programs: Programs, values: flags.FlagValues) -> None:
    _need(image=values.image, accelerator=values.accelerator)
    stamp = checkout.stamp(checkout.head(programs, values.allow_dirty))
    image = tagged(values.image, values.accelerator, stamp)
    root = checkout.ROOT
    arguments = [f"--build-arg=EXTRA={extra(values.accelerator)}", f"--build-arg=VERSION={stamp}"]
    build = [
        "docker",
        "build",
        "--platform=linux/amd64",
        f"--file={root / DOCKERFILE}",
        *arguments,
        f"--tag={image}",
        str(root),
    ]
    programs.run(build, quiet=False)
    programs.run(["docker", "push", image], quiet=False)
    programs.note(f"pushed {image}")


def _logs(programs: Programs, values: flags.FlagValues) -> int:
    chosen = f"jobset.sigs.k8s.io/jobset-name={values.name}"
    if values.pod != "all":
        chosen += ",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    shown = [
        f"--selector={chosen}",
        f"--container={manifest.CONTAINER}",
        f"--tail={values.lines}",
        f"--follow={str(values.follow).lower()}",
    ]
    # kubectl itself stops at five pods.
    all_of_them = ["--prefix", "--max-log-requests=4096"] if values.pod == "all" else []
    return programs.run(_kubectl(values, "logs", *shown, *all_of_them), check=False, quiet=False).code


def carry_out(verb: str, command: list[str] | None, values: flags.FlagValues) -> None:
    """Carries out a verb.

    Raises:
      LaunchError: it cannot be done, or failed.
    """
    programs = Programs(values.dry_run)
    # Warnings must not get into a manifest.
    aside = Programs(say=lambda line: print(line, file=sys.stderr))
    if verb == "build":
        _build(programs, values)
        return
    _need(name=values.name)
    if verb == "manifest" and command is not None:
        print(text(values, command, checkout.head(aside, allow_dirty=True)), end="")
    if verb == "submit" and command is not None:
        written = text(values, command, checkout.head(aside, allow_dirty=True))
        programs.run(_kubectl(values, "create", "--validate=strict", "--filename=-"), text=written)
        programs.note(f"submitted; python -m launch.gke logs --name={values.name} follows it")
    if verb == "status":
        programs.run(_kubectl(values, "get", "jobset", values.name), quiet=False)
        programs.run(
            _kubectl(values, "get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={values.name}"), quiet=False
        )
    if verb == "logs":
        sys.exit(_logs(programs, values))
    if verb == "delete":
        programs.run(_kubectl(values, "delete", "jobset", values.name))
        programs.note(f"{values.name} is deleted")


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Reads the verb and carries it out; see `verbs.carried`."""
    verbs.carried(argv, VERBS, STARTING, lambda verb, command: carry_out(verb, command, values))
