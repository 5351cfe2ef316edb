"""Expansion of words: tree nodes in, the fields bash would make of them out, substitutions executed on the way.

A field is a string in which `UNKNOWN` stands for any text that cannot be known before execution.
"""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from tree_sitter import Node

from subl_jax.settings.bash.commands import quoting
from subl_jax.settings.bash.commands.arithmetic import evaluate
from subl_jax.settings.bash.commands.braces import Pieces, expand_braces
from subl_jax.settings.bash.commands.state import ENVIRONMENT, Shell, Value
from subl_jax.settings.bash.commands.syntax import UNKNOWN, Document, Script, decode, document_tree, encode, text_of

_DEFAULTS = frozenset({"-", ":-", "=", ":=", "+", ":+", "?", ":?"})
_BACKTICKS = re.compile(r"`((?:[^`\\]|\\.)*)`", re.DOTALL)


@runtime_checkable
class Runner(Protocol):
    """What expansion asks of the walk: the output of a substituted script."""

    def substituted(self, nodes: list[Node], script: Script, shell: Shell) -> str:
        """Output of the statements of `$(...)`, run in a subshell."""
        ...

    def substituted_text(self, text: str, shell: Shell) -> str:
        """Output of a script given as text, run in a subshell."""
        ...

    def piped_file(self, node: Node, script: Script, shell: Shell) -> str:
        """The name of the file that stands for `<(...)` or `>(...)`."""
        ...


class _Fields:
    """The fields of one word as they grow; `separators` is the IFS."""

    def __init__(self, separators: str):
        self._separators = separators
        self.fields: list[Pieces] = []
        self.open: Pieces | None = None

    def add(self, text: str, literal: bool = False) -> None:
        """Text of the current field."""
        self.open = [] if self.open is None else self.open
        self.open.append((text, literal))

    def close(self) -> None:
        """The current field, if there is one, is complete."""
        if self.open is not None:
            self.fields.append(self.open)
        self.open = None

    def add_split(self, text: str) -> None:
        """The value of an unquoted expansion: blanks separate fields, glob characters match files."""
        parts = quoting.split_fields(text, self._separators)
        for index, part in enumerate(parts):
            if index:
                self.close()
            if part:
                self.add(quoting.hide_globs(part))

    def add_each(self, values: list[str], quoted: bool) -> None:
        """`"${a[@]}"`: one field per value, the first joined to what stands before it."""
        for index, value in enumerate(values):
            if index:
                self.close()
            if quoted:
                self.add(value)
            else:
                self.add_split(value)


class Expander:
    """Expansion in the state of one shell and the script its words come from."""

    def __init__(self, runner: Runner, script: Script, shell: Shell):
        self._runner = runner
        self._script = script
        self._shell = shell

    def _no_fields(self) -> _Fields:
        separators = self._shell.variables.get("IFS")
        return _Fields(separators if isinstance(separators, str) and UNKNOWN not in separators else " \t\n")

    def fields(self, node: Node) -> list[str]:
        """All fields of a word: none, one or several."""
        found = self._no_fields()
        self._word(node, found, False)
        found.close()
        return [
            "".join(quoting.hide_globs(text) if literal else text for text, literal in field)
            for pieces in found.fields
            for field in expand_braces(pieces)
        ]

    def text(self, node: Node) -> str:
        """A word where bash neither splits nor matches files: an assignment's value, a here-string, `case $x`."""
        found = self._no_fields()
        self._word(node, found, True)
        found.close()
        return " ".join("".join(text for text, _ in pieces) for pieces in found.fields)

    def arithmetic(self, node: Node) -> int | None:
        """The value of `$((...))`, `((...))` or a part of it; the substitutions in it are executed."""
        source = re.sub(r"^(?:\$?\(\(|\$\[)|(?:\)\)|\])$", "", self._expanded(node))
        return evaluate(source, self._shell)

    def _expanded(self, node: Node) -> str:
        """The source of a node with its expansions done."""
        if node.type in ("simple_expansion", "expansion", "command_substitution", "string", "raw_string"):
            return self.text(node)
        if not node.child_count:
            return text_of(node)
        out, at, source = [], node.start_byte, node.text or b""
        for child in node.children:
            out += [decode(source[at - node.start_byte : child.start_byte - node.start_byte]), self._expanded(child)]
            at = child.end_byte
        return "".join(out)

    def document(self, document: Document) -> str:
        """The text of a here-document, expanded unless its delimiter was quoted."""
        if document.literal or not re.search(r"[$`\\]", document.text):
            return document.text
        if "$" not in document.text:
            return self._literal(encode(document.text), True)
        body = document_tree(document.text)
        if body is None:
            return UNKNOWN
        out, at = [], 0
        inner = Expander(self._runner, body.script, self._shell)
        for offset, node in body.expansions:
            out.append(self._literal(body.text[at:offset], True))
            out.append(inner.text(node))
            at = offset + node.end_byte - node.start_byte
        return "".join([*out, self._literal(body.text[at:], True)])

    def _literal(self, raw: bytes, here_document: bool) -> str:
        text = decode(raw)
        if not here_document:
            return quoting.unescape_double(text)
        out, at = [], 0
        for found in _BACKTICKS.finditer(text):
            out.append(quoting.unescape_double(text[at : found.start()], True))
            out.append(self._runner.substituted_text(re.sub(r"\\([\\$`])", r"\1", found[1]), self._shell))
            at = found.end()
        return "".join(out) + quoting.unescape_double(text[at:], True)

    def _word(self, node: Node, found: _Fields, quoted: bool) -> None:
        kind = node.type
        if kind in ("word", "number", "extglob_pattern", "regex", "variable_name", "test_operator"):
            if node.named_child_count:
                self._children(node, found, quoted, literal=True)
            else:
                for text, literal in quoting.unquoted_pieces(text_of(node)):
                    found.add(text, literal)
        elif kind in ("concatenation", "brace_expression", "command_name", "subscript"):
            self._children(node, found, quoted, literal=True)
        elif kind == "raw_string":
            found.add(text_of(node)[1:-1])
        elif kind == "ansi_c_string":
            found.add(quoting.decode_ansi(text_of(node)[2:-1]))
        elif kind == "translated_string":
            self._word(node.named_children[0], found, True)
        elif kind == "string":
            self._string(node, found)
        elif kind in ("simple_expansion", "expansion"):
            self._parameter(node, found, quoted)
        elif kind == "command_substitution":
            self._value(self._substitution(node, quoted), found, quoted)
        elif kind == "process_substitution":
            found.add(self._runner.piped_file(node, self._script, self._shell))
        elif kind == "arithmetic_expansion":
            number = self.arithmetic(node)
            found.add(UNKNOWN if number is None else str(number))
        else:
            # Whatever else: its substitutions are executed, its value is a matter of execution.
            for child in node.named_children:
                self._word(child, self._no_fields(), True)
            found.add(UNKNOWN)

    def _children(self, node: Node, found: _Fields, quoted: bool, literal: bool) -> None:
        """Parts of a word one after the other; what lies between them is literal text (`{`, `..`)."""
        at = node.start_byte
        source = node.text or b""
        for child in node.named_children:
            gap = decode(source[at - node.start_byte : child.start_byte - node.start_byte])
            if gap:
                found.add(gap, literal)
            self._word(child, found, quoted)
            at = child.end_byte
        gap = decode(source[at - node.start_byte :])
        if gap:
            found.add(gap, literal)

    def _string(self, node: Node, found: _Fields) -> None:
        """A double-quoted string: text, expansions without splitting, `"$@"` as several fields."""
        source = node.text or b""
        found.add("")
        at = 1
        only = node.named_child_count == 1 and node.named_children[0].type in ("simple_expansion", "expansion")
        if only and node.named_children[0].text == source[1:-1] and self._list_of(node.named_children[0]) == []:
            # "$@" without parameters is no field, not an empty one.
            found.open = None if found.open == [("", False)] else found.open
            return
        for child in node.named_children:
            if child.type == "string_content":
                continue
            # The grammar puts blanks before a backquote into the backquote.
            start = child.start_byte - node.start_byte
            start += len(source[start:]) - len(source[start:].lstrip(b" \t\n"))
            found.add(self._literal(source[at:start], False))
            self._word(child, found, True)
            at = child.end_byte - node.start_byte
        found.add(self._literal(source[at : len(source) - 1], False))

    def _value(self, value: str, found: _Fields, quoted: bool) -> None:
        if quoted:
            found.add(value)
        else:
            found.add_split(value)

    def _substitution(self, node: Node, quoted: bool) -> str:
        """The output of `$(...)` or backquotes, without newlines at its end."""
        source = text_of(node).strip()
        if source.startswith("`") and "\\" in source:
            inner = re.sub(r'\\([\\$`"])' if quoted else r"\\([\\$`])", r"\1", source[1:-1])
            output = self._runner.substituted_text(inner, self._shell)
        else:
            output = self._runner.substituted(node.named_children, self._script, self._shell)
        return output.rstrip("\n")

    def _list_of(self, node: Node) -> list[str] | None:
        """The values of `$@`, `$*`, `${a[@]}`, `${@:2}`; None where it is no list or is not known."""
        names = [child for child in node.named_children if child.type != "word"]
        if not names:
            return None
        source = text_of(node)
        if names[0].type == "special_variable_name" and text_of(names[0]) in "@*" and "#" not in source:
            values = self._shell.parameters
            skipped = re.fullmatch(r"\$\{[@*]:\s*(\d+)\}", source)
            if skipped and values is not None:
                return values[max(int(skipped[1]) - 1, 0) :]
            return values if source in ("$@", "$*", "${@}", "${*}") else None
        if names[0].type == "subscript" and re.fullmatch(r"\$\{\w+\[[@*]\]\}", source):
            value = self._shell.variables.get(text_of(names[0].named_children[0]))
            return value if isinstance(value, list) else [value] if isinstance(value, str) else None
        return None

    def _parameter(self, node: Node, found: _Fields, quoted: bool) -> None:
        values = self._list_of(node)
        if values is not None:
            star = "*" in text_of(node)
            found.add_each([" ".join(values)] if star and quoted else values, quoted)
            return
        value = self._scalar(node)
        self._value(value, found, quoted)

    def lookup(self, name: str) -> Value:
        """The value of a variable or positional parameter; None where it is not known."""
        parameters = self._shell.parameters
        if name.isdigit():
            if name == "0":
                return self._shell.zero
            if parameters is None:
                return None
            return parameters[int(name) - 1] if int(name) <= len(parameters) else ""
        if name == "#":
            return None if parameters is None else str(len(parameters))
        return self._shell.variables.get(name)

    def _scalar(self, node: Node) -> str:
        """The value of `$x` or `${x...}` as one text."""
        children = node.children
        parts = [child for child in children if child.is_named or text_of(child) not in ("$", "${", "}")]
        if not parts:
            return UNKNOWN
        if parts[0].type not in ("variable_name", "special_variable_name", "subscript"):
            return self._prefixed(parts)
        value = self._first_value(parts[0])
        operator = text_of(parts[1]) if len(parts) > 1 else ""
        operands = parts[2:]
        if not operator:
            return UNKNOWN if value is None else value
        if operator in _DEFAULTS:
            return self._default(parts[0], value, operator, operands)
        texts = ["" if text_of(part) in ("/", ":") else self.text(part) for part in operands]
        if value is None or UNKNOWN in value:
            return UNKNOWN
        if operator in ("#", "##", "%", "%%"):
            return quoting.remove_affix(value, texts[0] if texts else "", operator)
        if operator in ("/", "//"):
            words = [text for part, text in zip(operands, texts, strict=True) if text_of(part) != "/"]
            return quoting.substitute(value, words[0] if words else "", "".join(words[1:]), operator == "//")
        if operator == ":" and texts and all(text.isdigit() for text in texts if text):
            numbers = [int(text) for text in texts if text]
            return value[numbers[0] :][: numbers[1] if len(numbers) > 1 else None] if numbers else UNKNOWN
        changed = {
            "^^": value.upper(),
            ",,": value.lower(),
            "^": value[:1].upper() + value[1:],
            ",": value[:1].lower() + value[1:],
        }
        return changed.get(operator, UNKNOWN) if not operands else UNKNOWN

    def _prefixed(self, parts: list[Node]) -> str:
        """`${#x}` and `${!x}`."""
        name = parts[1] if len(parts) == 2 else None
        if name is None or name.type != "variable_name":
            return UNKNOWN
        value = self._first_value(name)
        if value is None or UNKNOWN in value:
            return UNKNOWN
        if text_of(parts[0]) == "#":
            return str(len(value))
        other = self.lookup(value) if text_of(parts[0]) == "!" else None
        return other if isinstance(other, str) else UNKNOWN

    def _first_value(self, name: Node) -> str | None:
        """A scalar, or the element of an array that is meant."""
        if name.type != "subscript":
            value = self.lookup(text_of(name))
            return value if value is None or isinstance(value, str) else (value[0] if value else "")
        variable, *index = name.named_children
        value = self.lookup(text_of(variable))
        position = self.text(index[0]) if index else ""
        if isinstance(value, str):
            value = [value]
        if value is None:
            # What is known of an associative array is known by element.
            return self._shell.elements.get((text_of(variable), position))
        if not position.isdigit():
            number = evaluate(position, self._shell) if UNKNOWN not in position else None
            position = "" if number is None else str(number)
        if not position.isdigit():
            return None
        return value[int(position)] if int(position) < len(value) else ""

    def _default(self, name: Node, value: str | None, operator: str, operands: list[Node]) -> str:
        """`${x:-word}` and its kin."""
        empty = None if value is None or set(value) == {UNKNOWN} else not value
        variable = text_of(name)
        if variable not in self._shell.variables and not variable.isdigit() and variable not in ENVIRONMENT:
            # No statement sets it: who writes a default for it expects it to be unset.
            empty = True
        wants = operator[-1] == "+"
        if empty is False and operator[-1] in "-=?" or empty is True and wants:
            return value or ""
        other = "".join(self.text(operand) for operand in operands)
        if empty is None:
            return UNKNOWN
        if operator[-1] == "=" and name.type == "variable_name":
            self._shell.assign(text_of(name), other)
        return other
