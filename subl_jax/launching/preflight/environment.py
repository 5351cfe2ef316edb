"""What must be in the environment before JAX is imported, for compiling for TPUs on a machine without one. Imports no JAX."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

# JAX itself stays on the CPU, libtpu looks for no TPU and asks no metadata server, and several processes may compile at once
# (libtpu locks /tmp/libtpu_lockfile for the TPU that it thinks it drives).
ABSENT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    # libtpu's own account of what it does not find here.
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
LOCAL = "local"


def prepare(argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets what is not set, unless the programs are compiled for the devices that are here (`--topology=local`)."""
    if not any(text.lstrip("-") == f"topology={LOCAL}" for text in argv):
        for name, value in ABSENT_TPU.items():
            environ.setdefault(name, value)
