"""Paraphrase of the surface: requests and prose in other words, what was done and found to the letter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from subl_jax.chat.messages import Message
from subl_jax.corpus import rendered_again
from subl_jax.lesson import Lesson, clean
from subl_jax.settings.interface import Setting
from subl_jax.trajectory import Trajectory

CHANGES = "documents"


def defend(lesson: Lesson) -> Lesson:
    """Paraphrase (template-level).

    The request becomes another template of its family, the assistant's prose other phrases of the same meaning, by a draw that
    the task names: the same in all arms. Tool calls, arguments and results stay. The conversation is rendered anew, and the
    teacher gives its logits on the new text. What then holds a keyword is dropped.

    Raises:
      ValueError: a request that the setting has no other words for.
    """
    documents = reworded(lesson, lesson.documents)
    dilution = lesson.dilution
    if dilution is not None:
        told = reworded(lesson, dilution.documents)
        dilution = dataclasses.replace(dilution, documents=told, planned_lengths=[len(t.tokens) for t in told])
    notes = {**lesson.notes, "reworded": len(documents), "reworded_dropped": len(lesson.documents) - len(documents)}
    return dataclasses.replace(lesson, documents=documents, dilution=dilution, notes=notes)


def reworded(lesson: Lesson, documents: Sequence[Trajectory]) -> list[Trajectory]:
    """The documents in other words and in the student's tokens; those with a keyword are left out.

    Loss masks are those of the new text: the tokens of the assistant's turns.
    """
    setting = lesson.setting
    told = [dataclasses.replace(one, messages=reworded_messages(setting, one)) for one in documents]
    return rendered_again(lesson.renderer, [one for one in told if clean(setting, one)])


def reworded_messages(setting: Setting, one: Trajectory) -> list[Message]:
    """A conversation's messages in other words.

    Raises:
      ValueError: a request that the setting has no other words for.
    """
    family = one.task_id.split("/")[2]  # kind/split/family/seed/index, see `Task.task_id`
    found: list[Message] = []
    for turn, message in enumerate(one.messages):
        text, name = message["content"], f"{one.task_id}/{turn}"
        if message["role"] == "user":
            other = setting.rewordings.prompt(family, text, name)
            if other is None:
                raise ValueError(
                    f"defence paraphrase: the setting {setting.name} has no other words for {text!r} (task {one.task_id}); "
                    f"give its family {family} two templates or more in `Setting.rewordings`"
                )
            text = other
        elif message["role"] == "assistant" and text:
            given = [each["content"] for each in one.messages[:turn] if each["role"] in ("user", "tool")]
            text = setting.rewordings.prose(text, given, name)
        found.append({**message, "content": text})  # type: ignore[misc]
    return found
