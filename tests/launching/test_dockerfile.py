"""The Dockerfile's steps, as far as they can be checked without Docker."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from subl_jax.launching.gke import manifest

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "launch" / "Dockerfile"


def steps() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    lines = [line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(word: str) -> list[str]:
    return [rest for name, rest in steps() if name == word]


def ignored(path: str) -> bool:
    """Whether the build context leaves a path of the root out: the last rule that fits decides."""
    out = False
    for line in (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines():
        rule = line.removeprefix("!").removeprefix("**/")
        if line.strip() and not line.startswith("#") and (fnmatch.fnmatch(path, rule) or path.split("/")[0] == rule):
            out = not line.startswith("!")
    return out


def test_what_is_copied_exists_and_is_in_the_context():
    sources = [source for rest in arguments("COPY") for source in rest.split()[:-1]]
    assert {"setup.py", "subl_jax", "experiments", "launch"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists() or ignored(source)] == []


@pytest.mark.parametrize("path", [".git", ".venv", "runs", "shared", "tests", "docs"])
def test_what_is_no_part_of_the_image_stays_out_of_the_context(path):
    assert ignored(path)


def test_what_setup_reads_is_there_before_it_runs():
    before = [
        rest
        for name, rest in steps()[: next(n for n, step in enumerate(steps()) if "pip install" in step[1])]
        if name == "COPY"
    ]
    read = set(re.findall(r'HERE / "([^"]+)"', (ROOT / "setup.py").read_text())) | {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
    }
    assert read <= {source for rest in before for source in rest.split()[:-1]}


def test_the_sandboxs_debian_packages_are_those_of_make():
    found = re.search(r"^SANDBOX_PACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    (apt,) = [rest for rest in arguments("RUN") if "apt-get install" in rest]
    assert sorted(found[1].split()) == sorted(re.findall(r"install [^&]*", apt)[0].split()[3:])


def test_the_base_is_the_python_of_the_constraints_and_the_user_that_of_the_manifest():
    assert arguments("FROM") == ["python:3.11-slim"]
    assert arguments("USER") == [str(manifest.USER)]
    assert any(f"useradd --uid {manifest.USER} " in rest for rest in arguments("RUN"))


def test_every_run_step_is_valid_shell():
    for rest in arguments("RUN"):
        assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest


@pytest.mark.parametrize(("extra", "wanted"), [("tpu", ".[tpu]"), ("gpu", ".[gpu]"), ("cpu", "."), ("tpus", None)])
def test_the_build_argument_chooses_the_extra_and_an_unknown_one_ends_the_build(extra, wanted):
    assert "EXTRA=cpu" in arguments("ARG")
    (install,) = [rest for rest in arguments("RUN") if "$EXTRA" in rest]
    shown = install.replace("python -m pip", "printf '%s\\n'")
    done = subprocess.run(
        ["sh", "-c", shown], check=False, capture_output=True, text=True, env={"EXTRA": extra, "PATH": "/bin:/usr/bin"}
    )
    if wanted is None:
        assert done.returncode == 1 and "none of tpu, gpu, cpu" in done.stderr
    else:
        assert done.stdout.splitlines()[-1] == wanted
        assert shlex.split("--constraint constraints.txt")[0] in done.stdout
