"""Runs a snippet in an interpreter without the type-checking import hook, which slows these generators thirtyfold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def in_plain_python(code: str, **environment: str) -> str:
    """What the snippet prints; its failure is the test's."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
