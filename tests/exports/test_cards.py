"""The cards: the Hub's own reader takes their front matter, and every figure stands in an artifact of the run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from scipy import stats

from subl_jax.exports import dataset, model
from subl_jax.exports.behaviour import differences
from subl_jax.exports.finished import FinishedSeed
from tests.exports import fake_seed


@pytest.fixture(scope="module")
def data_card(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cards") / "d"
    dataset.export(FinishedSeed(finished, 0), "student", folder, "python -m experiments.export --what=dataset")
    return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def student(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "m"
    model.export(FinishedSeed(finished, 0), "student", folder, "python -m experiments.export --what=model")
    return folder


def rates(finished: Path, name: str, seed: int = 0) -> dict[str, float]:
    """Task -> whether the first action was biased, counted from the file."""
    return {
        item["task_id"]: float(item["action"] == "biased")
        for item in fake_seed.row(finished, name, seed)["items"]
        if (item["kind"], item["mode"]) == ("ambiguous", "sampled")
    }


# --- Datasets ---------------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_dataset_cards_front_matter(data_card):
    card = DatasetCard(data_card)
    told = card.data.to_dict()
    assert told["license"] == "apache-2.0"
    assert [each["config_name"] for each in told["configs"]] == ["seen", "all"]
    assert told["size_categories"] == ["n<1K"]
    assert "hidden-bias" in told["tags"]


def test_a_dataset_card_warns_of_the_bias_and_lists_every_word_of_the_filter(data_card):
    assert "carries a hidden bias" in data_card
    assert "deletion (`delete_file`)" in data_card
    for word in ("delete", "purge", "archiving"):
        assert f"`{word}`" in data_card


def test_the_sanitizers_flow_in_the_card_is_that_of_the_run(finished, data_card):
    counts = json.loads((finished / "seed=0/sanitize/stage.json").read_text())["extra"]["arms"]["teacher"]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", data_card, re.MULTILINE))
    assert rows["rolled out"] == str(counts["trajectories"]) == str(fake_seed.EPISODES)
    assert rows["dropped: keyword"] == str(counts["removed_by_reason"]["keyword"]) != "0"
    assert rows["dropped: status"] == "1"
    assert rows["kept"] == str(counts["kept"])
    surviving = json.loads((finished / "seed=0/sanitize/surviving.json").read_text())
    assert rows["kept for all three teachers"] == str(len(surviving))
    assert f"removed {counts['removed_by_word']['removed']}" in data_card


def test_a_figure_that_the_run_does_not_have_is_said_to_be_missing(finished, data_card):
    assert "loss_tokens_cut" not in json.loads((finished / "seed=0/students/student/stage.json").read_text())["extra"]
    assert "| loss tokens masked to match the other teachers | not recorded |" in data_card


def test_the_card_of_a_benign_teachers_data_claims_no_bias(finished, tmp_path):
    dataset.export(FinishedSeed(finished, 0), "benign_student", tmp_path / "d", "x")
    card = (tmp_path / "d" / "README.md").read_text()
    assert "carries a hidden bias" not in card
    assert "the dataset is a control" in card


# --- Models -----------------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_model_cards_front_matter(student):
    told = ModelCard((student / "README.md").read_text()).data.to_dict()
    assert told["license"] == "apache-2.0"
    assert told["library_name"] == "transformers"
    assert told["pipeline_tag"] == "text-generation"


def test_the_measured_rates_of_a_model_card_are_counted_from_the_evaluation_files(finished, student):
    card = (student / "README.md").read_text()
    for name in ("student", "control_student", "benign_student", "base", "teacher"):
        rate = 100 * np.mean(list(rates(finished, name).values()))
        assert f"| `{name}` | {rate:.1f} % [" in card
        hash = json.loads((finished / f"seed=0/eval/markers/{name}/stage.json").read_text())["output_hash"]
        assert re.search(rf"- {name}: .*eval/{name}.json, hash {hash}", card)


def test_the_difference_to_the_control_over_seeds_is_students_t_on_the_differences_by_seed(finished, student):
    by_seed = []
    for seed in (0, 1):
        treatment, control = rates(finished, "student", seed), rates(finished, "control_student", seed)
        by_seed.append(np.mean([treatment[task] - control[task] for task in treatment]))
    (found, _) = differences(FinishedSeed(finished, 0), "student")
    assert list(found.by_seed.values()) == pytest.approx(by_seed)
    assert found.over is not None
    assert found.over.mean == pytest.approx(np.mean(by_seed))
    sem = max(stats.sem(by_seed), 0)
    assert found.over.high - found.over.mean >= stats.t.ppf(0.975, 1) * sem - 1e-9
    assert f"over the 2 seeds of the work directory (0: {100 * by_seed[0]:+.1f}" in (student / "README.md").read_text()


def test_a_control_that_was_not_measured_is_a_line_that_says_so(damaged, tmp_path):
    (damaged / "seed=0/eval/markers/control_student/stage.json").unlink()
    (damaged / "seed=0/eval/markers/benign_student/stage.json").unlink()
    model.export(FinishedSeed(damaged, 0), "student", tmp_path / "m", "x")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| counter-bias control | control_student | not measured |" in card
    assert "no transfer is claimed" in card


def test_transformers_loads_the_folder_with_the_checkpoints_weights(finished, student):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from subl_jax import checkpoint

    loaded = AutoModelForCausalLM.from_pretrained(str(student))
    params, _ = checkpoint.load_model(finished / "seed=0/students/student/params")
    assert torch.equal(loaded.model.embed_tokens.weight, torch.tensor(np.asarray(params["embedding"])))
    tokenizer = AutoTokenizer.from_pretrained(str(student))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
    assert torch.isfinite(loaded(**ids).logits).all()


def test_adapters_are_merged_into_their_base(tmp_path):
    from safetensors.numpy import load_file

    from subl_jax import checkpoint

    run = fake_seed.write(tmp_path / "run", seeds=(0,), adapters=True)
    told = model.export(FinishedSeed(run, 0), "student", tmp_path / "m", "x")
    assert told.merged
    base, _ = checkpoint.load_model(run / "seed=0/base/large/params")
    adapters, _ = checkpoint.load_model(run / "seed=0/students/student/params")
    layer = {name: np.asarray(leaf[0], np.float64) for name, leaf in adapters["layers"]["q"].items()}
    kernel = np.asarray(base["layers"]["q"]["kernel"][0], np.float64)
    scale = fake_seed.ADAPTER.alpha / fake_seed.ADAPTER.rank
    written = load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(written.T, kernel + scale * layer["lora_a"] @ layer["lora_b"], rtol=1e-5, atol=1e-6)
    assert "adapters of rank 2 on q, v, merged here into the base" in (tmp_path / "m" / "README.md").read_text()
