"""What a provider says of its scopes is read as it was written, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from linux.cgroups import DEFAULT_PLACE, ScopePlace
from linux.files import OwnFile
from linux.scope_file import SUFFIX, ScopesSaid, read_scope_file, write_scope_file

PLACE = ScopePlace("jobs.slice/mine", "alloc-{id}.scope")


@pytest.mark.clause("NODE-22")
@pytest.mark.parametrize("has_scopes", [True, False])
def test_basic_what_is_said_is_read(tmp_path: Path, has_scopes: bool) -> None:
    socket = tmp_path / "p.sock"
    assert read_scope_file(socket) is None
    for place in (DEFAULT_PLACE, PLACE):
        file = write_scope_file(socket, tmp_path if has_scopes else None, place).path
        said = ScopesSaid(tmp_path.stat().st_ino if has_scopes else None, place)
        assert read_scope_file(socket) == said
    assert [path.name for path in tmp_path.iterdir()] == [f"p.sock{SUFFIX}"]
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"cgroup_id": "1", "parent": "a", "name": "{id}"}',
             '{"cgroup_id": 1, "parent": "..", "name": "{id}"}',
             '{"cgroup_id": 1, "parent": "a", "name": "b"}'],
)  # fmt: skip
def test_what_cannot_be_read_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / f"p.sock{SUFFIX}").write_text(text)
    with pytest.raises(ValueError, match=r"p\.sock\.scopes|scopes"):
        read_scope_file(tmp_path / "p.sock")


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"write\(2\): ENOENT.*p\.sock\.scopes"):
        write_scope_file(tmp_path / "nowhere" / "p.sock", None, DEFAULT_PLACE)
    (tmp_path / f"p.sock{SUFFIX}").mkdir()
    with pytest.raises(OSError, match=r"rename\(2\): EISDIR.*p\.sock\.scopes"):
        write_scope_file(tmp_path / "p.sock", None, DEFAULT_PLACE)
    assert [path.name for path in tmp_path.iterdir()] == [f"p.sock{SUFFIX}"]


@pytest.mark.clause("NODE-22")
def test_what_another_provider_says_is_not_removed(tmp_path: Path) -> None:
    first, second = (write_scope_file(tmp_path / "p.sock", None, PLACE) for _ in range(2))
    first.remove()
    assert read_scope_file(tmp_path / "p.sock") == ScopesSaid(None, PLACE)
    second.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_later_file_that_has_the_inode_of_the_own_one_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("ours")
    own = OwnFile(path, path.lstat())
    # As after a removal: file systems use inodes again.
    os.utime(path, ns=(0, own.status.st_mtime_ns + 1))
    own.remove()
    assert path.exists()
    OwnFile(path, path.lstat()).remove()
    assert not path.exists()
