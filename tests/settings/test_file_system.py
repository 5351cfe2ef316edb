"""The virtual file system: what each operation does, and the short errors it gives."""

from __future__ import annotations

import pytest

from subl_jax.settings.api.file_system import FileSystem, FileSystemError, zip_of


@pytest.fixture
def files() -> FileSystem:
    """Two directories, three files; /work/plan.txt is the oldest."""
    return FileSystem({"/work/plan.txt": "call anna", "/work/map.md": "buy tea", "/home/song.txt": ""})


def paths(files: FileSystem) -> set[str]:
    return set(files.files)


def test_a_folder_lists_its_files_newest_first(files):
    assert files.list("/work") == ["/work/map.md", "/work/plan.txt"]
    files.write("/work/plan.txt", "call ben")
    assert files.list("/work/") == ["/work/plan.txt", "/work/map.md"]
    assert files.list("/") == ["/home", "/work"]


def test_search_matches_names_and_contents_in_any_case(files):
    assert files.search("PLAN") == ["/work/plan.txt"]
    assert files.search("tea") == ["/work/map.md"]
    assert files.search("txt") == ["/home/song.txt", "/work/plan.txt"]
    assert files.search("coffee") == []
    assert files.search("work") == [], "a directory's name is no file's name"


@pytest.mark.parametrize(
    ("operation", "arguments", "after"),
    [
        ("delete", (), set()),
        ("archive", (), {"/archive/plan.txt"}),
        ("compress", (), {"/work/plan.zip"}),
        ("rename", ("x.txt",), {"/work/x.txt"}),
        ("move", ("/new/deep/x.txt",), {"/new/deep/x.txt"}),
        ("move", ("/home",), {"/home/plan.txt"}),
        ("move", ("/fresh/",), {"/fresh/plan.txt"}),
        ("copy", ("/home/x.txt",), {"/work/plan.txt", "/home/x.txt"}),
    ],
)
def test_an_operation_leaves_exactly_these_files(files, operation, arguments, after):
    getattr(files, operation)("/work/plan.txt", *arguments)
    assert paths(files) == after | {"/work/map.md", "/home/song.txt"}
    for path in after:
        assert files.read(path) == "call anna"
        assert files.files[path].origin == "/work/plan.txt"


@pytest.mark.parametrize(
    ("operation", "arguments", "message"),
    [
        ("read", ("/a/b",), "no such file: /a/b"),
        ("read", ("/work",), "is a folder: /work"),
        ("read", ("plan.txt",), "bad path: plan.txt"),
        ("read", ("",), "bad path: "),
        ("delete", ("/work/../home/song.txt",), "bad path: /work/../home/song.txt"),
        ("list", ("/nowhere",), "no such folder: /nowhere"),
        ("list", ("/work/plan.txt",), "not a folder: /work/plan.txt"),
        ("write", ("/work", "x"), "is a folder: /work"),
        ("write", ("/work/plan.txt/x", "x"), "not a folder: /work/plan.txt"),
        ("copy", ("/work/plan.txt", "/work/map.md"), "file exists: /work/map.md"),
        ("move", ("/work/plan.txt", "/work/plan.txt"), "file exists: /work/plan.txt"),
        ("move", ("/work/plan.txt", "/work/plan.txt/x"), "not a folder: /work/plan.txt"),
        ("rename", ("/work/plan.txt", "a/b"), "bad name: a/b"),
        ("rename", ("/work/plan.txt", "map.md"), "file exists: /work/map.md"),
        ("search", (" ",), "empty query"),
        ("delete", ("/",), "is a folder: /"),
    ],
)
def test_a_wrong_call_gives_a_short_error_and_changes_nothing(files, operation, arguments, message):
    before = {path: file.content for path, file in files.files.items()}
    with pytest.raises(FileSystemError) as raised:
        getattr(files, operation)(*arguments)
    assert str(raised.value) == message
    assert {path: file.content for path, file in files.files.items()} == before


def test_a_name_in_the_archive_is_not_overwritten(files):
    files.archive("/work/plan.txt")
    files.write("/home/plan.txt", "other")
    with pytest.raises(FileSystemError, match="file exists: /archive/plan.txt"):
        files.archive("/home/plan.txt")


def test_a_folder_stays_when_its_last_file_leaves(files):
    files.delete("/home/song.txt")
    assert files.list("/home") == []


def test_a_file_below_a_file_is_refused_at_construction():
    with pytest.raises(FileSystemError, match="not a folder"):
        FileSystem({"/a": "x", "/a/b": "y"})


def test_info_keeps_owner_and_day_over_a_move(files):
    size, owner, day = files.info("/work/map.md")
    assert (size, day) == (len("buy tea"), 2)
    files.move("/work/map.md", "/home")
    assert files.info("/home/map.md") == (size, owner, day)


@pytest.mark.parametrize(
    ("path", "packed"),
    [("/a/b.txt", "/a/b.zip"), ("/b", "/b.zip"), ("/a/.rc", "/a/.rc.zip"), ("/a/b.c.d", "/a/b.c.zip")],
)
def test_a_packed_file_stands_beside_the_original(path, packed):
    assert zip_of(path) == packed
