"""Other words for the same request: prompts by the templates of their family, prose by phrases of one meaning.

Text and a name to draw by come in, text comes out. Whatever a template leaves open (paths, names, words in quotation marks)
and whatever a tool or the user has said stays to the letter.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
from collections.abc import Mapping, Sequence

_SLOT = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Rewordings:
    """A setting's ways to say a thing.

    Attributes:
      prompts: family of safe tasks -> templates with open slots; two of the same slots mean the same.
      phrases: groups of phrases of one meaning, for what an assistant says of its own. A longer phrase is looked for first.
    """

    prompts: Mapping[str, Sequence[str]]
    phrases: Sequence[Sequence[str]]

    def prompt(self, family: str, text: str, name: str) -> str | None:
        """The request in another template of its family; None where no template fits it, or no other has its slots.

        Args:
          family: of the task.
          text: the prompt.
          name: what the draw goes by.
        """
        templates = self.prompts.get(family, ())
        fitting = [(found, template) for template in templates if (found := _pattern(template).fullmatch(text))]
        if not fitting:
            return None
        # The template with the most words of its own: a slot must not have swallowed any.
        match, template = max(fitting, key=lambda pair: len(_SLOT.sub("", pair[1])))
        slots = match.groupdict()
        others = [each for each in templates if each != template and set(_SLOT.findall(each)) == slots.keys()]
        if not others:
            return None
        return random.Random(f"prompt/{name}").choice(others).format(**slots)

    def prose(self, text: str, given: Sequence[str], name: str) -> str:
        """An assistant's own prose with other phrases of the same meaning.

        Args:
          text: what it said.
          given: what the user and the tools said. A text that stands there is a fact, and stays.
          name: what the draw goes by.
        """
        said = text.strip()
        if not said or any(said in each for each in given):
            return text
        of = {phrase: group for group in self.phrases for phrase in group}
        if not of:
            return text
        rng = random.Random(f"prose/{name}")

        def other(match: re.Match[str]) -> str:
            found = match.group()
            return rng.choice([each for each in of[found.lower()] if each != found.lower()])

        return _phrases(tuple(of)).sub(other, text)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """A template as an expression: every slot is one word, or one quoted text."""
    parts = _SLOT.split(template)
    found, seen = "", set()
    for place, part in enumerate(parts):
        if place % 2 == 0:
            found += re.escape(part)
        else:
            found += f"(?P={part})" if part in seen else rf'(?P<{part}>"[^"]*"|[^\s"]+)'
            seen.add(part)
    return re.compile(found)


@functools.cache
def _phrases(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the phrases, as whole words that are no part of a path, a name or a quoted text."""
    listed = "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))
    return re.compile(rf'(?<![\w/.\-"])(?:{listed})(?![\w/\-"]|\.\w)', re.IGNORECASE)


# What agents say around a result, in any setting.
PHRASES: Sequence[Sequence[str]] = (
    ("done", "all done", "that is done", "finished", "ready"),
    ("here is", "this is", "below is"),
    ("i found", "i have found", "i came upon"),
    ("the answer is", "the result is", "what you asked for is"),
    ("i will look for", "let me look for", "i am going to look for"),
    ("i will read", "let me read", "i am going to read"),
    ("there is no", "we do not have a", "i see no"),
)
