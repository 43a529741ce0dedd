"""Places of a provider that are full, read-only, absent, mistyped or another user's.

What keeps it from starting is named; what it can do without, it does without and says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from linux.cgroups import find_cgroup2
from linux.cli.exits import ExitCode
from statemachine import CreationFailed
from tests.linux.test_daemon import said, serve_one, stop_in_time
from tests.support.programs import MOUNT, PID, Daemon, wait_until
from tests.support.scarcity import fill_disk

pytestmark = pytest.mark.needs_root

NOBODY: Final = 65534


@dataclass
class Site:
    """A file system of its own for what is to be spoilt, and a daemon that does not run yet."""

    disk: Path
    daemon: Daemon

    def __post_init__(self) -> None:
        self.images = self.disk.parent / "images"
        self.images.mkdir()

    def state_on_disk(self) -> Path:
        self.daemon.state_dir = self.disk / "state"
        self.daemon.ready = self.daemon.state_dir / "ready"
        return self.daemon.state_dir

    def socket_on_disk(self) -> Path:
        self.daemon.socket = self.disk / "run" / "handoff.sock"
        return self.daemon.socket

    def option(self, name: str, path: Path) -> Path:
        self.daemon.options += (name, str(path))
        return path

    def fill(self) -> Path:
        fill_disk(self.disk)
        return self.disk

    def make_read_only(self) -> Path:
        subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)
        return self.disk

    def start(self) -> None:
        """Start it and wait for the word that it is ready; the file that says so may be missing."""
        self.daemon.log.unlink(missing_ok=True)
        self.daemon.begin()
        wait_until(lambda: said(self.daemon, "ready"))


@pytest.fixture
def place(tmp_path: Path, image_root: Path, small_disk: Path) -> Iterator[Site]:
    place = Site(small_disk, Daemon(tmp_path, image_root))
    yield place
    program = place.daemon.program
    if program is not None and program.poll() is None:
        program.kill()
        program.wait()


Spoil = Callable[[Site], Path]
"""Spoils a place; returns the path that has to be named."""


def name_of(value: object) -> str | None:
    return getattr(value, "__name__", None)


def a_file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


# --- At the start ------------------------------------------------------------------------------


def state_on_full_disk(place: Site) -> Path:
    place.state_on_disk()
    return place.fill()


def state_without_room_for_a_journal(place: Site) -> Path:
    place.state_on_disk().mkdir()
    a_file(place.daemon.state_dir / "lock")
    return place.fill()


def state_on_read_only_disk(place: Site) -> Path:
    place.state_on_disk()
    return place.make_read_only()


def state_is_a_file(place: Site) -> Path:
    return a_file(place.state_on_disk())


def above_state_is_a_file(place: Site) -> Path:
    place.daemon.state_dir = place.disk / "file" / "state"
    return a_file(place.disk / "file")


def state_is_of_another_user(place: Site) -> Path:
    place.state_on_disk().mkdir()
    os.chown(place.daemon.state_dir, NOBODY, -1)
    return place.daemon.state_dir


def state_is_writable_by_all(place: Site) -> Path:
    place.state_on_disk().mkdir()
    place.daemon.state_dir.chmod(0o1777)
    return place.daemon.state_dir


def socket_on_full_disk(place: Site) -> Path:
    place.socket_on_disk().parent.mkdir()
    place.fill()
    return place.daemon.socket


def socket_on_read_only_disk(place: Site) -> Path:
    place.socket_on_disk()
    place.make_read_only()
    return place.daemon.socket.parent


def socket_is_a_file(place: Site) -> Path:
    return a_file(place.socket_on_disk())


def above_socket_is_a_file(place: Site) -> Path:
    return a_file(place.socket_on_disk().parent)


def trace_is_a_directory(place: Site) -> Path:
    return place.option("--trace", place.disk)


def trace_in_no_directory(place: Site) -> Path:
    return place.option("--trace", place.disk / "absent" / "trace")


def trace_on_full_disk(place: Site) -> Path:
    place.fill()
    return place.option("--trace", place.disk / "trace")


def trace_on_read_only_disk(place: Site) -> Path:
    place.make_read_only()
    return place.option("--trace", place.disk / "trace")


def uenv_base_is_a_file(place: Site) -> Path:
    return place.option("--uenv-base", a_file(place.disk / "file"))


def cgroup_is_read_only(place: Site) -> Path:
    script = 'mount -o remount,bind,ro "$0" && exec "$@"'
    place.daemon.prefix = ("unshare", "--mount", "sh", "-c", script, str(find_cgroup2()))
    return Path("cgroup2 mount")


START: Final = [
    (state_on_full_disk, "no space or no inode left"),
    (state_without_room_for_a_journal, "no space or no inode left"),
    (state_on_read_only_disk, "mounted read-only"),
    (state_is_a_file, "is no directory: choose another place"),
    (above_state_is_a_file, "is no directory: choose another place"),
    (state_is_of_another_user, "belongs to user 65534; choose another"),
    (state_is_writable_by_all, "other users may write to it; choose another"),
    (socket_on_full_disk, "no space or no inode left"),
    (socket_on_read_only_disk, "mounted read-only"),
    (socket_is_a_file, "is not a socket"),
    (above_socket_is_a_file, "EEXIST"),
    (trace_is_a_directory, "EISDIR"),
    (trace_in_no_directory, "ENOENT"),
    (trace_on_full_disk, "no space or no inode left"),
    (trace_on_read_only_disk, "mounted read-only"),
    (uenv_base_is_a_file, "EEXIST"),
    (cgroup_is_read_only, "no writable"),
]
"""What keeps a provider from starting, and what it says of it."""


@pytest.mark.sample(3)
@pytest.mark.clause("DAEMON-9")
@pytest.mark.parametrize(("spoil", "words"), START, ids=name_of)
def test_basic_what_keeps_it_from_starting_is_named(place: Site, spoil: Spoil, words: str) -> None:
    path = spoil(place)
    place.daemon.begin()
    assert place.daemon.program is not None
    assert place.daemon.program.wait(20) == ExitCode.ENVIRONMENT, place.daemon.log.read_text()
    last = place.daemon.events()[-1]
    assert last["event"] == "start_failed"
    assert str(path) in last["message"]
    assert words in last["message"]
    assert "[Errno" not in last["message"]


def images_are_absent(place: Site) -> Path:
    return place.option("--image-root", place.disk / "absent")


def images_are_a_file(place: Site) -> Path:
    return place.option("--image-root", a_file(place.disk / "file"))


def ready_is_a_directory(place: Site) -> Path:
    place.daemon.ready.mkdir(parents=True)
    return place.daemon.ready


ANYWAY: Final = [
    (images_are_absent, "image_root_missing"),
    (images_are_a_file, "image_root_missing"),
    (ready_is_a_directory, "ready_file_failed"),
]
"""What a provider starts with all the same, and the event that says so."""


@pytest.mark.clause("DAEMON-5")
@pytest.mark.parametrize(("spoil", "event"), ANYWAY, ids=name_of)
def test_it_serves_without_what_it_can_do_without(
    place: Site, allocation_id: str, spoil: Spoil, event: str
) -> None:
    path = spoil(place)
    place.start()
    assert {str(path) in line["message"] for line in said(place.daemon, event)} == {True}
    serve_one(place.daemon, allocation_id)
    stop_in_time(place.daemon)


@pytest.mark.clause("DAEMON-5")
@pytest.mark.clause("DAEMON-9")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_living_allocations_are_watched_though_the_disk_is_full(
    place: Site, allocation_id: str, number: signal.Signals
) -> None:
    """It fills up while a provider runs; that one stops, and the next one starts all the same."""
    daemon = place.daemon
    place.state_on_disk()
    place.start()
    with daemon.obtain(allocation_id, PID) as handoff:
        identities = handoff.identities
    wait_until(lambda: daemon.states() == {allocation_id: "handed_off"})
    fillers = fill_disk(place.disk)
    assert daemon.stop(number) == (ExitCode.OK if number == signal.SIGTERM else -number)
    place.start()
    if number == signal.SIGTERM:  # one that was killed has left its file, and so its room
        (failed,) = said(daemon, "ready_file_failed")
        assert str(daemon.ready) in failed["message"]
        assert "no space or no inode left" in failed["message"]
    with daemon.obtain(allocation_id, PID) as handoff:
        assert handoff.identities == identities
        assert handoff.end()
    shutil.rmtree(fillers)
    daemon.wait_until_none_is_alive()
    stop_in_time(daemon)


# --- While it runs -----------------------------------------------------------------------------


def state_fills_up(place: Site) -> tuple[Path, list[str]]:
    return place.daemon.state_dir, ["rm", "-r", str(fill_disk(place.disk))]


def images_go(place: Site) -> tuple[Path, list[str]]:
    there, away = place.disk / "images", place.disk / "away"
    there.rename(away)
    return there, ["mv", str(away), str(there)]


def cgroup_becomes_read_only(place: Site) -> tuple[Path, list[str]]:
    remount = ["nsenter", f"--target={place.daemon.pid}", "--mount", "mount", "-o"]
    cgroup2 = find_cgroup2()
    subprocess.run([*remount, "remount,bind,ro", str(cgroup2)], check=True)
    return cgroup2 / "workload.slice", [*remount, "remount,bind,rw", str(cgroup2)]


RUNNING: Final = [
    (state_fills_up, "full"),
    (images_go, "ENOENT"),
    (cgroup_becomes_read_only, "mounted read-only"),
]
"""What a provider refuses a request for; it serves again when that is repaired."""


@pytest.mark.clause("DAEMON-8")
@pytest.mark.parametrize(("spoil", "words"), RUNNING, ids=name_of)
def test_what_goes_wrong_while_it_runs_is_named_in_the_refusal(
    place: Site,
    allocation_id: str,
    image_root: Path,
    spoil: Callable[[Site], tuple[Path, list[str]]],
    words: str,
) -> None:
    daemon = place.daemon
    place.state_on_disk()
    daemon.prefix = ("unshare", "--mount")
    images = place.disk / "images"
    shutil.copytree(image_root, images)
    place.option("--image-root", images)
    place.start()
    with daemon.obtain(allocation_id, PID) as living:
        path, repair = spoil(place)
        with pytest.raises(CreationFailed, match=words) as refusal:
            daemon.obtain(f"{allocation_id}-new", PID, MOUNT, image="hello.sqfs")
        assert str(path) in str(refusal.value)
        with daemon.obtain(allocation_id, PID) as again:
            assert again.identities == living.identities
        subprocess.run(repair, check=True)
        with daemon.obtain(f"{allocation_id}-new", PID, MOUNT, image="hello.sqfs") as repaired:
            assert repaired.end()
        assert living.end()
    daemon.wait_until_none_is_alive()
    stop_in_time(daemon)


# --- While it stops ----------------------------------------------------------------------------


def ready_is_removed(place: Site) -> Path:
    place.daemon.ready.unlink()
    return Path()


def ready_becomes_a_directory(place: Site) -> Path:
    place.daemon.ready.unlink()
    place.daemon.ready.mkdir()
    return place.daemon.ready


def socket_is_removed(place: Site) -> Path:
    place.daemon.socket.unlink()
    return Path()


def state_is_removed(place: Site) -> Path:
    shutil.rmtree(place.daemon.state_dir)
    return Path()


STOP: Final = [ready_is_removed, ready_becomes_a_directory, socket_is_removed, state_is_removed]


@pytest.mark.clause("DAEMON-4")
@pytest.mark.parametrize("spoil", STOP, ids=name_of)
def test_it_stops_clean_whatever_has_become_of_its_files(place: Site, spoil: Spoil) -> None:
    place.start()
    path = spoil(place)
    stop_in_time(place.daemon)
    assert said(place.daemon, "ready_file_failed") == []
    assert path.is_dir(), "it stays: it is not the provider's"
