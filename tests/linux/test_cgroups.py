"""A scope says whether a process is in it, and no scope of another owner is touched."""

from __future__ import annotations

import errno
import itertools
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from linux import cgroups
from linux.cgroups import (
    ANCHOR_SLICE,
    OWNER_ATTRIBUTE,
    WORKLOAD_SLICE,
    CgroupUnavailable,
    Scope,
    ScopeError,
    ScopeWatch,
    Use,
    anchor_cgroup,
    find_cgroup2,
    remove_anchor_cgroup,
    remove_slices,
)
from linux.syscalls import pidfd_open
from linux.testing.hostile import IDS
from tests.support.census import kill_all
from tests.support.forging import process_state
from tests.support.spared import is_spared
from transport.calls import hook_syscalls
from transport.descriptors import Descriptor
from transport.testing.peer import DEADLINE_S, wait_until

pytestmark = pytest.mark.needs_root

OWNER: Final = "token-of-this-test"
OTHER_TOKEN: Final = "token-of-another"
IDLE_S: Final = 0.2
"""How long an idle watch is counted; a spinning one wakes thousands of times in it."""


@pytest.fixture
def root(cgroup2: Path, allocation_id: str) -> Iterator[Path]:
    """A cgroup as the root for this test alone, which makes and removes slices in it."""
    root = cgroup2 / f"{allocation_id}-root"
    root.mkdir()
    yield root
    kill_all(root)
    wait_until(lambda: "populated 0" in (root / "cgroup.events").read_text())
    for directory, _, _ in os.walk(root, topdown=False):
        Path(directory).rmdir()


@pytest.fixture
def scope(root: Path) -> Scope:
    return Scope.create(root, "alloc", OWNER)


@contextmanager
def running(directory: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a cgroup, from its first instruction; kill and reap it at the end."""
    program = command or ("sleep", "1000")
    entry = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(directory), *program]
    process = subprocess.Popen(entry, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        try:
            wait_until(lambda: is_member(process.pid, directory) or has_exited(process.pid))
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def has_exited(pid: int) -> bool:
    """Whether a child has, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def is_member(pid: int, directory: Path) -> bool:
    return Path(f"/proc/{pid}/cgroup").read_text().rstrip().endswith(f"/{directory.name}")


def run_to_end(directory: Path) -> None:
    with running(directory, "true") as process:
        process.wait(DEADLINE_S)


def exit_status(process: subprocess.Popen[bytes]) -> int:
    return process.wait(DEADLINE_S)


# --- where ---------------------------------------------------------------------------------------


@pytest.mark.clause("NODE-1")
def test_basic(root: Path) -> None:
    scope = Scope.create(root, "alloc-42", OWNER)
    assert scope.path == root / "workload.slice" / "alloc-42.scope"
    assert (scope.owner(), scope.is_populated(), scope.is_over()) == (OWNER, False, False)
    with running(scope.path) as process:
        assert scope.is_populated()
        assert scope.processes() == [process.pid]
        assert not scope.is_over()
        assert not scope.remove()
        scope.kill()
        assert exit_status(process) == -signal.SIGKILL
    wait_until(scope.is_over)
    assert scope.remove()
    assert scope.is_gone()
    assert scope.remove()


@pytest.mark.clause("NODE-1")
def test_the_cgroup2_mount_is_found_by_its_type(cgroup2: Path) -> None:
    assert find_cgroup2() == cgroup2
    assert (find_cgroup2() / "cgroup.controllers").exists()


def mountinfo_line(point: Path, fstype: str, options: str = "rw,relatime") -> str:
    return f"41 31 0:38 / {str(point).replace(' ', chr(92) + '040')} {options} - {fstype} x rw\n"


def hierarchy(path: Path) -> Path:
    path.mkdir()
    (path / "cgroup.controllers").write_text("")
    return path


def test_covered_readonly_and_foreign_mounts_are_passed_over(tmp_path: Path) -> None:
    good = hierarchy(tmp_path / "a place\\with 100%")
    text = (
        mountinfo_line(tmp_path / "covered", "cgroup2")
        + mountinfo_line(hierarchy(tmp_path / "frozen"), "cgroup2", "ro,relatime")
        + mountinfo_line(hierarchy(tmp_path / "v1"), "cgroup")
        + mountinfo_line(good, "cgroup2").replace("place\\with", "place\\134with")
    )
    assert find_cgroup2(text) == good
    file = tmp_path / "mountinfo"
    file.write_text(text)
    assert find_cgroup2(file) == good


@pytest.mark.parametrize("text", ["", "41 31 0:38 / /sys/fs/cgroup rw - cgroup cgroup rw\n"])
def test_a_node_without_cgroup2_is_told_what_to_do(text: str) -> None:
    with pytest.raises(CgroupUnavailable, match="mount -t cgroup2"):
        find_cgroup2(text)


# --- making --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*IDS.values(), "\udc80"], ids=[*IDS, "no Unicode"])
def test_a_hostile_id_makes_nothing(root: Path, name: str) -> None:
    before = sorted(path.name for path in root.iterdir())
    attempts: list[Callable[[], object]] = [
        lambda: Scope.create(root, name, OWNER),
        lambda: Scope.open(root, name, OWNER),
        lambda: anchor_cgroup(root, name),
    ]
    for attempt in attempts:
        with pytest.raises(ScopeError) as refusal:
            attempt()
        assert refusal.value.errno == errno.EINVAL
        str(refusal.value).encode()
    assert sorted(path.name for path in root.iterdir()) == before


@pytest.mark.parametrize("name", ["x" * 128, "ü" * 64, "a b", "-rf", "%n$(id)", "alloc.scope"])
def test_an_odd_but_legal_id_lives_its_life(root: Path, name: str) -> None:
    scope = Scope.create(root, name, OWNER)
    found = Scope.open(root, name, OWNER)
    assert found is not None
    assert found.path == scope.path
    run_to_end(scope.path)
    wait_until(found.is_over)
    assert found.remove()


@pytest.mark.clause("END-11")
def test_a_scope_of_another_owner_is_named_and_left_alone(root: Path) -> None:
    theirs = Scope.create(root, "alloc", OTHER_TOKEN)
    with running(theirs.path) as process:
        with pytest.raises(ScopeError, match=rf"EEXIST.*alloc\.scope; it belongs .* {OTHER_TOKEN}"):
            Scope.create(root, "alloc", OWNER)
        assert Scope.open(root, "alloc", OWNER) is None
        mine = Scope(theirs.path, OWNER)
        mine.kill()
        assert mine.is_gone()
        assert mine.remove()
        assert is_spared(process)
    assert theirs.owner() == OTHER_TOKEN


def test_our_own_scope_is_not_made_a_second_time(root: Path) -> None:
    Scope.create(root, "alloc", OWNER)
    with pytest.raises(ScopeError, match=f"belongs to owner {OWNER}"):
        Scope.create(root, "alloc", OWNER)


def test_a_scope_whose_maker_died_before_stamping_it_is_taken_over(
    scope: Scope, root: Path
) -> None:
    os.removexattr(scope.path, OWNER_ATTRIBUTE)
    taken = Scope.create(root, "alloc", OWNER)
    assert taken.owner() == OWNER
    assert taken.remove()
    assert not taken.path.exists()


@pytest.fixture
def theirs(root: Path) -> Path:
    """A scope that a consumer made, with limits, before it asked."""
    path = root / WORKLOAD_SLICE / "alloc.scope"
    path.mkdir(parents=True)
    (path / "cgroup.max.descendants").write_text("7")
    os.setxattr(path, "user.consumer", b"mine")
    return path


def state_of(path: Path) -> tuple[int, str, bytes]:
    limit = (path / "cgroup.max.descendants").read_text().strip()
    return path.stat().st_ino, limit, os.getxattr(path, "user.consumer")


@pytest.mark.clause("NODE-18", "NODE-19")
def test_a_scope_that_a_consumer_made_is_adopted_and_given_back(root: Path, theirs: Path) -> None:
    before, attributes = state_of(theirs), os.listxattr(theirs)
    for _ in range(2):
        scope = Scope.create(root, "alloc", OWNER)
        assert (scope.owner(), scope.is_gone(), scope.is_over()) == (OWNER, False, False)
        assert state_of(theirs) == before
        (theirs / "below").mkdir()
        run_to_end(theirs / "below")
        wait_until(scope.is_over)
        assert scope.remove()
        assert scope.is_gone()
        assert (state_of(theirs), os.listxattr(theirs)) == (before, attributes)
        assert not (theirs / "below").exists()
        assert Scope.open(root, "alloc", OWNER) is None
    scope.kill()
    assert scope.remove()
    assert theirs.is_dir()


@pytest.mark.clause("NODE-18")
def test_use_before_the_adoption_is_no_use(root: Path, theirs: Path) -> None:
    run_to_end(theirs)
    wait_until(lambda: "usage_usec 0\n" not in (theirs / "cpu.stat").read_text())
    scope = Scope.create(root, "alloc", OWNER)
    again = Scope.open(root, "alloc", OWNER)
    assert again is not None
    assert [each.was_used() or each.is_over() for each in (scope, again)] == [False, False]
    run_to_end(theirs)
    wait_until(again.was_used)
    wait_until(again.is_over)


@pytest.mark.clause("NODE-18")
def test_a_scope_in_use_is_not_adopted(root: Path, theirs: Path) -> None:
    refused = pytest.raises(ScopeError, match=r"EEXIST.*processes are in it; end them first")
    with running(theirs), refused:
        Scope.create(root, "alloc", OWNER)
    (theirs / "below").mkdir()
    with pytest.raises(ScopeError, match=r"EEXIST.*cgroups are below it, 'below' .* remove them"):
        Scope.create(root, "alloc", OWNER)
    assert OWNER_ATTRIBUTE not in os.listxattr(theirs)


@pytest.mark.clause("NODE-18")
def test_a_process_that_enters_during_the_adoption_keeps_its_scope(
    root: Path, theirs: Path
) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        is_due = True

        def enter(event: str, _: tuple[object, ...]) -> None:
            nonlocal is_due
            if event == "os.setxattr" and is_due:
                is_due = False
                (theirs / "cgroup.procs").write_text(str(process.pid))

        sys.addaudithook(enter)
        with pytest.raises(ScopeError, match=r"EEXIST.*processes are in it"):
            Scope.create(root, "alloc", OWNER)
        assert OWNER_ATTRIBUTE not in os.listxattr(theirs)
        assert is_spared(process)
        process.kill()


def test_an_adoption_that_fails_is_undone(root: Path, theirs: Path) -> None:
    (theirs.parent / "neighbour").mkdir()
    (theirs.parent / "neighbour" / "cgroup.type").write_text("threaded")
    before = state_of(theirs)
    with pytest.raises(ScopeError, match="made threaded"):
        Scope.create(root, "alloc", OWNER)
    assert state_of(theirs) == before
    assert OWNER_ATTRIBUTE not in os.listxattr(theirs)


@pytest.mark.clause("NODE-19", "NODE-4")
def test_an_adopted_scope_that_lost_its_owner_is_not_ours(root: Path, theirs: Path) -> None:
    scope = Scope.create(root, "alloc", OWNER)
    os.removexattr(theirs, OWNER_ATTRIBUTE)
    assert scope.is_gone()
    assert Scope.open(root, "alloc", OWNER) is None
    assert scope.remove()
    assert theirs.is_dir()


def test_a_scope_that_has_lost_its_token_is_still_its_makers_to_remove(root: Path) -> None:
    scope = Scope.create(root, "alloc", OWNER)
    (scope.path / "below").mkdir()
    os.removexattr(scope.path, OWNER_ATTRIBUTE)
    assert not Scope(scope.path, OWNER).remove(), "who did not make it has no proof"
    with running(scope.path) as process:
        assert not scope.remove()
        with pytest.raises(ScopeError, match="it has no owner"):
            scope.kill()
        assert is_spared(process)
    wait_until(lambda: not scope.is_populated())
    assert scope.remove()
    assert not scope.path.exists()


@pytest.mark.clause("NODE-4")
def test_what_another_program_puts_there_while_a_scope_is_made_is_not_claimed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, theirs = cgroups._make_in_slice, root / WORKLOAD_SLICE / "alloc.scope"

    def replaced(path: Path, *arguments: object, **more: object) -> None:
        make(path, *arguments, **more)  # type: ignore[arg-type]
        path.rmdir()
        path.mkdir()
        (path / "below").mkdir()

    monkeypatch.setattr(cgroups, "_make_in_slice", replaced)
    with pytest.raises(ScopeError, match="cgroups are below it"):
        Scope.create(root, "alloc", OWNER, description="a description")
    assert not [name for name in os.listxattr(theirs) if name.startswith("user.")]
    (theirs / "below").rmdir()
    theirs.rmdir()


@pytest.mark.clause("NODE-19")
def test_a_crash_at_any_moment_leaves_no_scope_that_could_be_a_consumers(root: Path) -> None:
    # Between mkdir(2) and setxattr(2) a scope has no owner; its permissions say whose it is.
    made: list[int] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.setxattr" and arguments[1] == OWNER_ATTRIBUTE:
            directory = arguments[0]
            if isinstance(directory, int):
                made.append(os.fstat(directory).st_mode)

    sys.addaudithook(note)
    Scope.create(root, "alloc", OWNER)
    assert [stat.filemode(mode) for mode in made] == ["drwxr-xr-t"]


@pytest.mark.clause("END-11", "NODE-4")
@pytest.mark.parametrize("nested", [False, True])
def test_a_used_scope_without_an_owner_is_never_touched(
    scope: Scope, root: Path, nested: bool
) -> None:
    os.removexattr(scope.path, OWNER_ATTRIBUTE)
    place = scope.path / "below" if nested else scope.path
    place.mkdir(exist_ok=True)
    with running(place) as process:
        with pytest.raises(ScopeError, match="it has no owner, and processes are in it"):
            Scope.create(root, "alloc", OWNER)
        found = Scope.open(root, "alloc", OWNER)
        assert found is not None
        with pytest.raises(ScopeError, match=r"EPERM.*it has no owner"):
            found.kill()
        assert not found.remove()
        assert is_spared(process)
        assert place.is_dir()


def test_a_scope_whose_maker_died_before_stamping_it_is_removed(scope: Scope, root: Path) -> None:
    os.removexattr(scope.path, OWNER_ATTRIBUTE)
    found = Scope.open(root, "alloc", OWNER)
    assert found is not None
    found.kill()
    assert found.remove()


def test_a_failure_in_the_middle_leaves_nothing(root: Path) -> None:
    # A sibling that was made threaded takes the use of every new cgroup beside it.
    neighbour = Scope.create(root, "neighbour", OWNER)
    (neighbour.path / "cgroup.type").write_text("threaded")
    with pytest.raises(ScopeError, match=r"not supported.*'domain invalid'.*made threaded"):
        Scope.create(root, "alloc", OWNER)
    assert not (root / WORKLOAD_SLICE / "alloc.scope").exists()


def test_a_full_hierarchy_is_reported_by_call_errno_and_path(root: Path) -> None:
    Scope.create(root, "alloc", OWNER)
    (root / "cgroup.max.descendants").write_text("2")
    with pytest.raises(ScopeError) as refusal:
        Scope.create(root, "second", OWNER)
    assert str(refusal.value) == (
        f"mkdir(2): EAGAIN (Resource temporarily unavailable): {root}/workload.slice/second.scope; "
        "no cgroup left: raise cgroup.max.descendants and cgroup.max.depth above it"
    )


def test_many_makers_of_one_scope_make_one(root: Path) -> None:
    def make(number: int) -> str | None:
        try:
            return Scope.create(root, "alloc", f"owner-{number}").owner()
        except ScopeError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [owner for owner in pool.map(make, range(8)) if owner is not None]
    assert len(winners) == 1
    found = Scope.open(root, "alloc", winners[0])
    assert found is not None
    assert found.owner() == winners[0]


# --- over or not -------------------------------------------------------------------------------


@pytest.mark.clause("END-5")
def test_freezing_is_neither_use_nor_end(scope: Scope) -> None:
    for word in ("1", "0"):
        (scope.path / "cgroup.freeze").write_text(word)
        assert (scope.was_used(), scope.is_populated(), scope.is_over()) == (False, False, False)
    with running(scope.path):
        (scope.path / "cgroup.freeze").write_text("1")
        wait_until(lambda: "frozen 1" in (scope.path / "cgroup.events").read_text())
        assert scope.is_populated()
        assert not scope.is_over()


@pytest.mark.clause("END-4")
def test_use_that_was_not_watched_is_still_known(scope: Scope, root: Path) -> None:
    run_to_end(scope.path)
    found = Scope.open(root, "alloc", OWNER)
    assert found is not None
    wait_until(lambda: found.was_used() and not found.is_populated())
    assert found.is_over()


@pytest.mark.clause("END-6")
def test_a_process_below_counts(scope: Scope) -> None:
    below = scope.path / "a" / "b"
    below.mkdir(parents=True)
    with running(below) as process:
        assert (scope.path / "cgroup.procs").read_text() == ""
        assert scope.is_populated()
        assert scope.processes() == [process.pid]
        assert not scope.is_over()
    wait_until(scope.is_over)


@pytest.mark.clause("END-5")
def test_a_zombie_does_not_count(scope: Scope) -> None:
    with running(scope.path, "true") as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process_state(process.pid) == "Z"
        assert not scope.is_populated()
        wait_until(scope.is_over)
        assert scope.remove()


LEADERLESS: Final = """
import ctypes, os, threading, time
EXIT_THIS_THREAD = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).syscall(EXIT_THIS_THREAD, 0)
"""


def test_a_leader_that_left_its_threads_behind_counts_and_dies(scope: Scope) -> None:
    """cgroup.kill alone does not reach them."""
    with running(scope.path, sys.executable, "-c", LEADERLESS) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().split(")")[1].split()[0] == "Z")
        assert scope.is_populated()
        assert not scope.is_over()
        scope.kill()
        assert exit_status(process) == -signal.SIGKILL
    wait_until(scope.is_over)


def test_moving_the_last_process_out_empties_it(scope: Scope, root: Path) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    with running(scope.path) as process:
        assert scope.is_populated()
        (elsewhere / "cgroup.procs").write_text(str(process.pid))
        wait_until(scope.is_over)


def test_a_scope_that_others_removed_is_over_and_removed(scope: Scope) -> None:
    scope.path.rmdir()
    assert scope.is_gone()
    wait_until(scope.is_over)
    assert not scope.is_populated()
    assert not scope.was_used()
    assert scope.owner() is None
    assert scope.processes() == []
    scope.kill()
    assert scope.remove()
    for attempt in (scope.open_procs, scope.open_events):
        with pytest.raises(ScopeError, match=r"open\(2\): ENOENT"):
            attempt()


@pytest.mark.clause("END-4")
@pytest.mark.parametrize("call", [os.open, os.pread])
def test_a_scope_that_others_remove_during_a_look_is_over(scope: Scope, call: object) -> None:
    def remove_first(
        function: Callable[..., Any], words: tuple[Any, ...], more: Mapping[str, Any]
    ) -> Any:
        if function is call and scope.path.exists():
            scope.path.rmdir()
        return function(*words, **more)

    assert scope.use() is Use.NONE
    with hook_syscalls(remove_first):
        assert scope.use() is Use.OVER


def test_a_process_enters_by_the_procs_descriptor(scope: Scope) -> None:
    with scope.open_procs() as procs, subprocess.Popen(["sleep", "1000"]) as process:
        os.write(procs.fileno(), str(process.pid).encode())
        assert scope.processes() == [process.pid]
        assert not os.get_inheritable(procs.fileno())
        scope.kill()
        assert exit_status(process) == -signal.SIGKILL


# --- kill and remove -----------------------------------------------------------------------------

FORKER: Final = "import os, signal\nfor _ in range(5): os.fork()\nsignal.pause()\n"


@pytest.mark.parametrize("is_frozen", [False, True])
def test_kill_reaches_everyone_frozen_nested_and_detached(scope: Scope, is_frozen: bool) -> None:
    below = scope.path / "below"
    below.mkdir()
    with (
        running(scope.path, sys.executable, "-c", FORKER),
        running(below, "setsid", "sleep", "1000"),
    ):
        wait_until(lambda: len(scope.processes()) == 33)
        if is_frozen:
            (scope.path / "cgroup.freeze").write_text("1")
        scope.kill()
        scope.kill()
        wait_until(lambda: not scope.is_populated())
    assert scope.remove()


_removals: Final[list[list[tuple[str, bool]]]] = []
"""Where `removals_noted` notes; the hook of an interpreter stays for as long as that runs."""


def _note_removal(event: str, arguments: tuple[object, ...]) -> None:
    if event == "os.rmdir" and _removals:
        path, above = arguments
        base = Path(f"/proc/self/fd/{above}") if above != -1 else Path()
        with suppress(FileNotFoundError):
            events = (base / str(path) / "cgroup.events").read_text()
            _removals[-1].append((Path(str(path)).name, "populated 1" in events))


sys.addaudithook(_note_removal)


@contextmanager
def removals_noted() -> Iterator[list[tuple[str, bool]]]:
    """Note each rmdir of a cgroup: its name, and whether it was populated then."""
    _removals.append([])
    try:
        yield _removals[-1]
    finally:
        _removals.pop()


@pytest.mark.clause("END-4")
def test_what_enters_between_two_readings_counts(scope: Scope) -> None:
    with running(scope.path):
        pass
    wait_until(scope.is_over)
    readings: list[int] = []
    with ExitStack() as stack:

        def enter(function: Any, arguments: Any, more: Any) -> Any:
            if function is os.pread:
                readings.append(1)
                if len(readings) == 2:
                    stack.enter_context(running(scope.path))
            return function(*arguments, **more)

        with hook_syscalls(enter):
            assert Scope(scope.path, OWNER).use() is Use.RUNNING


@pytest.mark.clause("NODE-4")
def test_a_process_that_only_passes_through_while_a_scope_is_killed_lives(
    scope: Scope, root: Path
) -> None:
    passing = subprocess.Popen(["sleep", "infinity"])

    def pass_through(function: Any, arguments: Any, more: Any) -> Any:
        if function is os.open and arguments[0] == "cgroup.procs" and not entered:
            entered.append(passing.pid)
            (scope.path / "cgroup.procs").write_text(str(passing.pid))
        result = function(*arguments, **more)
        if function.__name__ == "_once" and arguments[0] == "pidfd_open(2)":
            (root / "cgroup.procs").write_text(str(passing.pid))
        return result

    entered: list[int] = []
    try:
        with running(scope.path), hook_syscalls(pass_through):
            scope.kill()
        assert entered
        assert is_spared(passing)
    finally:
        passing.kill()
        passing.wait()


@pytest.mark.clause("NODE-17")
def test_no_cgroup_is_removed_before_it_reads_as_empty(scope: Scope, root: Path) -> None:
    below, anchors = scope.path / "below", anchor_cgroup(root, "instance")
    below.mkdir()
    own = Scope(scope.path, OWNER)

    def remove_all() -> list[bool]:
        gone = [own.remove(), remove_anchor_cgroup(root, "instance")]
        remove_slices(root)
        return gone

    with removals_noted() as noted:
        with running(below), running(anchors):
            assert remove_all() == [False, False]
        with running(scope.path):
            assert remove_all()[0] is False
        os.removexattr(scope.path, OWNER_ATTRIBUTE)
        with running(scope.path):
            assert not own.remove()
        os.setxattr(scope.path, OWNER_ATTRIBUTE, OWNER.encode())
        assert {name for name, _ in noted} <= {"below", "instance.scope", ANCHOR_SLICE}
        wait_until(lambda: all(remove_all()))
    assert [name for name, is_populated in noted if is_populated] == []
    names = {"below", "alloc.scope", "instance.scope", WORKLOAD_SLICE, ANCHOR_SLICE}
    assert {name for name, _ in noted} == names


@pytest.mark.clause("NODE-4", "NODE-17", "END-11")
def test_a_scope_is_removed_at_once_only_if_it_is_ours_and_empty(scope: Scope) -> None:
    below = scope.path / "below"
    with removals_noted() as noted:
        assert not Scope(scope.path, OTHER_TOKEN).remove_if_empty()
        below.mkdir()
        for place in (below, scope.path):
            with running(place):
                assert not scope.remove_if_empty()
        assert noted == []
        wait_until(lambda: not scope.is_populated())
        assert not scope.remove_if_empty()
        below.rmdir()
        os.removexattr(scope.path, OWNER_ATTRIBUTE)
        assert not scope.remove_if_empty()
        os.setxattr(scope.path, OWNER_ATTRIBUTE, OWNER.encode())
        assert scope.remove_if_empty()
        assert scope.is_gone()
        assert not scope.remove_if_empty()
    assert [name for name, is_populated in noted if is_populated] == []


@pytest.mark.clause("NODE-19")
def test_an_adopted_scope_is_not_removed_at_once(root: Path, theirs: Path) -> None:
    scope = Scope.create(root, "alloc", OWNER)
    with removals_noted() as noted:
        assert not scope.remove_if_empty()
    assert noted == []
    assert scope.owner() == OWNER
    assert scope.remove()
    assert theirs.is_dir()


def test_many_cgroups_below_are_removed_in_one_go_and_listed_once(scope: Scope) -> None:
    for number in range(300):
        (scope.path / f"below-{number}").mkdir()
    listings = 0

    def count_listings(event: str, _: tuple[object, ...]) -> None:
        nonlocal listings
        listings += event == "os.scandir"

    sys.addaudithook(count_listings)
    assert scope.remove()
    assert listings <= 2


THREADED: Final = """
import os, sys, threading, time
def live():
    with open(sys.argv[1] + "/cgroup.threads", "w") as threads:
        threads.write(str(threading.get_native_id()))
    print("in", flush=True)
    time.sleep(1000)
threading.Thread(target=live).start()
"""


def test_threads_of_a_threaded_cgroup_count_and_die(scope: Scope) -> None:
    below = scope.path / "threads"
    below.mkdir()
    (below / "cgroup.type").write_text("threaded")
    with running(scope.path, sys.executable, "-c", THREADED, str(below)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(OSError, match="not supported"):
            (below / "cgroup.procs").read_text()
        assert scope.processes() == [process.pid]
        scope.kill()
        assert exit_status(process) == -signal.SIGKILL
    wait_until(scope.is_over)
    assert scope.remove()


def test_a_scope_made_threaded_is_killed_process_by_process(scope: Scope) -> None:
    """The Linux kernel refuses cgroup.kill there."""
    (scope.path / "cgroup.type").write_text("threaded")
    below = scope.path / "below"
    below.mkdir()
    (below / "cgroup.type").write_text("threaded")
    with ExitStack() as stack:
        places = (scope.path, below, below)
        processes = [stack.enter_context(running(place)) for place in places]
        assert scope.is_populated()
        assert scope.processes() == sorted(process.pid for process in processes)
        # Before Linux 5.14 there is no such file.
        with pytest.raises(OSError, match=r"not supported|denied"):
            (scope.path / "cgroup.kill").write_text("1")
        scope.kill()
        assert [exit_status(process) for process in processes] == [-signal.SIGKILL] * 3
    wait_until(scope.is_over)
    assert scope.remove()


@pytest.mark.clause("NODE-19")
def test_a_scope_that_was_frozen_to_kill_all_in_it_is_given_back_thawed(
    root: Path, theirs: Path
) -> None:
    attributes = os.listxattr(theirs)
    scope = Scope.create(root, "alloc", OWNER)
    (theirs / "cgroup.type").write_text("threaded")
    with running(theirs) as process:
        scope.kill()
        assert exit_status(process) == -signal.SIGKILL
    assert (theirs / "cgroup.freeze").read_text() == "1\n"
    # Its provider dies now; the next one gives it back.
    found = Scope.open(root, "alloc", OWNER)
    assert found is not None
    wait_until(found.is_over)
    assert found.remove()
    assert (theirs / "cgroup.freeze").read_text() == "0\n"
    assert os.listxattr(theirs) == attributes


def test_remove_takes_a_wide_and_a_deep_nest(scope: Scope) -> None:
    for number in range(20):
        (scope.path / f"wide-{number}" / "below").mkdir(parents=True)
    depth, name = 40, "n" * 200
    here = Descriptor(os.open(scope.path, os.O_RDONLY | os.O_DIRECTORY))
    for _ in range(depth):
        os.mkdir(name, dir_fd=here.fileno())  # longer as a path than any path can be
        with here:
            here = Descriptor(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here.fileno()))
    here.close()
    assert scope.processes() == []
    assert scope.remove()


def test_remove_waits_for_no_process(scope: Scope) -> None:
    below = scope.path / "a" / "b"
    below.mkdir(parents=True)
    (scope.path / "empty").mkdir()
    with running(below):
        assert not scope.remove()
        assert scope.is_populated()
    assert scope.remove()


# --- watching ----------------------------------------------------------------------------------


def wait_readable(watch: ScopeWatch[str]) -> bool:
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    return bool(poll.poll(DEADLINE_S * 1000))


def wait_for(watch: ScopeWatch[str], key: str) -> None:
    while True:
        assert wait_readable(watch), f"{key} was never reported"
        if key in watch.poll():
            return


def idle_wakeups(watch: ScopeWatch[str]) -> int:
    """How often an event loop would wake up for the watch while nothing happens."""
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    deadline = time.monotonic() + IDLE_S
    count = 0
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            count += 1
            watch.poll()
    return count


def test_the_watch_reports_use_and_end(scope: Scope) -> None:
    with ScopeWatch[str]() as watch, scope.open_events() as events:
        watch.add("alloc", events.fileno())
        assert watch.poll() == ["alloc"]
        assert watch.poll() == []
        with running(scope.path):
            wait_for(watch, "alloc")
            assert not scope.is_over()
        wait_for(watch, "alloc")
        wait_until(scope.is_over)


def test_the_watch_does_not_spin(scope: Scope, root: Path) -> None:
    gone = Scope.create(root, "gone", OWNER)
    with (
        ScopeWatch[str]() as watch,
        scope.open_events() as events,
        gone.open_events() as gone_events,
        running(scope.path, "true") as process,
        pidfd_open(process.pid) as pidfd,
    ):
        watch.add("alloc", events.fileno())
        watch.add("gone", gone_events.fileno())
        watch.add("anchor", pidfd.fileno(), ScopeWatch.DEATH)
        exit_status(process)
        assert gone.remove()
        told: set[str] = set()
        while told != {"alloc", "gone", "anchor"}:
            assert wait_readable(watch)
            told.update(watch.poll())
        wait_until(lambda: not scope.is_populated())
        # One late event may still come: the Linux kernel holds back what follows too soon.
        assert idle_wakeups(watch) <= 1
        assert idle_wakeups(watch) == 0


def test_a_death_is_reported_once(scope: Scope) -> None:
    with ScopeWatch[str]() as watch, running(scope.path) as process, pidfd_open(process.pid) as fd:
        watch.add("anchor", fd.fileno(), ScopeWatch.DEATH)
        assert watch.poll() == []
        process.kill()
        wait_for(watch, "anchor")
        assert watch.poll() == []
        watch.remove("anchor")
        watch.remove("anchor")


@pytest.mark.clause("END-21")
def test_a_removal_is_reported_once_and_no_others(scope: Scope, root: Path) -> None:
    other = Scope.create(root, "other", OWNER)
    with ScopeWatch[str]() as watch, scope.open_events() as events:
        watch.add_removal("alloc", scope.path)
        watch.add("alloc", events.fileno())
        assert watch.poll() == ["alloc"]
        other.path.rmdir()
        assert watch.poll() == []
        scope.path.rmdir()
        assert is_readable(watch)
        assert watch.poll() == ["alloc"]
        assert watch.poll() == []
        # The slice is another one now.
        assert Scope.create(root, "alloc", OWNER).remove()
        (root / WORKLOAD_SLICE).rmdir()
        again = Scope.create(root, "alloc", OWNER)
        watch.add_removal("alloc", again.path)
        assert again.remove()
        assert watch.poll() == ["alloc"]
        watch.remove("alloc")
        assert Scope.create(root, "alloc", OWNER).remove()
        assert watch.poll() == []


def test_a_removal_among_too_many_others_is_not_missed(scope: Scope) -> None:
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    others = [scope.path.parent / f"other-{number}" for number in range(2)]
    with ScopeWatch[str]() as watch:
        watch.add_removal("alloc", scope.path)
        for other in itertools.islice(itertools.cycle(others), queue + 1):
            other.mkdir()
            other.rmdir()
        scope.path.rmdir()
        seen: list[str] = []
        while is_readable(watch):
            seen += watch.poll()
        assert seen == ["alloc"]


def is_readable(watch: ScopeWatch[str]) -> bool:
    poll = select.poll()
    poll.register(watch.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def test_a_key_can_be_watched_again_after_it_was_removed(scope: Scope) -> None:
    with ScopeWatch[str]() as watch:
        for _ in range(3):
            with scope.open_events() as events:
                watch.add("alloc", events.fileno())
                assert watch.poll() == ["alloc"]
                watch.remove("alloc")
        assert watch.poll() == []


def test_misuse_of_the_watch_is_refused(scope: Scope) -> None:
    with ScopeWatch[str]() as watch, scope.open_events() as one, scope.open_events() as two:
        watch.add("alloc", one.fileno())
        for key, fd in (("alloc", two.fileno()), ("other", one.fileno())):
            with pytest.raises(ValueError, match="already watched"):
                watch.add(key, fd)
        with pytest.raises(ValueError, match="CHANGES or DEATH"):
            watch.add("other", two.fileno(), select.EPOLLOUT)
        assert watch.poll() == ["alloc"]
    watch.close()


# --- anchors and slices ------------------------------------------------------------------------


@pytest.mark.clause("NODE-3")
def test_the_anchors_cgroup_is_made_found_and_removed_when_empty(root: Path) -> None:
    path = anchor_cgroup(root, "instance-1")
    assert path == root / ANCHOR_SLICE / "instance-1.scope"
    assert anchor_cgroup(root, "instance-1") == path
    with running(path):
        assert not remove_anchor_cgroup(root, "instance-1")
    assert remove_anchor_cgroup(root, "instance-1")
    assert remove_anchor_cgroup(root, "instance-1")


def test_our_slices_go_when_they_are_empty(root: Path) -> None:
    scope = Scope.create(root, "alloc", OWNER)
    anchor_cgroup(root, "instance")
    remove_slices(root)
    assert scope.path.is_dir()
    scope.remove()
    remove_slices(root)
    assert not (root / WORKLOAD_SLICE).exists()
    assert (root / ANCHOR_SLICE).exists()
    remove_anchor_cgroup(root, "instance")
    remove_slices(root)
    remove_slices(root)
    assert not (root / ANCHOR_SLICE).exists()


def test_a_slice_that_was_there_before_stays(root: Path) -> None:
    (root / WORKLOAD_SLICE).mkdir()
    Scope.create(root, "alloc", OWNER).remove()
    remove_slices(root)
    assert (root / WORKLOAD_SLICE).is_dir()


def test_scopes_are_made_while_others_remove_the_empty_slice(root: Path) -> None:
    done = threading.Event()

    def tidy() -> None:
        while not done.is_set():
            remove_slices(root)

    tidier = threading.Thread(target=tidy)
    tidier.start()
    try:
        for number in range(50):
            assert Scope.create(root, f"alloc-{number}", OWNER).remove()
    finally:
        done.set()
        tidier.join()
