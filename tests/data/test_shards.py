"""Shards: what several processes write is, record for record, the dataset that one process writes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from subl_jax import data
from subl_jax.trajectory import Trajectory
from tests.data.episodes import assert_same, environment, failed, python, trajectory


def episodes(count: int) -> list[Trajectory]:
    items = [trajectory(e, length=3 + 7 * e, text=f"file {e} – ü 🙂 \ud800") for e in range(count)]
    items[1:2] = [failed(1, "tool_error", "boom")]
    return items


def write_blocks(directory: Path, items: list[Trajectory], world: int) -> None:
    for rank in reversed(range(world)):  # in no particular order
        indices = data.block(len(items), rank, world)
        data.write_shard(directory, rank, world, [items[index] for index in indices])


def raw_records(directory: Path) -> list[bytes]:
    """The records' bytes, read by TFDS without this project's code."""
    import tensorflow_datasets as tfds

    builder = cast(Any, tfds.builder_from_directory(str(directory)))
    source = builder.as_data_source("train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    return [source[index] for index in range(len(source))]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("count", "world", "lengths"), [(11, 2, [6, 5]), (11, 3, [4, 4, 3]), (2, 4, [1, 1, 0, 0]), (11, 1, [11])]
)
def test_shards_of_several_processes_equal_the_dataset_of_one(tmp_path, count, world, lengths):
    items = episodes(count)
    data.write(tmp_path / "one", items, metadata={"teacher": "deletion"})
    write_blocks(tmp_path / "many", items, world)
    assert not (tmp_path / "many").exists()
    data.seal_shards(tmp_path / "many", world, metadata={"teacher": "deletion"})
    assert raw_records(tmp_path / "many") == raw_records(tmp_path / "one")
    jsonl = "trajectories.jsonl"
    assert (tmp_path / "many" / jsonl).read_bytes() == (tmp_path / "one" / jsonl).read_bytes()
    source = data.open_source(tmp_path / "many")
    for actual, expected in zip(source, items, strict=True):
        assert_same(actual, expected)
    assert_same(source[-1], items[-1])
    assert data.read_metadata(tmp_path / "many") == {"teacher": "deletion"}
    shards = {f"trajectories-train.array_record-{rank:05d}-of-{world:05d}" for rank in range(world)}
    assert names(tmp_path / "many") == shards | {jsonl, "dataset_info.json", "features.json", "metadata.json"}
    (split,) = json.loads((tmp_path / "many" / "dataset_info.json").read_text())["splits"]
    assert [int(length) for length in split["shardLengths"]] == lengths
    assert names(tmp_path) == {"one", "many"}


def test_processes_of_their_own_may_write_at_the_same_time(tmp_path):
    code = """
        import sys
        from subl_jax import data
        from tests.data.test_shards import episodes
        rank, items = int(sys.argv[2]), episodes(5)
        data.write_shard(sys.argv[1], rank, 2, [items[index] for index in data.block(5, rank, 2)])
    """
    directory = tmp_path / "deep" / "dataset"
    children = [subprocess.Popen(python(code, str(directory), str(rank)), env=environment()) for rank in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    data.seal_shards(directory, 2, metadata={})
    for actual, expected in zip(data.read(directory), episodes(5), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize(("count", "world"), [(0, 1), (0, 3), (1, 1), (2, 4), (11, 2), (11, 3), (12, 3), (1000, 7)])
def test_blocks_split_all_indices_evenly_and_in_order(count, world):
    blocks = [data.block(count, rank, world) for rank in range(world)]
    assert [index for block in blocks for index in block] == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@pytest.mark.parametrize(("count", "rank", "world"), [(3, 2, 2), (3, -1, 2), (3, 0, 0), (-1, 0, 1)])
def test_impossible_blocks_are_refused(count, rank, world):
    with pytest.raises(ValueError, match=r"rank=.* of world=|count=-1 must not be negative"):
        data.block(count, rank, world)


# --- Shards that do not fit -------------------------------------------------------------------------------------------


def refusal(directory: Path, world: int, **options: Any) -> str:
    with pytest.raises(data.DatasetError) as caught:
        data.seal_shards(directory, world, metadata={}, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            [[0, 1, 2], [2, 3]],
            "shard 1 of 2 begins at episode 2, sample 0, but shard 0 of 2 ends at episode 2, sample 0",
        ),
        ([[2, 3], [0, 1]], "shard 1 of 2 begins at episode 0, sample 0, but shard 0 of 2 ends at episode 3, sample 0"),
        (
            [[0, 2], [], [1, 3]],
            "shard 2 of 3 begins at episode 1, sample 0, but shard 0 of 3 ends at episode 2, sample",
        ),
    ],
)
def test_overlapping_or_unsorted_blocks_are_refused_by_name(tmp_path, blocks, message):
    for rank, block in enumerate(blocks):
        data.write_shard(tmp_path / "d", rank, len(blocks), [trajectory(episode) for episode in block])
    assert message in refusal(tmp_path / "d", len(blocks))
    assert not (tmp_path / "d").exists()


def test_samples_of_an_episode_may_lie_in_two_blocks(tmp_path):
    data.write_shard(tmp_path / "d", 0, 2, [trajectory(0), trajectory(1, 0)])
    data.write_shard(tmp_path / "d", 1, 2, [trajectory(1, 1), trajectory(2)])
    data.seal_shards(tmp_path / "d", 2, metadata={})
    assert [(item.episode, item.sample) for item in data.read(tmp_path / "d")] == [(0, 0), (1, 0), (1, 1), (2, 0)]


def test_an_unsorted_block_is_refused_before_it_is_written(tmp_path):
    data.write_shard(tmp_path / "d", 1, 2, [trajectory(5)])
    with pytest.raises(data.DatasetError, match="episode 0 .* comes after episode 1"):
        data.write_shard(tmp_path / "d", 1, 2, [trajectory(1), trajectory(0)])
    assert "missing, process 0 of 2 has not written its shard" in refusal(tmp_path / "d", 2)
    data.write_shard(tmp_path / "d", 0, 2, [trajectory(0)])
    # The earlier shard of the process that failed is gone, too: nothing of two tries is mixed.
    assert "missing, process 1 of 2 has not written its shard" in refusal(tmp_path / "d", 2)


def test_a_missing_shard_is_named_and_sealing_can_be_tried_again(tmp_path):
    items = episodes(5)
    data.write_shard(tmp_path / "d", 0, 2, items[:3])
    message = refusal(tmp_path / "d", 2)
    assert str(tmp_path / ".d.shards" / "00001-of-00002") in message
    assert "run the stage again" in message
    data.write_shard(tmp_path / "d", 1, 2, items[3:])
    data.seal_shards(tmp_path / "d", 2, metadata={})
    assert len(data.read(tmp_path / "d")) == 5


def test_shards_of_an_earlier_try_with_other_processes_are_removed(tmp_path):
    write_blocks(tmp_path / "d", episodes(9), 3)
    shutil.copytree(tmp_path / ".d.shards" / "00001-of-00003", tmp_path / ".d.shards" / ".00002-of-00003.partial")
    write_blocks(tmp_path / "d", episodes(4), 2)
    assert names(tmp_path / ".d.shards") == {"00000-of-00002", "00001-of-00002"}
    data.seal_shards(tmp_path / "d", 2, metadata={})
    assert len(data.read(tmp_path / "d")) == 4


def test_what_does_not_belong_to_the_run_is_refused(tmp_path):
    write_blocks(tmp_path / "d", episodes(9), 3)
    message = refusal(tmp_path / "d", 2)
    assert "00000-of-00003 does not belong to a run of 2 processes; delete" in message


@pytest.mark.parametrize("name", ["records.array_record", "lines.jsonl", "shard.json"])
def test_a_damaged_shard_is_refused(tmp_path, name):
    write_blocks(tmp_path / "d", episodes(4), 2)
    path = tmp_path / ".d.shards" / "00001-of-00002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refusal(tmp_path / "d", 2)
    assert str(path) in message
    assert "run the stage again" in message


def test_no_episode_in_any_shard_is_refused(tmp_path):
    write_blocks(tmp_path / "d", [], 2)
    assert "no trajectories to write" in refusal(tmp_path / "d", 2)


# --- Complete or absent -----------------------------------------------------------------------------------------------


def test_an_older_dataset_stands_until_the_new_one_is_sealed(tmp_path):
    data.write(tmp_path / "d", episodes(2), metadata={})
    write_blocks(tmp_path / "d", episodes(3), 2)
    assert "exists already" in refusal(tmp_path / "d", 2)
    assert len(data.read(tmp_path / "d")) == 2
    data.seal_shards(tmp_path / "d", 2, metadata={}, overwrite=True)
    assert len(data.read(tmp_path / "d")) == 3
    assert names(tmp_path) == {"d"}


def test_a_seal_that_fails_leaves_no_dataset_and_can_be_tried_again(tmp_path, monkeypatch):
    write_blocks(tmp_path / "d", episodes(4), 2)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("subl_jax.artifacts.file_manifest", full_disk)
        assert "No space left on device; free some space" in refusal(tmp_path / "d", 2)
    assert names(tmp_path) == {".d.shards"}
    data.seal_shards(tmp_path / "d", 2, metadata={})
    assert len(data.read(tmp_path / "d")) == 4


def test_a_seal_killed_at_its_last_step_is_made_good_by_writing_again(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    write_blocks(tmp_path / "d", episodes(4), 2)
    with monkeypatch.context() as patch:
        patch.setattr("subl_jax.artifacts.publish", kill)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # the dead tidy nothing up
        with pytest.raises(Killed):
            data.seal_shards(tmp_path / "d", 2, metadata={})
    assert names(tmp_path) == {".d.partial", ".d.shards"}
    assert "records.array_record: missing" in refusal(tmp_path / "d", 2)  # moved away already
    write_blocks(tmp_path / "d", episodes(4), 2)
    data.seal_shards(tmp_path / "d", 2, metadata={})
    assert len(data.read(tmp_path / "d")) == 4
    assert names(tmp_path) == {"d"}


def test_a_full_disk_in_one_process_leaves_the_shards_of_the_others(tmp_path):
    data.write_shard(tmp_path / "d", 0, 2, [trajectory(0)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(data.DatasetError, match="File too large; raise the file size limit"):
            data.write_shard(tmp_path / "d", 1, 2, [trajectory(1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / ".d.shards") == ["00000-of-00002"]
