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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
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
from transport.descriptors import Descriptor, DescriptorBundle
from transport.framing import FRAME_BYTES_MAX
from transport.request import Patience
from transport.testing.peer import Liar, Line, Script, confirm_ends, copies_of, frame_of, wait_until

pytestmark = pytest.mark.needs_root

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)
TRUTH: Final = "truth"
ROOT: Final = Path(__file__).parents[2]
HASTY: Final = Patience(answer_s=0.1, redial_s=0.02)

INSPECTOR: Final = KernelInspector(Features.probe())


@pytest.fixture(scope="module")
def service() -> Iterator[LinuxBackend]:
    """Makes the namespaces that are lied about, and those of self-service."""
    settings = NodeSettings(cgroup2=None)
    with closing(LinuxBackend.for_self_service(settings, clock=lambda: 0.0)) as backend:
        backend.create_namespaces(NamespaceRequest(TRUTH, ALL))
        yield backend


class Rig:
    """What a lying provider has at hand, and the consumers that it is tried on."""

    def __init__(self, form: Form, path: Path, name: str, bundle: DescriptorBundle) -> None:
        self.path: Final = path
        self.request: Final = NamespaceRequest(name, ALL)
        self.honest: Final = NamespaceResponse(name, ALL)
        self.frame: Final = frame_of(self.honest)
        self.ended: Final = AllocationEnded(name)
        self.fds: Final = bundle.filenos()
        """A process, a network and a mount namespace, as asked for."""
        self.stack: Final = ExitStack()
        self._form = form

    @cached_property
    def strangers(self) -> dict[str, int]:
        """Descriptors that were not asked for."""

        def keep(fd: int) -> int:
            return self.stack.enter_context(Descriptor(fd)).fileno()

        reader, writer = map(keep, os.pipe())
        return {
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
            "socket": self.stack.enter_context(socket.socket()).fileno(),
            "pidfd": keep(os.pidfd_open(os.getpid())),
        }

    def copies(self) -> int:
        """How many descriptors there are of all that can be sent."""
        return copies_of((*self.fds, *self.strangers.values()))

    def lie(self, script: Script) -> Liar:
        """Start a provider that acts so when it has heard the first request."""

        def heard(line: Line) -> None:
            line.hear()
            script(line)

        return self.stack.enter_context(Liar(self.path, heard))

    def consumer(self, **options: Any) -> Any:
        made = self._form(self.path, INSPECTOR, **options)
        return self.stack.enter_context(closing(made))

    def obtain(self, **options: Any) -> Any:
        return self.consumer(**options).obtain(self.request)


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__.lower())
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, service: LinuxBackend, allocation_id: str
) -> Iterator[Rig]:
    with service.bundle_of(TRUTH) as bundle:
        made = Rig(request.param, tmp_path / "s", allocation_id, bundle)
        with made.stack:
            yield made


Lie: TypeAlias = Callable[[Rig], Iterable[tuple[Any, Sequence[int]]]]
"""What is sent after a request was heard: messages or bytes, each with descriptors."""


def _with(*positions: int) -> Lie:
    """The honest answer, with some of its descriptors."""
    return lambda rig: [(rig.honest, [rig.fds[position] for position in positions])]


def _substitute(name: str, position: int) -> Lie:
    def lie(rig: Rig) -> Iterable[tuple[Any, Sequence[int]]]:
        fds = list(rig.fds)
        fds[position] = rig.strangers[name]
        return [(rig.honest, fds)]

    return lie


def _changed(fds: slice, **changes: Any) -> Lie:
    """Another answer than the honest one."""
    return lambda rig: [(replace(rig.honest, **changes), rig.fds[fds])]


def _saying(what: Any, *, comes_with: bool = True) -> Lie:
    return lambda rig: [(what, rig.fds if comes_with else ())]


def _longer(rig: Rig) -> Iterable[tuple[Any, Sequence[int]]]:
    body = rig.frame[4:] + b"\xc0"
    return [(len(body).to_bytes(4, "big") + body, rig.fds)]


ANY: Final = slice(None)
OTHER: Final = AllocationEnded("other")
NO_NAMESPACE: Final = "announced as Pid, cannot be used: it is no namespace"
OF_NO_TYPE: Final = "announced as Mount, cannot be used: it is a namespace of another type"
OWN: Final = "is the receiver's own namespace"

LIES: Final[dict[str, tuple[str, Lie]]] = {
    "swapped": ("descriptor 1 of 3, announced as Pid, is a Net namespace", _with(1, 0, 2)),
    "one missing": ("announces 3 descriptors and came with 2", _with(0, 1)),
    "one too many": ("descriptors were cut off: more than 3", _with(0, 1, 2, 0)),
    "hundreds": ("descriptors were cut off: more than 3", _with(*(0, 1, 2) * 84)),
    "none": ("announces 3 descriptors and came with 0", _with()),
    "one twice": ("descriptor 2 of 3, announced as Net, is a Pid namespace", _with(0, 0, 2)),
    **{f"{name} for Mount": (OF_NO_TYPE, _substitute(name, 2)) for name in ("uts", "cgroup")},
    **{
        f"{name} for Pid": (NO_NAMESPACE, _substitute(name, 0))
        for name in ("file", "directory", "memfd", "pipe", "pipe's end", "socket", "pidfd")
    },
    "own pid": (OWN, _substitute("own pid", 0)),
    "own net": (OWN, _substitute("own net", 1)),
    "own mount": (OWN, _substitute("own mount", 2)),
    "descriptors after the frame": (
        "announces 3 descriptors and came with 0",
        lambda rig: [(rig.frame, ()), (b"\0", rig.fds)],
    ),
    "descriptors with a frame before": (
        "AllocationEnded announces 0 descriptors and came with 3",
        lambda rig: [(rig.ended, rig.fds), (rig.honest, ())],
    ),
    "descriptors with an error": (
        "CreationFailed announces 0 descriptors and came with 3",
        _saying(CreationFailed("no")),
    ),
    "descriptors twice": (
        "descriptors came twice with one frame",
        lambda rig: [(rig.frame[:5], rig.fds), (rig.frame[5:], rig.fds)],
    ),
    "a length just over the limit": (
        f"announces {FRAME_BYTES_MAX + 1} bytes",
        _saying((FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"\x81"),
    ),
    "the longest length": ("announces 4294967295 bytes", _saying(b"\xff\xff\xff\xff")),
    "a length of zero": ("announces 0 bytes", _saying(b"\0\0\0\0")),
    "garbage": ("the body is not readable", _saying(b"\0\0\0\x04\xc1\xff\xc1\xff")),
    "not a map": ("the body must be a map of one entry", _saying(b"\0\0\0\x01\x2a")),
    "bytes after the message": ("more bytes follow the message", _longer),
    "another allocation's": (
        "the response is for 'other', not 'nsh-test-",
        _changed(ANY, allocation_id="other"),
    ),
    "another allocation's, endless": (
        "the response is for 'xxxx",
        _changed(ANY, allocation_id="x" * 65_000),
    ),
    "another order": (
        "fd_types is ['Mount', 'Net', 'Pid'], not ['Pid', 'Net', 'Mount']",
        _changed(slice(None, None, -1), fd_types=ALL[::-1]),
    ),
    "fewer types": (
        "fd_types is ['Pid', 'Net'], not",
        _changed(slice(2), fd_types=(PID, NET)),
    ),
    "one type twice": (
        "fd_types is ['Pid', 'Net', 'Net'], not",
        lambda rig: [
            (replace(rig.honest, fd_types=(PID, NET, NET)), (*rig.fds[:2], rig.fds[1])),
        ],
    ),
    "a mount path that was not asked for": (
        "uenv_mount_path must be there exactly if",
        _changed(ANY, uenv_mount_path="/"),
    ),
    "a request": (
        "NamespaceRequest is not for the consumer",
        lambda rig: [(rig.request, ())],
    ),
    "the end of another": (
        "AllocationEnded for 'other', which was never asked for",
        _saying(OTHER, comes_with=False),
    ),
    # Quoted it would be four times as long, and fit into no frame.
    "the end of another, endless": (
        "AllocationEnded for '\\x01\\x01",
        _saying(AllocationEnded("\1" * 65_000), comes_with=False),
    ),
    "the end before the answer": (
        "EndAnnounced is not possible while",
        lambda rig: [(rig.ended, ()), (rig.honest, rig.fds)],
    ),
    "ends without end": (
        "AllocationEnded for 'other', which was never asked for",
        lambda rig: itertools.repeat((OTHER, ())),
    ),
}
"""Each with what the reason must say. The connection is closed at once, with that reason."""

lies = pytest.mark.parametrize(("reason", "lie"), LIES.values(), ids=LIES.keys())


def told_by(rig: Rig, lie: Lie) -> Liar:
    def script(line: Line) -> None:
        for what, fds in lie(rig):
            line.say(what, fds)

    return rig.lie(script)


@pytest.mark.clause("FD-8", "FD-9", "ERR-6")
@lies
def test_a_lie_is_caught_and_the_consumer_serves_itself(
    rig: Rig, service: LinuxBackend, reason: str, lie: Lie
) -> None:
    told_by(rig, lie)
    with rig.obtain(service=service) as handoff:
        assert isinstance(handoff.fallback, FdPassing)
        assert reason in handoff.fallback.reason
        assert len(set(handoff.identities) - set(map(INSPECTOR.inspect, rig.fds))) == 3
        assert handoff.end()


@pytest.mark.clause("FD-10", "SELF-8")
@lies
def test_a_lie_is_raised_told_to_the_liar_and_followed_by_the_end(
    rig: Rig, reason: str, lie: Lie
) -> None:
    before = rig.copies()
    liar = told_by(rig, lie)
    with pytest.raises(FdPassing) as raised:
        rig.obtain()
    assert reason in raised.value.reason
    assert rig.copies() == before
    assert liar.told(0) == [rig.request, raised.value]
    assert liar.told(1) == [rig.ended]


def test_one_descriptor_too_many_is_noticed_below_the_limit(rig: Rig) -> None:
    before = rig.copies()
    rig.lie(lambda line: line.say(replace(rig.honest, fd_types=(NET,)), rig.fds[1:]))
    with pytest.raises(FdPassing, match=r"announces 1 .* came with 2"):
        rig.consumer().obtain(replace(rig.request, namespaces=(NET,)))
    assert rig.copies() == before


def test_a_mount_path_that_is_missing_is_noticed(rig: Rig) -> None:
    rig.lie(lambda line: line.say(rig.honest, rig.fds))
    with pytest.raises(FdPassing, match="uenv_mount_path must be there"):
        rig.consumer().obtain(replace(rig.request, uenv_image="hello.sqfs"))


@pytest.mark.parametrize("descriptors", [1, 2, 3])
def test_descriptors_that_the_consumer_has_no_number_for_are_missed(
    rig: Rig, descriptors: int
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
    rig.lie(lambda line: line.say(rig.honest, rig.fds))
    # One number is for the connection.
    command = [sys.executable, "-c", script, str(rig.path), rig.request.allocation_id]
    result = subprocess.run(
        [*command, str(descriptors)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert "or the receiver has no descriptor left" in result.stdout, result.stderr
    assert result.returncode == 0, result.stderr


def test_an_answer_that_stalls_is_given_up_at_the_deadline(rig: Rig, service: LinuxBackend) -> None:
    def stall(line: Line) -> None:
        line.say(rig.frame[:-1], rig.fds)
        confirm_ends(line)

    before = rig.copies()
    rig.lie(stall)
    with rig.obtain(service=service, patience=HASTY) as handoff:
        assert isinstance(handoff.fallback, SocketUnavailable)
        handoff.end(0.5)
        handoff.close()
        assert rig.copies() == before


def test_a_stalled_answer_that_goes_on_as_an_end_is_no_confirmation(
    rig: Rig, service: LinuxBackend
) -> None:
    def stall(line: Line) -> None:
        line.say(rig.frame[:-1], rig.fds)
        line.hear()
        # Read as the last byte of the answer and three more of a header, or so.
        line.say(rig.ended)

    liar = rig.lie(stall)
    with rig.obtain(service=service, patience=HASTY) as handoff:
        assert handoff.settle()
        assert liar.told(1) == [rig.ended]
        handoff.end()


# --- Lies once the answer is there ---------------------------------------------------------------


def test_a_second_answer_is_closed_and_the_first_is_kept(rig: Rig) -> None:
    def answer_twice(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        line.say(rig.honest, rig.fds)

    before = rig.copies()
    liar = rig.lie(answer_twice)
    with rig.obtain() as handoff:
        assert not handoff.wait_ended(0.05)
        assert [type(message) for message in liar.told(0)] == [NamespaceRequest, FdPassing]
        assert rig.copies() == before + 3
        assert handoff.identities == tuple(map(INSPECTOR.inspect, handoff.bundle.filenos()))


def test_a_response_is_no_confirmation_of_an_end(rig: Rig) -> None:
    def answer_ends_with_responses(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        while line.hear() is not None:
            line.say(rig.honest, rig.fds)

    before = rig.copies()
    rig.lie(answer_ends_with_responses)
    with rig.obtain(patience=Patience(answer_s=0.05, redial_s=0.01)) as held:
        assert not held.end(0.02)
        assert not held.is_ended
        assert rig.copies() == before + 3
        assert held.end(5.0)


@pytest.mark.parametrize(
    "error", [CreationFailed("no"), SocketUnavailable("no"), FdPassing("no")], ids=repr
)
def test_an_error_that_answers_nothing_costs_the_connection_only(
    rig: Rig, error: NamespaceError
) -> None:
    def err(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        line.say(error)

    liar = rig.lie(err)
    with rig.obtain() as handoff:
        assert not handoff.wait_ended(0.05)
        liar.told(0)
        assert not handoff.bundle.closed


def test_pushes_without_end_are_one_end(rig: Rig) -> None:
    def push(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        while True:
            line.say(rig.ended)

    liar = rig.lie(push)
    with rig.obtain() as handoff:
        assert handoff.wait_ended(5.0)
        liar.told(0)
        assert handoff.end()


def test_errors_without_end_do_not_keep_an_end_waiting(rig: Rig) -> None:
    def err(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        line.hear()
        while True:
            line.say(CreationFailed("no"))

    rig.lie(err)
    with closing(rig.obtain()) as handoff:
        assert not handoff.end(0.05)


# --- Odd, and true -----------------------------------------------------------------------------


def test_an_answer_byte_by_byte_is_an_answer(rig: Rig) -> None:
    def dribble(line: Line) -> None:
        line.say(rig.frame[:1], rig.fds)
        for byte in rig.frame[1:]:
            _wait_read(line)
            line.say(bytes([byte]))

    rig.lie(dribble)
    with rig.obtain() as handoff:
        assert not handoff.is_degraded
        assert handoff.identities == tuple(map(INSPECTOR.inspect, rig.fds))


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
    rig: Rig, leave: Callable[[Line], None]
) -> None:
    def answer(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        leave(line)

    rig.lie(answer)
    with rig.obtain() as handoff:
        assert not handoff.is_degraded
        assert not handoff.wait_ended(0.02)


def test_a_provider_that_stops_writing_has_not_answered(rig: Rig) -> None:
    rig.lie(lambda line: line.sock.shutdown(socket.SHUT_WR))
    with pytest.raises(SocketUnavailable, match="closed the connection"):
        rig.obtain()


def test_a_provider_that_stops_reading_can_still_answer(rig: Rig) -> None:
    def stop_reading(line: Line) -> None:
        line.sock.shutdown(socket.SHUT_RD)
        line.say(rig.honest, rig.fds)

    rig.lie(stop_reading)
    with rig.obtain() as handoff:
        assert not handoff.is_degraded


def test_an_answer_in_the_compact_form_is_an_answer(rig: Rig) -> None:
    name = rig.request.allocation_id.encode()
    body = (
        b"\x81\xb1NamespaceResponse\x93"
        + bytes([0xA0 | len(name)])
        + name
        + b"\x93\xa3Pid\xa3Net\xa5Mount\xc0"
    )
    rig.lie(lambda line: line.say(len(body).to_bytes(4, "big") + body, rig.fds))
    with rig.obtain() as handoff:
        assert not handoff.is_degraded


def test_every_way_to_cut_an_answer_in_two_is_an_answer(rig: Rig) -> None:
    cuts = itertools.count(1)

    def cut(line: Line) -> None:
        line.hear()
        at = next(cuts)
        line.say(rig.frame[:at], rig.fds)
        line.say(rig.frame[at:])

    count = len(rig.frame) - 1
    with Liar(rig.path, *[cut] * count):
        for _ in range(count):
            with rig.obtain() as handoff:
                assert not handoff.is_degraded
