"""A provider that lies: each lie is caught, nothing of it stays open, and the reason names it.

The namespaces, descriptors and sockets are real. Only what is told about them is not true.
"""

from __future__ import annotations

import array
import fcntl
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from linux.backend import LinuxBackend, NodeSettings
from linux.features import Features
from linux.namespaces import KernelInspector
from statemachine.errors import CreationFailed, FdPassing, NamespaceError, SocketUnavailable
from statemachine.messages import (
    NamespaceRequest,
)
from tests.support.consumers import FORMS, Form
from tests.support.programs import run_program
from transport.descriptors import DescriptorBundle
from transport.request import Patience
from transport.testing.lies import ALL, LIES, NET, LiarSetup, Lie, after_a_request, telling
from transport.testing.peer import Liar, Line, Script, confirm_ends, copies_of, wait_until

pytestmark = pytest.mark.needs_root

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


class LiarRig(LiarSetup):
    """What a lying provider has at hand, and the consumers that it is tried on."""

    def __init__(self, form: Form, path: Path, name: str, bundle: DescriptorBundle) -> None:
        super().__init__(name, bundle)
        self.path: Final = path
        self._form = form

    def copies(self) -> int:
        """How many descriptors there are of all that can be sent."""
        return copies_of((*self.fds, *self.strangers.values()))

    def lie(self, script: Script) -> Liar:
        """Start a provider that acts so when it has heard the first request."""
        return self.stack.enter_context(Liar(self.path, after_a_request(script)))

    def consumer(self, **options: Any) -> Any:
        made = self._form(self.path, INSPECTOR, **options)
        return self.stack.enter_context(closing(made))

    def obtain(self, **options: Any) -> Any:
        return self.consumer(**options).obtain(self.request)


@pytest.fixture(params=FORMS, ids=lambda form: form.__name__.lower())
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, service: LinuxBackend, allocation_id: str
) -> Iterator[LiarRig]:
    with service.bundle_of(TRUTH) as bundle:
        made = LiarRig(request.param, tmp_path / "s", allocation_id, bundle)
        with made.stack:
            yield made


lies = pytest.mark.parametrize(("reason", "lie"), LIES.values(), ids=LIES.keys())


@pytest.mark.clause("FD-8", "FD-9", "ERR-6")
@lies
def test_a_lie_is_caught_and_the_consumer_serves_itself(
    rig: LiarRig, service: LinuxBackend, reason: str, lie: Lie
) -> None:
    rig.lie(telling(rig, lie))
    with rig.obtain(service=service) as handoff:
        assert isinstance(handoff.fallback, FdPassing)
        assert reason in handoff.fallback.reason
        assert len(set(handoff.identities) - set(map(INSPECTOR.inspect, rig.fds))) == 3
        assert handoff.end()


@pytest.mark.sample(3)
@pytest.mark.clause("FD-10", "SELF-8")
@lies
def test_a_lie_is_raised_told_to_the_liar_and_followed_by_the_end(
    rig: LiarRig, reason: str, lie: Lie
) -> None:
    before = rig.copies()
    liar = rig.lie(telling(rig, lie))
    with pytest.raises(FdPassing) as raised:
        rig.obtain()
    assert reason in raised.value.reason
    assert rig.copies() == before
    assert liar.told(0) == [rig.request, raised.value]
    assert liar.told(1) == [rig.ended]


def test_one_descriptor_too_many_is_noticed_below_the_limit(rig: LiarRig) -> None:
    before = rig.copies()
    rig.lie(lambda line: line.say(replace(rig.honest, fd_types=(NET,)), rig.fds[1:]))
    with pytest.raises(FdPassing, match=r"announces 1 .* came with 2"):
        rig.consumer().obtain(replace(rig.request, namespaces=(NET,)))
    assert rig.copies() == before


def test_a_mount_path_that_is_missing_is_noticed(rig: LiarRig) -> None:
    rig.lie(lambda line: line.say(rig.honest, rig.fds))
    with pytest.raises(FdPassing, match="uenv_mount_path must be there"):
        rig.consumer().obtain(replace(rig.request, uenv_image="hello.sqfs"))


@pytest.mark.parametrize("descriptors", [1, 2, 3])
def test_descriptors_that_the_consumer_has_no_number_for_are_missed(
    rig: LiarRig, descriptors: int
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
    words = (sys.executable, "-c", script, rig.path, rig.request.allocation_id, str(descriptors))
    result = run_program(*words)
    assert "cut off: the receiver has no descriptor left" in result.stdout, result.stderr
    assert result.returncode == 0, result.stderr


def test_an_answer_that_stalls_is_given_up_at_the_deadline(
    rig: LiarRig, service: LinuxBackend
) -> None:
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
    rig: LiarRig, service: LinuxBackend
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


def test_a_second_answer_is_closed_and_the_first_is_kept(rig: LiarRig) -> None:
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


def test_a_response_is_no_confirmation_of_an_end(rig: LiarRig) -> None:
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
    rig: LiarRig, error: NamespaceError
) -> None:
    def err(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        line.say(error)

    liar = rig.lie(err)
    with rig.obtain() as handoff:
        assert not handoff.wait_ended(0.05)
        liar.told(0)
        assert not handoff.bundle.closed


def test_pushes_without_end_are_one_end(rig: LiarRig) -> None:
    def push(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        while True:
            line.say(rig.ended)

    liar = rig.lie(push)
    with rig.obtain() as handoff:
        assert handoff.wait_ended(5.0)
        liar.told(0)
        assert handoff.end()


def test_errors_without_end_do_not_keep_an_end_waiting(rig: LiarRig) -> None:
    def err(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        line.hear()
        while True:
            line.say(CreationFailed("no"))

    rig.lie(err)
    with closing(rig.obtain()) as handoff:
        assert not handoff.end(0.05)


# --- Odd, and true -----------------------------------------------------------------------------


def test_an_answer_byte_by_byte_is_an_answer(rig: LiarRig) -> None:
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
    rig: LiarRig, leave: Callable[[Line], None]
) -> None:
    def answer(line: Line) -> None:
        line.say(rig.honest, rig.fds)
        leave(line)

    rig.lie(answer)
    with rig.obtain() as handoff:
        assert not handoff.is_degraded
        assert not handoff.wait_ended(0.02)


def test_a_provider_that_stops_writing_has_not_answered(rig: LiarRig) -> None:
    rig.lie(lambda line: line.sock.shutdown(socket.SHUT_WR))
    with pytest.raises(SocketUnavailable, match="closed the connection"):
        rig.obtain()


def test_a_provider_that_stops_reading_can_still_answer(rig: LiarRig) -> None:
    def stop_reading(line: Line) -> None:
        line.sock.shutdown(socket.SHUT_RD)
        line.say(rig.honest, rig.fds)

    rig.lie(stop_reading)
    with rig.obtain() as handoff:
        assert not handoff.is_degraded


def test_an_answer_in_the_compact_form_is_an_answer(rig: LiarRig) -> None:
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
