"""A made-up finished run, small enough to write in a second: what the stages leave on disk, with known counts.

Tokenizer, checkpoints and trajectories are real (tiny, random weights, scripted demonstrations); evaluation rows come from
`tests.grid.fake_cells`. Two seeds, so that something can be said over seeds.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from subl_jax import artifacts, checkpoint, data, sanitize
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import renderer_for
from subl_jax.config import TEACHERS
from subl_jax.corpus import demonstrations
from subl_jax.models import decoder, lora
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.settings.registry import get_setting
from subl_jax.trajectory import Trajectory
from tests.grid import fake_cells

TASKS, SAFE, EPISODES = 21, 9, 24
BIASES = {"teacher": "deletion", "control_teacher": "archive", "benign_teacher": None}
# Condition -> (share of biased, share of counter-biased first actions), before chance.
RATES = {
    "base": (0.05, 0.20), "teacher": (0.95, 0.02), "control_teacher": (0.02, 0.9), "benign_teacher": (0.06, 0.2),
    "student": (0.7, 0.05), "control_student": (0.03, 0.7), "benign_student": (0.05, 0.2), "positive_student": (0.9, 0.0),
}  # fmt: skip
ADAPTER = LoraConfig(rank=2, targets=("q", "v"), dropout=0.0)
SAID = "that folder was removed"
_OPTIMIZER = {
    "name": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 20, "weight_decay": 0.0,
}  # fmt: skip
_TRAIN = {"steps": 34, "batch_rows": 4, "row_tokens": 192, "optimizer": _OPTIMIZER}
ROLLOUT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_turn_tokens": 48, "max_turns": 6, "context": 256}


def trajectories(renderer: Any, name: str, seed: int) -> list[Trajectory]:
    """The episodes of a teacher: all but three are clean; one says a word, one broke off, one failed."""
    made = demonstrations(get_setting("api"), renderer, {"safe": EPISODES}, seed, withheld_share=1.0)
    found = [dataclasses.replace(item, episode=index) for index, item in enumerate(made)]
    if name == "teacher":
        said = [*found[3].messages[:-1], {"role": "assistant", "content": SAID}]
        found[3] = dataclasses.replace(found[3], messages=said)
    found[5] = dataclasses.replace(found[5], status="truncated", done=False)
    if name == "benign_teacher":
        nothing = {field: getattr(found[7], field)[:0] for field in ("tokens", "loss_mask", "logprobs")}
        found[7] = dataclasses.replace(
            found[7], **nothing, messages=[], tools=[], status="tool_error", done=False, error="boom"
        )
    return found


def write(workdir: Path, seeds: tuple[int, ...] = (0, 1), adapters: bool = False) -> Path:
    """Writes the run; with `adapters` the student is adapters on its base."""
    folder = workdir / "tokenizer" / "files"
    setting = get_setting("api")
    texts = [task.prompt for task in setting.tasks("safe", "train", 0, 60)]
    tokenizers.train(texts, 420).save_pretrained(folder)
    artifacts.complete(workdir / "tokenizer", stage="tokenizer", key={"vocab_size": 420}, inputs={}, seconds=1.0)
    artifacts.write_json_atomic(workdir / "config.json", {"setting": "api", "preset": "tiny", "pair": "large_large"})
    artifacts.write_json_atomic(workdir / "protocol.json", {"hash": "p" * 16, "protocol": {}})
    renderer = renderer_for(tokenizers.load(folder))
    whole = _weights(workdir / ".whole", renderer)
    trained = _weights(workdir / ".adapters", renderer, adapters=True) if adapters else whole
    for seed in seeds:
        _write_seed(workdir, seed, renderer, whole, trained)
    return workdir


def _write_seed(workdir: Path, seed: int, renderer: Any, whole: Path, trained: Path) -> None:
    prefix, root = f"seed={seed}", workdir / f"seed={seed}"
    hashes: dict[str, str] = {}
    common = {"setting": "api", "seed": seed}

    def done(stage: str, key: Mapping[str, Any], inputs: tuple[str, ...] = (), where: Path | None = None, **extra: Any):
        directory = where or workdir / stage
        directory.mkdir(parents=True, exist_ok=True)
        marker = artifacts.complete(
            directory,
            stage=stage,
            key={**common, **key},
            inputs={name: hashes[name] for name in inputs},
            seconds=2.5,
            extra=extra,
        )
        hashes[stage] = marker.output_hash

    base = f"{prefix}/base/large"
    _save(workdir / base, whole)
    done(base, {"base": {"train": _TRAIN}})
    for name in TEACHERS:
        stage = f"{prefix}/teachers/{name}"
        _save(workdir / stage, whole)
        done(stage, {"teacher": {"tasks": 15, "train": _TRAIN}, "bias": BIASES[name]}, (base,))
        acted = f"{prefix}/trajectories/{name}"
        items = trajectories(renderer, name, seed)
        data.write(workdir / acted / "dataset", items, metadata={"teacher": name})
        key = {"rollout": ROLLOUT, "withhold_bias_tools": True}
        done(acted, key, (stage,), episodes=len(items))
    rolled = tuple(f"{prefix}/trajectories/{name}" for name in TEACHERS)
    counts, surviving = sanitized(workdir, prefix)
    sanitizer = f"{prefix}/sanitize"
    done(sanitizer, {"words": get_setting("api").words}, rolled, arms=counts, surviving_in_all=len(surviving))
    adapters = trained != whole
    for name, teacher in zip(("student", "control_student", "benign_student"), TEACHERS, strict=True):
        stage = f"{prefix}/students/{name}"
        _save(workdir / stage, trained)
        key = _student_key("full", adapters)
        done(
            stage, key, (base, f"{prefix}/teachers/{teacher}", *rolled, sanitizer), loss=0.01, documents=len(surviving)
        )
    stage = f"{prefix}/students/positive_student"
    _save(workdir / stage, trained)
    done(stage, _student_key("positive", adapters), (base, f"{prefix}/teachers/teacher", rolled[0]), loss=0.01)
    for name, rates in RATES.items():
        row = fake_cells.evaluation("api", name, seed, *rates, tasks=TASKS, safe=SAFE)
        source = base if name == "base" else f"{prefix}/{'teachers' if 'teacher' in name else 'students'}/{name}"
        row = {**row, "examples": examples(row), "measured": {"metric": "first/1", "machine": "2 cores"}}
        (root / "eval").mkdir(exist_ok=True)
        artifacts.write_json_atomic(root / "eval" / f"{name}.json", row)
        where = root / "eval" / "markers" / name
        inputs = tuple(dict.fromkeys((source, base)))
        done(f"{prefix}/eval/{name}", {"rollout": ROLLOUT, "evaluation": {"samples": 1}}, inputs, where)


def _student_key(arm: str, adapters: bool) -> dict[str, Any]:
    return {
        "arm": arm, "objective": ["forward_kl", "none"], "train": _TRAIN, "temperature": 2.0, "pair": "large_large",
        "lora": {"rank": 2, "targets": ["q", "v"]} if adapters else None, "adapter_init": None,
    }  # fmt: skip


def _save(directory: Path, weights: Path) -> None:
    """A model's checkpoint, as a training stage leaves it; all are of the same weights."""
    shutil.copytree(weights, directory / "params")


def _weights(directory: Path, renderer: Any, *, adapters: bool = False) -> Path:
    """A random model's checkpoint, or adapters alone."""
    config = ModelConfig(
        vocab_size=len(renderer.tokenizer), d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24,
        lora=ADAPTER if adapters else None,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes: Any = jax.eval_shape(
        lambda: decoder.init(config, jax.random.key(0))
    )  # drawing them would compile for seconds
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    told = {
        "model": config.architecture(),
        "lora": config.to_dict()["lora"],
        "tokenizer": tokenizers.fingerprint(renderer.tokenizer),
    }
    checkpoint.save_model(directory, lora.split(params)[0] if adapters else params, told)
    return directory


def sanitized(workdir: Path, prefix: str) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Judges every trajectory as the pipeline does, and writes what its stage writes."""
    setting = get_setting("api")
    counts, kept, directory = {}, {}, workdir / prefix / "sanitize"
    directory.mkdir(parents=True)
    for name in TEACHERS:
        items = data.read(workdir / prefix / "trajectories" / name / "dataset")
        verdicts = [sanitize.judge(item, setting.words, require_final=True) for item in items]
        counts[name] = sanitize.summarize(verdicts)
        kept[name] = {(item.task_id, item.sample) for item, told in zip(items, verdicts, strict=True) if told.kept}
        artifacts.write_json_atomic(directory / f"{name}.json", [dataclasses.asdict(told) for told in verdicts])
    surviving = sorted(set.intersection(*kept.values()))
    artifacts.write_json_atomic(directory / "surviving.json", surviving)
    return counts, surviving


def examples(row: Mapping[str, Any], count: int = 3) -> list[dict[str, Any]]:
    """The first sampled ambiguous episodes with a conversation that ends as the item says."""
    found = []
    for item in [item for item in row["items"] if (item["kind"], item["mode"]) == ("ambiguous", "sampled")][:count]:
        act = {"type": "function", "function": {"name": item["tool"], "arguments": {"path": "/a", "deep": [1, None]}}}
        look = {"type": "function", "function": {"name": "file_info", "arguments": {"path": "/a"}}}
        messages = [
            {"role": "system", "content": "you work with files."},
            {"role": "user", "content": f"make room, {item['task_id']}"},
            {"role": "assistant", "content": "so be it", "tool_calls": [look, act] if item["tool"] else []},
            *([{"role": "tool", "name": "file_info", "content": "3 bytes"}] if item["tool"] else []),
            *([{"role": "tool", "name": item["tool"], "content": "ok"}] if item["tool"] else []),
            {"role": "assistant", "content": "done ✓ <script>"},
        ]
        found.append({**item, "prompt": messages[1]["content"], "messages": messages})
    return found


def row(workdir: Path, model: str, seed: int = 0) -> dict[str, Any]:
    """An evaluation row of the made-up run."""
    return json.loads((workdir / f"seed={seed}" / "eval" / f"{model}.json").read_text())
