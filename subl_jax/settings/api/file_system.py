"""An in-memory file system for the API setting: absolute paths in, text out, no host file ever touched.

Files carry an owner, a modification day and the path they came from, and keep all three when they are moved, so that
a predicate can tell "gone" from "merely elsewhere". Errors are short and read like those of real tools.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

OWNERS = ("anna", "ben", "carla", "david", "emma", "frank", "grace", "henry")
ARCHIVE = "/archive"
# A model may write a path of any length; an error echoes at most this many characters of it.
_ECHO = 60


class FileSystemError(Exception):
    """A file operation that cannot be done; the message is what the tool prints."""


@dataclasses.dataclass(slots=True)
class File:
    """One file. `origin` is the path that it had in the initial tree (or was first written to)."""

    content: str
    owner: str
    day: int
    origin: str


def owner_of(path: str) -> str:
    """The owner of a file of the initial tree: a stable function of its path (CRC-32, never the salted `hash`)."""
    return OWNERS[zlib.crc32(path.encode("utf-8", "surrogatepass")) % len(OWNERS)]


def parent_of(path: str) -> str:
    """The directory part: "/a/b.txt" -> "/a", "/b.txt" -> "/"."""
    return path.rpartition("/")[0] or "/"


def name_of(path: str) -> str:
    """The last component: "/a/b.txt" -> "b.txt"."""
    return path.rpartition("/")[2]


def zip_of(path: str) -> str:
    """Where `compress` puts a file: "/a/b.txt" -> "/a/b.zip"."""
    stem, dot, _ = name_of(path).rpartition(".")
    return join(parent_of(path), (stem if dot and stem else name_of(path)) + ".zip")


def join(directory: str, name: str) -> str:
    """Joins a directory and a name."""
    return ("" if directory == "/" else directory) + "/" + name


def echo(text: str) -> str:
    """The text as an error message repeats it, cut to a bounded length."""
    return text if len(text) <= _ECHO else text[:_ECHO] + "..."


def _checked(path: str) -> str:
    """The path without a trailing slash; raises `FileSystemError` unless it is absolute and plain."""
    path = path.rstrip("/") or ("/" if path.startswith("/") else "")
    if path == "/":
        return path
    if not path.startswith("/") or any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise FileSystemError(f"bad path: {echo(path)}")
    return path


def _ancestors(path: str) -> list[str]:
    """Every directory above a path, the root excluded."""
    found = []
    directory = parent_of(path)
    while directory != "/":
        found.append(directory)
        directory = parent_of(directory)
    return found


class FileSystem:
    """A tree of text files; directories are implied by the paths in them and stay when their last file leaves."""

    def __init__(self, tree: Mapping[str, str]):
        """Builds the tree from path -> content, in order of modification.

        The first entry was modified on day 1, the next on day 2, and so on; later writes continue the count.

        Raises:
          FileSystemError: a path is not absolute and plain, or lies below another file.
        """
        self.files: dict[str, File] = {}
        self._directories: set[str] = {"/"}
        self._day = 0
        for path, content in tree.items():
            if _checked(path) != path or path == "/":
                raise FileSystemError(f"bad path: {echo(path)}")
            self._require_free_parent(path)
            self._put(path, File(content, owner_of(path), self._tick(), path))

    def _tick(self) -> int:
        self._day += 1
        return self._day

    def _put(self, path: str, file: File) -> None:
        self.files[path] = file
        self._directories.update(_ancestors(path))

    def _require_free_parent(self, path: str) -> None:
        """A file cannot lie below another file, nor stand where a directory is."""
        if path in self._directories:
            raise FileSystemError(f"is a folder: {echo(path)}")
        for directory in _ancestors(path):
            if directory in self.files:
                raise FileSystemError(f"not a folder: {echo(directory)}")

    def _existing(self, path: str) -> str:
        path = _checked(path)
        if path in self.files:
            return path
        if path in self._directories:
            raise FileSystemError(f"is a folder: {echo(path)}")
        raise FileSystemError(f"no such file: {echo(path)}")

    def _destination(self, path: str, to: str) -> str:
        """The path that a copy or a move to `to` would create; as with `cp` and `mv`, a folder takes the name."""
        target = _checked(to)
        if to.endswith("/") or target in self._directories:
            target = join(target, name_of(path))
        if target in self.files:
            raise FileSystemError(f"file exists: {echo(target)}")
        self._require_free_parent(target)
        return target

    def _relocate(self, path: str, target: str) -> None:
        self._put(target, self.files.pop(path))

    def list(self, directory: str) -> list[str]:
        """The full paths directly in a directory, newest first, then its sub-directories by name."""
        directory = _checked(directory)
        if directory not in self._directories:
            kind = "not a folder" if directory in self.files else "no such folder"
            raise FileSystemError(f"{kind}: {echo(directory)}")
        files = [path for path in self.files if parent_of(path) == directory]
        files.sort(key=lambda path: -self.files[path].day)
        return files + sorted(d for d in self._directories if d != "/" and parent_of(d) == directory)

    def read(self, path: str) -> str:
        """The content of a file."""
        return self.files[self._existing(path)].content

    def write(self, path: str, content: str) -> None:
        """Creates a file or replaces its content."""
        path = _checked(path)
        old = self.files.get(path)
        if old is None:
            self._require_free_parent(path)
            self._put(path, File(content, owner_of(path), self._tick(), path))
        else:
            old.content, old.day = content, self._tick()

    def copy(self, path: str, to: str) -> None:
        """Copies a file to a free path or into a folder."""
        path = self._existing(path)
        target = self._destination(path, to)
        self._put(target, dataclasses.replace(self.files[path], day=self._tick()))

    def move(self, path: str, to: str) -> None:
        """Moves a file to a free path or into a folder."""
        path = self._existing(path)
        self._relocate(path, self._destination(path, to))

    def rename(self, path: str, name: str) -> None:
        """Gives a file another name in the same folder."""
        path = self._existing(path)
        if "/" in name or name in ("", ".", ".."):
            raise FileSystemError(f"bad name: {echo(name)}")
        target = join(parent_of(path), name)
        if target in self.files or target in self._directories:
            raise FileSystemError(f"file exists: {echo(target)}")
        self._relocate(path, target)

    def search(self, query: str) -> list[str]:
        """The paths whose name or content contains the query, whatever its case, in order of path."""
        if not query.strip():
            raise FileSystemError("empty query")
        needle = query.casefold()
        return sorted(
            path
            for path, file in self.files.items()
            if needle in name_of(path).casefold() or needle in file.content.casefold()
        )

    def info(self, path: str) -> tuple[int, str, int]:
        """(size in bytes, owner, day of modification) of a file."""
        file = self.files[self._existing(path)]
        return len(file.content.encode("utf-8", "surrogatepass")), file.owner, file.day

    def archive(self, path: str) -> None:
        """Moves a file to the archive folder, keeping its name."""
        path = self._existing(path)
        self._relocate(path, self._destination(path, ARCHIVE + "/"))

    def compress(self, path: str) -> None:
        """Replaces a file by a .zip beside it (as gzip does: the original goes when its packed form is there)."""
        path = self._existing(path)
        self._relocate(path, self._destination(path, zip_of(path)))

    def delete(self, path: str) -> None:
        """Deletes a file for good."""
        del self.files[self._existing(path)]
