"""One test for each fact that the simulation models: in memory, and on the Linux that runs this.

Each is named for the fact. One that fails in memory alone is a mistake of the simulation; one that
fails on Linux is no fact.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from linux.simulated.mounts import Propagation
from linux.simulated.namespaces import SimulatedNamespaces
from statemachine.messages import NamespaceType
from tests.suites.fidelity.cgroups import Cgroups, SimulatedCgroups, linux_cgroups
from tests.suites.fidelity.differential import NOTICES_S
from tests.suites.fidelity.machines import SLEEP
from tests.suites.fidelity.mounts import Mounts, SimulatedMounts, linux_mounts
from tests.suites.fidelity.namespaces import Namespaces, SimulatedWorker, linux_worker
from tests.suites.fidelity.socket_model import SimulatedFile, SimulatedTable
from tests.suites.fidelity.sockets import FILES, SimulatedSockets, Sockets, linux_sockets
from transport.channel import SENDMSG_DESCRIPTORS_MAX
from transport.testing.peer import DEADLINE_S

pytestmark = pytest.mark.needs_root

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
BOTH = ("simulated", "linux")
M = TypeVar("M")


@contextmanager
def one_of(
    kind: str, simulated: Callable[[], M], linux: Callable[[], AbstractContextManager[M]]
) -> Iterator[M]:
    if kind == "simulated":
        yield simulated()
    else:
        with linux() as machine:
            yield machine


@pytest.fixture(autouse=True)
def _in_the_sessions_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What other sessions see of this one's images has its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def machine_of(simulated: Callable[[], M], linux: Callable[[], AbstractContextManager[M]]) -> Any:
    """A fixture with the two machines of a family."""

    @pytest.fixture(params=BOTH)
    def machine(request: pytest.FixtureRequest) -> Iterator[M]:
        with one_of(request.param, simulated, linux) as machine:
            yield machine

    return machine


socket_machine = machine_of(SimulatedSockets, linux_sockets)
cgroups = machine_of(SimulatedCgroups, linux_cgroups)
worker = machine_of(SimulatedWorker, linux_worker)
mounts = machine_of(SimulatedMounts, linux_mounts)


@pytest.fixture
def sockets(socket_machine: Sockets) -> Sockets:
    """A process that has a pair of sockets: 0 and 1."""
    socket_machine.pair()
    return socket_machine


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError, match=r"Errno|\(") as caught:
        yield
    assert caught.value.errno == number, errno.errorcode[caught.value.errno or 0]


def soon(look: Callable[[], Any], expected: object) -> None:
    """What Linux promises to be so in a moment."""
    deadline = time.monotonic() + DEADLINE_S
    while (seen := look()) != expected and time.monotonic() < deadline:
        time.sleep(0.001)
    assert seen == expected


# --- SCM_RIGHTS and descriptors -----------------------------------------------------------------


def fds_of(come: list[tuple[int, str, bool]]) -> list[str]:
    return [label for _, label, _ in come]


def test_basic_descriptors_arrive_in_order(sockets: Sockets) -> None:
    files = sockets.open(), sockets.open()
    sockets.send(0, 1, (*files, files[0]))
    _, come, is_truncated = sockets.receive(1, 8, 64)
    assert (fds_of(come), is_truncated) == (["file 0", "file 1", "file 0"], False)


def test_plain_bytes_are_glued_in_front_of_a_set_and_never_behind(sockets: Sockets) -> None:
    file = sockets.open()
    for fds in ((), (file,), (), (file, file)):
        sockets.send(0, 1, fds)
    reads = [sockets.receive(1, 8, 64) for _ in range(2)]
    assert [(data, len(come)) for data, come, _ in reads] == [(b"AB", 1), (b"CD", 2)]


def test_a_set_comes_with_the_first_byte_and_not_again(sockets: Sockets) -> None:
    sockets.send(0, 3, (sockets.open(),))
    assert [len(sockets.receive(1, 1, 64)[1]) for _ in range(3)] == [1, 0, 0]


def test_once_its_set_is_taken_the_rest_is_plain_and_glued_to_the_next(sockets: Sockets) -> None:
    file = sockets.open()
    sockets.send(0, 3, (file,))
    sockets.send(0, 1, (file,))
    sockets.receive(1, 1, 64)
    data, come, _ = sockets.receive(1, 8, 64)
    assert (data, len(come)) == (b"AAB", 1)


@pytest.mark.parametrize("free", [0, 1, 2])
def test_who_is_short_of_numbers_gets_a_prefix_and_is_told(sockets: Sockets, free: int) -> None:
    files = [sockets.open() for _ in range(3)]
    sockets.send(0, 1, tuple(files))
    sockets.limit(5 + free)
    data, come, is_truncated = sockets.receive(1, 8, 64)
    assert (data, fds_of(come), is_truncated) == (b"A", ["file 0", "file 1"][:free], True)


@pytest.mark.parametrize(("control_bytes", "fitting"), [(0, 0), (16, 0), (20, 1), (24, 2), (27, 2)])
def test_who_is_short_of_control_space_gets_a_prefix_and_is_told(
    sockets: Sockets, control_bytes: int, fitting: int
) -> None:
    file = sockets.open()
    sockets.send(0, 1, (file,) * 3)
    _, come, is_truncated = sockets.receive(1, 8, control_bytes)
    assert (len(come), is_truncated) == (fitting, True)


def test_what_did_not_fit_is_closed(sockets: Sockets) -> None:
    file = sockets.open()
    sockets.send(0, 1, (file,))
    sockets.close_fd(file)
    assert sockets.alive() == ["file 0"]
    sockets.receive(1, 8, 0)
    assert sockets.alive() == []


def test_a_plain_read_closes_what_comes_and_does_not_tell(sockets: Sockets) -> None:
    file = sockets.open()
    sockets.send(0, 1, (file,))
    sockets.close_fd(file)
    assert sockets.read(1, 8) == b"A"
    assert sockets.alive() == []


def test_253_descriptors_are_sent_and_254_are_not(sockets: Sockets) -> None:
    file = sockets.open()
    assert sockets.send(0, 1, (file,) * SENDMSG_DESCRIPTORS_MAX) == 1
    with refused(errno.EINVAL):
        sockets.send(0, 1, (file,) * (SENDMSG_DESCRIPTORS_MAX + 1))


def test_without_a_byte_nothing_is_sent(sockets: Sockets) -> None:
    assert sockets.send(0, 0, (sockets.open(),)) == 0
    with refused(errno.EAGAIN):
        sockets.receive(1, 8, 64)


def test_a_bad_descriptor_sends_nothing(sockets: Sockets) -> None:
    with refused(errno.EBADF):
        sockets.send(0, 1, (sockets.open(), 9))
    with refused(errno.EAGAIN):
        sockets.receive(1, 8, 64)


def test_a_peek_gives_duplicates_and_leaves_the_set(sockets: Sockets) -> None:
    sockets.send(0, 1, (sockets.open(),))
    peeked, taken = sockets.receive(1, 8, 64, is_peek=True), sockets.receive(1, 8, 64)
    assert [fds_of(each[1]) for each in (peeked, taken)] == [["file 0"], ["file 0"]]
    assert len(sockets.table()) == 5


def test_a_peek_takes_a_set_of_whose_bytes_it_has_none(sockets: Sockets) -> None:
    sockets.send(0, 1)
    sockets.send(0, 1, (sockets.open(),))
    data, come, _ = sockets.receive(1, 1, 64, is_peek=True)
    assert (data, fds_of(come)) == (b"A", ["file 0"])
    assert sockets.receive(1, 1, 64)[:2] == (b"A", [])


def test_a_read_of_no_bytes_takes_a_set(sockets: Sockets) -> None:
    sockets.send(0, 1, (sockets.open(),))
    assert [len(sockets.receive(1, 0, 64)[1]) for _ in range(2)] == [1, 0]


def test_a_send_that_is_cut_short_has_sent_its_set_with_the_first_part(sockets: Sockets) -> None:
    file = sockets.open()
    if isinstance(sockets, SimulatedSockets):
        sockets.process.room = 219_264
    assert 0 < sockets.send(0, 5_000_000, (file,)) < 5_000_000
    first, second = (sockets.receive(1, 1_000_000, 64) for _ in range(2))
    assert (len(first[1]), len(second[1])) == (1, 0)


def test_received_descriptors_are_inherited_unless_it_is_asked(sockets: Sockets) -> None:
    sockets.send(0, 1, (sockets.open(),))
    asked = sockets.receive(1, 8, 64, is_peek=True)
    not_asked = sockets.receive(1, 8, 64, is_inherited=True)
    assert [each[1][0][2] for each in (asked, not_asked)] == [False, True]


def test_what_is_in_flight_outlives_its_sender(sockets: Sockets) -> None:
    file = sockets.open()
    sockets.send(0, 1, (file,))
    sockets.close_fd(file)
    sockets.close_fd(0)
    assert fds_of(sockets.receive(1, 8, 64)[1]) == ["file 0"]


def test_what_is_in_flight_goes_with_its_receiver(sockets: Sockets) -> None:
    file = sockets.open()
    sockets.send(0, 1, (file,))
    sockets.close_fd(file)
    sockets.close_fd(1)
    assert sockets.alive() == []


def test_who_takes_no_descriptors_is_sent_none_and_can_send_them(sockets: Sockets) -> None:
    file = sockets.open()
    sockets.accept_rights(1, False)
    with refused(errno.EPERM):
        sockets.send(0, 1, (file,))
    assert sockets.send(0, 1) == 1
    assert sockets.send(1, 1, (file,)) == 1


def test_the_lowest_free_number_is_given_out(sockets: Sockets) -> None:
    files = [sockets.open() for _ in range(3)]
    sockets.close_fd(files[0])
    assert sockets.duplicate(files[1]) == files[0]


def test_beyond_the_limit_there_are_no_numbers_and_no_half_pairs(sockets: Sockets) -> None:
    sockets.limit(3)
    with refused(errno.EMFILE):
        sockets.pair()
    assert len(sockets.table()) == 2
    assert sockets.open() == 2
    with refused(errno.EMFILE):
        sockets.duplicate(2)


def test_who_closes_without_having_read_resets_the_peer(sockets: Sockets) -> None:
    sockets.send(0, 1)
    sockets.close_fd(1)
    with refused(errno.EPIPE):
        sockets.send(0, 1)
    with refused(errno.ECONNRESET):
        sockets.receive(0, 1)
    assert sockets.receive(0, 1)[0] == b""


def test_what_is_in_flight_goes_with_a_killed_process() -> None:
    """The one fact of these that takes a second process; the simulation's `die` is as brief."""
    for kill in (_die_in_memory, _die_on_linux):
        assert kill()


def _die_in_memory() -> bool:
    table, file = SimulatedTable(), SimulatedFile()
    table.pair()
    table.send(0, b"x", [table.open(file)])
    table.close(2)
    was_alive = file.is_alive
    table.die()
    return was_alive and not file.is_alive


def _die_on_linux() -> bool:
    here, there = socket.socketpair()
    reader, writer = os.pipe()
    poll = select.poll()
    poll.register(reader, 0)
    with here, there, subprocess.Popen([SLEEP, "infinity"], pass_fds=[there.fileno()]) as receiver:
        socket.send_fds(here, [b"x"], [writer])
        os.close(writer)
        there.close()
        was_alive = poll.poll(0) == []
        receiver.send_signal(signal.SIGKILL)
        receiver.wait()
        is_gone = poll.poll(int(DEADLINE_S * 1000)) == [(reader, select.POLLHUP)]
    os.close(reader)
    return was_alive and is_gone


# --- Cgroups ------------------------------------------------------------------------------------


def test_basic_a_process_populates_its_cgroup_and_all_above(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.make("a/b")
    assert not cgroups.populated("a")
    cgroups.enter("a/b", 0)
    assert (cgroups.populated("a"), cgroups.populated("a/b")) == (True, True)
    assert (cgroups.processes("a"), cgroups.processes("a/b")) == ([], [0])


def test_a_zombie_does_not_populate(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.enter("a", 0)
    cgroups.exit(0)
    assert (cgroups.populated("a"), cgroups.processes("a")) == (False, [])
    cgroups.remove("a")
    cgroups.reap(0)


def test_what_is_frozen_populates_and_can_be_killed(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.enter("a", 0)
    cgroups.freeze("a", True)
    soon(lambda: cgroups.frozen("a"), True)
    assert cgroups.populated("a")
    cgroups.kill("a")
    assert not cgroups.populated("a")


def test_freezing_freezes_all_below(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.make("a/b")
    cgroups.freeze("a", True)
    soon(lambda: cgroups.frozen("a/b"), True)
    cgroups.freeze("a/b", False)
    soon(lambda: cgroups.frozen("a/b"), True)


def test_the_last_to_move_out_leaves_it_empty(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.make("d")
    cgroups.enter("a", 0)
    cgroups.enter("d", 0)
    assert not cgroups.populated("a")


def test_a_cgroup_is_removed_only_without_processes_and_without_any_below(
    cgroups: Cgroups,
) -> None:
    cgroups.make("a")
    cgroups.make("a/b")
    with refused(errno.EBUSY):
        cgroups.remove("a")
    cgroups.remove("a/b")
    cgroups.enter("a", 0)
    with refused(errno.EBUSY):
        cgroups.remove("a")


def test_a_kill_reaches_everything_below(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.make("a/b")
    cgroups.enter("a", 0)
    cgroups.enter("a/b", 1)
    cgroups.kill("a")
    assert not cgroups.populated("a")


def test_whatever_changes_before_it_is_read_is_one_notice(cgroups: Cgroups) -> None:
    cgroups.make("a")
    assert not cgroups.has_changed("a")
    cgroups.enter("a", 0)
    cgroups.exit(0)
    soon(lambda: cgroups.has_changed("a"), True)
    time.sleep(NOTICES_S[-1])
    assert not cgroups.populated("a")
    assert not cgroups.has_changed("a")


def test_who_comes_second_is_no_notice(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.enter("a", 0)
    soon(lambda: cgroups.has_changed("a"), True)
    assert cgroups.populated("a")
    cgroups.enter("a", 1)
    assert not cgroups.has_changed("a")


def test_freezing_is_a_notice_and_no_end(cgroups: Cgroups) -> None:
    cgroups.make("a")
    cgroups.freeze("a", True)
    soon(lambda: cgroups.has_changed("a"), True)
    assert not cgroups.populated("a")


# --- Namespaces and inits -----------------------------------------------------------------------


def start_in_a_new(worker: Namespaces, *kinds: NamespaceType) -> None:
    """Process 0 in new namespaces, and the worker at home again."""
    for kind in kinds:
        worker.unshare(kind)
    worker.fork()
    worker.go_home()


def test_basic_a_namespace_tells_its_kind_and_itself_from_others(worker: Namespaces) -> None:
    start_in_a_new(worker, *NamespaceType)
    for kind in (PID, NET, MOUNT, PID):
        worker.open(0, kind)
    assert [worker.kind_of(number) for number in range(3)] == [PID, NET, MOUNT]
    assert (worker.are_same(0, 3), worker.are_same(0, 1)) == ((True, True), (False, False))


def test_the_wrong_kind_is_refused_and_none_is_not(worker: Namespaces) -> None:
    start_in_a_new(worker, PID)
    worker.open(0, PID)
    with refused(errno.EINVAL):
        worker.enter(0, NET)
    worker.enter(0, None)


def test_there_is_no_pid_namespace_for_children_before_the_first(worker: Namespaces) -> None:
    worker.unshare(PID)
    with refused(errno.ENOENT):
        worker.open_own(PID)
    assert worker.fork() == 1
    assert worker.open_own(PID)


def test_a_second_pid_namespace_is_refused(worker: Namespaces) -> None:
    worker.unshare(PID)
    with refused(errno.EINVAL):
        worker.unshare(PID)
    worker.unshare(MOUNT)
    worker.unshare(MOUNT)


def test_a_dead_pid_namespace_is_entered_and_nothing_starts_in_it(worker: Namespaces) -> None:
    start_in_a_new(worker, PID)
    worker.open(0, PID)
    worker.kill(0)
    soon(lambda: worker.is_dead(0), True)
    worker.reap(0)
    worker.enter(0, PID)
    with refused(errno.ENOMEM):
        worker.fork()
    with refused(errno.ESRCH):
        worker.find_init(0)


def test_the_other_namespaces_outlive_an_init(worker: Namespaces) -> None:
    start_in_a_new(worker, PID, MOUNT)
    worker.open(0, MOUNT)
    worker.kill(0)
    soon(lambda: worker.is_dead(0), True)
    worker.reap(0)
    worker.enter(0, MOUNT)
    assert worker.fork() == 0


def test_an_init_takes_all_in_its_namespace_along_and_no_other(worker: Namespaces) -> None:
    start_in_a_new(worker, PID, MOUNT)
    worker.open(0, PID)
    worker.open(0, MOUNT)
    worker.enter(0, PID)
    assert worker.fork() == 2
    worker.go_home()
    worker.enter(1, MOUNT)
    worker.fork()
    worker.kill(0)
    soon(lambda: worker.is_dead(1), True)
    assert not worker.is_dead(2)


def test_an_init_waits_for_a_zombie_whose_parent_is_outside(worker: Namespaces) -> None:
    start_in_a_new(worker, PID)
    worker.open(0, PID)
    worker.enter(0, PID)
    worker.fork()
    worker.kill(1)
    soon(lambda: worker.is_dead(1), True)
    worker.kill(0)
    assert not worker.is_dead(0)
    with refused(errno.ESRCH):
        worker.open(0, PID)
    with refused(errno.ENOMEM):
        worker.fork()
    worker.reap(1)
    soon(lambda: worker.is_dead(0), True)


def test_what_is_dead_has_no_namespaces_to_open(worker: Namespaces) -> None:
    start_in_a_new(worker, PID)
    worker.kill(0)
    with refused(errno.ESRCH):
        worker.open(0, PID)


def test_an_inode_number_comes_again_and_an_id_does_not() -> None:
    machine = SimulatedNamespaces()
    first = machine.make(MOUNT)
    machine.drop(first)
    second = machine.make(MOUNT)
    assert (first.inode == second.inode, first.unique_id == second.unique_id) == (True, False)
    with linux_worker() as worker:
        inodes, ids = worker.number_mount_namespaces(until_again=2_000)
    assert len(set(ids)) == len(ids)
    assert len(set(inodes)) < len(inodes)


# --- Mounts and images --------------------------------------------------------------------------


def test_basic_a_later_mount_and_unmount_outside_reach_a_slave(mounts: Mounts) -> None:
    mounts.copy(1, Propagation.SLAVE)
    mounts.mount(0, "a", 0)
    assert mounts.look(1, "a") == ("one.sqfs", 0)
    mounts.unmount(0, "a", False)
    assert mounts.look(1, "a") is None


def test_nothing_of_a_slave_reaches_the_outside(mounts: Mounts) -> None:
    mounts.copy(1, Propagation.SLAVE)
    mounts.mount(1, "a", 0)
    assert mounts.look(0, "a") is None


def test_what_is_shared_leaks_out_and_stays(mounts: Mounts) -> None:
    mounts.copy(1, Propagation.SHARED)
    mounts.mount(1, "a", 0)
    mounts.end(1)
    assert mounts.look(0, "a") == ("one.sqfs", 0)


def test_a_private_copy_keeps_what_is_unmounted_outside(mounts: Mounts) -> None:
    mounts.mount(0, "a", 0)
    mounts.copy(1, Propagation.PRIVATE)
    mounts.unmount(0, "a", False)
    assert mounts.look(1, "a") == ("one.sqfs", 0)


def test_an_open_file_makes_a_mount_busy_unless_it_is_lazy(mounts: Mounts) -> None:
    mounts.mount(0, "a", 0)
    mounts.open_in(0, "a")
    with refused(errno.EBUSY):
        mounts.unmount(0, "a", False)
    mounts.unmount(0, "a", True)
    assert mounts.look(0, "a") is None


def test_an_open_file_in_a_slave_makes_the_mount_outside_busy(mounts: Mounts) -> None:
    mounts.copy(1, Propagation.SLAVE)
    mounts.mount(0, "a", 0)
    mounts.open_in(1, "a")
    with refused(errno.EBUSY):
        mounts.unmount(0, "a", False)


def test_what_comes_from_outside_goes_below_what_is_there(mounts: Mounts) -> None:
    mounts.copy(1, Propagation.SLAVE)
    mounts.mount(1, "a", 0)
    mounts.mount(0, "a", 1)
    assert mounts.look(1, "a") == ("one.sqfs", 0)
    mounts.unmount(1, "a", False)
    assert mounts.look(1, "a") == ("other.sqfs", 1)


def test_two_on_one_place_stack_without_a_word(mounts: Mounts) -> None:
    mounts.mount(0, "a", 0)
    mounts.mount(0, "a", 1)
    assert mounts.look(0, "a") == ("other.sqfs", 1)
    mounts.unmount(0, "a", False)
    assert mounts.look(0, "a") == ("one.sqfs", 0)


def test_what_is_not_mounted_is_not_unmounted(mounts: Mounts) -> None:
    with refused(errno.EINVAL):
        mounts.unmount(0, "a", False)


def test_all_mounts_of_an_image_are_of_one_superblock(mounts: Mounts) -> None:
    mounts.mount(0, "a", 0)
    mounts.copy(1, Propagation.PRIVATE)
    mounts.mount(1, "b", 0)
    assert mounts.look(0, "a") == mounts.look(1, "b") == ("one.sqfs", 0)
    assert mounts.loops(0) == 1


def test_a_loop_device_goes_with_the_last_user_and_not_before(mounts: Mounts) -> None:
    mounts.copy(1, Propagation.SLAVE)
    mounts.mount(1, "a", 0)
    mounts.open_in(1, "a")
    mounts.drop(0)
    mounts.end(1)
    assert mounts.loops(0) == 1
    mounts.close_file(0)
    soon(lambda: mounts.loops(0), 0)


def test_there_are_as_many_files_as_the_programs_believe() -> None:
    machine = SimulatedSockets()
    assert [machine.open() for _ in range(FILES + 1)][-1] == -1
