"""The checks that stand on every function of the library under test: types everywhere, dimensions where arrays are."""

from __future__ import annotations

import types
from typing import Any

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float

from subl_jax.data import packing
from subl_jax.evaluate import verdicts
from subl_jax.models import attention, decoder
from tests import annotations


def made(body: str, **names: Any) -> types.FunctionType:
    """A function of a module with these names."""
    module = types.ModuleType("made")
    module.__dict__.update(names)
    exec("from __future__ import annotations\n" + body, module.__dict__)
    return module.__dict__["f"]


def test_a_value_of_a_wrong_type_is_refused_where_no_arrays_are():
    assert not annotations._may_name_arrays(verdicts.points.__wrapped__)  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(jaxtyping.TypeCheckError, match="share"):
        verdicts.points("half")  # pyright: ignore[reportArgumentType]


def test_dimensions_must_agree_between_arguments():
    function = made("def f(a: Pair, b: Pair) -> None: ...", Pair=Float[np.ndarray, "n"])
    checked = annotations._typed(typechecker=annotations.check)(function)
    checked(np.zeros(2), np.zeros(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        checked(np.zeros(2), np.zeros(3))


def test_modules_of_arrays_are_known_by_their_imports_by_their_aliases_and_by_what_an_annotation_reaches_into():
    other = types.ModuleType("other")
    other.__dict__["Row"] = Float[np.ndarray, "n"]
    assert annotations._may_name_arrays(made("def f(a: Float[x, 'n']): ...", Float=Float))
    assert annotations._may_name_arrays(made("def f(a: Row): ...", Row=other.Row | None))
    assert annotations._may_name_arrays(made("def f(a: other.Row): ...", other=other))
    assert not annotations._may_name_arrays(made("def f(a: int): ...", other=other, jaxtyping=jaxtyping))
    for function in (decoder.apply, attention.attend, packing.epoch_order):
        found: Any = function
        while hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        assert annotations._may_name_arrays(found), function


def test_a_method_that_hides_a_type_s_name_does_not_stop_the_import():
    body = "class A:\n    def list(self): ...\n    @typed\n    def f(self) -> list[str]: return ['a']\nf = A().f"
    typed = annotations._typed(typechecker=annotations.check)
    assert made(body, typed=typed)() == ["a"]


def test_a_name_that_only_type_checkers_import_does_not_stop_a_call():
    checked = annotations._typed(typechecker=annotations.check)(made("def f(a: Absent) -> int: return 1"))
    assert checked(3) == 1
    later = annotations._typed(typechecker=annotations.check)(made("def f(a: Later | None) -> int: return 1"))
    later.__globals__["Later"] = str
    assert later("x") == 1
