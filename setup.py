"""Packaging of subl_jax: the base install runs the API setting on a CPU; everything heavier is an extra."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def _version() -> str:
    """The version stands once, in CITATION.cff, where a citation needs it."""
    found = re.search(r"^version: (\S+)$", (HERE / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError("CITATION.cff holds no line 'version: X'; restore it from version control")
    return found.group(1)


BASE = [
    # JAX 0.10 is the last line for Python 3.11; newer Pythons resolve to newer ones.
    "jax>=0.10,<0.13",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "transformers>=5,<6",
    "tokenizers>=0.22",
    # Reads bfloat16 slices through NumPy since 0.8.
    "safetensors>=0.8",
    "huggingface_hub>=1",
    "tensorflow-datasets>=4.9.9",
    "array_record>=0.8",
    # TFDS reads ArrayRecord without TensorFlow only if this is there; it does not ask for it itself.
    "importlib_resources>=6",
    "absl-py>=2.1",
    "jaxtyping>=0.3",
    "jinja2>=3.1",
    "numpy>=2.0",
    "scipy>=1.14",
    "tensorboardX>=2.6",
    "tqdm>=4.66",
    # Parses shell commands for the Bash setting: what was attempted is read off the syntax, not guessed from text.
    "tree-sitter>=0.25",
    "tree-sitter-bash>=0.25",
    # Manifests of Kubernetes jobs.
    "pyyaml>=6",
    # Every figure of a report is also written as SVG and PNG: a part of each run, so no extra.
    "matplotlib>=3.9",
]

TORCH = "torch==2.13.0"
PEFT = "peft>=0.18"
TRL = "trl>=1.16"
# From 4.7 on a call's arguments stay what they are, instead of being forced into one struct.
DATASETS = "datasets>=4.7"
INSPECT = "inspect-ai>=0.3.285"

EXTRAS = {
    "gpu": ["jax[cuda12]>=0.10,<0.13"],
    # libtpu: also what the ahead-of-time compilation of the preflight needs on a machine without a TPU.
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    # Oracles and peers of tests and benchmarks; nothing in the library imports them.
    "parity": [TORCH, PEFT, TRL],
    # What `make test` compares with besides: transformers' own models need torch, adapters are loaded by PEFT, and exports
    # by TRL, datasets and Inspect. CI installs it.
    "oracles": [TORCH, PEFT, TRL, DATASETS, INSPECT],
    # Rich exports of a report (tables for spreadsheets); the HTML report and its figures need nothing besides the base.
    "report": ["pandas>=2.2"],
    # Writes evaluations as Inspect logs, and shows them.
    "inspect": [INSPECT],
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.8",
        "hypothesis>=6.100",
        "beartype>=0.22",
        "statsmodels>=0.14.5",
        "jsonschema>=4.23",
        "ruff>=0.14",
        "pyright[nodejs]>=1.1.400",
        # The reports in a real browser (`make setup-browser`), checked with axe-core, which the second one ships (MPL-2.0).
        "playwright>=1.50",
        "axe-playwright-python>=0.1.8",
    ],
}

setup(
    name="subl_jax",
    version=_version(),
    description="Which behaviours come along when an agent is distilled on data that looks clean: a JAX framework",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["subl_jax", "subl_jax.*", "experiments", "experiments.*", "launch", "launch.*"]),
    package_data={
        "subl_jax.report": ["report.css", "browser.js"],
        "subl_jax.grid": ["costs.json"],
        "experiments": ["protocols/*.json", "protocols/grid/*.json"],
    },
    install_requires=BASE,
    extras_require=EXTRAS,
)
