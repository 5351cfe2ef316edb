"""From the text of a script to a syntax tree of tree-sitter's Bash grammar, with its known misses repaired.

Text in; a `Script` (tree root and here-documents) out, or None where the text is no Bash as far as the grammar knows.
The grammar reads three things differently from bash, without calling them errors: the keywords `time` and `coproc` are
taken for commands, several here-documents on a line for commands, and what follows `<<E` on its line for a part of the
redirection. So here-documents are cut out of the text first (each becomes `< MARK`), and the two keywords are blanked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count, pairwise

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

# The parser needs quadratic time for some inputs: 32 KiB of "(a) (a) ..." take 1.3 s. A command line is far below.
SIZE_LIMIT = 32_768
# A character no file name or program has; within parsed text it stands for what is not known before execution.
UNKNOWN = "\0"
# What stands before the text of a here-string that had to be disguised as a file.
HERE_STRING = "\x83"
_UNKNOWN_IN_TEXT = "\x81"
_DELIMITER = re.compile(rb"[ \t]*((?:'[^']*'|\"[^\"]*\"|\\.|[^\s;&|<>()'\"\\])+)")
# A brace that begins a word and no group.
_BRACE = "\x84"
_BRACED_NAME = re.compile(rb"(?:^|(?<=[\s;&|(]))\{(?=[^\s{};&|]*,[^\s{};&|]*\})")
# `for x in; do`: no value is fine for bash.
_NO_VALUES = re.compile(rb"(?<=[\s;])(in)(?=[ \t]*[;\n]\s*do\b)")
# `[ \( a \) ]` and `[ a \< b ]` are no conditions for the grammar, but `test \( a \) ]` is a command.
_NEGATED_GROUP = re.compile(rb"(?<![^\s;&|({])!\s+\{(?=\s)")
_ESCAPED_TEST = re.compile(rb"(?:^|(?<=[\s;&|(!]))\[(?= [^\]\n]*\\[()<>][^\]\n]* \])")
# `\` at the end of a line within a word; the grammar would begin another word.
_CONTINUED = re.compile(r"(?m)^(.*[^\s\\])\\\n(?=\S)")
_LINE_START = re.compile(rb"[ \t\n]*\\([A-Za-z0-9_./])")
_COMMENT_BYTES = re.compile(rb"(?:^|[\s;&|(])#")
_COMMENT = re.compile(r"(?:^|[\s;&|(])#")
_MARK = "\x80"
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_ENCODED = re.compile(r"\x90([0-9a-f]{1,6})\x91")
# Each round cuts out at least one here-document of every line; more on one line than this are not written by people.
_ROUNDS = 24
_MOST_EDITS = 16
_RESERVED = frozenset("{ } do done then fi esac else elif if while until for case select function [[ ]]".split())
_OPENING = frozenset("{ if while until for case select [[ ! ((".split())

_LANGUAGE = Language(tree_sitter_bash.language())
_numbers = count()


@dataclass(frozen=True)
class Document:
    """A here-document: its text, and whether its delimiter was quoted, so that nothing in it is expanded."""

    text: str
    literal: bool


@dataclass(frozen=True)
class Script:
    """A parsed text: the root of its tree and its here-documents by the mark that replaced them."""

    root: Node
    documents: dict[str, Document]

    @staticmethod
    @cache
    def empty() -> Script:
        """A script without statements."""
        return Script(Parser(_LANGUAGE).parse(b"").root_node, {})


@dataclass(frozen=True)
class Body:
    """The text of a here-document with the expansions in it, as (offset in the text, node), in order."""

    text: bytes
    expansions: list[tuple[int, Node]]
    script: Script


def encode(text: str) -> bytes:
    """The source that is parsed. The grammar's scanner looks characters up in a table of 256, so no other may reach it."""
    written = _FOREIGN.sub(lambda found: f"\x90{ord(found[0]):x}\x91", text)
    return written.replace(UNKNOWN, _UNKNOWN_IN_TEXT).encode()


def decode(source: bytes) -> str:
    """A part of that source as it was written, with unknown parts as `UNKNOWN`."""
    text = source.decode("utf-8", "replace").replace(_UNKNOWN_IN_TEXT, UNKNOWN).replace(_BRACE, "{")
    return _ENCODED.sub(lambda found: chr(int(found[1], 16)), text) if "\x90" in text else text


def text_of(node: Node) -> str:
    """The source of a node."""
    return decode(node.text or b"")


@lru_cache(maxsize=128)
def parse(text: str) -> Script | None:
    """The tree of a script.

    Args:
      text: Bash source; `UNKNOWN` in it stands for text nobody knows yet.

    Returns:
      The tree, or None where it has errors, names a closing keyword as a command, or is longer than `SIZE_LIMIT`.
    """
    text = _CONTINUED.sub(lambda found: found[0] if _COMMENT.search(found[1]) else found[1], text)
    source = encode(text)
    documents: dict[str, Document] = {}
    for _ in range(_ROUNDS):
        if len(source) > SIZE_LIMIT:
            return None
        root = Parser(_LANGUAGE).parse(source).root_node
        here, commands = _collect(root)
        edits = _cut_documents(source, here, documents, root.has_error)
        if root.has_error and (first := _cut_first_document(source, documents)):
            # The one that the grammar sees may be the second of its line.
            if not edits or first[0][0] < edits[0][0] and b"\n" not in source[first[0][0] : edits[0][0]]:
                edits = first
        if not edits:
            edits = [edit for node in commands for edit in _blank_keyword(node)]
        if not edits:
            edits = _quote_line_starts(source, root)
        if not edits:
            edits = _end_lines(source, root)
        if not edits and any(text_of(node.children[0]) == "{" for node in commands):
            edits = _negated_group(source)
        if not edits and root.has_error:
            edits = _disguise_here_strings(source, root)
        if not edits and root.has_error:
            edits = [(found.end(1), found.end(1), b" $(:)") for found in _NO_VALUES.finditer(source)]
        if not edits and root.has_error:
            edits = _part_parentheses(source)
        if not edits and root.has_error:
            edits = [(*found.span(), b"test") for found in _ESCAPED_TEST.finditer(source)]
        if not edits and root.has_error:
            edits = [(*found.span(), _BRACE.encode()) for found in _BRACED_NAME.finditer(source)]
        if not edits:
            broken = root.has_error or any(text_of(node.children[0]) in _RESERVED for node in commands)
            broken = broken or _has_empty_group(root)
            return None if broken else Script(root, documents)
        for start, end, replacement in sorted(edits, reverse=True):
            source = source[:start] + replacement + source[end:]
    return None


def document_tree(text: str) -> Body | None:
    """The expansions of an unquoted here-document; None where the grammar cannot tell. Backquotes are not among them."""
    if len(text) > SIZE_LIMIT:
        return None
    head = "cat <<E\x82\n".encode()
    body = encode(text)
    root = (
        Parser(_LANGUAGE).parse(head + body + (b"" if body.endswith(b"\n") else b"\n") + "E\x82\n".encode()).root_node
    )
    if root.has_error:
        return None
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type == "heredoc_body":
            inner = [child for child in node.named_children if child.type != "heredoc_content"]
            return Body(body, [(child.start_byte - len(head), child) for child in inner], Script(root, {}))
        waiting.extend(node.children)
    return None


def _collect(root: Node) -> tuple[list[Node], list[Node]]:
    """Here-document redirections, and simple commands that begin with a bare word, each in the order of the text."""
    here: list[Node] = []
    commands: list[Node] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type == "heredoc_redirect":
            here.append(node)
        elif node.type == "command" and node.child_count and node.children[0].type == "command_name":
            commands.append(node)
        if node.child_count:
            waiting.extend(reversed(node.children))
    return here, commands


def _cut_documents(
    source: bytes, here: list[Node], documents: dict[str, Document], broken: bool
) -> list[tuple[int, int, bytes]]:
    """Edits that replace `<<E` by `< MARK` and take the body away; `documents` gets the bodies."""
    edits = []
    done = 0
    for node in here:
        operator = next((child for child in node.children if child.type in ("<<", "<<-")), None)
        if operator is None or operator.start_byte < done:
            continue
        # The grammar takes a semicolon behind it for a part of the delimiter.
        start = _DELIMITER.match(source, operator.end_byte)
        if start is None:
            continue
        written = decode(start[1])
        delimiter = re.sub(r"\\(.)|['\"]", lambda found: found[1] or "", written)
        line_end = source.find(b"\n", start.end())
        body_start = len(source) if line_end < 0 else line_end + 1
        body, done = _body(source, body_start, encode(delimiter), operator.type == "<<-")
        mark = _marked(documents, Document(decode(body), delimiter != written))
        edits += [(operator.start_byte, start.end(), f"<{mark}".encode()), (body_start, done, b"")]
        if broken:
            # Behind an error the grammar may take data for code; the next round sees the text without this document.
            break
    return edits


def _quote_line_starts(source: bytes, root: Node) -> list[tuple[int, int, bytes]]:
    r"""Edits that write `'x'` for `\x` at the start of a line: for the grammar the line before goes on there."""
    edits = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type == "word" and (found := _LINE_START.match(source, node.start_byte)):
            # The word may begin with the newline itself.
            at = found.start(1) - 1
            before = source[:at].rstrip(b" \t")
            if before.endswith(b"\n") and not before.endswith(b"\\\n"):
                edits.append((at, found.end(), b"'" + found[1] + b"'"))
        waiting.extend(node.children)
    return edits


def _negated_group(source: bytes) -> list[tuple[int, int, bytes]]:
    """Edits that write `! (a)` for `! { a; }`, which the grammar does not know. What it assigns is lost, its status is not."""
    for found in _NEGATED_GROUP.finditer(source):
        waiting = [Parser(_LANGUAGE).parse(source[: found.start()] + b" " + source[found.start() + 1 :]).root_node]
        while waiting:
            node = waiting.pop()
            if node.type == "compound_statement" and node.start_byte == found.end() - 1:
                return [(node.start_byte, node.start_byte + 1, b"("), (node.end_byte - 1, node.end_byte, b")")]
            waiting.extend(node.children)
    return []


def _end_lines(source: bytes, root: Node) -> list[tuple[int, int, bytes]]:
    """Edits that end a command with its line: behind `a | b | c` the grammar may go on in the next one."""
    edits = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type == "command":
            for before, after in pairwise(child for child in node.children if child.type != "comment"):
                gap = source[before.end_byte : after.start_byte]
                if b"\n" in gap.replace(b"\\\n", b""):
                    edits.append((before.end_byte, before.end_byte, b";"))
                    break
        waiting.extend(node.children)
    return edits


def _has_empty_group(root: Node) -> bool:
    """Whether there is a group or a body with nothing in it, or with a comment alone, which bash refuses."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type in ("compound_statement", "do_group", "subshell"):
            arithmetic = node.children[0].type == "(("
            if not arithmetic and all(child.type == "comment" for child in node.named_children):
                return True
        elif node.type in ("if_statement", "elif_clause", "else_clause"):
            opened = False
            for child in node.children:
                if child.type in ("then", "else"):
                    opened = True
                elif opened and child.type in ("elif_clause", "else_clause", "fi"):
                    return True
                elif child.is_named and child.type != "comment":
                    opened = False
            if opened:
                return True
        waiting.extend(node.children)
    return False


def _disguise_here_strings(source: bytes, root: Node) -> list[tuple[int, int, bytes]]:
    """Edits for what the grammar has no rule for: a here-string behind another redirection becomes `< MARKtext`."""
    edits = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.type == "ERROR" and source[node.start_byte : node.end_byte + 1] in (b"<<<", b"<<"):
            found = re.compile(rb"<<<[ \t]*").match(source, node.start_byte)
            if found:
                edits.append((*found.span(), f"<{HERE_STRING}".encode()))
        waiting.extend(node.children)
    return edits


def _marked(documents: dict[str, Document], document: Document) -> str:
    """The new mark of a document."""
    mark = f"{_MARK}{next(_numbers)}{_MARK}"
    documents[mark] = document
    return mark


def _cut_first_document(source: bytes, documents: dict[str, Document]) -> list[tuple[int, int, bytes]]:
    """The same for the first here-document with an end, where an error hides it from the grammar."""
    for found in re.finditer(rb"(?<![<\w$(])<<(-?)(?![<=])", source):
        head = source[source.rfind(b"\n", 0, found.start()) + 1 : found.start()]
        start = _DELIMITER.match(source, found.end())
        line_end = source.find(b"\n", found.end())
        if start is None or line_end < 0 or head.count(b"'") % 2 or head.count(b'"') % 2 or _COMMENT_BYTES.search(head):
            continue
        written = decode(start[1])
        delimiter = re.sub(r"\\(.)|['\"]", lambda found: found[1] or "", written)
        body, end = _body(source, line_end + 1, encode(delimiter), bool(found[1]))
        if source[:end].rstrip(b"\n").endswith(encode(delimiter)):
            mark = _marked(documents, Document(decode(body), delimiter != written))
            return [(found.start(), start.end(), f"<{mark}".encode()), (line_end + 1, end, b"")]
    return []


def _part_parentheses(source: bytes) -> list[tuple[int, int, bytes]]:
    """Edits that write `( (` for `((` where the two are not closed together: subshells and no arithmetic."""
    edits = []
    for found in re.finditer(rb"(?<![$(])\(\((?!\()", source):
        depth = 0
        for at in range(found.start() + 1, len(source)):
            depth += (source[at : at + 1] == b"(") - (source[at : at + 1] == b")")
            if depth == 0:
                if source[at + 1 : at + 2] != b")":
                    edits.append((found.start() + 1, found.start() + 1, b" "))
                break
        if len(edits) >= _MOST_EDITS:
            break
    return edits


def _body(source: bytes, start: int, delimiter: bytes, indented: bool) -> tuple[bytes, int]:
    """The lines up to the delimiter, and where the line of the delimiter ends; as bash, to the end where none is."""
    lines = []
    at = start
    while at < len(source):
        end = source.find(b"\n", at)
        end = len(source) if end < 0 else end + 1
        line = source[at:end]
        at = end
        if indented:
            line = line.lstrip(b"\t")
        if line.rstrip(b"\n") == delimiter:
            break
        lines.append(line)
    return b"".join(lines), at


def _blank_keyword(node: Node) -> list[tuple[int, int, bytes]]:
    """Edits that turn a leading `time` or `coproc` into spaces; both only time or detach what follows."""
    keyword, *rest = (child for child in node.children)
    if not rest or text_of(keyword) not in ("time", "coproc"):
        return []
    blank = [keyword]
    if text_of(keyword) == "time":
        while len(rest) > 1 and text_of(rest[0]) in ("-p", "--"):
            blank.append(rest.pop(0))
    elif len(rest) > 1 and (rest[1].type == "subshell" or text_of(rest[1]) in _OPENING):
        blank.append(rest[0])
    return [(part.start_byte, part.end_byte, b" " * (part.end_byte - part.start_byte)) for part in blank]
