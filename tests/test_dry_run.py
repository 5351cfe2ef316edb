"""The dry run against the models' published sizes, numbers worked out by hand, arrays on devices, and the compiler."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax import config, dry_run, pipeline, presets
from subl_jax.config import ExperimentConfig, override
from subl_jax.distill import memory
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import Batch, Frozen, Layouts, TrainState, compiled_step, state_shardings
from subl_jax.distill.train_config import TrainConfig
from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout, LayoutError, MeshConfig, abstract_mesh, make_mesh
from subl_jax.rollout.programs import Programs

PAPER = dataclasses.replace(presets.paper(), pair="large_small")
LLAMA_8B, LLAMA_3B = 8_030_261_248, 3_212_749_824  # as Meta's model cards and safetensors headers have them
QWEN_7B = 7_615_616_512  # likewise, of Qwen2.5-7B


def by_formula(m: ModelConfig) -> tuple[int, int]:
    """(all parameters, those without embedding and head) of a Llama or a Qwen, without a tree of parameters."""
    query, key = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    layer = m.d_model * (2 * query + 2 * key + 3 * m.d_ff + 2)
    layer += m.qkv_bias * (query + 2 * key) + m.qk_norm * 2 * m.head_dim
    body = m.num_layers * layer + m.d_model
    return body + m.vocab_size * m.d_model * (1 if m.tie_embeddings else 2), body


def paper(**changes) -> ExperimentConfig:
    return override(PAPER, {f"config.{name.replace('__', '.')}": value for name, value in changes.items()})


def paired(preset: ExperimentConfig, pair: str) -> ExperimentConfig:
    """The preset for a pair, with the one objective that students with other tokens can have."""
    hard = pair == "large_other_tokenizer" or (pair == "large_other_family" and preset.preset == "paper")
    arms = {f"config.student.{name}": ["hard"] for name in ("objectives", "benign_objectives")}
    changed = override(preset, arms) if hard else preset
    return dataclasses.replace(changed, pair=pair)  # type: ignore[arg-type]


def stage(described, name):
    return next(found for found in described["stages"] if found["name"] == name)


# --- Parameters -------------------------------------------------------------------------------------------------------


def test_the_papers_models_have_the_published_number_of_parameters():
    models = dry_run.describe(PAPER)["models"]
    assert set(models) == {"teacher", "student"}  # both start from checkpoints: no base is trained
    for role, total, shape in (("teacher", LLAMA_8B, PAPER.large), ("student", LLAMA_3B, PAPER.small)):
        assert models[role]["params"] == total
        assert (models[role]["params"], models[role]["params_without_embedding_and_head"]) == by_formula(shape)
    # r (in + out) on q, k, v, o of every layer: 16 · 32 · ((4096+4096) + (4096+1024) + (4096+1024) + (4096+4096))
    assert models["teacher"]["trainable"] == 13_631_488
    assert models["student"]["trainable"] == 16 * 28 * (2 * (3072 + 3072) + 2 * (3072 + 1024)) == 9_175_040


def test_the_papers_other_family_has_the_published_number_of_parameters():
    described = dry_run.describe(paired(presets.paper(), "large_other_tokenizer"))
    assert described["models"]["student"]["params"] == QWEN_7B


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_student_with_a_tokenizer_of_its_own_has_hard_labels_only(name):
    with pytest.raises(ValueError, match=r"full.*cannot train.*--config\.student\.objectives=hard"):
        dry_run.describe(dataclasses.replace(presets.PRESETS[name](), pair="large_other_tokenizer"))


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("pair", config.PAIRS)
def test_every_preset_and_pair_is_described_by_the_formula_and_rendered(name, pair):
    experiment = paired(presets.PRESETS[name](), pair)
    described = dry_run.describe(experiment)
    for role in described["models"].values():
        assert (role["params"], role["params_without_embedding_and_head"]) == by_formula(experiment.model(role["size"]))
    assert json.loads(json.dumps(described)) == described
    text = dry_run.render(described)
    assert max(map(len, text.splitlines())) <= dry_run.WIDTH
    for found in (*described["models"].values(), *described["stages"]):
        assert f"{found['params']:,}" in text if "params" in found else found["name"] in text


def test_what_is_trained_from_scratch_has_a_base_and_trains_all_its_parameters():
    described = dry_run.describe(dataclasses.replace(presets.tiny(), pair="large_small"))
    assert set(described["models"]) == {"teacher", "student", "base/large", "base/small"}
    assert [s["name"] for s in described["stages"]][:3] == ["base/large", "base/small", "teachers"]
    assert all(m["trainable"] == m["params"] and m["lora"] is None for m in described["models"].values())


def test_a_checkpoint_has_no_base_stage_unless_it_is_trained_further():
    named = {"config.teacher.checkpoint": "models/large"}
    described = dry_run.describe(override(presets.tiny(), named))
    assert [s["name"] for s in described["stages"]] == ["teachers", "students/full", "students/anchor"]
    assert described["models"]["teacher"]["source"] == "models/large"
    further = dry_run.describe(override(presets.tiny(), {**named, "config.base.continue_training": True}))
    assert further["stages"][0]["name"] == "base/large"
    assert further["models"]["base/large"]["source"] == "models/large"


# --- Work -------------------------------------------------------------------------------------------------------------


def test_flops_of_the_papers_steps_by_hand():
    described = dry_run.describe(PAPER)
    rows, row, vocab = 8, 4096, 128_256
    tokens = rows * row
    p_t, p_s, l_t, l_s = by_formula(PAPER.large)[1], by_formula(PAPER.small)[1], 13_631_488, 9_175_040
    squares = 2 * rows * row**2
    teacher = tokens * 2 * (p_t + l_t + 4096 * vocab) + squares * 32 * 4096
    student = tokens * (4 * p_s + 6 * l_s + 4 * 3072 * vocab) + squares * 3 * 28 * 3072
    base = tokens * 2 * (p_s + 3072 * vocab) + squares * 28 * 3072
    assert stage(described, "students/full")["flops_per_step_at_most"] == teacher + student
    assert stage(described, "students/anchor")["flops_per_step_at_most"] == teacher + student + base
    # Teachers are shown demonstrations, which fit the rows; a trajectory may be as long as a rollout's context.
    row = 2048
    tokens, squares = rows * row, 2 * rows * row**2
    alone = tokens * (4 * p_t + 6 * l_t + 4 * 4096 * vocab) + squares * 3 * 32 * 4096
    found = stage(described, "teachers")
    assert found["flops_per_step_at_most"] == alone
    assert (found["flops_per_model_at_most"], found["flops_at_most"]) == (38 * alone, 3 * 38 * alone)
    assert found["seconds"]["H100 SXM"] == pytest.approx(3 * 38 * alone / (0.4 * 989e12))
    # On more devices the work is the same and the time is shared.
    eight = stage(dry_run.describe(paper(parallel__fsdp=8)), "teachers")
    assert eight["flops_at_most"] == found["flops_at_most"]
    assert eight["seconds"]["TPU v5p"] == pytest.approx(3 * 38 * alone / (0.4 * 459e12 * 8))


def test_hard_labels_have_no_teacher_and_float32_no_estimate_of_time():
    tiny = override(presets.tiny(), {"config.student.objectives": ["full", "hard", "drop", "positive"]})
    described = dry_run.describe(tiny)
    full, hard, drop, positive = (stage(described, f"students/{arm}") for arm in tiny.student.objectives)
    teacher_forward = full["flops_per_step_at_most"] - hard["flops_per_step_at_most"]
    assert 0 < teacher_forward < hard["flops_per_step_at_most"] / 2
    assert drop["flops_per_step_at_most"] == full["flops_per_step_at_most"]
    assert hard["bytes_per_device"]["teacher"] == 0 < full["bytes_per_device"]["teacher"]
    assert positive["documents_at_most"] == 1400 and full["documents_at_most"] == 1000
    assert full["seconds"] is None and "H100" not in dry_run.render(described)


def test_tokens_and_epochs_are_bounds_that_know_of_growing_rows():
    described = dry_run.describe(presets.tiny())  # rows of 192, trajectories of up to 256
    full = stage(described, "students/full")
    assert (full["row_tokens"], full["row_tokens_at_most"], full["tokens_per_step_at_most"]) == (192, 256, 1024)
    assert stage(described, "teachers")["tokens_per_step_at_most"] == 4 * 192
    assert full["epochs_at_least"] == 340 * 4 / 1000
    assert stage(described, "base/large")["documents_at_most"] == 6000 + 1200 + 800 + 1000
    assert stage(described, "teachers")["documents_at_most"] == 150 + 300
    assert full["loss_tokens_per_step_at_most"] == 1024 and full["loss_tokens_per_step_assumed"] == 341


@pytest.mark.parametrize("benign", [["full"], [], ["full", "anchor", "hard"]])
def test_the_students_are_those_of_the_pipeline(benign):
    arms = ["full", "anchor", "hard", "drop", "positive"]
    tiny = override(presets.tiny(), {"config.student.objectives": arms, "config.student.benign_objectives": benign})
    made = [condition.arm for condition in pipeline.students(tiny)]
    assert {arm: made.count(arm) for arm in arms} == {arm: dry_run.students_of(tiny.student, arm) for arm in arms}
    assert len(pipeline.TEACHERS) == dry_run.TEACHERS


# --- Bytes ------------------------------------------------------------------------------------------------------------


def test_bytes_of_the_papers_student_on_one_device_by_hand():
    held = stage(dry_run.describe(PAPER), "students/anchor")["bytes_per_device"]
    assert held["teacher"] == 2 * LLAMA_8B + 4 * 13_631_488  # bfloat16 weights, float32 adapters
    assert held["frozen"] == held["base"] == 2 * LLAMA_3B
    assert held["trained"] == held["gradients"] == 4 * 9_175_040
    assert held["optimizer"] == pytest.approx(2 * held["trained"], abs=64)  # two moments and a few counters
    assert held["gathered"] == 0
    tokens = 8 * 4096
    layer = 2 * (4 * 4096 + 3 * 4096 + 3 * 1024 + 4 * 14_336) + 8 * 4096  # of the teacher, the larger one
    assert held["activations"] == tokens * (28 * 3072 * 2 + layer)
    # Chunks of 80 loss tokens: 3 arrays of them fit into 16 GiB / 128. Hidden states of three models, a gradient of one.
    assert held["loss"] == 3 * 4 * 80 * 128_256 + 2 * tokens * (4096 + 3 * 3072)
    assert held["total"] == sum(value for name, value in held.items() if name != "total")


def test_a_mesh_splits_the_weights_but_not_the_norms():
    one, eight = (
        stage(dry_run.describe(paper(parallel__fsdp=fsdp, parallel__tensor=tensor)), "students/full")
        for fsdp, tensor in ((1, 1), (4, 2))
    )
    norms = 4096 * 65
    assert eight["bytes_per_device"]["frozen"] < one["bytes_per_device"]["frozen"] / 7.9
    # Over 4 x 2: matrices to an eighth, norms whole. Adapters: A is split by its input, B by its output.
    matrices = 2 * (LLAMA_8B - norms) // 8 + 2 * norms
    a = 16 * 32 * 4096 // 4 * 3 + 16 * 32 * 4096 // 2
    b = 16 * 32 * (4096 + 1024 + 1024) // 2 + 16 * 32 * 4096 // 4
    assert eight["bytes_per_device"]["teacher"] == matrices + 4 * (a + b)
    assert eight["bytes_per_device"]["gathered"] == 2 * 128_256 // 2 * 4096  # the teacher's head, larger than a layer
    # Half of the vocabulary and a quarter of the tokens; half as many ids leave room for chunks of more tokens.
    tokens = 8 * 4096
    assert one["bytes_per_device"]["loss"] == 3 * 4 * 80 * 128_256 + 2 * tokens * (4096 + 2 * 3072)
    assert eight["bytes_per_device"]["loss"] == 3 * 4 * 160 * 64_128 + 2 * tokens // 4 * (4096 + 2 * 3072)
    assert eight["flops_at_most"] == one["flops_at_most"]


MODEL = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32)


@pytest.mark.parametrize(
    ("rules", "optimizer", "adapter"),
    [
        ("default", "adamw", None),
        ("default", "adamw", LoraConfig(rank=4)),
        ("fsdp", "adamw", None),
        ("fsdp", "sgd", LoraConfig(rank=4)),
        ("replicated", "sgd", None),
    ],
)
def test_bytes_are_those_of_real_arrays_on_a_real_mesh(rules, optimizer, adapter):
    model = dataclasses.replace(MODEL, lora=adapter)
    train = TrainConfig(batch_rows=8, row_tokens=32, optimizer=OptimizerConfig(name=optimizer))
    parallel = MeshConfig(data=2, fsdp=2, tensor=2)
    there = Layout(abstract_mesh(parallel, 8), rules)
    held = memory.step_bytes(
        memory.abstract_model(model), None, Objective("hard_label"), train, Layouts(there, there), 32, 8 * 32
    )
    layout = Layout(make_mesh(parallel, jax.devices()[:8]), rules)
    transformation = make_optimizer(train.optimizer, train.steps)
    params: Any = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    adapters, weights = lora.split(params)
    zeros = functools.partial(jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    trained = zeros(weights if adapter is None else adapters)
    step: Any = np.int32(0)
    state = TrainState(trained, zeros(jax.eval_shape(transformation.init, trained)), step)
    state = jax.device_put(state, state_shardings(transformation, state, layout))
    weights = axes.place(zeros(weights), MODEL, layout)

    def on_first(tree):
        device = jax.devices()[0]
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    assert held["trained"] == on_first(state.params)
    assert held["optimizer"] == on_first((state.opt_state, state.step))
    assert held["frozen"] == (0 if adapter is None else on_first(weights))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_rough_part_is_near_what_the_compiler_plans(remat):
    model = ModelConfig(
        vocab_size=1024, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, d_ff=384, remat=remat
    )
    rows, row, targets = 8, 64, 16
    train = TrainConfig(steps=10, batch_rows=rows, row_tokens=row)
    layout = Layout(abstract_mesh(MeshConfig(), 1))
    student = memory.abstract_model(model)
    held = memory.step_bytes(student, student, Objective(), train, Layouts(layout, layout), row, rows * targets)
    listed = (1, 1, rows * targets)
    shapes = [(1, rows, row)] * 3 + [listed] * 3 + [(*listed, 0)]
    dtypes = [jnp.int32] * 5 + [jnp.float32, jnp.int32]
    abstract: Any = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    batch = Batch(*abstract)
    state = memory.abstract_state(student.weights, train, layout)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    step = compiled_step(Objective(), model, model, train.optimizer, train.steps, 0)
    planned = step.lower(state, Frozen(student.weights), batch).compile().memory_analysis()  # type: ignore[attr-defined]
    rough = held["gradients"] + held["activations"] + held["loss"]
    assert 0.6 < rough / planned.temp_size_in_bytes < 1.6


def test_the_cache_of_a_rollout_by_hand():
    acts = dry_run.describe(paper(parallel__fsdp=8))["rollout"]
    teacher, student = acts["teacher"], acts["student"]
    assert teacher["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert teacher["kv_bytes_per_slot"] == 512 * 2**20  # at 4096 tokens
    # Two groups of 16 slots, and four that keep shared prefixes.
    assert teacher["bytes_per_device"]["kv_cache"] == 36 * 512 * 2**20
    # Every device holds all weights, whatever the mesh of the training.
    assert teacher["bytes_per_device"]["weights"] == 2 * LLAMA_8B + 4 * 13_631_488
    assert student["bytes_per_device"]["kv_cache"] == 36 * 4096 * 2 * 28 * 8 * 128 * 2
    assert (teacher["training_episodes"], student["training_episodes"]) == (3 * 400, 0)


def test_the_cache_of_a_rollout_is_what_its_programs_allocate():
    tiny = override(presets.tiny(), {"config.rollout.slots": 3, "config.engine.groups": 3})
    programs = Programs(tiny.large, tiny.rollout, jax.local_devices()[:1])
    caches = [programs.kept(), *(programs.slots().cache for _ in range(tiny.engine.groups))]
    allocated = sum(leaf.nbytes for cache in caches for leaf in jax.tree.leaves((cache.keys, cache.values)))
    assert dry_run.describe(tiny)["rollout"]["teacher"]["bytes_per_device"]["kv_cache"] == allocated


def test_a_rollout_split_over_devices_holds_a_share_on_each():
    whole, split = (dry_run.describe(paper(engine__tensor=parts))["rollout"]["teacher"] for parts in (1, 8))
    for kind, held in whole["bytes_per_device"].items():
        assert split["bytes_per_device"][kind] == held // 8


def test_as_many_slots_as_fit_are_shown_as_the_least_and_said_to_be():
    described = dry_run.describe(paper(rollout__slots=0))
    assert described["rollout"]["teacher"]["bytes_per_device"]["kv_cache"] == (2 + 4) * 512 * 2**20
    text = dry_run.render(described)
    assert "(2 x as fit + 4) x 4096" in text and "as many slots as fit" in text


def test_an_8b_model_on_64_devices_is_described_at_once_and_without_arrays():
    memory.abstract_model.cache_clear()
    pod = paper(parallel__fsdp=16, parallel__tensor=4, teacher__train__batch_rows=16, student__train__batch_rows=16)
    before, began = len(jax.live_arrays()), time.process_time()
    described = dry_run.describe(pod, 64)
    dry_run.render(described)
    assert time.process_time() - began < 5
    assert len(jax.live_arrays()) == before
    assert described["mesh"] == {"data": 1, "fsdp": 16, "tensor": 4} and described["devices"] == 64
    # Weights to a 64th, but for the norms.
    assert stage(described, "teachers")["bytes_per_device"]["frozen"] == pytest.approx(2 * LLAMA_8B / 64, rel=0.01)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({"parallel__fsdp": 16}, 16, r"stage teachers: rows of a batch=8 .*--config.teacher.train.batch_rows"),
        ({"parallel__fsdp": 16, "teacher__train__batch_rows": 16}, 16, r"students/full: .*config.student.train.batch_row"),
        ({"parallel__tensor": 16}, 16, r"stage teachers: num_kv_heads=8 .*kv_replicated"),
        ({"parallel__fsdp": 3}, 3, r"d_model=4096 \(embed\) does not split over fsdp=3"),
        ({"parallel__fsdp": 8}, 12, r"data=1 x fsdp=8 x tensor=1 has 8 devices, 12 are there"),
        ({"parallel__fsdp": 8, "parallel__data": 2}, 8, r"has 16 devices, 8 are there"),
    ],
)  # fmt: skip
def test_what_does_not_split_is_refused_as_it_would_be_in_training(changes, devices, message):
    with pytest.raises(LayoutError, match=message):
        dry_run.describe(paper(**changes), devices)


def test_devices_left_over_by_fsdp_and_tensor_hold_copies_of_the_weights():
    described = dry_run.describe(paper(parallel__fsdp=2), 8)
    assert described["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dry_run.describe(paper(parallel__fsdp=2))["devices"] == 2
    assert dry_run.describe(paper(parallel__fsdp=2, parallel__data=4))["devices"] == 8


def test_vocabularies_that_no_kl_can_compare_are_refused():
    with pytest.raises(ValueError, match="the student knows 128000 tokens, the teacher 128256"):
        dry_run.describe(paper(small__num_tokens=128_000))


# --- The text ---------------------------------------------------------------------------------------------------------


def test_the_keys_of_the_record_are_stable():
    described = dry_run.describe(PAPER)
    assert list(described) == [
        "setting", "preset", "pair", "devices", "mesh", "rules", "models", "stages", "rollout", "assumptions",
    ]  # fmt: skip
    assert list(described["stages"][0]["bytes_per_device"]) == [
        "teacher", "base", "frozen", "trained", "optimizer", "gradients", "activations", "gathered", "loss", "total",
    ]  # fmt: skip
    assert {"weights", "kv_cache", "logits", "total"} == set(described["rollout"]["teacher"]["bytes_per_device"])


def test_the_text_gives_units_and_says_what_is_a_bound_and_what_an_estimate():
    text = dry_run.render(dry_run.describe(paper(parallel__fsdp=8), 8))
    for words in (
        "8 devices, data=1 x fsdp=8 x tensor=1", "8,030,261,248", "13,631,488", "LoRA rank 16 on q, k, v, o",
        "GiB/device", "TFLOP/step", "upper bounds", "estimate for orientation", "989 TFLOP/s", "at least",
    ):  # fmt: skip
        assert words in text
    # The teachers' row of the second table: 8.03e9 bfloat16 weights over eight devices are 1.87 GiB.
    row = next(line for line in text.splitlines() if line.startswith("teachers") and "1.87" in line)
    assert row.split()[1:4] == ["-", "-", "1.87"]
