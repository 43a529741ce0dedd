"""A chroot is told from a root of one's own, whatever it is made of; propagation is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from linux.cli.exits import ExitCode
from linux.demo.host import PREFIX
from tests.support.programs import (
    MOUNT,
    NET,
    Daemon,
    daemon_in,
    environment,
    run_program,
    wait_until,
)

pytestmark = pytest.mark.needs_root

ASK: Final = """
import sys
from linux.root import has_propagation, is_chroot
print(is_chroot(), has_propagation())
"""
DEMO: Final = "from linux import cli; import sys; sys.exit(cli.main(['demo']))"

BIND: Final = 'mount --rbind / "$D" &&'
"""The same files, in another mount: a root that only its mount tells from the node's."""
DIRECTORY: Final = (
    'mount -t tmpfs tmpfs "$D" && mkdir "$D/sub" && for top in /*; do [ -d "$top" ] || continue; '
    'mkdir "$D/sub$top" && mount --rbind "$top" "$D/sub$top" || exit 9; done; D=$D/sub;'
)
"""A directory that is no mount point."""

WITHIN: Final = {
    "node": ('exec "$@"', False),
    "bind mount": (f'{BIND} exec chroot "$D" "$@"', True),
    "directory": (f'{DIRECTORY} exec chroot "$D" "$@"', True),
    "pivot_root": (
        f'{BIND} cd "$D" && pivot_root . mnt && umount --lazy /mnt && exec "$@"',
        False,
    ),
}
"""How a program gets its root, and whether that is a chroot."""


def within(
    how: str, where: Path, program: str, propagation: str = "private"
) -> subprocess.CompletedProcess[str]:
    script, _ = WITHIN[how]
    words = ("unshare", "--mount", "--propagation", propagation, "sh", "-c", script, "sh")
    return run_program(*words, *(sys.executable, "-c", program), env=environment(D=str(where)))


@pytest.mark.clause("DAEMON-10")
@pytest.mark.parametrize("how", WITHIN)
def test_basic_chroot_is_noticed(tmp_path: Path, how: str) -> None:
    found = within(how, tmp_path, ASK)
    assert found.stdout.split() == [str(WITHIN[how][1]), "False"], found.stderr


@pytest.mark.clause("DAEMON-10")
def test_propagation_is_noticed(tmp_path: Path) -> None:
    assert within("node", tmp_path, ASK, "shared").stdout.split() == ["False", "True"]


@pytest.mark.clause("DAEMON-10")
@pytest.mark.parametrize(
    ("how", "propagation", "event"),
    [
        ("node", "shared", None),
        ("node", "private", "root_is_private"),
        ("bind mount", "shared", "root_is_chroot"),
    ],
)
def test_provider_says_what_is_wrong_with_its_root(
    tmp_path: Path, image_root: Path, how: str, propagation: str, event: str | None
) -> None:
    (tmp_path / "there").mkdir()
    daemon = Daemon(tmp_path, image_root)
    where = ("unshare", "--mount", "--propagation", propagation)
    daemon.prefix = (*where, "sh", "-c", WITHIN[how][0], "sh")
    daemon.begin(D=str(tmp_path / "there"))
    wait_until(lambda: {"ready", "start_failed"} & {line["event"] for line in daemon.events()})
    assert daemon.stop() == ExitCode.OK
    said = [line["event"] for line in daemon.events() if line["event"].startswith("root_is")]
    assert said == ([event] if event else [])


@pytest.mark.parametrize("name", [b"\xff", "\u2028".encode()], ids=["no UTF-8", "a line's end"])
def test_mount_point_with_any_name_stops_nothing(
    tmp_path: Path, image_root: Path, allocation_id: str, name: bytes
) -> None:
    """Users choose the names of what they mount, and so bytes of a table that is read."""
    (tmp_path / os.fsdecode(name)).mkdir()
    mount = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", mount, str(tmp_path / os.fsdecode(name)))
    with (
        daemon_in(tmp_path, image_root, prefix=prefix) as daemon,
        daemon.obtain(allocation_id, NET, MOUNT) as handoff,
    ):
        assert handoff.end()


@pytest.mark.parametrize("how", ["bind mount", "directory"])
def test_demo_in_a_chroot_says_so_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    before = set(os.listdir("/tmp"))
    shown = within(how, there, DEMO)
    assert shown.returncode == 3, shown.stdout
    assert "this process is in a chroot" in shown.stderr
    assert "demo --backend simulated" in shown.stderr
    grown = set(os.listdir("/tmp")) - before
    assert not [name for name in grown if name.startswith(PREFIX)]


def test_demo_without_proc_says_so(tmp_path: Path) -> None:
    within = ("unshare", "--mount", "sh", "-c", 'umount --lazy /proc && exec "$@"', "sh")
    shown = run_program(*within, sys.executable, "-c", DEMO)
    assert shown.returncode == 3
    assert "there is no /proc here: mount -t proc proc /proc" in shown.stderr
