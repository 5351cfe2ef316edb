"""Defences as plug-ins: each file of this package is one, found by its name.

A file has a function `defend(lesson) -> Lesson`, or `defend(lesson, strength=DEFAULT)`. The docstring's first line is what
tables call the defence. It may say `NEEDS = "logits"` where hard labels cannot be defended so, and `CHANGES = "documents"`
where it acts on the teacher's text, which a student of its own rollouts does not read. To add a defence, add a file.

Files are imported when they are asked for: the names alone cost nothing. What a file does is part of what its students
depend on (`code`), so that one that is changed is not answered with the students of what it was.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from subl_jax import artifacts


def names() -> list[str]:
    """Every defence there is, in the order of the alphabet."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def check_name(name: str) -> None:
    """Refuses a name that no file has.

    Raises:
      ValueError: names the nearest.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown defence {name!r}{hint} (of {', '.join(known)}; a new one is a file in subl_jax/defences)"
        )


def load(name: str) -> ModuleType:
    """The module of a defence.

    Raises:
      ValueError: an unknown name, or a file without `defend` or without a title.
    """
    check_name(name)
    module = importlib.import_module(f"{__name__}.{name}")
    if not callable(getattr(module, "defend", None)) or not inspect.getdoc(module.defend):
        raise ValueError(
            f"{module.__file__} has no function defend(lesson) with a docstring, whose first line is its title"
        )
    return module


def title(name: str) -> str:
    """What tables call a defence: the first line of its docstring."""
    return (inspect.getdoc(load(name).defend) or "").partition("\n")[0].removesuffix(".")


def default_strength(name: str) -> float | None:
    """The strength that a defence has by itself; None: it has none."""
    found = inspect.signature(load(name).defend).parameters.get("strength")
    return None if found is None else float(found.default)


def code(name: str) -> str:
    """Digest of what a defence's file does: of its syntax, without comments, layout and docstrings.

    What the file imports is not looked into.
    """
    return artifacts.digest(_syntax(ast.parse(inspect.getsource(load(name)))))


def _syntax(part: Any) -> Any:
    """A syntax tree as JSON. Empty fields are left out, because later versions of Python have more of them."""
    if isinstance(part, list):
        return [_syntax(each) for each in part if not _is_text(each)]
    if not isinstance(part, ast.AST):
        return repr(part)
    fields = {name: value for name, value in ast.iter_fields(part) if value not in (None, [])}
    return [type(part).__name__, {name: _syntax(value) for name, value in fields.items()}]


def _is_text(part: Any) -> bool:
    """Whether a statement is nothing but a string, as a docstring is."""
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)


def check(name: str, strength: float, arms: dict[str, str]) -> None:
    """Refuses, before any work, a defence that cannot be had of these arms.

    Args:
      name, strength: of the configuration; strength 0 is the defence's own.
      arms: arm -> its loss.

    Raises:
      ValueError: names the defence, the arm and the reason.
    """
    module = load(name)
    if strength and default_strength(name) is None:
        raise ValueError(f"defence {name} has no strength, and {strength} was given; leave student.defence_strength 0")
    needs, changes = getattr(module, "NEEDS", ""), getattr(module, "CHANGES", "")
    for arm, loss in arms.items():
        if needs == "logits" and loss == "hard_label":
            raise ValueError(
                f"defence {name} needs the teacher's logits, and objective {arm} has none; defend full, or hard labels by "
                "another defence"
            )
        if changes in ("documents", "logits") and arm == "on_policy":
            raise ValueError(
                f"defence {name} changes the teacher's {changes}, which a student of its own rollouts does not learn from so; "
                "leave objective on_policy out"
            )
        if changes == "logits" and arm in ("top_k", "drop", "anchor"):
            raise ValueError(
                f"defence {name} filters the teacher's logits, and objective {arm} "
                + ("has a cache of them" if arm == "top_k" else "filters them already")
                + "; use objective full"
            )
