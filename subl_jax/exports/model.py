"""A student as a Hugging Face folder with its card: what `transformers` loads, and what it is.

A finished seed and a student's name in; config.json, safetensors, the tokenizer and README.md out. Adapters are merged into
their base.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from subl_jax import artifacts, checkpoint
from subl_jax.artifacts import Marker
from subl_jax.exports.behaviour import Difference, Line, differences, lines
from subl_jax.exports.finished import ExportError, FinishedSeed
from subl_jax.metrics.progress import progress
from subl_jax.models import hf_export, hf_import, lora
from subl_jax.models.config import ModelConfig
from subl_jax.models.families import HuggingFaceError, family_of


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the card says, each from an artifact.

    Attributes:
      model: the student's name on disk.
      markers: role -> marker: "student", "teacher", "base", and "sanitize" where its data was sanitized.
      config: its shape.
      parameters: how many; architecture: the class of transformers that loads it; dtype: as written.
      merged: whether adapters were merged into the base.
      imported: the Hugging Face folder that the base came from; None for one that was trained from scratch.
      measured, compared: see `exports.behaviour`.
      tokenizer: its fingerprint.
      preset, protocol: of the run, None where it does not say.
      source: the student's directory; command: what wrote the export.
    """

    model: str
    markers: Mapping[str, Marker]
    config: ModelConfig
    parameters: int
    architecture: str
    dtype: str
    merged: bool
    imported: str | None
    measured: Sequence[Line]
    compared: Sequence[Difference]
    tokenizer: str | None
    preset: str | None
    protocol: str | None
    source: str
    command: str


def check(run: FinishedSeed, model: str) -> None:
    """Refuses, before anything is written, what is no finished student.

    Raises:
      ExportError: it is no student (convert exports any other checkpoint), its stages do not fit together, or transformers
        has no class for its shape.
    """
    if model not in run.students:
        raise ExportError(
            f"{model} is no student of {run.root}, which has {', '.join(run.students) or 'none'}; any other checkpoint is "
            "exported by python -m subl_jax.models.convert export"
        )
    marker = run.student(model)
    run.marker(run.teacher_of(marker))
    run.marker(run.base_of(marker))
    parameters = run.root / "students" / model / "params"
    try:
        family_of(ModelConfig.from_dict(checkpoint.read_metadata(parameters)["model"]))
    except (checkpoint.CheckpointError, HuggingFaceError) as error:
        raise ExportError(
            f"{model} has no Hugging Face form: {error}; its dataset and its Inspect log can be exported (--what)"
        ) from error


def export(run: FinishedSeed, model: str, directory: Path, command: str) -> Facts:
    """Writes the Hugging Face folder of a student, and its card.

    Args:
      run, model: which; see `check`.
      directory: the folder to make; it must not exist, or be empty.
      command: what the card names as its origin.

    Raises:
      ExportError: see `check`; or the checkpoint or the folder is not to be used, with the cause.
    """
    from subl_jax.exports import model_card

    check(run, model)
    marker = run.student(model)
    base = run.marker(run.base_of(marker))
    parameters = run.root / "students" / model / "params"
    imported = base.extra.get("checkpoint")
    try:
        metadata = checkpoint.read_metadata(parameters)
        if metadata.get("lora"):
            below = Path(imported) if imported else run.place(run.base_of(marker)) / "params"
            config, params = lora.merge_checkpoint(parameters, below)
        else:
            config = ModelConfig.from_dict(metadata["model"])
            params, _ = checkpoint.load_model(parameters)
        leaves = jax.tree.leaves(params)
        size = sum(leaf.nbytes for leaf in leaves)
        tokenizer = run.tokenizer_folder(metadata["tokenizer"])
        with progress(size, f"{model}: weights", unit="B") as shown:
            hf_export.export_folder(
                directory,
                config,
                params,
                tokenizer=tokenizer,
                max_position_embeddings=_longest(imported),
                report=shown.advance,
            )
    except (checkpoint.CheckpointError, HuggingFaceError) as error:
        raise ExportError(f"{parameters}: {error}") from error
    facts = Facts(
        model=model,
        markers=_markers(run, marker),
        config=config,
        parameters=sum(leaf.size for leaf in leaves),
        architecture=family_of(config).architecture,
        dtype=str(leaves[0].dtype),
        merged=bool(metadata.get("lora")),
        imported=imported,
        measured=lines(run, model),
        compared=differences(run, model),
        tokenizer=metadata.get("tokenizer"),
        preset=run.config().get("preset"),
        protocol=run.protocol_hash(),
        source=str(run.root / "students" / model),
        command=command,
    )
    artifacts.write_text_atomic(directory / "README.md", model_card.render(facts))
    return facts


def _markers(run: FinishedSeed, marker: Marker) -> dict[str, Marker]:
    """The stages that a student is made of."""
    found = {
        "student": marker,
        "teacher": run.marker(run.teacher_of(marker)),
        "base": run.marker(run.base_of(marker)),
    }
    for stage in run.inputs_of(marker, "sanitize"):
        found["sanitize"] = run.marker(stage)
    return found


def _longest(imported: str | None) -> int:
    """The longest context that an imported base tells; a modest one for an organism."""
    path = Path(imported or "") / hf_import.CONFIG
    if imported and path.is_file():
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return told.get("max_position_embeddings") or hf_export.MAX_POSITION_EMBEDDINGS
    return hf_export.MAX_POSITION_EMBEDDINGS
