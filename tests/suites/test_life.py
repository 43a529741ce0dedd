"""End to end, from request to release: a consumer, the socket, the provider, this machine."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from linux.cgroups import Scope
from linux.forge.idle import IDLE_COMMAND
from linux.forge.spawn import spawn_within
from linux.journal import Entry
from linux.namespaces import CLONE_FLAGS
from linux.testing.worlds import (
    IMAGE,
    LIGHT,
    MOUNT,
    NET,
    PID,
    LinuxWorld,
    real,
)
from statemachine import effects as do
from statemachine import events as on
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
)
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits
from statemachine.states import AllocationState
from statemachine.testing.strategies import ORDERS
from tests.support.forging import ALL
from tests.support.serving import Serving
from tests.support.spared import is_spared
from transport.codec import decode_message, encode_message
from transport.framing import encode_frame
from transport.request import Consumer, Handoff
from transport.serve import Spans
from transport.testing.peer import DEADLINE_S, Line, wait_until

pytestmark = pytest.mark.needs_root

NS_GET_NSTYPE: Final = 0xB703
LONG_S: Final = DEADLINE_S
"""Longer than anything here takes."""


class LiveNode:
    """A provider on this machine, and a consumer of it."""

    def __init__(self, world: LinuxWorld, directory: Path) -> None:
        self.world: Final = world
        self.path: Final = directory / "s.sock"
        self.consumer: Final = Consumer(self.path, world.inspector)
        self.provider: Serving
        self._stack: Final = ExitStack()

    def start(self, limits: Limits | None = None, **spans: float) -> None:
        # An end that is announced is a release then: on a slow machine, too, where the deadline of
        # a release can pass while the allocation is still being made.
        wanted = Spans(**{"release_s": LONG_S, **spans})
        serving = Serving(self.path, self.world.backend, limits=limits, spans=wanted)
        self.provider = self._stack.enter_context(serving)

    def drop(self) -> None:
        """Stop the provider, which releases nothing, and close what it had open."""
        self.provider.end()
        self.world.backend.close()

    def restart(self, **spans: float) -> None:
        self.world.backend = self.world.program()
        self.start(None, **spans)

    def obtain(
        self, name: str, kinds: tuple[NamespaceType, ...] = LIGHT, image: str | None = None
    ) -> Handoff:
        """A handoff that is closed with the test at the latest."""
        handoff = self.consumer.obtain(NamespaceRequest(name, kinds, image))
        self._stack.callback(handoff.close)
        return handoff

    def spawn(self, handoff: Handoff, *command: str, **more: int) -> subprocess.Popen[bytes]:
        """Start a command in an allocation, as a consumer does."""
        scope = Scope(self.world.scope(handoff.request.allocation_id), "")
        with scope.open_procs() as procs:
            process = spawn_within(command, handoff.bundle, scope=procs, **more)
        self._stack.callback(_end, process)
        return process

    def state_of(self, name: str) -> AllocationState:
        return self.provider.state_of(name)

    def is_released(self, name: str) -> bool:
        return self.state_of(name) is AllocationState.RELEASED

    def close(self) -> None:
        self._stack.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:
        pass


@pytest.fixture(params=["made anew", pytest.param("pool", marks=pytest.mark.deep("long"))])
def idle_life(
    request: pytest.FixtureRequest, tmp_path: Path, cgroup2: Path, image_root: Path
) -> Iterator[LiveNode]:
    """A provider that is not started yet."""
    with real(tmp_path, cgroup2, image_root, has_pool=request.param == "pool") as world:
        life = LiveNode(world, tmp_path)
        try:
            yield life
        finally:
            life.close()


@pytest.fixture
def life(idle_life: LiveNode) -> LiveNode:
    idle_life.start()
    return idle_life


# --- The hand-off ------------------------------------------------------------------------------


@pytest.mark.clause("NODE-2")
def test_basic_life_of_an_allocation(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id, ALL, IMAGE)
    assert life.state_of(allocation_id) is AllocationState.HANDED_OFF
    assert life.spawn(handoff, "true").wait() == 0
    assert handoff.wait_ended(LONG_S)
    assert life.is_released(allocation_id)
    assert life.world.leftovers() == []


@pytest.mark.clause("FD-2")
def test_descriptors_come_in_the_order_of_fd_types(life: LiveNode, allocation_id: str) -> None:
    """Read off the socket byte by byte, with nothing of ours in between."""
    for number, order in enumerate(ORDERS):
        request = NamespaceRequest(f"{allocation_id}-{number}", order)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.connect(str(life.path))
            peer.sendall(encode_frame(encode_message(request)))
            data, numbers, _, _ = socket.recv_fds(peer, 65_540, 16)
            (length,) = struct.unpack(">I", data[:4])
            response = decode_message(data[4 : 4 + length])
            kinds = [fcntl.ioctl(fd, NS_GET_NSTYPE) for fd in numbers]
            for fd in numbers:
                os.close(fd)
        assert isinstance(response, NamespaceResponse)
        assert response.fd_types == order
        assert kinds == [CLONE_FLAGS[kind] for kind in order]


@pytest.mark.clause("LIFE-3")
def test_the_same_request_gets_the_same_namespaces(life: LiveNode, allocation_id: str) -> None:
    first = life.obtain(allocation_id, ALL)
    assert life.obtain(allocation_id, ALL).identities == first.identities


@pytest.mark.clause("LIFE-4")
def test_concurrent_requests_get_one_set(life: LiveNode, allocation_id: str) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Line.to(life.path)) for _ in range(5)]
        for wire in wires:
            wire.say(NamespaceRequest(allocation_id, LIGHT))
        answers = {wire.hear() for wire in wires}
    assert answers == {NamespaceResponse(allocation_id, LIGHT, None)}
    assert len(life.provider.effects(do.CreateNamespaces)) == 1


@pytest.mark.clause("LIFE-5")
def test_another_request_for_a_live_id_is_refused(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id, (PID, MOUNT))
    with pytest.raises(CreationFailed, match="another request"):
        life.obtain(allocation_id, (MOUNT, PID))
    assert life.obtain(allocation_id, (PID, MOUNT)).identities == handoff.identities


def test_every_holder_is_notified_of_the_end(life: LiveNode, allocation_id: str) -> None:
    holders = [life.obtain(allocation_id) for _ in range(3)]
    assert holders[0].end(LONG_S)
    assert all(holder.wait_ended(LONG_S) for holder in holders)
    announced = life.provider.effects(do.AnnounceEnd)
    assert len(set(announced)) == len(announced) == 3


@pytest.mark.clause("LIFE-8", "ERR-1")
def test_a_failed_creation_is_answered_and_leaves_nothing(
    life: LiveNode, allocation_id: str
) -> None:
    with pytest.raises(CreationFailed, match=r"openat2\(2\): ENOENT .*missing\.sqfs"):
        life.obtain(allocation_id, LIGHT, "missing.sqfs")
    assert life.world.leftovers() == []


def test_an_id_that_failed_can_be_requested_again(life: LiveNode, allocation_id: str) -> None:
    with pytest.raises(CreationFailed):
        life.obtain(allocation_id, LIGHT, "missing.sqfs")
    assert life.obtain(allocation_id).identities


@pytest.mark.clause("LIFE-6")
def test_an_id_that_was_released_begins_anew(life: LiveNode, allocation_id: str) -> None:
    first = life.obtain(allocation_id)
    assert first.end(LONG_S)
    assert not set(life.obtain(allocation_id).identities) & set(first.identities)


def test_the_end_of_what_has_ended_is_confirmed_again(life: LiveNode, allocation_id: str) -> None:
    assert life.obtain(allocation_id).end(LONG_S)
    life.consumer.end(allocation_id)


def test_the_end_of_what_never_was_is_not_found(life: LiveNode, allocation_id: str) -> None:
    with pytest.raises(AllocationNotFound):
        life.consumer.end(allocation_id)


# --- Inside ------------------------------------------------------------------------------------


def output_of(life: LiveNode, handoff: Handoff, script: str) -> list[str]:
    """What a shell prints in an allocation, while something keeps its cgroup populated."""
    process = life.spawn(handoff, "sh", "-c", script, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=LONG_S)
    return output.decode().splitlines()


@pytest.fixture
def inside(life: LiveNode, allocation_id: str) -> Handoff:
    """An allocation with everything, kept alive by a process."""
    handoff = life.obtain(allocation_id, ALL, IMAGE)
    life.spawn(handoff, "sleep", "infinity")
    return handoff


def test_the_first_process_is_the_init(life: LiveNode, inside: Handoff) -> None:
    assert output_of(life, inside, "cat /proc/1/comm") == [*IDLE_COMMAND]


@pytest.mark.clause("NODE-10")
def test_proc_shows_the_allocation_alone(life: LiveNode, inside: Handoff) -> None:
    pids = output_of(life, inside, "cd /proc; echo [0-9]*")[0].split()
    assert len(pids) == 3  # the init, the process that keeps it alive, the shell itself
    assert max(map(int, pids)) < 10


@pytest.mark.clause("NODE-7")
def test_orphans_are_reaped(life: LiveNode, inside: Handoff) -> None:
    output_of(life, inside, "sleep 0.01 & exit")
    wait_until(lambda: len(output_of(life, inside, "cd /proc; echo [0-9]*")[0].split()) == 3)


@pytest.mark.clause("NODE-7")
def test_the_init_ignores_signals_from_inside(life: LiveNode, inside: Handoff) -> None:
    output_of(life, inside, "kill -TERM 1; kill -KILL 1; kill -STOP 1")
    assert output_of(life, inside, "grep State /proc/1/status") == ["State:\tS (sleeping)"]


@pytest.mark.clause("NODE-8")
def test_lo_is_up_and_alone(life: LiveNode, inside: Handoff) -> None:
    (link,) = output_of(life, inside, "ip -o link")
    assert " lo: <LOOPBACK,UP,LOWER_UP>" in link


@pytest.mark.clause("NODE-12")
def test_the_image_is_at_its_mount_point(life: LiveNode, inside: Handoff) -> None:
    path = inside.response.uenv_mount_path
    assert output_of(life, inside, f"cat {path}/hello.txt") == ["hello from the image"]


def test_programs_of_the_image_run(life: LiveNode, inside: Handoff) -> None:
    path = inside.response.uenv_mount_path
    assert output_of(life, inside, f"{path}/bin/marker") == ["marker"]


def test_the_image_is_read_only_without_setuid_and_devices(life: LiveNode, inside: Handoff) -> None:
    path = inside.response.uenv_mount_path
    (line,) = output_of(life, inside, f"grep ' {path} ' /proc/mounts")
    options = line.split()[3].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)


@pytest.mark.clause("NODE-12")
def test_the_image_is_not_on_the_node(life: LiveNode, allocation_id: str) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    handoff = life.obtain(allocation_id, ALL, IMAGE)
    assert handoff.response.uenv_mount_path is not None
    assert not Path(handoff.response.uenv_mount_path).exists()
    assert Path("/proc/self/mountinfo").read_text() == before


@contextmanager
def shared_mount(path: Path) -> Iterator[Path]:
    """A mount whose changes reach others, as all of a node's do under systemd."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    subprocess.run(["mount", "--make-shared", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-R", path], check=True)


@pytest.mark.clause("NODE-9")
def test_what_the_node_mounts_later_is_seen_inside(
    life: LiveNode, tmp_path: Path, allocation_id: str
) -> None:
    with shared_mount(tmp_path / "shared") as shared:
        handoff = life.obtain(allocation_id)
        life.spawn(handoff, "sleep", "infinity")
        (shared / "later").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", shared / "later"], check=True)
        (shared / "later" / "file").touch()
        assert output_of(life, handoff, f"ls {shared}/later") == ["file"]


@pytest.mark.clause("NODE-9")
def test_what_is_mounted_inside_is_not_seen_on_the_node(
    life: LiveNode, tmp_path: Path, allocation_id: str
) -> None:
    with shared_mount(tmp_path / "shared") as shared:
        handoff = life.obtain(allocation_id)
        life.spawn(handoff, "sleep", "infinity")
        (shared / "inner").mkdir()
        script = (
            f"mount -t tmpfs tmpfs {shared}/inner && touch {shared}/inner/file && ls {shared}/inner"
        )
        assert output_of(life, handoff, script) == ["file"]
        assert list((shared / "inner").iterdir()) == []


# --- Ends --------------------------------------------------------------------------------------


def by_its_cgroup(life: LiveNode, handoff: Handoff) -> None:
    life.spawn(handoff, "true").wait()


def by_message(life: LiveNode, handoff: Handoff) -> None:
    life.spawn(handoff, "sleep", "infinity")
    assert handoff.end(LONG_S)


def by_the_death_of_its_init(life: LiveNode, handoff: Handoff) -> None:
    process = life.spawn(handoff, "sleep", "infinity")
    life.world.kill_init(handoff.request.allocation_id)
    process.wait(LONG_S)


def by_an_operator(life: LiveNode, handoff: Handoff) -> None:
    process = life.spawn(handoff, "sleep", "infinity")
    # The process is this test's child, and keeps its namespace until it is reaped.
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    life.consumer.end(handoff.request.allocation_id)
    reaper.join()


def by_removal_of_the_cgroup(life: LiveNode, handoff: Handoff) -> None:
    life.world.remove_scope(handoff.request.allocation_id)


ENDS: Final = (
    by_its_cgroup,
    by_the_death_of_its_init,
    by_an_operator,
    by_removal_of_the_cgroup,
)


@pytest.mark.clause("END-1", "END-10")
@pytest.mark.parametrize("end", ENDS)
def test_one_end_is_announced_once_and_everything_released(
    life: LiveNode, allocation_id: str, end: Callable[[LiveNode, Handoff], None]
) -> None:
    with Line.to(life.path) as other:
        other.say(NamespaceRequest(allocation_id, LIGHT, IMAGE))
        other.hear()
        handoff = life.obtain(allocation_id, LIGHT, IMAGE)
        end(life, handoff)
        assert other.hear() == AllocationEnded(allocation_id)
        assert handoff.wait_ended(LONG_S)
        assert life.is_released(allocation_id)
        assert life.world.leftovers() == []
        assert other.hears_nothing()


def test_a_requested_end_is_answered_once(life: LiveNode, allocation_id: str) -> None:
    with Line.to(life.path) as wire:
        wire.say(NamespaceRequest(allocation_id, LIGHT))
        wire.hear()
        wire.say(AllocationEnded(allocation_id))
        assert wire.hear() == AllocationEnded(allocation_id)
        # Asked once more, it is answered once more: nothing else was on its way.
        wire.say(AllocationEnded(allocation_id))
        assert wire.hear() == AllocationEnded(allocation_id)
        assert wire.hears_nothing()


@pytest.mark.clause("END-8")
def test_an_end_kills_what_runs(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id, (NET, MOUNT))  # no PID namespace takes it along
    process = life.spawn(handoff, "sleep", "infinity")
    assert handoff.end(LONG_S)
    assert process.wait(LONG_S) == -signal.SIGKILL
    assert life.world.leftovers() == []


@pytest.mark.clause("END-2")
def test_many_reasons_to_end_are_one_end(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id)
    with life.spawn(handoff, "sleep", "infinity") as process, ExitStack() as stack:
        wires = [stack.enter_context(Line.to(life.path)) for _ in range(3)]
        life.world.kill_init(allocation_id)
        process.kill()
        for wire in wires:
            wire.say(AllocationEnded(allocation_id))
        process.wait()
        assert [wire.hear() for wire in wires] == [AllocationEnded(allocation_id)] * 3
        assert handoff.wait_ended(LONG_S)
    released = [e for e, _ in life.provider.turns if isinstance(e, on.NamespacesReleased)]
    assert released == [on.NamespacesReleased(allocation_id)]


def test_the_last_of_several_processes_counts(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id)
    last = life.spawn(handoff, "sleep", "infinity")
    life.spawn(handoff, "true").wait()
    assert not handoff.wait_ended(0.0)
    last.kill()
    last.wait()
    assert handoff.wait_ended(LONG_S)


@pytest.mark.clause("END-6")
def test_a_process_further_down_keeps_it_alive(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id)
    below = life.world.scope(allocation_id) / "a" / "b"
    below.mkdir(parents=True)
    life.world.adopt_process(allocation_id, below)
    life.spawn(handoff, "true").wait()
    assert_still_alive(life, allocation_id)
    life.world.leave(allocation_id)
    assert handoff.wait_ended(LONG_S)


def assert_still_alive(life: LiveNode, name: str) -> None:
    """Say so once the provider has seen all there is to see by now."""
    life.provider.ask(life.provider.provider._watcher.observe)
    assert life.state_of(name) is AllocationState.HANDED_OFF


@pytest.mark.clause("END-5")
def test_a_frozen_process_keeps_it_alive(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id)
    life.spawn(handoff, "sleep", "infinity")
    life.world.freeze(allocation_id)
    assert_still_alive(life, allocation_id)
    life.world.freeze(allocation_id, is_frozen=False)
    assert_still_alive(life, allocation_id)


def test_what_is_frozen_can_be_ended(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id, (MOUNT,))
    process = life.spawn(handoff, "sleep", "infinity")
    life.world.freeze(allocation_id)
    assert handoff.end(LONG_S)
    assert process.wait(LONG_S) == -signal.SIGKILL


LEADERLESS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall({exit}, 0)
"""
SYS_EXIT: Final = {"x86_64": 60, "aarch64": 93}[platform.machine()]


@pytest.fixture
def leaderless(life: LiveNode, allocation_id: str) -> tuple[Handoff, subprocess.Popen[bytes]]:
    """A process whose first thread has gone, and whose second one lives."""
    handoff = life.obtain(allocation_id, (MOUNT,))
    program = LEADERLESS.format(exit=SYS_EXIT)
    process = life.spawn(handoff, sys.executable, "-c", program, stdin=subprocess.PIPE)
    stat = Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
    return handoff, process


def test_a_thread_keeps_it_alive(
    life: LiveNode, allocation_id: str, leaderless: tuple[Handoff, subprocess.Popen[bytes]]
) -> None:
    handoff, process = leaderless
    assert_still_alive(life, allocation_id)
    assert process.stdin is not None
    process.stdin.close()
    assert handoff.wait_ended(LONG_S)


def test_a_thread_without_its_leader_is_killed(
    life: LiveNode, leaderless: tuple[Handoff, subprocess.Popen[bytes]]
) -> None:
    handoff, _ = leaderless
    assert handoff.end(LONG_S)
    assert life.world.leftovers() == []


def test_a_zombie_in_the_cgroup_alone_does_not_keep_it(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id, (MOUNT,))
    process = life.spawn(handoff, "true")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert handoff.wait_ended(LONG_S)
    assert life.is_released(allocation_id)


@pytest.mark.clause("END-16")
def test_an_end_that_overtakes_the_creation_undoes_it(life: LiveNode, allocation_id: str) -> None:
    with Line.to(life.path) as asker, Line.to(life.path) as ender:
        asker.say(NamespaceRequest(allocation_id, ALL, IMAGE))
        wait_until(lambda: life.state_of(allocation_id) is not AllocationState.UNKNOWN)
        ender.say(AllocationEnded(allocation_id))
        assert ender.hear() == AllocationEnded(allocation_id)
        assert isinstance(asker.hear(), CreationFailed | NamespaceResponse)
    assert life.world.leftovers() == []


# --- It is not used ----------------------------------------------------------------------------


def test_an_unclaimed_allocation_is_ended(idle_life: LiveNode, allocation_id: str) -> None:
    idle_life.start(claim_s=0.01)
    idle_life.obtain(allocation_id).close()
    wait_until(lambda: idle_life.is_released(allocation_id))
    assert idle_life.world.leftovers() == []


@pytest.mark.clause("END-3")
def test_a_connection_claims_it(idle_life: LiveNode, allocation_id: str) -> None:
    idle_life.start(claim_s=0.01)
    handoff = idle_life.obtain(allocation_id)
    idle_life.obtain(f"{allocation_id}-unclaimed").close()
    wait_until(lambda: idle_life.is_released(f"{allocation_id}-unclaimed"))
    assert not handoff.wait_ended(0.0)


def test_a_process_in_it_claims_it(idle_life: LiveNode, allocation_id: str) -> None:
    idle_life.start(claim_s=0.01)
    handoff = idle_life.obtain(allocation_id)
    idle_life.spawn(handoff, "sleep", "infinity")
    wait_until(lambda: any(e == on.ScopePopulated(allocation_id) for e, _ in history_of(idle_life)))
    handoff.close()
    idle_life.obtain(f"{allocation_id}-unclaimed").close()
    wait_until(lambda: idle_life.is_released(f"{allocation_id}-unclaimed"))
    assert_still_alive(idle_life, allocation_id)


def history_of(life: LiveNode) -> list[tuple[on.Event, tuple[do.Effect, ...]]]:
    return list(life.provider.turns)


# --- The grace ---------------------------------------------------------------------------------


def test_without_a_grace_a_first_helper_is_the_end(life: LiveNode, allocation_id: str) -> None:
    handoff = life.obtain(allocation_id)
    life.spawn(handoff, "true").wait()
    assert handoff.wait_ended(LONG_S)


def graces_of(life: LiveNode) -> list[str]:
    return life.provider.ask(lambda: list(life.provider.provider._watcher._graces))


@pytest.mark.clause("END-7")
def test_within_the_grace_the_next_process_goes_on(idle_life: LiveNode, allocation_id: str) -> None:
    idle_life.start(empty_grace_s=LONG_S)
    handoff = idle_life.obtain(allocation_id)
    idle_life.spawn(handoff, "true").wait()
    wait_until(lambda: graces_of(idle_life) == [allocation_id])
    idle_life.spawn(handoff, "sleep", "infinity")
    wait_until(lambda: graces_of(idle_life) == [])
    assert_still_alive(idle_life, allocation_id)


def test_after_the_grace_it_is_over(idle_life: LiveNode, allocation_id: str) -> None:
    idle_life.start(empty_grace_s=0.05)
    handoff = idle_life.obtain(allocation_id)
    idle_life.spawn(handoff, "true").wait()
    assert handoff.wait_ended(LONG_S)


# --- What does not die -------------------------------------------------------------------------


@pytest.fixture
def draining(idle_life: LiveNode, allocation_id: str) -> Iterator[Handoff]:
    """An allocation that is ended, and has a dead process that its parent has not reaped."""
    idle_life.start(release_s=0.1)
    handoff = idle_life.obtain(allocation_id)
    idle_life.world.block_release(allocation_id)
    with Line.to(idle_life.path) as operator:
        operator.say(AllocationEnded(allocation_id))
        wait_until(lambda: idle_life.state_of(allocation_id) is AllocationState.ENDED)
        yield handoff
    idle_life.world.unblock_release(allocation_id)
    wait_until(lambda: idle_life.is_released(allocation_id))
    assert idle_life.world.leftovers() == []


def entry_of(life: LiveNode, name: str) -> Entry:
    journal = life.world.program_now._journal
    assert journal is not None
    return next(entry for entry in journal.entries() if entry.allocation_id == name)


@pytest.mark.clause("END-9")
def test_what_does_not_die_is_named(
    idle_life: LiveNode, draining: Handoff, allocation_id: str
) -> None:
    zombie = str(idle_life.world._entangled[allocation_id].pid)
    ask, kernel = idle_life.provider.ask, idle_life.provider.provider.kernel
    wait_until(lambda: zombie in ask(lambda: kernel.drain_of(allocation_id)))
    wait_until(lambda: zombie in (entry_of(idle_life, allocation_id).why or ""))


def test_its_end_is_announced_at_the_deadline(
    idle_life: LiveNode, draining: Handoff, allocation_id: str
) -> None:
    assert draining.wait_ended(LONG_S)
    assert idle_life.state_of(allocation_id) is AllocationState.ENDED


def test_it_does_not_delay_others(
    idle_life: LiveNode, draining: Handoff, allocation_id: str
) -> None:
    other = idle_life.obtain(f"{allocation_id}-other")
    assert other.end(LONG_S)
    assert idle_life.state_of(allocation_id) is AllocationState.ENDED


@pytest.mark.clause("LIFE-7")
def test_its_id_is_not_given_again(
    idle_life: LiveNode, draining: Handoff, allocation_id: str
) -> None:
    assert draining.wait_ended(LONG_S)
    with pytest.raises(CreationFailed, match="not released"):
        idle_life.obtain(allocation_id)


def test_it_is_found_again_by_the_next_provider(
    idle_life: LiveNode, draining: Handoff, allocation_id: str
) -> None:
    idle_life.drop()
    idle_life.restart()
    assert idle_life.state_of(allocation_id) is AllocationState.ENDED


# --- The provider comes back -------------------------------------------------------------------


@pytest.mark.clause("CRASH-2")
def test_the_next_provider_hands_over_the_same(life: LiveNode, allocation_id: str) -> None:
    first = life.obtain(allocation_id, ALL, IMAGE)
    life.drop()
    life.restart()
    assert life.state_of(allocation_id) is AllocationState.HANDED_OFF
    again = life.obtain(allocation_id, ALL, IMAGE)
    assert (again.identities, again.response) == (first.identities, first.response)


def test_the_next_provider_sees_the_end(life: LiveNode, allocation_id: str) -> None:
    process = life.spawn(life.obtain(allocation_id), "sleep", "infinity")
    life.drop()
    life.restart()
    process.kill()
    process.wait()
    wait_until(lambda: life.is_released(allocation_id))
    assert life.world.leftovers() == []


@pytest.mark.clause("CRASH-4")
def test_what_ended_meanwhile_is_released_at_the_start(life: LiveNode, allocation_id: str) -> None:
    process = life.spawn(life.obtain(allocation_id), "sleep", "infinity")
    life.drop()
    process.kill()
    process.wait()
    life.restart()
    wait_until(lambda: life.is_released(allocation_id))


def test_what_is_not_claimed_after_a_restart_is_ended(life: LiveNode, allocation_id: str) -> None:
    life.obtain(allocation_id)
    life.drop()
    life.restart(claim_s=0.01)
    wait_until(lambda: life.is_released(allocation_id))


@pytest.mark.clause("CRASH-6")
def test_what_was_released_is_still_known_after_a_restart(
    life: LiveNode, allocation_id: str
) -> None:
    assert life.obtain(allocation_id).end(LONG_S)
    life.drop()
    life.restart()
    life.consumer.end(allocation_id)


@pytest.mark.clause("LIFE-2", "CRASH-1")
def test_a_process_survives_the_provider(life: LiveNode, allocation_id: str) -> None:
    process = life.spawn(life.obtain(allocation_id), "sleep", "infinity")
    life.drop()
    assert is_spared(process)
    life.restart()
