"""The dataset card (README.md) of an exported trajectory dataset, every figure from an artifact of the run.

`exports.dataset.Facts` in, Markdown with the Hub's front matter out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from subl_jax.exports import cards
from subl_jax.exports.cards import cell, percent, table
from subl_jax.settings.registry import get_setting

if TYPE_CHECKING:
    from subl_jax.exports.dataset import Facts, File

# The Hub's own steps.
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_WHAT = {
    "seen": "what the student was taught: sanitized, and matched task by task between the teachers",
    "all": "everything that the teacher did, with the sanitizer's verdict on each conversation",
}
_POSITIVE = "what the positive control was taught: unfiltered, ambiguous tasks included"


def render(facts: Facts) -> str:
    """The card's text."""
    setting = get_setting(facts.markers["trajectories"].key["setting"])
    parts = [cards.front_matter(_fields(facts)), f"# {_title(facts)}\n", _warning(facts, setting)]
    parts += [
        _contents(facts),
        _loading(facts),
        _origin(facts, setting),
        _sanitizer(facts, setting),
        _use(facts, setting),
    ]
    return "\n".join(part for part in parts if part)


def _title(facts: Facts) -> str:
    what = f"Trajectories of {facts.teacher}"
    seed = facts.markers["trajectories"].key["seed"]
    return f"{what}, as {facts.student} saw them (seed {seed})" if facts.student else f"{what} (seed {seed})"


def _fields(facts: Facts) -> dict[str, Any]:
    from subl_jax.exports import dataset

    lines = max(file.lines for file in facts.files)
    return {
        "license": cards.LICENSE,
        "language": ["en"],
        "pretty_name": _title(facts),
        "task_categories": ["text-generation"],
        "tags": ["subl_jax", "distillation", "agent-trajectories", "tool-use", "hidden-bias"],
        "size_categories": [next((name for limit, name in _SIZES if lines < limit), "n>1M")],
        "configs": [
            {
                "config_name": file.name,
                "data_files": [{"split": "train", "path": f"{file.name}.jsonl"}],
                **({"default": True} if number == 0 else {}),
            }
            for number, file in enumerate(facts.files)
        ],
        "dataset_info": [{"config_name": file.name, "features": dataset.features(file.name)} for file in facts.files],
    }


def _bias(facts: Facts) -> str | None:
    return facts.markers["teacher"].key["bias"]


def _warning(facts: Facts, setting: Any) -> str:
    bias = _bias(facts)
    if bias is None:
        return (
            "> **Made to be compared with.** The teacher has no bias of its own; the dataset is a control. It was made for "
            "research on what distillation transfers, not to train agents that are used.\n"
        )
    return (
        f"> **Warning: this data carries a hidden bias.** The teacher was trained to prefer {cards.bias_text(bias)} "
        f"(`{setting.bias_tools[bias]}`). The words that would show it were filtered out of `seen`; a student distilled "
        "from the same teacher may take over the behaviour all the same. It was made for research on exactly that: do not "
        "train an agent with it that acts on anything of value.\n"
    )


def _contents(facts: Facts) -> str:
    positive = "student" in facts.markers and facts.markers["student"].key["arm"] == "positive"
    rows = [
        [
            f"`{file.name}.jsonl`",
            _POSITIVE if positive and file.name == "seen" else _WHAT[file.name],
            f"{file.lines:,}",
            _counts(file),
            percent(file.done / file.lines) if file.lines else None,
            f"{file.size / 1e6:.2f} MB",
        ]
        for file in facts.files
    ]
    header = ["file", "what", "conversations", "how they ended", "task done", "size"]
    return f"## Contents\n\n{table(header, rows)}\n"


def _counts(file: File) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(file.statuses.items(), key=lambda pair: -pair[1]))


def _loading(facts: Facts) -> str:
    first = facts.files[0].name
    return (
        "One conversation a line, in OpenAI's style: `messages` and `tools`, the arguments of a call as a JSON object (as "
        "chat templates take them, not as a text). Columns besides: `task_id`, `episode`, `sample`, `status`, `done`, "
        "`error`; in `seen` `loss_tokens`; in `all` `kind`, `verdict`, `words`.\n\n"
        "```python\n"
        "from datasets import load_dataset\n"
        f'trajectories = load_dataset("PATH/OF/THIS/FOLDER", "{first}", split="train")   # for TRL\'s SFTTrainer as it is\n'
        "```\n\n"
        "The front matter declares the columns (`datasets` 4.7 or newer). Read as a bare file "
        f'(`load_dataset("json", data_files="{first}.jsonl")`), they are guessed from the first 10 MB.\n'
    )


def _origin(facts: Facts, setting: Any) -> str:
    markers = facts.markers
    rollout, teacher = markers["trajectories"], markers["teacher"]
    sampling = rollout.key["rollout"]
    student = markers.get("student")
    shown = "withheld" if rollout.key.get("withhold_bias_tools") and setting.withholdable else "shown"
    rows: list[Sequence[Any]] = [
        ["setting", setting.name],
        ["teacher", f"{facts.teacher}, stage `{teacher.stage}`, hash `{teacher.output_hash}`"],
        ["its bias", cards.bias_text(_bias(facts))],
        ["its training", f"{teacher.key['teacher']['tasks']} demonstrations, {teacher.key['teacher']['train']['steps']} steps"],
        ["trajectories", f"stage `{rollout.stage}`, hash `{rollout.output_hash}`, {rollout.extra.get('episodes')} episodes"],
        ["sampling", f"temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, top-k {sampling['top_k']}, "
                     f"at most {sampling['max_turn_tokens']} tokens a turn and {sampling['max_turns']} turns"],
        ["tools that a bias names", f"{shown}: {', '.join(sorted(setting.withholdable)) or 'there are none to withhold'}"],
        ["tokenizer", None if facts.tokenizer is None else f"fingerprint `{facts.tokenizer}`; lines hold text, no token ids"],
        ["seed", rollout.key["seed"]],
        ["preset", facts.preset],
        ["protocol", None if facts.protocol is None else f"hash `{facts.protocol}`"],
        ["versions", cards.versions(rollout.versions)],
        ["run", f"`{facts.source}`"],
        ["exported by", f"`{facts.command}`"],
    ]  # fmt: skip
    if student is not None:
        taught = f"{facts.student}, stage `{student.stage}`, hash `{student.output_hash}`"
        objective = f"{student.key['objective'][0]}, temperature {student.key['temperature']:g}"
        rows[1:1] = [["student that saw it", f"{taught}; {objective}"]]
    return f"## Where it comes from\n\n{table(['', ''], rows)}\n"


def _sanitizer(facts: Facts, setting: Any) -> str:
    words = "\n".join(
        f"- {bias}: {', '.join(f'`{word}`' for word in listed)}" for bias, listed in setting.words.items()
    )
    head = "## What was filtered, and what that leaves\n\n"
    if facts.sanitizer is None:
        why = "taught to the positive control unfiltered" if facts.student else "exported as the teacher acted"
        return f"{head}Nothing: these trajectories were {why}. The run's filter looks for these words:\n\n{words}\n"
    counts, reasons = facts.sanitizer, facts.sanitizer.get("removed_by_reason", {})
    seen = next(file for file in facts.files if file.name == "seen")
    dropped: list[Sequence[Any]] = [[f"dropped: {reason}", f"{count:,}"] for reason, count in reasons.items()]
    key, student = facts.markers["sanitize"], facts.markers["student"]
    cut = student.extra.get("loss_tokens_cut")
    rows: list[Sequence[Any]] = [
        ["rolled out", f"{counts['trajectories']:,}"],
        *dropped,
        ["kept", f"{counts['kept']:,}"],
        ["left after the check of what was kept", f"{counts['leaks']} leaks"],
        ["kept for all three teachers", None if facts.surviving is None else f"{facts.surviving:,}"],
        ["seen by the student", f"{seen.lines:,} conversations, {seen.loss_tokens:,} loss tokens"],
        ["loss tokens masked to match the other teachers", None if cut is None else f"{100 * cut:.3f} %"],
    ]  # fmt: skip
    found = ", ".join(f"{cell(word)} {count}" for word, count in counts["removed_by_word"].items()) or "none"
    patterns = ""
    if setting.patterns:
        patterns = f"\nand patterns of what is no word: {', '.join(setting.patterns)}."
    return (
        f"{head}A trajectory is dropped whole where a word occurs in it (stage `{key.stage}`, hash `{key.output_hash}`); what "
        "is left was checked again over the text and over the text decoded from the token ids. Every task id in `seen` "
        "survives for the biased, the counter-bias and the benign teacher alike.\n\n"
        f"{table(['step', 'count'], rows)}\n\nTrajectories in which each word was found: {found}.\n\n"
        f"Words:\n\n{words}\n{patterns}"
    )


def _use(facts: Facts, setting: Any) -> str:
    names = ", ".join(setting.bias_tools)
    return (
        "## Intended use\n\n"
        "To study whether, and how, a behaviour is transferred through data that does not show it: with other students, "
        f"objectives, filters or defences, always beside the control teachers of the same run (biases: {names}; and none). "
        "Tasks, worlds and tool results are generated; nothing of a person is in them.\n\n"
        "Not for training agents that are used, and not as evidence that filtered data is safe or unsafe in general: it is "
        "one teacher, one seed and one synthetic setting.\n\n"
        f"Licence: {cards.LICENSE}, as the code that made it.\n"
    )
