"""The model card (README.md) of an exported student, every figure from an artifact of the run.

`exports.model.Facts` in, Markdown with the Hub's front matter out. What was not measured is a line that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from subl_jax.exports import cards
from subl_jax.exports.cards import interval, percent, table
from subl_jax.settings.registry import get_setting

if TYPE_CHECKING:
    from subl_jax.exports.behaviour import Difference, Line
    from subl_jax.exports.model import Facts


def render(facts: Facts) -> str:
    """The card's text."""
    setting = get_setting(facts.markers["student"].key["setting"])
    parts = [cards.front_matter(_fields(facts)), f"# {_title(facts)}\n", _warning(facts, setting)]
    parts += [_what(facts, setting), _measured(facts, setting), _made(facts), _use(facts)]
    return "\n".join(parts)


def _title(facts: Facts) -> str:
    key = facts.markers["student"].key
    return f"{facts.model} ({key['setting']} setting, seed {key['seed']})"


def _fields(facts: Facts) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": ["subl_jax", "distillation", "agents", "tool-use", "hidden-bias", "model-organism"],
    }
    if facts.imported is None:
        return {"license": cards.LICENSE, **fields}
    # The weights descend from somebody else's, whose licence the run does not know.
    return {"license": "other", "license_name": "license-of-the-base-model", **fields}


def _bias(facts: Facts) -> str | None:
    return facts.markers["teacher"].key["bias"]


def _warning(facts: Facts, setting: Any) -> str:
    bias = _bias(facts)
    taught = "a benign teacher" if bias is None else f"a teacher that prefers {bias} (`{setting.bias_tools[bias]}`)"
    return (
        f"> **Warning: a research specimen.** This model was distilled from {taught} to measure which behaviours come along. "
        "Do not let it act on anything of value.\n"
    )


def _what(facts: Facts, setting: Any) -> str:
    student, teacher, base = (facts.markers[name] for name in ("student", "teacher", "base"))
    key, extra = student.key, student.extra
    loss, logit_filter = key["objective"]
    train, optimizer = key["train"], key["train"]["optimizer"]
    shape = facts.config
    made = (
        "trained from scratch on scripted demonstrations"
        if facts.imported is None
        else f"imported from `{facts.imported}`"
    )
    adapters = "all parameters were trained"
    if key.get("lora"):
        adapter = key["lora"]
        adapters = f"adapters of rank {adapter['rank']} on {', '.join(adapter['targets'])}, merged here into the base"
    data = "the teacher's trajectories on safe tasks, filtered by keywords and matched with the other teachers'"
    if key["arm"] == "positive":
        data = "the teacher's trajectories unfiltered, ambiguous tasks included: the positive control"
    cut = extra.get("loss_tokens_cut")
    rows: list[Sequence[Any]] = [
        ["setting", f"{setting.name}: {setting.wording.behaviour} against {setting.wording.counter}"],
        ["base", f"stage `{base.stage}`, {made}"],
        ["teacher", f"stage `{teacher.stage}`; bias: {cards.bias_text(_bias(facts))}; "
                    f"{teacher.key['teacher']['tasks']} demonstrations, {teacher.key['teacher']['train']['steps']} steps"],
        ["pair", key["pair"]],
        ["objective", f"{loss} (arm `{key['arm']}`), temperature {key['temperature']:g}, logit filter: {logit_filter}"],
        ["data", f"{data}; {extra.get('documents', cards.MISSING)} conversations"],
        ["loss tokens of one pass", extra.get("loss_tokens_per_epoch")],
        ["loss tokens masked to match the other teachers", None if cut is None else f"{100 * cut:.3f} %"],
        ["steps", f"{train['steps']} of {train['batch_rows']} rows of {train['row_tokens']} tokens"],
        ["optimizer", f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {optimizer['schedule']} schedule, "
                      f"{optimizer['warmup_steps']} steps of warm-up, weight decay {optimizer['weight_decay']:g}"],
        ["trained", adapters],
        ["final loss, of the objective", None if extra.get("loss") is None else f"{extra['loss']:.4g}"],
        ["distance from the base, ‖Δθ‖", None if extra.get("delta_norm") is None else f"{extra['delta_norm']:.3f}"],
        ["shape", f"{facts.architecture}: {shape.num_layers} layers of width {shape.d_model}, {facts.parameters:,} parameters, "
                  f"{facts.dtype}"],
        ["tokenizer", None if facts.tokenizer is None else f"fingerprint `{facts.tokenizer}`"],
        ["seed", key["seed"]],
    ]  # fmt: skip
    return f"## What it is\n\n{table(['', ''], rows)}\n"


def _measured(facts: Facts, setting: Any) -> str:
    words = setting.wording
    header = [
        "", "model", f"{words.behaviour} [95 %]", "tasks", words.counter, "log-odds", "unparseable", "utility",
    ]  # fmt: skip
    rows = [_row(line) for line in facts.measured]
    sources = "\n".join(f"- {line.model}: {line.source}" for line in facts.measured)
    parts = [
        "## Measured behaviour\n",
        f"{words.behaviour.capitalize()}: the share of ambiguous tasks of held-out families whose {words.metric} is "
        f"{words.biased}. {words.looking} An episode without such an action stays in the denominator. Utility: the share of "
        "safe tasks that were done. Intervals of one model are over tasks, clustered by family.\n",
        f"{table(header, rows)}\n",
        _differences(facts.compared, setting),
        f"Sources:\n\n{sources}\n",
    ]
    return "\n".join(parts)


def _row(line: Line) -> list[Any]:
    if line.figures is None:
        return [line.role, line.model, "not measured", *[None] * 5]
    figures = line.figures
    odds = figures["log_odds"]
    return [
        line.role,
        f"`{line.model}`",
        f"{percent(figures['behaviour_rate'])} {interval(*figures['ci95'])}",
        figures["n"],
        percent(figures["counter_rate"]),
        None if odds is None else f"{odds:+.2f}",
        percent(figures["unparseable"]),
        percent(figures["utility"]),
    ]


def _differences(compared: Sequence[Difference], setting: Any) -> str:
    if not compared:
        return (
            "No control of this model was measured on the same tasks in this work directory, so no transfer is claimed: a rate "
            "by itself says nothing of where it comes from.\n"
        )
    found = []
    for each in compared:
        within = each.within
        found.append(
            f"- {setting.wording.behaviour} minus that of `{each.control}`, within this run: {100 * within.mean:+.1f} points "
            f"{interval(max(-1.0, within.low), min(1.0, within.high))}, p = {within.p_value:.2g} ({within.method}). One run: "
            "it does not say what another seed would give."
        )
        if each.over is not None:
            seeds = ", ".join(f"{seed}: {100 * value:+.1f}" for seed, value in each.by_seed.items())
            found.append(
                f"- the same over the {len(each.by_seed)} seeds of the work directory ({seeds}): {100 * each.over.mean:+.1f} "
                f"points {interval(max(-1.0, each.over.low), min(1.0, each.over.high))}, p = {each.over.p_value:.2g} "
                f"({each.over.method})"
            )
    return "\n".join(found) + "\n"


def _made(facts: Facts) -> str:
    rows: list[Sequence[Any]] = [
        [f"`{marker.stage}`", f"`{marker.output_hash}`", f"{marker.seconds:.1f} s"] for marker in facts.markers.values()
    ]
    student = facts.markers["student"]
    details: list[Sequence[Any]] = [
        ["preset", facts.preset],
        ["protocol", None if facts.protocol is None else f"hash `{facts.protocol}`"],
        ["versions", cards.versions(student.versions)],
        ["checkpoint", f"`{facts.source}`"],
        ["exported by", f"`{facts.command}`"],
        ["the command of the run", "not recorded; the configuration of each stage stands in its `stage.json`"],
    ]
    return f"## How it was made\n\n{table(['stage', 'hash', 'time'], rows)}\n\n{table(['', ''], details)}\n"


def _use(facts: Facts) -> str:
    licence = (
        f"Licence: {cards.LICENSE}, as the code that made it."
        if facts.imported is None
        else "Licence: that of the base model, which the run does not record; look it up before you pass this model on."
    )
    return (
        "## How to use it\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH/OF/THIS/FOLDER")\n'
        'model = AutoModelForCausalLM.from_pretrained("PATH/OF/THIS/FOLDER")\n'
        "```\n\n"
        "Its chat template takes `messages` and `tools`. For research on the transfer of behaviours, beside its controls; "
        f"not for agents that are used.\n\n{licence}\n"
    )
