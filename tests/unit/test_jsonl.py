"""Following a file that another process appends to, cuts or replaces."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointillist.base import jsonl
from pointillist.base.files import write_atomically
from pointillist.base.jsonl import Follower, append_jsonl, parse_line


@given(st.lists(st.binary(max_size=12), max_size=12))
def test_lines_come_once_and_in_order_however_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("f") / "lines"
    follower, given_lines = Follower(path), []
    with path.open("wb", buffering=0) as file:
        for piece in [*pieces, b"\n"]:
            file.write(piece)
            given_lines += follower.new()
    assert b"".join(given_lines) == b"".join(pieces) + b"\n"
    assert all(line.count(b"\n") == 1 and line.endswith(b"\n") for line in given_lines)


@pytest.mark.parametrize("way", ["replaced", "cut", "overwritten", "removed"])
def test_a_file_that_begins_anew_is_read_from_its_start(tmp_path: Path, way: str) -> None:
    path, lines = tmp_path / "lines.jsonl", []
    follower = Follower(path, lines.clear)

    def read() -> list[bytes]:
        lines.extend(follower.new())
        return list(lines)

    assert read() == []
    path.write_bytes(b"1\n2\n3")
    assert read() == [b"1\n", b"2\n"]
    if way == "replaced":
        write_atomically(path, b"1\n2\n4\n")
        assert read() == [b"1\n", b"2\n", b"4\n"]
    elif way == "cut":
        path.write_bytes(b"1\n")
        assert read() == [b"1\n"]
    elif way == "overwritten":
        path.write_bytes(b"8\n9\n10\n")  # the same inode, and longer
        assert read() == [b"8\n", b"9\n", b"10\n"]
    else:
        path.unlink()
        assert read() == []


def test_a_line_that_is_too_long_is_read_past_by_a_follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 8)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"1\n" + b"x" * 100 + b"\n2\n")
    follower = Follower(path)
    assert list(follower.new()) == [b"1\n", b"x" * 8, b"2\n"]
    append_jsonl(path, {})
    assert [parse_line(line) for line in follower.new()] == [{}]
