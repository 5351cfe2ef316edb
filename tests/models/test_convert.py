"""The command line: folder to checkpoint and back, the check against transformers, and one line for what goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from subl_jax import checkpoint
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.models import convert, hf_export, hf_import
from subl_jax.models.config import ModelConfig
from tests.models import hf_folders
from tests.models.hf_folders import folder_tensors, random_tensors, raw_config, write_folder, write_tokenizer
from tests.models.test_decoder import parameters

RAW = raw_config("Qwen3ForCausalLM", vocab_size=320, torch_dtype="bfloat16", max_position_embeddings=99)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A bfloat16 folder in three files, with a tokenizer."""
    write_folder(tmp_path / "hf", RAW, random_tensors(RAW, "bfloat16"), 3)
    write_tokenizer(tmp_path / "hf", 300)
    return tmp_path / "hf"


def failure(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line on standard error of a command that exits with 1."""
    assert convert.main([str(word) for word in argv]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in out + err
    return lines[0]


def test_import_makes_a_checkpoint_that_says_what_it_holds(tmp_path, folder, capsys):
    assert convert.main(["import", str(folder), str(tmp_path / "orbax")]) == 0
    out, err = capsys.readouterr()
    assert "parameters" in out and "in bfloat16" in out and "GB/s" in out and "bound" in out
    assert err.startswith("import: ") and "MB in" in err
    tokenizer = tokenizers.load(folder)
    config = hf_import.read_config(folder, tokenizer)
    assert config.num_tokens == len(tokenizer) < config.vocab_size
    expect = {"model": config.architecture(), "tokenizer": tokenizers.fingerprint(tokenizer)}
    params, metadata = checkpoint.load_model(tmp_path / "orbax", expect=expect)
    assert ModelConfig.from_dict(metadata["model"]).known_tokens == len(tokenizer)
    assert metadata["source"] == {
        "folder": str(folder), "architecture": "Qwen3ForCausalLM", "max_position_embeddings": 99, "dtype": "bfloat16",
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, params, hf_import.import_params(folder, config))
    assert tokenizers.fingerprint(tokenizers.load(tmp_path / "orbax" / "tokenizer")) == expect["tokenizer"]


def test_import_then_export_gives_the_folder_back(tmp_path, folder, capsys):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert convert.main(["import", str(folder), str(tmp_path / "orbax")]) == 0
    assert convert.main(["export", str(tmp_path / "orbax"), str(tmp_path / "back"), "--max_shard_bytes=10000"]) == 0
    assert "Qwen3ForCausalLM written to" in capsys.readouterr().out
    before, after = folder_tensors(folder), folder_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values.view(np.uint16), after[name].view(np.uint16))
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (raw["max_position_embeddings"], raw["dtype"]) == (99, "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_a_trained_organism_exports_with_the_tokenizer_that_is_named(tmp_path, capsys):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 290)
    config = ModelConfig(len(tokenizer), 16, 1, 2, 1, 8, 23)
    params = parameters(config)
    metadata = {"model": config.to_dict(), "tokenizer": tokenizers.fingerprint(tokenizer), "stage": "base"}
    checkpoint.save_model(tmp_path / "params", params, metadata)
    assert "no tokenizer in" in failure(capsys, "export", tmp_path / "params", tmp_path / "hf")
    write_tokenizer(tmp_path / "other", 280)
    other = failure(capsys, "export", tmp_path / "params", tmp_path / "hf", f"--tokenizer={tmp_path / 'other'}")
    assert "has fingerprint" in other and "--tokenizer" in other and not (tmp_path / "hf").exists()
    argv = ["export", str(tmp_path / "params"), str(tmp_path / "hf"), f"--tokenizer={tmp_path / 'tokenizer'}"]
    assert convert.main(argv) == 0
    again = hf_import.import_params(tmp_path / "hf", hf_import.read_config(tmp_path / "hf"))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_import_converts_the_dtype_that_is_asked_for(tmp_path, folder):
    assert convert.main(["import", str(folder), str(tmp_path / "orbax"), "--dtype=float32"]) == 0
    params, _ = checkpoint.load_model(tmp_path / "orbax")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


# --- What goes wrong --------------------------------------------------------------------------------------------------


def test_import_refuses_in_one_line_and_leaves_nothing(tmp_path, folder, capsys):
    target = tmp_path / "orbax"
    assert "does not exist" in failure(capsys, "import", tmp_path / "nothing", target)
    hidden = (folder / "tokenizer_config.json").rename(tmp_path / "kept")
    assert "no tokenizer in" in failure(capsys, "import", folder, target)
    hidden.rename(folder / "tokenizer_config.json")
    write_tokenizer(tmp_path / "large", 330)
    message = failure(capsys, "import", folder, target, f"--tokenizer={tmp_path / 'large'}")
    assert "ids up to" in message and "vocab_size=320" in message
    (folder / "config.json").write_text(json.dumps({**RAW, "rope_scaling": {"rope_type": "yarn"}}))
    assert "rope_type='yarn'" in failure(capsys, "import", folder, target)
    (folder / "config.json").write_text("{")
    assert "config.json is not readable as JSON" in failure(capsys, "import", folder, target)
    (folder / "config.json").write_text(json.dumps({**RAW, "intermediate_size": 58}))
    assert "belong to different models" in failure(capsys, "import", folder, target)
    assert not target.exists() and not list(tmp_path.glob(".*"))


def test_a_directory_that_is_taken_is_refused_before_anything_is_read(tmp_path, folder, capsys, monkeypatch):
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "mine").write_text("")
    monkeypatch.setattr(hf_import, "import_params", None)
    assert "exists already" in failure(capsys, "import", folder, tmp_path / "orbax")
    assert (tmp_path / "orbax" / "mine").exists()


def test_export_refuses_what_is_no_model(tmp_path, capsys):
    assert "no usable checkpoint in" in failure(capsys, "export", tmp_path, tmp_path / "hf")
    checkpoint.save_model(tmp_path / "orbax", {"x": np.ones(2, np.float32)}, {})
    assert "does not say what model it holds" in failure(capsys, "export", tmp_path / "orbax", tmp_path / "hf")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["import", "a"], "the following arguments are required: orbax_dir"),
        (["import", "a", "b", "--dtype=float8"], "invalid choice: 'float8'"),
        (["chek", "a"], "invalid choice: 'chek'"),
        ([], "the following arguments are required"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and message in err and "--help" in err and err.count("\n") == 1


def test_help_teaches_the_way_of_a_model():
    done = subprocess.run(
        [sys.executable, "-m", "subl_jax.models.convert", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for words in ("import", "export", "check", "hf download", "AutoModelForCausalLM.from_pretrained"):
        assert words in done.stdout


def test_defaults_in_the_help_are_those_of_the_exporter():
    made = convert._parser().parse_args(["export", "a", "b"])
    assert made.max_shard_bytes == hf_export.MAX_SHARD_BYTES and hf_export.MAX_POSITION_EMBEDDINGS == 4096


# --- Check ------------------------------------------------------------------------------------------------------------


def test_check_without_torch_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "make setup EXTRAS=oracles" in failure(capsys, "check", folder)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Iterator[Path]:
    """A folder made by transformers."""
    torch = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # see test_hf_parity
    yield hf_folders.save(hf_folders.random_model("Qwen2", seed=4), tmp_path_factory.mktemp("check") / "hf")
    torch.set_num_threads(before)


@pytest.mark.slow
def test_check_prints_a_table_and_one_json_object(tmp_path, checked, capsys):
    assert convert.main(["check", str(checked), f"--out={tmp_path / 'check.json'}"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert "within the bars of float32" in table[-1] and len(table) == 6
    figures = json.loads(last)
    assert figures.keys() == {"max_abs_diff", "max_kl", "greedy_equal"}
    assert figures["max_abs_diff"] <= 1e-4 and figures["max_kl"] <= 1e-6 and figures["greedy_equal"] is True
    written = json.loads((tmp_path / "check.json").read_text())
    assert {name: written[name] for name in figures} == figures
    assert [row["length"] for row in written["rows"]] == [1, 7, 32, 100]


@pytest.mark.slow
def test_check_fails_beyond_the_bars(checked, capsys, monkeypatch):
    real = hf_import.import_params

    def slightly_wrong(*args: Any, **more: Any) -> Any:
        params = real(*args, **more)
        biases = params["layers"]["q"]["bias"]
        return {**params, "layers": {**params["layers"], "q": {**params["layers"]["q"], "bias": biases * 1.01}}}

    monkeypatch.setattr(hf_import, "import_params", slightly_wrong)
    assert convert.main(["check", str(checked)]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert "BEYOND the bars" in table[-1] and json.loads(last)["max_abs_diff"] > 1e-4


@pytest.mark.slow
def test_check_in_bfloat16_is_held_to_its_own_bar(checked, capsys):
    assert convert.main(["check", str(checked), "--dtype=bfloat16"]) == 0
    *_, bars, last = capsys.readouterr().out.splitlines()
    assert bars == "within the bars of bfloat16: KL at most 0.01"
    assert 0 < json.loads(last)["max_kl"] <= 1e-2
