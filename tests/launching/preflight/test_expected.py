"""The model of collectives against sums by hand on small shapes."""

from __future__ import annotations

import pytest

from subl_jax.distill.step import Layouts
from subl_jax.launching.preflight import expected
from subl_jax.parallel.layout import Layout, MeshConfig, abstract_mesh
from tests.launching.preflight.tpu import model

L, D, FF, V = 2, 512, 2048, 2048
M = D * (512 + 256 + 256 + 512) + 3 * D * FF


def layouts(data: int, fsdp: int, tensor: int, rules: str = "default") -> Layouts:
    layout = Layout(abstract_mesh(MeshConfig(data, fsdp, tensor), data * fsdp * tensor), rules)
    return Layouts(layout, layout)


def kinds(mesh: tuple[int, int, int], rules: str = "default", accumulate: int = 1) -> dict[str, int]:
    terms = expected.distill_terms(
        model(L), model(L, tie_embeddings=False), layouts(*mesh, rules), 16, 128, 16 * 128, accumulate
    )
    return expected.by_kind(terms)


def test_fsdp_gathers_weights_twice_for_the_student_and_once_for_the_teacher() -> None:
    tokens = 16 * 128 // 4
    found = kinds((1, 4, 1))
    assert found["all-gather"] == 3 * 2 * L * M + 2 * 2 * V * D + 2 * 4 * tokens * 4
    assert found["reduce-scatter"] == 4 * (L * M + V * D)
    assert found["all-to-all"] == 2 * 4 * tokens * D + 2 * tokens * D
    assert found["all-reduce"] == 4 * (2 * L + 1) * D


def test_copies_of_the_weights_sum_all_gradients_and_gather_nothing() -> None:
    found = kinds((4, 1, 1))
    table = V * D  # of the head, and of the look-up
    assert found == dict.fromkeys(expected.KINDS, 0) | {"all-reduce": 4 * (L * M + 2 * table + (2 * L + 1) * D)}


def test_tensor_parallelism_sums_activations_seven_times_a_layer_and_twenty_bytes_a_loss_token() -> None:
    tokens = 16 * 128
    found = kinds((1, 1, 4))
    rows = (4 + 2) * tokens * D
    residuals = (5 + 2) * L * 2 * tokens * D
    assert found["all-reduce"] == rows + residuals + 20 * tokens + 2 * tokens * D
    assert found["all-gather"] == found["reduce-scatter"] == found["all-to-all"] == 0


def test_parts_of_a_batch_gather_weights_anew_and_move_the_same_rows() -> None:
    one, two = kinds((1, 4, 1)), kinds((1, 4, 1), accumulate=2)
    ids = 2 * 4 * (16 * 128 // 4) * 4
    assert two["all-gather"] - ids == 2 * (one["all-gather"] - ids)
    assert two["reduce-scatter"] == 2 * one["reduce-scatter"]
    assert two["all-to-all"] == one["all-to-all"]


def test_one_device_moves_nothing() -> None:
    assert set(kinds((1, 1, 1)).values()) == {0}


def test_weights_that_stand_whole_everywhere_only_sum_gradients() -> None:
    found = kinds((2, 2, 1), "replicated")
    assert found["all-gather"] == found["reduce-scatter"] == found["all-to-all"] == 0
    assert found["all-reduce"] > 0


@pytest.mark.parametrize("slots", [1, 16])
def test_a_decode_step_sums_the_residual_twice_a_layer(slots: int) -> None:
    layout = Layout(abstract_mesh(MeshConfig(2, 1, 4), 8), "rollout")
    found = expected.by_kind(expected.decode_terms(model(L), layout, slots))
    assert found["all-reduce"] == slots * (2 * D * (1 + 2 * L) + 3 * 4)
    assert found["all-gather"] == slots * 4 * 8
