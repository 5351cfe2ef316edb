"""Other people's command lines (gcloud, kubectl, docker, git): printed or run, and failures that name their remedy."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

from subl_jax.launching.command import LaunchError

# Lines of standard error that a failure shows; the cause stands in the last ones.
SHOWN_LINES = 6

INSTALL = {
    "gcloud": "install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and run: gcloud auth login",
    "kubectl": "install it with: gcloud components install kubectl gke-gcloud-auth-plugin",
    "docker": "install Docker or a compatible client, or build where it is",
    "git": "install git",
}

# What the clouds' own words mean for the person in front of them; the first that matches is shown.
REMEDIES = (
    (
        r"not currently have an active account|[Rr]eauthentication|gcloud auth login|invalid_grant"
        r"|credentials.*(expired|refresh)|UNAUTHENTICATED",
        "log in: gcloud auth login",
    ),
    (r"gke-gcloud-auth-plugin", "install it with: gcloud components install gke-gcloud-auth-plugin"),
    (r"SERVICE_DISABLED|has not been used in project", "switch the API on: gcloud services enable tpu.googleapis.com"),
    (
        r"[Qq]uota|RESOURCE_EXHAUSTED",
        "ask for quota of this accelerator in this zone (console: IAM & Admin, Quotas), take a smaller one, or another zone; "
        "spot and on-demand have separate quotas (--spot)",
    ),
    (
        r"no more capacity|not enough resources|stockout|STOCKOUT",
        "the zone has none free: wait (a queued resource does so by itself), try --spot or another zone",
    ),
    (
        r"[Ll]ocation \S+ (is not found|not found)|[Uu]nknown zone|Invalid value for field 'zone'"
        r"|zone.*(does not exist|not found)|[Aa]ccelerator type .* not found|not available in zone",
        "see which zones have it: gcloud compute tpus accelerator-types list --zone=ZONE",
    ),
    (
        r"ALREADY_EXISTS|AlreadyExists|already exists",
        "it is there already: go on with it (install), delete it first, or take another --name",
    ),
    (r"Permission denied \(publickey\)", "give the key to the agent: ssh-add ~/.ssh/google_compute_engine"),
    (
        r"PERMISSION_DENIED|[Pp]ermission '|[Ff]orbidden",
        "the account lacks a role (roles/tpu.admin for TPU VMs), or the project is wrong",
    ),
    (
        r"no matches for kind \"?JobSet",
        "the cluster lacks JobSet; install it: https://jobset.sigs.k8s.io/docs/installation/",
    ),
    (
        r"[Cc]annot connect to the Docker daemon|docker daemon is not running",
        "start the daemon, or build on a machine that has one",
    ),
    (r"denied: |unauthorized: ", "let docker push there: gcloud auth configure-docker REGION-docker.pkg.dev"),
    (
        r"connection to the server .* refused|Unable to connect to the server|current-context is not set",
        "fetch the cluster's address: gcloud container clusters get-credentials CLUSTER --location=LOCATION",
    ),
    (
        r"[Cc]onnection (refused|timed out|reset)|port 22",
        "the workers do not answer yet: wait a minute; with private addresses only, pass --internal_ip from inside the network",
    ),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended."""

    code: int
    out: str = ""
    err: str = ""


class ProgramFailed(LaunchError):
    """A program ended with an error; the message names the command, its exit code, its last words and the remedy."""

    def __init__(self, argv: Sequence[str], result: Result):
        words = [line for line in (result.err or result.out).splitlines() if line.strip()][-SHOWN_LINES:]
        shown = "".join(f"\n  {line[:400]}" for line in words)
        super().__init__(
            f"exit code {result.code} of: {shlex.join(argv)}{shown}\nremedy: {remedy(result.err + result.out)}"
        )
        self.result = result


def remedy(words: str) -> str:
    """What to do about an error, by the words of the program that met it."""
    for pattern, advice in REMEDIES:
        if re.search(pattern, words):
            return advice
    return "run the command above by itself; --verbosity=debug says more for gcloud, -v=6 for kubectl"


class Programs:
    """Runs programs, or only prints them so that they can be copied into a shell."""

    def __init__(self, dry_run: bool = False, say: Callable[[str], None] = print):
        """Runs programs.

        Args:
          dry_run: print instead of running; every command then seems to succeed without output.
          say: takes a line for the person in front.
        """
        self.dry_run = dry_run
        self.say = say

    def note(self, line: str) -> None:
        """Says what happens; in a dry run as a comment, so that the whole output stays a script."""
        self.say(f"# {line}" if self.dry_run else line)

    def run(self, argv: Sequence[str], check: bool = True, text: str | None = None, quiet: bool = True) -> Result:
        """Runs a program to its end.

        Args:
          argv: the program and its arguments; no shell sees them.
          check: whether an exit code other than 0 is an error.
          text: its standard input, if any.
          quiet: keep what it prints for the result; else it goes to the terminal.

        Raises:
          LaunchError: it is not installed, or (with `check`) failed.
        """
        if self.dry_run:
            self.say(shlex.join(argv) if text is None else f"{shlex.join(argv)} <<'EOF'\n{text.rstrip()}\nEOF")
            return Result(0)
        stream = subprocess.PIPE if quiet else None
        try:
            # An empty input where none is given: none of them may wait for an answer.
            done = subprocess.run(
                list(argv), input=text or "", text=True, errors="replace", stdout=stream, stderr=stream
            )
        except FileNotFoundError:
            raise LaunchError(f"there is no {argv[0]} on PATH; {INSTALL.get(argv[0], 'install it')}") from None
        result = Result(done.returncode, done.stdout or "", done.stderr or "")
        if check and result.code:
            raise ProgramFailed(argv, result)
        return result
