"""The type checker that the import hook puts on every function of the library, see `conftest.py`.

jaxtyping wraps a function so that the dimensions in its annotations mean the same in all of them, and two type checks each
bind the arguments anew: about 40 µs a call. A function of a module that knows no array type has no dimensions, and is only
checked by beartype, in a tenth of that.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException

# An int is welcome where a float is asked for, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
# The same by itself; a violation is the error that jaxtyping would make of it.
_alone = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))

_whole = jaxtyping.jaxtyped


def install() -> None:
    """Has every module of the library checked that is imported from now on."""
    jaxtyping.jaxtyped = _typed  # what the import hook writes above every function
    jaxtyping.install_import_hook("subl_jax", f"{__name__}.check")


def _typed(*, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(found: Any) -> Any:
        if inspect.isfunction(found) and _all_known(found) and not _may_name_arrays(found):
            # A name that a class gives another meaning (a method `list`) is beyond beartype by itself.
            with contextlib.suppress(BeartypeDecorHintException):
                return _alone(found)
        return _whole(found, typechecker=typechecker)

    return decorate


def _all_known(function: Any) -> bool:
    """Whether every name in the annotations stands for something by now.

    One that does not is of a class that is still to come, or was imported for type checkers alone: jaxtyping lets it pass,
    beartype by itself does not.
    """
    told = " ".join(map(str, function.__annotations__.values()))
    names = re.findall(r"(?<![\w.])[A-Za-z_]\w*", told)
    return all(name in function.__globals__ or hasattr(builtins, name) for name in names)


def _may_name_arrays(function: Any) -> bool:
    """Whether an array type with dimensions can stand in the annotations or the body of a function.

    Any name of its module may be one; imports stand above all functions. So may an attribute that an annotation names.
    """
    names = function.__globals__
    if any(_of_arrays(value) for name, value in names.items() if not name.startswith("__")):
        return True
    told = " ".join(map(str, function.__annotations__.values()))
    return any(_of_arrays(getattr(names.get(owner), name, None)) for owner, name in re.findall(r"(\w+)\.(\w+)", told))


def _of_arrays(value: Any) -> bool:
    if value is jaxtyping:
        return False  # the hook's own import
    origin = getattr(type(value), "__module__", ""), getattr(value, "__module__", "")
    if any(isinstance(name, str) and name.partition(".")[0] == "jaxtyping" for name in origin):
        return True
    return any(_of_arrays(part) for part in typing.get_args(value))
