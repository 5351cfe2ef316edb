"""Artifacts: one text for equal objects, whole files or none, and stage markers that refuse another configuration."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subl_jax import artifacts


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    steps: int


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_canonical_json_is_json_and_a_fixed_point(value):
    text = artifacts.canonical_json(value)
    assert json.loads(text) == value
    assert artifacts.canonical_json(json.loads(text)) == text
    assert text.isascii()


def test_digest_is_the_sha256_of_the_canonical_text():
    # echo -n '{"a":[1,2.5,"x"],"b":null}' | sha256sum | cut -c1-16
    assert artifacts.digest({"b": None, "a": (1, 2.5, "x")}) == "ebeb83367f9695ff"


def test_equal_objects_of_different_types_have_one_digest():
    config = Outer(Inner(3e-4, ("a", "b")), 5)
    same = {"steps": np.int64(5), "inner": {"names": ["a", "b"], "rate": np.float64(3e-4)}}
    assert artifacts.digest(config) == artifacts.digest(same)
    assert artifacts.digest({"x": {"b", "a"}}) == artifacts.digest({"x": frozenset(["a", "b"])})
    assert artifacts.digest([Colour.RED, Path("a/b"), np.array([1, 2])]) == artifacts.digest(["red", "a/b", [1, 2]])
    assert artifacts.digest(config) != artifacts.digest(dataclasses.replace(config, steps=6))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"loss": {"mean": float("nan")}}, r"value\.loss\.mean is nan"),
        ([1, float("inf")], r"value\[1\] is inf"),
        ({1: 2}, "key 1 of type int"),
        ({"f": object()}, r"value\.f is a object"),
    ],
)
def test_values_without_json_form_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        artifacts.canonical_json(value)


def test_write_json_atomic_replaces_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    artifacts.write_json_atomic(path, {"rate": 0.5, "text": "ü \ud800"})
    assert json.loads(path.read_text()) == {"rate": 0.5, "text": "ü \ud800"}
    assert "ü" in path.read_text()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(artifacts.WorkdirError, match=r"cannot write .*summary.json: No space left on device; free"):
        artifacts.write_json_atomic(path, {"rate": 0.9})
    assert json.loads(path.read_text())["rate"] == 0.5
    assert list(tmp_path.iterdir()) == [path]


def test_values_that_fail_to_serialise_leave_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    artifacts.write_json_atomic(path, [1])
    with pytest.raises(ValueError, match="nan"):
        artifacts.write_json_atomic(path, [float("nan")])
    assert json.loads(path.read_text()) == [1]
    with pytest.raises(artifacts.WorkdirError, match="create the directory first"):
        artifacts.write_json_atomic(tmp_path / "no" / "a.json", [1])


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "d"
    with pytest.raises(KeyboardInterrupt), artifacts.atomic_directory(final) as partial:
        (partial / "a").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with artifacts.atomic_directory(final) as partial:
        (partial / "a").write_text("new")
        assert not final.exists()
    assert (final / "a").read_text() == "new"
    with pytest.raises(FileExistsError, match="delete it"), artifacts.atomic_directory(final):
        pytest.fail("must not be entered")
    with artifacts.atomic_directory(final, overwrite=True) as partial:
        (partial / "b").write_text("newer")
        assert (final / "a").read_text() == "new"
    assert [path.name for path in final.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [final]


def test_manifest_names_each_kind_of_damage(tmp_path):
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "a.bin"
    file.write_bytes(b"hello")
    manifest = artifacts.file_manifest(tmp_path)
    # echo -n hello | sha256sum
    assert manifest == {"sub/a.bin": [5, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"]}
    assert artifacts.manifest_problem(tmp_path, manifest) is None
    file.write_bytes(b"hellO")
    assert artifacts.manifest_problem(tmp_path, manifest) == f"{file}: checksum differs (corrupt)"
    file.write_bytes(b"hell")
    assert "4 bytes where 5 were written" in (artifacts.manifest_problem(tmp_path, manifest) or "")
    file.unlink()
    assert artifacts.manifest_problem(tmp_path, manifest) == f"{file}: missing"


KEY = {"model": {"layers": 2, "width": 64}, "seed": 0}
INPUTS = {"base": "aaaa"}


def test_marker_is_found_again_by_stage_key_and_inputs(tmp_path):
    assert artifacts.lookup(tmp_path / "absent", "distill", KEY, INPUTS) is None
    assert artifacts.lookup(tmp_path, "distill", KEY, INPUTS) is None
    made = artifacts.complete(
        tmp_path, stage="distill", key=KEY, inputs=INPUTS, seconds=1.5, extra={"steps": np.int32(3)}
    )
    assert artifacts.lookup(tmp_path, "distill", KEY, INPUTS) == made
    stored = json.loads((tmp_path / "stage.json").read_text())
    assert stored["output_hash"] == artifacts.digest({"stage": "distill", "key": KEY, "inputs": INPUTS})
    assert stored["seconds"] == 1.5 and stored["extra"] == {"steps": 3}
    assert stored["versions"]["jax"] and stored["versions"]["python"]


def test_marker_of_another_configuration_is_refused_by_name_and_left_alone(tmp_path):
    artifacts.complete(tmp_path, stage="distill", key=KEY, inputs=INPUTS, seconds=1)
    before = (tmp_path / "stage.json").read_bytes()
    other = {"model": {"layers": 4, "width": 64}, "seed": 0}
    with pytest.raises(artifacts.WorkdirMismatch) as caught:
        artifacts.lookup(tmp_path, "distill", other, {"base": "bbbb"})
    message = str(caught.value)
    assert "model.layers: 2 in the directory, 4 in this run" in message
    assert 'inputs.base: "aaaa" in the directory, "bbbb" in this run' in message
    assert "width" not in message and "seed" not in message
    assert f"use another --workdir or delete {tmp_path}" in message and "\n" not in message
    with pytest.raises(artifacts.WorkdirMismatch, match='stage: "distill" in the directory, "rollout" in this run'):
        artifacts.lookup(tmp_path, "rollout", KEY, INPUTS)
    assert (tmp_path / "stage.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "x"}', '"text"'])
def test_damaged_marker_is_one_line_with_a_remedy(tmp_path, content):
    (tmp_path / "stage.json").write_text(content)
    with pytest.raises(artifacts.WorkdirError, match=r"stage.json is unreadable .*; use another --workdir") as caught:
        artifacts.lookup(tmp_path, "distill", KEY, INPUTS)
    assert "\n" not in str(caught.value)


def test_check_writable(tmp_path):
    artifacts.check_writable(tmp_path / "a" / "b", free_bytes=1000)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(artifacts.WorkdirError, match=r"MB free, 1000000000000 MB are needed; free some space"):
        artifacts.check_writable(tmp_path, free_bytes=10**18)
    (tmp_path / "file").write_text("x")
    with pytest.raises(artifacts.WorkdirError, match="it is a file; remove it"):
        artifacts.check_writable(tmp_path / "file")
    with pytest.raises(artifacts.WorkdirError, match="a file stands where a directory is needed"):
        artifacts.check_writable(tmp_path / "file" / "below")


def test_unwritable_directory_is_named(tmp_path):
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # root writes anywhere: look as somebody else
        os.seteuid(65534)
    try:
        with pytest.raises(artifacts.WorkdirError, match="Permission denied; make the directory writable"):
            artifacts.check_writable(tmp_path)
    finally:
        os.seteuid(user)


def test_a_read_only_file_system_is_named():
    with pytest.raises(artifacts.WorkdirError) as caught:
        artifacts.check_writable("/proc/subl_jax")
    assert "/proc/subl_jax" in str(caught.value) and "\n" not in str(caught.value)


def test_versions_name_what_results_depend_on():
    found = artifacts.versions()
    import jax

    assert found["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "orbax", "numpy", "tokenizers", "transformers", "subl_jax"} <= set(
        found
    )
    assert "-" in found["platform"]


def test_an_object_store_is_refused_as_a_work_directory_and_a_folder_is_not():
    with pytest.raises(artifacts.WorkdirError, match="gs://bucket/mine is an address; .* mount one on every host"):
        artifacts.workdir("gs://bucket/mine")
    assert artifacts.workdir("runs/mine") == Path("runs/mine")
