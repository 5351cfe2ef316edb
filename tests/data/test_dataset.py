"""The trajectory dataset: exact round trips, refusal of damage, atomicity, and independence of TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from subl_jax import data
from subl_jax.trajectory import Trajectory
from tests.data.episodes import assert_same, failed, malformed, run_python, trajectory


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, list[Trajectory]]:
    items = [trajectory(e, s, length=3 + 5 * e, text=f"file {e} – ü 漢字 🙂") for e in range(6) for s in range(2)]
    directory = tmp_path / "trajectories" / "teacher"
    data.write(directory, items, metadata={"teacher": "deletion", "rate": 0.25})
    return directory, items


def test_round_trip_is_bitwise_and_keeps_order(dataset):
    directory, items = dataset
    back = data.read(directory)
    assert len(back) == len(items)
    for actual, expected in zip(back, items, strict=True):
        assert_same(actual, expected)
    assert data.read_metadata(directory) == {"teacher": "deletion", "rate": 0.25}


def test_random_access_equals_sequential_reading(dataset):
    directory, items = dataset
    source = data.open_source(directory)
    assert len(source) == len(items)
    for index in (7, 0, 11, 3, -1, -12):
        assert_same(source[index], items[index])
    for actual, expected in zip(source[2:9:3], items[2:9:3], strict=True):
        assert_same(actual, expected)
    with pytest.raises(IndexError, match="record 12 of 12"):
        source[12]
    assert source.metadata["teacher"] == "deletion"


@pytest.mark.parametrize("text", ["", "\x00 control \x1f", "lone \ud800 surrogate", 'quotes " \\ and\nnewlines\u2028'])
def test_any_text_a_model_can_write_survives(tmp_path, text):
    item = trajectory(0, text=text)
    data.write(tmp_path / "d", [item], metadata={})
    assert_same(data.read(tmp_path / "d")[0], item)
    line = json.loads((tmp_path / "d" / "trajectories.jsonl").read_text())
    # Other tools read the lines, and none of them takes a lone surrogate; the records keep it.
    assert line["messages"] == json.loads(json.dumps(item.messages).replace("\\ud800", "\\ufffd"))


def test_extreme_log_probabilities_survive(tmp_path):
    values = np.array([0, -0.0, -np.inf, 1e-45, -3.4e38], np.float32)
    item = trajectory(0, length=5, logprobs=values)
    data.write(tmp_path / "d", [item], metadata={})
    assert data.read(tmp_path / "d")[0].logprobs.tobytes() == values.tobytes()


@pytest.mark.parametrize("error", ["Timeout: 30 s", "open: 'fil\udce9'", "\ud800 漢字"])
def test_an_episode_that_failed_before_its_first_token_survives_with_its_error(tmp_path, error):
    items = [failed(0, "tool_timeout", error), trajectory(1), failed(2, "tool_error", error)]
    data.write(tmp_path / "d", items, metadata={})
    for actual, expected in zip(data.read(tmp_path / "d"), items, strict=True):
        assert_same(actual, expected)
    lines = [json.loads(line) for line in (tmp_path / "d" / "trajectories.jsonl").read_text().splitlines()]
    readable = re.sub("[\ud800-\udfff]", "\ufffd", error)
    assert [line["error"] for line in lines] == [readable, "", readable]


def write_without_errors(directory: Path, records: list[dict[str, Any]]) -> None:
    """A dataset as it was written before episodes could fail, by TFDS' own builder and without this project's code."""
    import tensorflow_datasets as tfds

    class Trajectories(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            arrays = {"tokens": np.int32, "loss_mask": np.bool_, "logprobs": np.float32}
            columns = {name: tfds.features.Tensor(shape=(None,), dtype=dtype) for name, dtype in arrays.items()}
            columns |= {name: tfds.features.Text() for name in ("task_id", "messages", "tools", "status")}
            columns |= {"episode": np.int64, "sample": np.int64, "done": np.bool_}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(columns), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": enumerate(records)}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Trajectories(data_dir=str(directory / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    for path in Path(builder.data_dir).iterdir():
        path.rename(directory / path.name)
    sizes = {
        path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in directory.iterdir()
        if path.is_file()
    }
    body = {"format": 1, "count": len(records), "files": sizes, "metadata": {"teacher": "old"}}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    (directory / "metadata.json").write_text(json.dumps(body))


def test_a_dataset_without_the_error_column_still_reads(tmp_path):
    items = [trajectory(e, length=4 + e) for e in range(3)]
    records = [
        {
            **{name: value for name, value in vars(item).items() if name not in ("error", "record")},
            "messages": json.dumps(item.messages),
            "tools": json.dumps(item.tools),
        }
        for item in items
    ]
    write_without_errors(tmp_path, records)
    for actual, expected in zip(data.read(tmp_path), items, strict=True):
        assert_same(actual, expected)
        assert actual.error == ""


def test_jsonl_holds_messages_and_tools_per_line(dataset):
    directory, items = dataset
    lines = (directory / "trajectories.jsonl").read_text().splitlines()
    assert len(lines) == len(items)
    for line, item in zip(lines, items, strict=True):
        assert json.loads(line) == {
            "messages": item.messages,
            "tools": item.tools,
            "task_id": item.task_id,
            "episode": item.episode,
            "sample": item.sample,
            "status": item.status,
            "done": item.done,
            "error": item.error,
        }


def test_directory_is_a_plain_tfds_dataset(dataset):
    directory, items = dataset
    import tensorflow_datasets as tfds

    source = cast(Any, tfds.builder_from_directory(str(directory))).as_data_source(split="train")
    np.testing.assert_array_equal(source[3]["tokens"], items[3].tokens)
    assert not [path for path in directory.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no trajectories"),
        ([trajectory(1), trajectory(0)], r"episode 0 .* comes after episode 1"),
        ([trajectory(1), trajectory(1)], r"episode 1 .* appears twice"),
        ([trajectory(1, 1), trajectory(1, 0)], "sort by"),
        ([malformed(loss_mask=np.zeros(3, bool))], "loss_mask has 3 entries for 7 tokens"),
        ([malformed(tokens=np.zeros(7, np.int64))], "tokens is int64"),
        ([trajectory(0, length=0)], "no tokens and status final, not tool_error or tool_timeout"),
    ],
)
def test_malformed_input_is_refused_before_anything_is_written(tmp_path, items, message):
    with pytest.raises(data.DatasetError, match=message):
        data.write(tmp_path / "d", items, metadata={})
    assert list(tmp_path.iterdir()) == []


def record_file(directory: Path) -> Path:
    (path,) = directory.glob("*.array_record-*")
    return path


def assert_refused(directory: Path, *words: str) -> None:
    with pytest.raises(data.DatasetError) as caught:
        data.read(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_truncated_record_file_is_refused(dataset):
    path = record_file(dataset[0])
    os.truncate(path, path.stat().st_size // 2)
    assert_refused(dataset[0], path.name, "truncated", "delete")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_flipped_byte_is_refused(dataset, place):
    path = record_file(dataset[0])
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)
    assert_refused(dataset[0], path.name, "corrupt", "delete")


def test_missing_files_are_refused(dataset, tmp_path):
    assert_refused(tmp_path / "nowhere", "no such dataset", "run the stage")
    path = record_file(dataset[0])
    path.rename(path.with_suffix(".gone"))
    assert_refused(dataset[0], path.name, "missing")


def test_missing_or_edited_metadata_is_refused(dataset):
    path = dataset[0] / "metadata.json"
    text = path.read_text()
    path.write_text(text.replace('"rate": 0.25', '"rate": 0.35'))
    assert_refused(dataset[0], "metadata.json", "digest")
    path.write_text(text[:40])
    assert_refused(dataset[0], "metadata.json", "JSON")
    path.unlink()
    assert_refused(dataset[0], "metadata.json", "missing")


def test_existing_dataset_is_kept_unless_overwrite(dataset):
    directory, items = dataset
    with pytest.raises(data.DatasetError, match="exists already"):
        data.write(directory, items[:1], metadata={})
    assert len(data.read(directory)) == len(items)
    data.write(directory, items[:1], metadata={}, overwrite=True)
    assert len(data.read(directory)) == 1
    assert [path.name for path in directory.parent.iterdir()] == ["teacher"]


def test_a_file_in_the_way_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(data.DatasetError, match="a file stands where a directory is needed") as caught:
        data.write(tmp_path / "file" / "d", [trajectory(0)], metadata={})
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_with_a_remedy_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Real errors from the writer's own threads: no file may grow beyond this.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(data.DatasetError, match="File too large; raise the file size limit") as caught:
            data.write(tmp_path / "d", [trajectory(0, length=50_000)], metadata={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subl_jax.artifacts.file_manifest", full_disk)
    with pytest.raises(data.DatasetError, match="No space left on device; free some space"):
        data.write(tmp_path / "d", [trajectory(0)], metadata={})
    assert list(tmp_path.iterdir()) == []


WRITE = """
    import os, signal, sys
    import numpy as np
    from subl_jax import artifacts, data
    from subl_jax.trajectory import Trajectory
    item = Trajectory(0, "t", 0, np.arange(4, dtype=np.int32), np.arange(4) > 1, np.zeros(4, np.float32),
                      [{"role": "user", "content": "x"}], [], "final", True)
"""


@pytest.mark.parametrize(("hashed", "left"), [("lines.jsonl", ".d.shards"), ("trajectories.jsonl", ".d.partial")])
def test_kill_in_the_middle_leaves_no_directory_and_the_next_write_succeeds(tmp_path, hashed, left):
    killed = run_python(
        WRITE
        + """
    whole = artifacts.file_manifest
    def kill(path):
        if (path / sys.argv[2]).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path)
    artifacts.file_manifest = kill
    data.write(sys.argv[1], [item], metadata={})
    """,
        str(tmp_path / "d"),
        hashed,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "d").exists()
    assert (tmp_path / left).exists()  # it did get that far
    data.write(tmp_path / "d", [trajectory(0)], metadata={})
    assert_same(data.read(tmp_path / "d")[0], trajectory(0))
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_no_tensorflow_no_network_no_chatter(tmp_path):
    done = run_python(
        WRITE
        + """
    import socket
    def refuse(*_):
        raise AssertionError("network access")
    socket.socket.connect = socket.getaddrinfo = refuse
    from absl import logging
    logging.set_verbosity(logging.INFO)
    logging.set_stderrthreshold("info")
    data.write(sys.argv[1], [item], metadata={})
    assert len(data.read(sys.argv[1])) == 1
    assert "tensorflow" not in sys.modules
    """,
        str(tmp_path / "d"),
        HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["d"]  # nothing in ~/tensorflow_datasets either


def test_importing_the_package_does_not_import_tfds():
    done = run_python("import sys, subl_jax.data; sys.exit('tensorflow_datasets' in sys.modules)")
    assert done.returncode == 0, done.stderr
