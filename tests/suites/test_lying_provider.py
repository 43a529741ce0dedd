"""A provider that lies: each lie is caught, nothing of it stays open, and the reason names it.

The namespaces, descriptors and sockets are real. Only what is told about them is not true.
"""

from __future__ import annotations

import array
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest

from linux.backend import LinuxBackend, NodeSettings
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine.errors import CreationFailed, FdPassing, NamespaceError, SocketUnavailable
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from tests.support.consumers import FORMS, Form
from transport.descriptors import Descriptor
from transport.framing import FRAME_BYTES_MAX
from transport.request import Consumer, Patience
from transport.testing.peer import Liar, Line, confirm_ends, copies_of, frame_of, wait_until

pytestmark = pytest.mark.needs_root

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)
TRUTH: Final = "truth"
ROOT: Final = Path(__file__).parents[2]
HASTY: Final = Patience(answer_s=0.1, redial_s=0.02)

NewConsumer: TypeAlias = Callable[..., Any]


@pytest.fixture(scope="module")
def service() -> Iterator[LinuxBackend]:
    """Makes the namespaces that are lied about, and those of self-service."""
    settings = NodeSettings(cgroup2=None)
    with closing(LinuxBackend.for_self_service(settings, clock=lambda: 0.0)) as backend:
        backend.create_namespaces(NamespaceRequest(TRUTH, ALL))
        yield backend


@dataclass(frozen=True)
class Stage:
    """What a liar has at hand."""

    request: NamespaceRequest
    honest: NamespaceResponse
    fds: tuple[int, ...]
    """A process, a network and a mount namespace, as asked for."""
    strangers: dict[str, int]
    """Descriptors that nobody asked for."""

    @property
    def frame(self) -> bytes:
        return frame_of(self.honest)

    @property
    def all_fds(self) -> tuple[int, ...]:
        return (*self.fds, *self.strangers.values())

    @property
    def ended(self) -> AllocationEnded:
        return AllocationEnded(self.request.allocation_id)


@pytest.fixture
def stage(service: LinuxBackend, allocation_id: str) -> Iterator[Stage]:
    with ExitStack() as stack:

        def keep(fd: int) -> int:
            return stack.enter_context(Descriptor(fd)).fileno()

        reader, writer = map(keep, os.pipe())
        strangers = {
            "uts": keep(os.open("/proc/self/ns/uts", os.O_RDONLY)),
            "cgroup": keep(os.open("/proc/self/ns/cgroup", os.O_RDONLY)),
            "own net": keep(os.open("/proc/self/ns/net", os.O_RDONLY)),
            "own mount": keep(os.open("/proc/self/ns/mnt", os.O_RDONLY)),
            "own pid": keep(os.open("/proc/self/ns/pid", os.O_RDONLY)),
            "file": keep(os.open(__file__, os.O_RDONLY)),
            "directory": keep(os.open("/proc/self/ns", os.O_RDONLY)),
            "memfd": keep(os.memfd_create("nshandoff-Pid-1")),
            "pipe": reader,
            "pipe's end": writer,
            "socket": stack.enter_context(socket.socket()).fileno(),
            "pidfd": keep(os.pidfd_open(os.getpid())),
        }
        bundle = stack.enter_context(service.bundle_of(TRUTH))
        request = NamespaceRequest(allocation_id, ALL)
        honest = NamespaceResponse(allocation_id, ALL)
        yield Stage(request, honest, bundle.filenos(), strangers)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__.lower())
def new_consumer(request: pytest.FixtureRequest, path: Path) -> Iterator[NewConsumer]:
    form: Form = request.param
    with ExitStack() as stack:

        def new(**options: Any) -> Any:
            inspector = KernelInspector(Features.probe())
            return stack.enter_context(closing(form(path, inspector, **options)))

        yield new


Lie: TypeAlias = Callable[[Stage, Line], None]
"""What is said after a request was heard."""

LIES: Final[dict[str, tuple[Lie, str]]] = {}
"""Each with what the reason must say. The connection is closed at once, with that reason."""


def lie(name: str, reason: str) -> Callable[[Lie], Lie]:
    def enter(tell: Lie) -> Lie:
        LIES[name] = (tell, reason)
        return tell

    return enter


@lie("swapped", "descriptor 1 of 3, announced as Pid, is a Net namespace")
def _(stage: Stage, line: Line) -> None:
    pid, net, mount = stage.fds
    line.say(stage.honest, (net, pid, mount))


@lie("one missing", "announces 3 descriptors and came with 2")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.honest, stage.fds[:2])


@lie("one too many", "descriptors were cut off: more than 3")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.honest, (*stage.fds, stage.fds[0]))


@lie("hundreds", "descriptors were cut off: more than 3")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.honest, stage.fds * 84)


@lie("none", "announces 3 descriptors and came with 0")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.honest)


@lie("one twice", "descriptor 2 of 3, announced as Net, is a Pid namespace")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.honest, (stage.fds[0], stage.fds[0], stage.fds[2]))


def _substitute(name: str, position: int, reason: str) -> None:
    @lie(f"{name} for {ALL[position].value}", reason)
    def _(stage: Stage, line: Line) -> None:
        fds = list(stage.fds)
        fds[position] = stage.strangers[name]
        line.say(stage.honest, fds)


for _name in ("uts", "cgroup"):
    _substitute(_name, 2, "announced as Mount, cannot be used: it is a namespace of another type")
for _name in ("file", "directory", "memfd", "pipe", "pipe's end", "socket", "pidfd"):
    _substitute(_name, 0, "announced as Pid, cannot be used: it is no namespace")
for _position, _name in enumerate(("own pid", "own net", "own mount")):
    _substitute(_name, _position, "is the receiver's own namespace")


@lie("descriptors after the frame", "announces 3 descriptors and came with 0")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.frame)
    line.say(b"\0", stage.fds)


@lie("descriptors with a frame before", "AllocationEnded announces 0 descriptors and came with 3")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.ended, stage.fds)
    line.say(stage.honest)


@lie("descriptors with an error", "CreationFailed announces 0 descriptors and came with 3")
def _(stage: Stage, line: Line) -> None:
    line.say(CreationFailed("no"), stage.fds)


@lie("descriptors twice", "descriptors came twice with one frame")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.frame[:5], stage.fds)
    line.say(stage.frame[5:], stage.fds)


@lie("a length just over the limit", f"announces {FRAME_BYTES_MAX + 1} bytes")
def _(stage: Stage, line: Line) -> None:
    line.say((FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"\x81", stage.fds)


@lie("the longest length", "announces 4294967295 bytes")
def _(stage: Stage, line: Line) -> None:
    line.say(b"\xff\xff\xff\xff", stage.fds)


@lie("a length of zero", "announces 0 bytes")
def _(stage: Stage, line: Line) -> None:
    line.say(b"\0\0\0\0", stage.fds)


@lie("garbage", "the body is not readable")
def _(stage: Stage, line: Line) -> None:
    line.say(b"\0\0\0\x04\xc1\xff\xc1\xff", stage.fds)


@lie("not a map", "the body must be a map of one entry")
def _(stage: Stage, line: Line) -> None:
    line.say(b"\0\0\0\x01\x2a", stage.fds)


@lie("bytes after the message", "more bytes follow the message")
def _(stage: Stage, line: Line) -> None:
    body = stage.frame[4:] + b"\xc0"
    line.say(len(body).to_bytes(4, "big") + body, stage.fds)


@lie("another allocation's", "the response is for 'other', not 'nsh-test-")
def _(stage: Stage, line: Line) -> None:
    line.say(replace(stage.honest, allocation_id="other"), stage.fds)


@lie("another allocation's, endless", "the response is for 'xxxx")
def _(stage: Stage, line: Line) -> None:
    line.say(replace(stage.honest, allocation_id="x" * 65_000), stage.fds)


@lie("another order", "fd_types is ['Mount', 'Net', 'Pid'], not ['Pid', 'Net', 'Mount']")
def _(stage: Stage, line: Line) -> None:
    line.say(replace(stage.honest, fd_types=ALL[::-1]), stage.fds[::-1])


@lie("fewer types", "fd_types is ['Pid', 'Net'], not")
def _(stage: Stage, line: Line) -> None:
    line.say(replace(stage.honest, fd_types=(PID, NET)), stage.fds[:2])


@lie("one type twice", "fd_types is ['Pid', 'Net', 'Net'], not")
def _(stage: Stage, line: Line) -> None:
    pid, net, _ = stage.fds
    line.say(replace(stage.honest, fd_types=(PID, NET, NET)), (pid, net, net))


@lie("a mount path that nobody asked for", "uenv_mount_path must be there exactly if")
def _(stage: Stage, line: Line) -> None:
    line.say(replace(stage.honest, uenv_mount_path="/"), stage.fds)


@lie("a request", "NamespaceRequest is not for the consumer")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.request)


@lie("the end of another", "AllocationEnded for 'other', which was never asked for")
def _(stage: Stage, line: Line) -> None:
    line.say(AllocationEnded("other"))


@lie("the end of another, endless", "AllocationEnded for '\\x01\\x01")
def _(stage: Stage, line: Line) -> None:
    # Quoted it would be four times as long, and fit into no frame.
    line.say(AllocationEnded("\1" * 65_000))


@lie("the end before the answer", "EndAnnounced is not possible while")
def _(stage: Stage, line: Line) -> None:
    line.say(stage.ended)
    line.say(stage.honest, stage.fds)


@lie("ends without end", "AllocationEnded for 'other', which was never asked for")
def _(stage: Stage, line: Line) -> None:
    while True:
        line.say(AllocationEnded("other"))


lies = pytest.mark.parametrize(("tell", "reason"), LIES.values(), ids=LIES.keys())


def scripted(stage: Stage, tell: Lie) -> Callable[[Line], None]:
    def script(line: Line) -> None:
        line.hear()
        tell(stage, line)

    return script


@pytest.mark.clause("FD-8", "FD-9", "ERR-6")
@lies
def test_a_lie_is_caught_and_the_consumer_serves_itself(
    new_consumer: NewConsumer,
    path: Path,
    service: LinuxBackend,
    stage: Stage,
    tell: Lie,
    reason: str,
) -> None:
    with (
        Liar(path, scripted(stage, tell)),
        new_consumer(service=service).obtain(stage.request) as handoff,
    ):
        assert isinstance(handoff.fallback, FdPassing)
        assert reason in handoff.fallback.reason
        inspector = KernelInspector(Features.probe())
        lied_about = {inspector.inspect(fd) for fd in stage.fds}
        assert len(set(handoff.identities) - lied_about) == 3
        assert handoff.end()


@pytest.mark.clause("FD-10")
@lies
def test_a_lie_without_self_service_is_raised_and_leaves_no_descriptor(
    new_consumer: NewConsumer, path: Path, stage: Stage, tell: Lie, reason: str
) -> None:
    before = copies_of(stage.all_fds)
    with Liar(path, scripted(stage, tell)):
        with pytest.raises(FdPassing) as raised:
            new_consumer().obtain(stage.request)
        assert reason in raised.value.reason
        assert copies_of(stage.all_fds) == before


@pytest.mark.clause("FD-10")
@lies
def test_a_liar_hears_what_was_wrong_and_is_hung_up_on(
    path: Path, stage: Stage, tell: Lie, reason: str
) -> None:
    with Liar(path, scripted(stage, tell)) as liar:
        with pytest.raises(FdPassing) as raised:
            Consumer(path, KernelInspector(Features.probe())).obtain(stage.request)
        assert liar.told(0) == [stage.request, raised.value]


@pytest.mark.clause("SELF-8")
@lies
def test_a_liar_is_told_to_end_what_it_may_have_made(
    path: Path, stage: Stage, tell: Lie, reason: str
) -> None:
    with Liar(path, scripted(stage, tell)) as liar:
        with pytest.raises(FdPassing):
            Consumer(path, KernelInspector(Features.probe())).obtain(stage.request)
        assert liar.told(1) == [stage.ended]


def test_one_descriptor_too_many_is_noticed_below_the_limit(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def say_two(line: Line) -> None:
        line.hear()
        line.say(replace(stage.honest, fd_types=(NET,)), stage.fds[1:])

    before = copies_of(stage.all_fds)
    with Liar(path, say_two), pytest.raises(FdPassing, match=r"announces 1 .* came with 2"):
        new_consumer().obtain(replace(stage.request, namespaces=(NET,)))
    assert copies_of(stage.all_fds) == before


def test_a_mount_path_that_is_missing_is_noticed(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def leave_out(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)

    with Liar(path, leave_out), pytest.raises(FdPassing, match="uenv_mount_path must be there"):
        new_consumer().obtain(replace(stage.request, uenv_image="hello.sqfs"))


@pytest.mark.parametrize("descriptors", [1, 2, 3])
def test_descriptors_that_the_consumer_has_no_number_for_are_missed(
    path: Path, stage: Stage, descriptors: int
) -> None:
    script = """
import os, resource, sys
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine.errors import FdPassing
from statemachine.messages import NamespaceRequest, NamespaceType
from transport.request import Consumer

consumer = Consumer(sys.argv[1], KernelInspector(Features.probe()))
request = NamespaceRequest(sys.argv[2], tuple(NamespaceType))
before = os.listdir("/proc/self/fd")
limit = max(map(int, before)) + int(sys.argv[3])  # The listing's own is free again.
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
try:
    consumer.obtain(request)
except FdPassing as error:
    print(error.reason)
assert os.listdir("/proc/self/fd") == before
"""

    def answer(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)

    with Liar(path, answer):
        # One number is for the connection.
        command = [sys.executable, "-c", script, str(path), stage.request.allocation_id]
        result = subprocess.run(
            [*command, str(descriptors)], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
    assert "or the receiver has no descriptor left" in result.stdout, result.stderr
    assert result.returncode == 0, result.stderr


def test_an_answer_that_stalls_is_given_up_at_the_deadline(
    new_consumer: NewConsumer, path: Path, service: LinuxBackend, stage: Stage
) -> None:
    def stall(line: Line) -> None:
        line.hear()
        line.say(stage.frame[:-1], stage.fds)
        confirm_ends(line)

    before = copies_of(stage.fds)
    consumer = new_consumer(service=service, patience=HASTY)
    with Liar(path, stall), consumer.obtain(stage.request) as handoff:
        assert isinstance(handoff.fallback, SocketUnavailable)
        handoff.end(0.5)
        handoff.close()
        assert copies_of(stage.fds) == before


def test_a_stalled_answer_that_goes_on_as_an_end_is_no_confirmation(
    new_consumer: NewConsumer, path: Path, service: LinuxBackend, stage: Stage
) -> None:
    def stall(line: Line) -> None:
        line.hear()
        line.say(stage.frame[:-1], stage.fds)
        line.hear()
        # Read as the last byte of the answer and three more of a header, or so.
        line.say(stage.ended)

    consumer = new_consumer(service=service, patience=HASTY)
    with Liar(path, stall) as liar, consumer.obtain(stage.request) as handoff:
        assert handoff.settle()
        assert liar.told(1) == [stage.ended]
        handoff.end()


# --- Lies once the answer is there ---------------------------------------------------------------


def test_a_second_answer_is_closed_and_the_first_is_kept(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def answer_twice(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)
        line.say(stage.honest, stage.fds)

    before = copies_of(stage.fds)
    with Liar(path, answer_twice) as liar, new_consumer().obtain(stage.request) as handoff:
        assert not handoff.wait_ended(0.05)
        told = liar.told(0)
        assert [type(message) for message in told] == [NamespaceRequest, FdPassing]
        assert copies_of(stage.fds) == before + 3
        inspector = KernelInspector(Features.probe())
        assert handoff.identities == tuple(map(inspector.inspect, handoff.bundle.filenos()))


def test_a_response_is_no_confirmation_of_an_end(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def answer_ends_with_responses(line: Line) -> None:
        while line.hear() is not None:
            line.say(stage.honest, stage.fds)

    before = copies_of(stage.fds)
    with (
        Liar(path, answer_ends_with_responses),
        new_consumer(patience=Patience(answer_s=0.05, redial_s=0.01)).obtain(stage.request) as held,
    ):
        assert not held.end(0.02)
        assert not held.is_ended
        assert copies_of(stage.fds) == before + 3
        assert held.end(5.0)


@pytest.mark.parametrize(
    "error", [CreationFailed("no"), SocketUnavailable("no"), FdPassing("no")], ids=repr
)
def test_an_error_that_answers_nothing_costs_the_connection_only(
    new_consumer: NewConsumer, path: Path, stage: Stage, error: NamespaceError
) -> None:
    def err(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)
        line.say(error)

    with Liar(path, err) as liar, new_consumer().obtain(stage.request) as handoff:
        assert not handoff.wait_ended(0.05)
        liar.told(0)
        assert not handoff.bundle.closed


def test_pushes_without_end_are_one_end(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def push(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)
        while True:
            line.say(stage.ended)

    with Liar(path, push) as liar, new_consumer().obtain(stage.request) as handoff:
        assert handoff.wait_ended(5.0)
        liar.told(0)
        assert handoff.end()


def test_errors_without_end_do_not_keep_an_end_waiting(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def err(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)
        line.hear()
        while True:
            line.say(CreationFailed("no"))

    with Liar(path, err), closing(new_consumer().obtain(stage.request)) as handoff:
        assert not handoff.end(0.05)


# --- Odd, and true -----------------------------------------------------------------------------


def test_an_answer_byte_by_byte_is_an_answer(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def dribble(line: Line) -> None:
        line.hear()
        line.say(stage.frame[:1], stage.fds)
        for byte in stage.frame[1:]:
            _wait_read(line)
            line.say(bytes([byte]))

    with Liar(path, dribble), new_consumer().obtain(stage.request) as handoff:
        assert not handoff.is_degraded
        inspector = KernelInspector(Features.probe())
        assert handoff.identities == tuple(map(inspector.inspect, stage.fds))


def _wait_read(line: Line) -> None:
    """Wait until the consumer has taken in what was said, so that it gets every byte alone."""
    unread = array.array("i", [0])

    def is_read() -> bool:
        fcntl.ioctl(line.sock, termios.TIOCOUTQ, unread)
        return unread[0] == 0

    wait_until(is_read, "the reading")


def _hang_up(line: Line) -> None:
    line.hang_up()
    line.is_over.set()


@pytest.mark.parametrize(
    "leave",
    [
        _hang_up,
        lambda line: line.sock.shutdown(socket.SHUT_WR),
        lambda line: line.sock.shutdown(socket.SHUT_RD),
    ],
    ids=["closes", "stops writing", "stops reading"],
)
def test_an_answer_whose_sender_leaves_at_once_is_an_answer(
    new_consumer: NewConsumer, path: Path, stage: Stage, leave: Callable[[Line], None]
) -> None:
    def answer(line: Line) -> None:
        line.hear()
        line.say(stage.honest, stage.fds)
        leave(line)

    with Liar(path, answer), new_consumer().obtain(stage.request) as handoff:
        assert not handoff.is_degraded
        assert not handoff.wait_ended(0.02)


def test_a_provider_that_stops_writing_has_not_answered(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def stop_writing(line: Line) -> None:
        line.hear()
        line.sock.shutdown(socket.SHUT_WR)

    with Liar(path, stop_writing), pytest.raises(SocketUnavailable, match="closed the connection"):
        new_consumer().obtain(stage.request)


def test_a_provider_that_stops_reading_can_still_answer(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    def stop_reading(line: Line) -> None:
        line.hear()
        line.sock.shutdown(socket.SHUT_RD)
        line.say(stage.honest, stage.fds)

    with Liar(path, stop_reading), new_consumer().obtain(stage.request) as handoff:
        assert not handoff.is_degraded


def test_an_answer_in_the_compact_form_is_an_answer(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    name = stage.request.allocation_id.encode()
    body = (
        b"\x81\xb1NamespaceResponse\x93"
        + bytes([0xA0 | len(name)])
        + name
        + b"\x93\xa3Pid\xa3Net\xa5Mount\xc0"
    )

    def answer(line: Line) -> None:
        line.hear()
        line.say(len(body).to_bytes(4, "big") + body, stage.fds)

    with Liar(path, answer), new_consumer().obtain(stage.request) as handoff:
        assert not handoff.is_degraded


def test_every_way_to_cut_an_answer_in_two_is_an_answer(
    new_consumer: NewConsumer, path: Path, stage: Stage
) -> None:
    cuts = itertools.count(1)

    def cut(line: Line) -> None:
        line.hear()
        at = next(cuts)
        line.say(stage.frame[:at], stage.fds)
        line.say(stage.frame[at:])

    consumer = new_consumer()
    with Liar(path, *[cut] * (len(stage.frame) - 1)):
        for _ in range(len(stage.frame) - 1):
            with consumer.obtain(stage.request) as handoff:
                assert not handoff.is_degraded
