"""The teacher cache: what is read back against float64 NumPy on dense logits, its size, and everything it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax import artifacts
from subl_jax.distill import teacher_cache
from subl_jax.distill.teacher_cache import CacheError, CacheMismatch, CacheReader, store
from subl_jax.distill.teacher_cache import records as cache_records
from subl_jax.distill.teacher_cache import shards as cache_shards
from subl_jax.distill.teacher_cache import top_k as teacher_top_k
from subl_jax.models import decoder
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.distill import tiny
from tests.distill.test_cache_records import LARGE_VOCAB, records_of, zipf


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in hand, as `loop.Model` is one."""

    config: ModelConfig
    params: Any


TEACHER = Model(tiny.LARGE, tiny.params(tiny.LARGE, 1))
STUDENT = Model(tiny.SMALL, tiny.params(tiny.SMALL, 0))
UNLEARNT = tiny.document([5, 6, 7], [])
DOCUMENTS = [*tiny.documents(7), UNLEARNT, *tiny.documents(8, seed=1, longest=40), UNLEARNT]
SHARED = tiny.VOCAB - 3


def bound(
    temperature: float = 1.0,
    k: int | None = 6,
    shared: int = SHARED,
    teacher: Model | None = TEACHER,
    documents=DOCUMENTS,
    by="t",
):
    """The identity of a cache."""
    return teacher_cache.identity(teacher, by, documents, temperature, k, shared)


def write(
    directory: Path,
    *,
    temperature: float = 1.0,
    k: int = 6,
    shared: int = SHARED,
    documents=DOCUMENTS,
    by="t",
    **options,
):
    """Writes the tiny teacher's cache."""
    known = bound(temperature, k, shared, documents=documents, by=by)
    return teacher_cache.write(
        directory, documents, TEACHER, k=k, temperature=temperature, shared_tokens=shared, identity=known, **options
    )


@functools.cache
def hidden_of(config: ModelConfig):
    """The hidden states of a document on its own, jitted."""
    return jax.jit(lambda params, *arrays: decoder.apply(config, params, {}, *arrays)[0])


def dense(model: Model, document, temperature: float, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities, log-normalisers) at the loss tokens in float64, the document run on its own, without a cache."""
    tokens = np.zeros(48, np.int32)
    tokens[: len(document.tokens)] = document.tokens
    positions, segments = np.arange(48, dtype=np.int32), (np.arange(48) < len(document.tokens)).astype(np.int32)
    arrays = (array[None] for array in (tokens, positions, segments))
    hidden = np.asarray(hidden_of(model.config)(model.params, *arrays), np.float64)[0]
    places = np.flatnonzero(document.loss_mask) - 1
    logits = hidden[places] @ np.asarray(model.params["embedding"], np.float64).T
    logits = logits[:, :shared] / temperature
    largest = logits.max(axis=1, keepdims=True)
    normaliser = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return logits - normaliser, normaliser[:, 0]


# --- On the device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [1.0, 30.0])
def test_top_k_tail_and_reference_equal_float64(deviation):
    rng = np.random.default_rng(7)
    scores, other = (rng.normal(0, deviation, (6, 5000)).astype(np.float32) for _ in range(2))
    top = jax.jit(teacher_top_k.top_k_of, static_argnums=1)(scores, 64)
    reference = jax.jit(teacher_top_k.reference_of)(scores, top, other)
    p, q = (x.astype(np.float64) for x in (scores, other))
    p, q = (
        x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True) for x in (p, q)
    )
    ids = np.sort(np.argsort(-scores, axis=1)[:, :64], axis=1)
    np.testing.assert_array_equal(top.ids, ids)
    chosen = np.take_along_axis(p, ids, axis=1)
    np.testing.assert_allclose(top.drops, chosen.max(1, keepdims=True) - chosen, atol=1e-5)
    for log_probs, log_tail in ((p, top.log_tail), (q, reference.log_tail)):
        rest = np.exp(log_probs)
        np.put_along_axis(rest, ids, 0, axis=1)
        # Relative to the tail itself: 1 minus the rest would not see a tail of e-20.
        np.testing.assert_allclose(log_tail, np.log(rest.sum(1)), rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(reference.kl, (np.exp(p) * (p - q)).sum(1), rtol=1e-5)
    np.testing.assert_allclose(reference.log_probs, np.take_along_axis(q, ids, axis=1), rtol=1e-5, atol=1e-5)


def test_no_array_of_all_tokens_by_vocabulary_exists():
    config = tiny.LARGE.from_dict({**tiny.LARGE.to_dict(), "vocab_size": 1000})
    run = teacher_top_k.program(
        config, None, k=4, temperature=1.0, shared_tokens=1000, chunk_tokens=16, measured=True
    )  # fmt: skip
    params = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    document, places = jax.ShapeDtypeStruct((4, 32), jnp.int32), jax.ShapeDtypeStruct((64,), jnp.int32)
    text = run.lower(params, None, document, document, document, places).compile().as_text()  # type: ignore[attr-defined]
    assert "16,1000]" in text
    assert "64,1000]" not in text and "4,16,1000]" not in text and "128,1000]" not in text


# --- The cache of a model ---------------------------------------------------------------------------------------------


def check_against_dense(
    directory: Path, temperature: float, k: int, shared: int, documents=DOCUMENTS, rtol=2e-4
) -> None:
    """Every document of a cache against float64 top k of its dense logits."""
    reader = CacheReader(directory, bound(temperature, k, shared, documents=documents))
    assert len(reader) == len(documents)
    for index, document in enumerate(documents):
        ids, log_probs, log_tail = reader.document(index)
        assert ids.shape == log_probs.shape == (document.loss_mask.sum(), min(k, shared))
        assert len(log_tail) == len(ids)
        if not len(ids):
            continue
        expected, normaliser = dense(TEACHER, document, temperature, shared)
        likeliest = np.sort(np.argsort(-expected, axis=1)[:, :k], axis=1)
        np.testing.assert_array_equal(ids, likeliest)
        np.testing.assert_allclose(log_probs, np.take_along_axis(expected, likeliest, axis=1), rtol=rtol, atol=2e-4)
        np.put_along_axis(expected, likeliest, -np.inf, axis=1)
        rest = np.exp(expected).sum(axis=1)
        np.testing.assert_allclose(np.exp(log_tail), rest, rtol=1e-4)
        assert (np.isneginf(log_tail) == (rest == 0)).all()
        np.testing.assert_allclose(reader.log_normaliser(index), normaliser, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("temperature", "k", "shared"), [(1.0, 6, SHARED), (2.5, 6, SHARED), (1.0, 64, tiny.VOCAB)])
def test_cache_of_a_model_equals_the_top_k_of_its_dense_logits(tmp_path, temperature, k, shared):
    figures = write(tmp_path / "cache", temperature=temperature, k=k, shared=shared)
    check_against_dense(tmp_path / "cache", temperature, k, shared)
    assert figures["k"] == min(k, shared)
    if k > shared:  # the whole distribution: nothing is lost but what the grid loses
        assert figures["tail_mass"] == 0 and figures["added_error_max"] < 1e-4


def test_packed_documents_have_the_records_of_documents_one_by_one(tmp_path):
    documents = DOCUMENTS[:5]
    write(tmp_path / "packed", documents=documents)
    packed = CacheReader(tmp_path / "packed", bound(documents=documents))
    for index, document in enumerate(documents):
        write(tmp_path / str(index), documents=[document], batch_tokens=1)
        alone = CacheReader(tmp_path / str(index), bound(documents=[document])).document(0)
        for together, single in zip(packed.document(index), alone, strict=True):
            np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-5)


def test_chunks_batches_and_shards_change_nothing(tmp_path):
    write(tmp_path / "cache", batch_tokens=128, chunk_tokens=3, shard_tokens=17)
    assert len(list((tmp_path / "cache").glob("records-*.bin"))) >= 4
    check_against_dense(tmp_path / "cache", 1.0, 6, SHARED)
    reader = CacheReader(tmp_path / "cache", bound())
    order = [9, 0, 7, 16, 3, 9]
    taken = reader.take(order)
    assert reader.counts().tolist() == [int(document.loss_mask.sum()) for document in DOCUMENTS]
    for at, part in enumerate(taken):
        np.testing.assert_array_equal(part, np.concatenate([reader.document(index)[at] for index in order]))
    with pytest.raises(IndexError, match="17"):
        reader.document(len(DOCUMENTS))


def test_a_teacher_split_over_devices_gives_the_same_cache(tmp_path):
    layout = Layout(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]))
    write(tmp_path / "cache", layout=layout)
    check_against_dense(tmp_path / "cache", 1.0, 6, SHARED)


def test_figures_equal_a_float64_computation_on_what_is_read(tmp_path):
    temperature = 2.0
    figures = write(tmp_path / "cache", temperature=temperature, reference=STUDENT, batch_tokens=128, shard_tokens=40)
    reader = CacheReader(tmp_path / "cache", bound(temperature))
    full, atoms, tails = [], [], []
    for index, document in enumerate(DOCUMENTS):
        ids, log_probs, log_tail = reader.document(index)
        tails.append(np.exp(log_tail))
        log_p, log_q = (dense(model, document, temperature, SHARED)[0] for model in (TEACHER, STUDENT))
        full.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        chosen = np.take_along_axis(log_q, ids, axis=1)
        rest = np.log(1 - np.exp(chosen).sum(axis=1))
        atoms.append((np.exp(log_probs) * (log_probs - chosen)).sum(axis=1) + np.exp(log_tail) * (log_tail - rest))
    full, atoms = np.concatenate(full), np.concatenate(atoms)
    assert figures["tokens"] == figures["measured_tokens"] == len(full) and figures["documents"] == len(DOCUMENTS)
    assert figures["tail_mass"] == pytest.approx(np.concatenate(tails).mean(), rel=1e-5)
    assert figures["kl_full"] == pytest.approx(full.mean(), rel=1e-4)
    assert figures["kl_atoms"] == pytest.approx(atoms.mean(), rel=1e-4)
    assert figures["added_error"] == pytest.approx(np.abs(full - atoms).mean(), rel=1e-3)
    assert figures["added_error_max"] == pytest.approx(np.abs(full - atoms).max(), rel=1e-3)
    assert 0 <= figures["quantisation_error"] < 1e-4 and abs(figures["quantisation_kl"]) < 1e-7
    assert reader.figures == figures
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert figures["bytes_per_token"] == on_disk / len(full)


def test_figures_may_be_measured_on_a_part(tmp_path):
    figures = write(tmp_path / "cache", batch_tokens=128, measured_tokens=30)
    assert 0 < figures["measured_tokens"] < figures["tokens"]
    assert "twice the temperature" in figures["reference"] and figures["kl_full"] > 0


def test_a_large_vocabulary_takes_at_most_280_bytes_a_token(tmp_path, monkeypatch):
    # Records of Zipf's law in place of a model's: everything else, index and metadata included, is what `write` leaves.
    documents = [tiny.document([1] * 34, range(2, 34), f"safe/train/x/0/{index}") for index in range(60)]
    model = Model(tiny.SMALL.from_dict({**tiny.SMALL.to_dict(), "vocab_size": LARGE_VOCAB}), {"embedding": np.zeros(1)})
    few = records_of(zipf(16, 8))

    def dispatch(self, rows, measured):
        order = [index for row in rows for index in row]
        read = cache_records.decode(few, LARGE_VOCAB)
        wanted = np.arange(32 * len(order)) % len(few)
        drops = read.log_probs.max(axis=1, keepdims=True) - read.log_probs
        parts: list[Any] = [part[wanted] for part in (read.ids, drops, read.log_tail, read.log_tail)]
        other: list[Any] = [np.zeros(len(wanted), np.float32), read.log_probs[wanted], read.log_tail[wanted]]
        return order, (teacher_top_k.TopK(*parts), teacher_top_k.Reference(*other))

    monkeypatch.setattr(cache_shards.Work, "dispatch", dispatch)
    known = teacher_cache.identity(model, "t", documents, 1.0, 64, LARGE_VOCAB)
    figures = teacher_cache.write(
        tmp_path / "cache", documents, model, k=64, shared_tokens=LARGE_VOCAB, identity=known
    )  # fmt: skip
    assert figures["tokens"] == 60 * 32
    assert figures["bytes_per_token"] <= 280
    ids, log_probs, _ = CacheReader(tmp_path / "cache", known).document(59)
    expected = cache_records.decode(few, LARGE_VOCAB)
    np.testing.assert_array_equal(ids[:16], expected.ids[np.arange(59 * 32, 59 * 32 + 16) % 16])
    assert np.abs(log_probs[:16] - expected.log_probs).max() < 1e-3


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache that tests do not change."""
    directory = tmp_path_factory.mktemp("teacher") / "cache"
    write(directory)
    return directory


def test_a_cache_of_something_else_is_refused_and_every_difference_named(cache):
    changed = {**TEACHER.params, "final_norm": {"scale": TEACHER.params["final_norm"]["scale"] * 1.0001}}
    differing = {
        "tokenizer": bound(by="other"),
        "dataset": bound(documents=DOCUMENTS[::-1]),
        "temperature": bound(1.5),
        "shared_tokens": bound(shared=SHARED - 1),
        "k": bound(k=5),
        "teacher.parameters": bound(teacher=Model(tiny.LARGE, changed)),
    }
    for name, expect in differing.items():
        with pytest.raises(CacheMismatch, match=rf"\({name}: .* in the cache, .* in this run\)"):
            CacheReader(cache, expect)
    with pytest.raises(CacheMismatch) as refused:
        CacheReader(cache, bound(1.5, 5, SHARED - 1, STUDENT, DOCUMENTS[1:], "other"))
    for name in [*differing, "teacher.architecture.num_layers"]:
        assert f"{name}: " in str(refused.value)


def test_masks_and_adapters_belong_to_the_identity():
    document = tiny.document([1, 2, 3, 4], [2])
    assert bound(documents=[document])["dataset"] != bound(documents=[tiny.document([1, 2, 3, 4], [3])])["dataset"]
    adapted = Model(tiny.LARGE.from_dict({**tiny.LARGE.to_dict(), "lora": LoraConfig(2).__dict__}), TEACHER.params)
    assert bound(teacher=adapted)["teacher"] != bound()["teacher"]
    # Where a document ends is part of it, too.
    split = [tiny.document([1, 2], [1]), tiny.document([3], [])]
    joined = [tiny.document([1], []), tiny.document([2, 3], [0])]
    assert bound(documents=split)["dataset"] != bound(documents=joined)["dataset"]


def test_without_the_teacher_a_cache_opens_but_never_without_the_rest(cache):
    reader = CacheReader(cache, bound(teacher=None, k=None))
    assert (reader.k, reader.vocab, reader.temperature) == (6, SHARED, 1.0)
    for name in ("tokenizer", "dataset", "temperature", "shared_tokens"):
        with pytest.raises(CacheError, match=f"say what {name} must be"):
            CacheReader(cache, {key: value for key, value in bound().items() if key != name})


@pytest.mark.parametrize(("name", "damage", "cause"), [
    ("records-00000.bin", lambda old: old[:-1], "truncated"),
    ("records-00000.bin", lambda old: old[:9] + bytes([old[9] ^ 1]) + old[10:], "checksum differs"),
    ("counts.bin", lambda old: old[::-1], "checksum differs"),
    ("metadata.json", lambda old: old.replace(b'"k": 6', b'"k": 7'), "does not match its own digest"),
    ("metadata.json", None, "missing"),
    ("records-00000.bin", None, "missing"),
])  # fmt: skip
def test_a_damaged_cache_is_refused_with_its_file_and_remedy(tmp_path, cache, name, damage, cause):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage is not None:
        assert damage(content) != content
        (copy / name).write_bytes(damage(content))
    with pytest.raises(CacheError, match=rf"{name}: .*{cause}.*; delete .*cache and write"):
        CacheReader(copy, bound())


def test_a_cache_of_another_format_or_none_is_refused(tmp_path, cache):
    with pytest.raises(CacheError, match="no such teacher cache"):
        CacheReader(tmp_path / "nowhere", bound())
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    body = json.loads((copy / "metadata.json").read_text())
    del body["digest"]
    (copy / "metadata.json").write_text(json.dumps(artifacts.sealed({**body, "format": 99})))
    with pytest.raises(CacheError, match="format 99 where this version reads 1"):
        CacheReader(copy, bound())


def test_writing_refuses_what_cannot_be_right(tmp_path, cache):
    with pytest.raises(CacheError, match="exists already"):
        write(cache)
    with pytest.raises(CacheError, match="no loss tokens in 1 documents"):
        write(tmp_path / "cache", documents=[UNLEARNT])
    with pytest.raises(ValueError, match="k=0"):
        write(tmp_path / "cache", k=0)
    with pytest.raises(ValueError, match=f"shared_tokens={tiny.VOCAB + 1} where the teacher knows {tiny.VOCAB}"):
        write(tmp_path / "cache", shared=tiny.VOCAB + 1)
    for temperature in (0.0, float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            teacher_cache.write(
                tmp_path / "cache", DOCUMENTS, TEACHER, temperature=temperature, shared_tokens=SHARED, identity={}
            )
    with pytest.raises(CacheError, match=r"temperature: 1\.0 in it, 2\.0 in the arguments"):
        teacher_cache.write(
            tmp_path / "cache", DOCUMENTS, TEACHER, k=6, temperature=2.0, shared_tokens=SHARED, identity=bound()
        )
    assert not (tmp_path / "cache").exists()


def test_a_teacher_that_is_no_number_leaves_no_cache(tmp_path):
    broken = Model(tiny.LARGE, {**TEACHER.params, "embedding": TEACHER.params["embedding"] * np.nan})
    with pytest.raises(ValueError, match="not finite"):
        teacher_cache.write(
            tmp_path / "cache", DOCUMENTS, broken, k=6, shared_tokens=SHARED, identity=bound(teacher=broken)
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()


def test_a_killed_write_is_never_taken_for_a_cache_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options: dict[str, Any] = {"batch_tokens": 128, "shard_tokens": 17}
    whole = write(tmp_path / "whole", **options)
    real, computed = cache_shards.write_shard, []

    def killed_at(limit: int):
        def write_shard(partial, number, *rest):
            if number == limit:
                (partial / cache_shards.records_file(number)).write_bytes(b"half a shard")
                raise KeyboardInterrupt
            computed.append(number)
            return real(partial, number, *rest)

        return write_shard

    monkeypatch.setattr(cache_shards, "write_shard", killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", **options)
    assert computed == [0, 1] and not (tmp_path / "cache").exists()
    # A finished shard whose file was damaged since is computed again.
    partial = artifacts.partial_path(tmp_path / "cache")
    (partial / cache_shards.records_file(0)).write_bytes(b"damaged")
    monkeypatch.setattr(cache_shards, "write_shard", killed_at(-1))
    computed.clear()
    assert write(tmp_path / "cache", **options) == whole
    assert computed[:2] == [0, 2] and 1 not in computed
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()
    assert not partial.exists()


def test_what_a_killed_write_of_another_cache_left_is_not_used(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_seal", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "cache", by="another")
    write(tmp_path / "cache")
    check_against_dense(tmp_path / "cache", 1.0, 6, SHARED)


def test_an_older_cache_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "cache", by="another")
    write(tmp_path / "cache", overwrite=True)
    check_against_dense(tmp_path / "cache", 1.0, 6, SHARED)
