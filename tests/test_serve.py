"""The provider's driver on a real socket: in order, in time, and each pays for itself."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import select
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
from liar import Line, copies_of, frame_of, wait_until
from scarcity import descriptors_left
from serving import Serving

from linux.simulated import SimulatedBackend, SimulatedFailure, SimulatedNode, Step
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.lifecycle import AllocationState
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import WAITING_MAX, Limits
from transport.contract import Observation, Recovery, Sighting
from transport.descriptors import DescriptorBundle
from transport.endpoint import SO_PASSRIGHTS, listen
from transport.serve import Provider, Spans, peers, watch, work
from transport.serve.timers import RETRY_MAX_S, Timers

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)
CREATED, HANDED_OFF, ENDED = (
    AllocationState.CREATED,
    AllocationState.HANDED_OFF,
    AllocationState.ENDED,
)


def wanted(name: str) -> NamespaceRequest:
    return NamespaceRequest(name, ALL)


def handed(name: str) -> NamespaceResponse:
    return NamespaceResponse(name, ALL)


def ended(name: str) -> AllocationEnded:
    return AllocationEnded(name)


class Gate:
    """A hook that lets every step pass but one, which waits until it is let go."""

    def __init__(self, step: Step, *names: str) -> None:
        self._step, self._names = step, names
        self._is_open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, step: Step, name: str) -> None:
        if step is self._step and (not self._names or name in self._names):
            self.reached.set()
            assert self._is_open.wait(10)

    def let_go(self) -> None:
        self._is_open.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    with closing(SimulatedNode(frozenset({"hello.sqfs"}))) as made:
        yield made


@pytest.fixture
def backend(node: SimulatedNode) -> Iterator[SimulatedBackend]:
    with closing(SimulatedBackend(node)) as made:
        yield made


@pytest.fixture
def serving(path: Path, backend: SimulatedBackend) -> Iterator[Serving]:
    with Serving(path, backend) as made:
        yield made


@contextmanager
def served(path: Path, backend: SimulatedBackend, **options: Any) -> Iterator[Serving]:
    with closing(backend), Serving(path, backend, **options) as made:
        yield made


def hear_all(line: Line, count: int) -> list[Message | None]:
    return [line.hear() for _ in range(count)]


def is_open(line: Line) -> bool:
    """Whether the provider still answers on a connection."""
    line.say(ended("nobody"))
    return line.hear() == AllocationNotFound("nobody")


# --- Answers -----------------------------------------------------------------------------------


def test_basic_request_is_answered_with_its_descriptors(serving: Serving) -> None:
    with serving.connect() as line:
        line.say(wanted("a"))
        assert line.hear() == handed("a")
        with line.take() as bundle:
            assert bundle.types == ALL


def test_an_end_is_answered_once_everything_is_gone(serving: Serving, node: SimulatedNode) -> None:
    with serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        line.say(ended("a"))
        assert line.hear() == ended("a")
        assert node.is_clean


@pytest.mark.clause("WIRE-14")
def test_answers_come_in_the_order_of_the_questions(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR, "slow")
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(b"".join(map(frame_of, (wanted("slow"), wanted("fast"), ended("none")))))
        serving.wait_for(on.NamespacesCreated)
        gate.let_go()
        assert hear_all(line, 3) == [handed("slow"), handed("fast"), AllocationNotFound("none")]


@pytest.mark.clause("WIRE-16")
def test_descriptors_stay_with_their_answers_when_pipelined(serving: Serving) -> None:
    orders = [(PID, NET, MOUNT), (), (NET,), (MOUNT, PID)]
    with serving.connect() as line:
        for number, order in enumerate(orders):
            line.say(NamespaceRequest(f"a{number}", order))
        for order in orders:
            line.hear()
            with line.take() as bundle:
                names = [os.readlink(f"/proc/self/fd/{fd}") for fd in bundle.filenos()]
                assert [name.split("-")[1] for name in names] == [kind.value for kind in order]


@pytest.mark.clause("WIRE-15")
def test_a_push_comes_in_between_and_takes_no_answers_place(
    path: Path, node: SimulatedNode
) -> None:
    gate = node.hook = Gate(Step.ANCHOR, "slow")
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        line.say(wanted("slow"))
        assert gate.reached.wait(10)
        node.start_process("a")
        node.end_process("a")
        assert line.hear() == ended("a")
        gate.let_go()
        assert line.hear() == handed("slow")


def test_a_slow_allocation_keeps_nobody_else_waiting(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR, "slow")
    with (
        served(path, SimulatedBackend(node)) as serving,
        serving.connect() as slow,
        serving.connect() as fast,
    ):
        slow.say(wanted("slow"))
        assert gate.reached.wait(10)
        for number in range(20):
            fast.say(wanted(f"a{number}"))
            assert fast.hear() == handed(f"a{number}")
        gate.let_go()
        assert slow.hear() == handed("slow")


def test_who_asks_while_it_is_made_gets_the_same(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with (
        served(path, SimulatedBackend(node)) as serving,
        serving.connect() as first,
        serving.connect() as second,
    ):
        for line in (first, second):
            line.say(wanted("a"))
        serving.wait_for(on.RequestReceived, 2)
        gate.let_go()
        assert first.hear() == second.hear() == handed("a")
        with first.take() as one, second.take() as other:
            same = zip(one.filenos(), other.filenos(), strict=True)
            assert all(os.path.sameopenfile(*pair) for pair in same)


def test_an_end_overtakes_a_creation(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.say(ended("a"))
        serving.wait_for(on.EndReceived)
        gate.let_go()
        refusal, confirmation = hear_all(line, 2)
        assert isinstance(refusal, CreationFailed)
        assert confirmation == ended("a")
        assert node.is_clean


class Noted(SimulatedBackend):
    """Notes what is asked of it, and when a creation is over."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__(node)
        self.calls: list[str] = []

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        try:
            return super().create_namespaces(request)
        finally:
            self.calls.append(f"create {request.allocation_id}")

    def bundle_of(self, allocation_id: str) -> DescriptorBundle:
        self.calls.append(f"open {allocation_id}")
        return super().bundle_of(allocation_id)

    def record_handed_off(self, allocation_id: str) -> None:
        self.calls.append(f"record {allocation_id}")
        super().record_handed_off(allocation_id)

    def release_namespaces(self, allocation_id: str) -> None:
        self.calls.append(f"release {allocation_id}")
        super().release_namespaces(allocation_id)


def test_a_release_waits_for_the_creation_before_it(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR, "a")
    backend = Noted(node)
    with served(path, backend) as serving, serving.connect() as line, serving.connect() as other:
        line.say(wanted("a"))
        line.say(ended("a"))
        serving.wait_for(on.EndReceived)
        # Whatever was handed to the backend with the end has begun before this is done.
        other.say(wanted("b"))
        assert other.hear() == handed("b")
        gate.let_go()
        hear_all(line, 2)
    assert [call for call in backend.calls if call.endswith(" a")] == ["create a", "release a"]


def test_all_of_an_events_effects_come_before_what_they_bring_about(
    path: Path, node: SimulatedNode
) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    backend = Noted(node)
    with (
        served(path, backend) as serving,
        serving.connect() as first,
        serving.connect() as second,
    ):
        for line in (first, second):
            line.say(wanted("a"))
        serving.wait_for(on.RequestReceived, 2)
        gate.let_go()
        assert first.hear() == second.hear() == handed("a")
        serving.wait_for(on.ResponseSent, 2)
    assert backend.calls == ["create a", "open a", "open a", "record a"]


def test_an_end_is_heard_though_its_sender_takes_no_answers_any_more(
    serving: Serving, node: SimulatedNode
) -> None:
    # The repeated request is answered at once, to nobody. The end behind it counts all the same.
    with serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        line.sock.shutdown(socket.SHUT_RD)
        line.say(frame_of(wanted("a")) + frame_of(ended("a")))
    wait_until(lambda: node.is_clean, "the release")


def test_whoever_takes_no_answers_is_dropped_after_the_linger_time(
    path: Path, backend: SimulatedBackend
) -> None:
    with (
        Serving(path, backend, spans=Spans(linger_s=0.02)) as serving,
        serving.connect() as line,
    ):
        line.sock.shutdown(socket.SHUT_RD)
        line.say(ended("none"))
        serving.wait_for(on.ConnectionLost)


# --- Peers that read slowly, or send slowly -------------------------------------------------------


def test_answers_to_a_peer_that_does_not_read_wait_for_it(serving: Serving) -> None:
    questions = 4000
    with serving.connect() as line:
        sender = threading.Thread(
            target=lambda: [line.say(frame_of(ended("n" * 100)) * 40) for _ in range(100)]
        )
        sender.start()
        try:
            with serving.connect() as other:
                assert is_open(other)
            for _ in range(questions):
                assert line.hear() == AllocationNotFound("n" * 100)
        finally:
            sender.join()


def test_a_peer_that_never_reads_is_dropped_and_holds_no_descriptors(
    path: Path, backend: SimulatedBackend
) -> None:
    limits = Limits(open_per_connection=1_000_000, open_per_uid=1_000_000)
    with Serving(path, backend, limits=limits) as serving, serving.connect() as line:
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                line.say(frame_of(wanted("a")) * 10)
        serving.wait_for(on.ConnectionLost)
        line.hear_rest()
        with backend.bundle_of("a") as bundle:
            # The node's own, and the one just opened.
            assert copies_of(bundle.filenos()) == 2 * len(ALL)


@pytest.mark.clause("PEER-7")
def test_a_frame_that_does_not_become_whole_is_refused_in_time(
    path: Path, backend: SimulatedBackend
) -> None:
    with (
        Serving(path, backend, spans=Spans(partial_frame_s=0.03)) as serving,
        serving.connect() as line,
    ):
        line.say(frame_of(wanted("a"))[:-1])
        assert line.hear() == FdPassing("a frame was not whole within 0.03 s")
        assert line.hear() is None


def test_a_frame_in_pieces_is_read_as_long_as_it_is_whole_in_time(serving: Serving) -> None:
    with serving.connect() as line:
        for byte in frame_of(wanted("a")):
            line.say(bytes([byte]))
        assert line.hear() == handed("a")


def test_bytes_that_trickle_in_buy_no_more_time(path: Path, backend: SimulatedBackend) -> None:
    with (
        Serving(path, backend, spans=Spans(partial_frame_s=0.2)) as serving,
        serving.connect() as line,
    ):
        for byte in frame_of(wanted("x" * 30)):
            line.say(bytes([byte]))
            if select.select([line.sock], [], [], 0.02)[0]:
                break
        assert line.hear() == FdPassing("a frame was not whole within 0.2 s")


def test_an_idle_connection_has_no_deadline(path: Path, backend: SimulatedBackend) -> None:
    with (
        Serving(path, backend, spans=Spans(partial_frame_s=0.02)) as serving,
        serving.connect() as line,
        serving.connect() as other,
    ):
        line.say(wanted("a"))
        line.hear()
        other.say(frame_of(wanted("b"))[:-1])
        assert isinstance(other.hear(), FdPassing)
        assert is_open(line)


# --- Frames that cannot be read ----------------------------------------------------------------

UNREADABLE: Final = {
    "garbage": (b"\0\0\0\x01\xc1", "0xc1 is not MessagePack"),
    "zero length": (b"\0\0\0\0", "a frame announces 0 bytes"),
    "over the limit": (b"\0\1\0\1", "a frame announces 65537 bytes"),
    "unknown name": (b"\0\0\0\x04\x81\xa1X\xc0", "'X' is not the name of a message"),
    "not for it": (frame_of(NamespaceResponse("a", ())), "NamespaceResponse is not for the"),
    "an error": (frame_of(CreationFailed("no")), "CreationFailed is not for the provider"),
}


@pytest.mark.clause("WIRE-11")
@pytest.mark.parametrize(("frame", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_frame_is_told_what_is_wrong_and_closed(
    serving: Serving, frame: bytes, reason: str
) -> None:
    with serving.connect() as line:
        line.say(frame)
        answer = line.hear()
        assert isinstance(answer, FdPassing)
        assert reason in answer.reason
        assert line.hear() is None


@pytest.mark.parametrize(("frame", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_the_refusal_of_a_frame_waits_for_its_turn(
    path: Path, node: SimulatedNode, frame: bytes, reason: str
) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(frame_of(wanted("a")) + frame)
        serving.wait_for(on.FrameRejected)
        gate.let_go()
        assert line.hear() == handed("a")
        assert isinstance(line.hear(), FdPassing)
        assert line.hear() is None


@pytest.mark.parametrize(("frame", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_follows_an_unreadable_frame_has_no_effect(
    path: Path, node: SimulatedNode, frame: bytes, reason: str
) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(frame_of(wanted("a")) + frame + frame_of(wanted("b")))
        serving.wait_for(on.FrameRejected)
        gate.let_go()
        line.hear_rest()
        assert serving.state_of("b") is AllocationState.UNKNOWN


@pytest.mark.clause("WIRE-12")
def test_an_unreadable_frame_affects_nobody_else(serving: Serving) -> None:
    with serving.connect() as line, serving.connect() as other:
        other.say(wanted("a"))
        other.hear()
        line.say(b"\0\0\0\0")
        line.hear_rest()
        assert is_open(other)
        assert serving.state_of("a") is HANDED_OFF


@pytest.mark.clause("WIRE-13")
def test_an_error_that_fits_into_no_frame_is_shortened(path: Path, node: SimulatedNode) -> None:
    def fail(step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            raise SimulatedFailure("x" * 70_000)

    node.hook = fail
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        assert line.hear() == CreationFailed("x" * peers.ERROR_CHARACTERS_MAX)
        assert is_open(line)


@pytest.mark.clause("WIRE-13")
def test_an_error_that_is_not_unicode_is_sent_escaped(path: Path, node: SimulatedNode) -> None:
    def fail(step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            raise SimulatedFailure(f"open: ENOENT: {os.fsdecode(b'/caf%c' % 0xE9)}")

    node.hook = fail
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        answer = line.hear()
        assert isinstance(answer, CreationFailed)
        assert r"/caf\udce9" in answer.reason


def test_descriptors_are_refused_where_they_are_sent(serving: Serving) -> None:
    with serving.connect() as line, socket.socket() as some:
        try:
            line.sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
        except OSError:
            pytest.skip("kernel lacks SO_PASSRIGHTS")
        with pytest.raises(PermissionError) as raised:
            line.say(wanted("a"), [some.fileno()])
        assert raised.value.errno == errno.EPERM
        assert is_open(line)


@pytest.mark.clause("FD-11")
def test_descriptors_are_dropped_where_they_cannot_be_refused(
    path: Path, backend: SimulatedBackend
) -> None:
    with (
        Serving(path, backend, use_passrights=False) as serving,
        serving.connect() as line,
        socket.socket() as some,
    ):
        line.say(wanted("a"), [some.fileno()])
        answer = line.hear()
        assert isinstance(answer, FdPassing)
        assert "none are accepted here" in answer.reason
        assert line.hear() is None
        assert copies_of([some.fileno()]) == 1
        assert serving.state_of("a") is AllocationState.UNKNOWN


# --- Who may, and how much -----------------------------------------------------------------------


def test_a_user_who_is_not_allowed_is_told_and_has_no_effect(
    path: Path, backend: SimulatedBackend
) -> None:
    limits = Limits(allowed_uids=frozenset({54_321}))
    with Serving(path, backend, limits=limits) as serving, serving.connect() as line:
        reason = f"user {os.geteuid()} may not use this provider"
        with suppress(BrokenPipeError):
            line.say(wanted("a"))
        assert line.hear() == SocketUnavailable(reason)
        assert line.hear() is None
        assert not serving.saw(on.RequestReceived)


def refused(reason: str) -> CreationFailed:
    return CreationFailed(f"limit reached: {reason}")


def test_too_many_connections_are_refused_by_name(path: Path, backend: SimulatedBackend) -> None:
    with (
        Serving(path, backend, limits=Limits(connections_per_uid=2)) as serving,
        serving.connect() as one,
        serving.connect() as two,
        serving.connect() as three,
    ):
        assert three.hear() == refused("connections of one user, at most 2")
        assert three.hear() is None
        assert is_open(one)
        assert is_open(two)


@pytest.mark.clause("ERR-4")
def test_too_many_live_allocations_are_refused_by_name(
    path: Path, backend: SimulatedBackend
) -> None:
    with (
        Serving(path, backend, limits=Limits(allocations_per_uid=1)) as serving,
        serving.connect() as line,
    ):
        line.say(wanted("a"))
        line.say(wanted("b"))
        assert line.hear() == handed("a")
        assert line.hear() == refused("live allocations of one user, at most 1")
        line.say(ended("a"))
        assert line.hear() == ended("a")
        line.say(wanted("b"))
        assert line.hear() == handed("b")


@pytest.mark.clause("ERR-4")
def test_too_many_open_messages_of_a_connection_are_refused_by_name(
    path: Path, node: SimulatedNode
) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    limits = Limits(open_per_connection=2)
    with (
        served(path, SimulatedBackend(node), limits=limits) as serving,
        serving.connect() as line,
    ):
        for name in "abc":
            line.say(wanted(name))
        serving.wait_for(on.RequestReceived, 3)
        gate.let_go()
        assert hear_all(line, 2) == [handed("a"), handed("b")]
        assert line.hear() == refused("unanswered messages of one connection, at most 2")


@pytest.mark.clause("PEER-6")
def test_far_too_many_open_messages_close_the_connection(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    limits = Limits(open_per_connection=2)
    with (
        served(path, SimulatedBackend(node), limits=limits) as serving,
        serving.connect() as line,
        serving.connect() as other,
    ):
        line.say(b"".join(frame_of(wanted(f"a{number}")) for number in range(9)))
        refusal = line.hear()
        assert isinstance(refusal, NamespaceError)
        assert "unanswered messages of one connection" in refusal.text
        assert line.hear() is None
        assert is_open(other)
        gate.let_go()


@pytest.mark.clause("PEER-5")
def test_too_many_open_messages_of_a_user_are_refused_by_name(
    path: Path, node: SimulatedNode
) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with (
        served(path, SimulatedBackend(node), limits=Limits(open_per_uid=1)) as serving,
        serving.connect() as line,
        serving.connect() as other,
    ):
        line.say(wanted("a"))
        serving.wait_for(on.RequestReceived)
        other.say(wanted("b"))
        assert other.hear() == refused("unanswered messages of one user, at most 1")
        gate.let_go()
        assert line.hear() == handed("a")


def test_many_connections_at_once_are_all_served(path: Path, backend: SimulatedBackend) -> None:
    count = 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    try:
        with Serving(path, backend) as serving, ExitStack() as stack:
            lines = [stack.enter_context(serving.connect()) for _ in range(count)]
            for line in lines:
                line.say(wanted("a"))
            assert [line.hear() for line in lines] == [handed("a")] * count
            assert len(serving.saw(on.NamespacesCreated)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.clause("PEER-11")
def test_without_descriptors_connections_are_turned_away_and_later_served(
    serving: Serving,
) -> None:
    with ExitStack() as stack:
        waiting = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        lines = [Line(sock) for sock in waiting]
        with descriptors_left(0):
            for line in lines:
                line.sock.connect(str(serving.path))
            reason = "the provider has no file descriptor left"
            assert [line.hear() for line in lines] == [SocketUnavailable(reason)] * 3
        with serving.connect() as line:
            assert is_open(line)


# --- Before it is ready ------------------------------------------------------------------------


class Recovering(SimulatedBackend):
    """Takes as long to recover as a test wants."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__(node)
        self.may_go_on = threading.Event()

    def recover(self) -> Recovery:
        assert self.may_go_on.wait(10)
        return super().recover()


@contextmanager
def recovering(
    path: Path, node: SimulatedNode, **options: Any
) -> Iterator[tuple[Serving, Recovering]]:
    with closing(Recovering(node)) as backend:
        serving = Serving(path, backend, waits_ready=False, **options)
        try:
            with serving:
                yield serving, backend
        finally:
            backend.may_go_on.set()


def test_what_is_asked_before_it_is_ready_waits_in_order(path: Path, node: SimulatedNode) -> None:
    with recovering(path, node) as (serving, backend), ExitStack() as stack:
        lines = [stack.enter_context(serving.connect()) for _ in range(5)]
        for number, line in enumerate(lines):
            line.say(wanted(f"a{number}"))
            serving.wait_for(on.RequestReceived, number + 1)
        backend.may_go_on.set()
        assert [line.hear() for line in lines] == [handed(f"a{number}") for number in range(5)]
        ready = next(
            effects for event, effects in serving.turns if isinstance(event, on.ProviderReady)
        )
        created = [e.request.allocation_id for e in ready if hasattr(e, "request")]
        assert created == [f"a{number}" for number in range(5)]


def test_no_more_wait_before_it_is_ready_than_may(path: Path, node: SimulatedNode) -> None:
    with recovering(path, node) as (serving, backend), ExitStack() as stack:
        lines = [stack.enter_context(serving.connect()) for _ in range(3)]
        for line in lines:
            for number in range(WAITING_MAX // 2):
                line.say(wanted(f"a{number}"))
        serving.wait_for(on.RequestReceived, 3 * WAITING_MAX // 2)
        reason = f"{WAITING_MAX} messages already wait for the provider"
        backend.may_go_on.set()
        heard = [line.hear() for line in lines for _ in range(WAITING_MAX // 2)]
        assert heard.count(SocketUnavailable(reason)) == WAITING_MAX // 2


@pytest.mark.clause("LIFE-14")
def test_who_waits_too_long_for_it_to_be_ready_is_told(path: Path, node: SimulatedNode) -> None:
    with (
        recovering(path, node, spans=Spans(readiness_s=0.02)) as (serving, backend),
        serving.connect() as line,
    ):
        line.say(wanted("a"))
        line.say(ended("a"))
        reason = "the provider did not become ready in time"
        assert hear_all(line, 2) == [SocketUnavailable(reason)] * 2
        backend.may_go_on.set()
        line.say(wanted("a"))
        assert line.hear() in (handed("a"), SocketUnavailable(reason))


def test_what_an_earlier_provider_left_is_handed_over_again(
    path: Path, node: SimulatedNode
) -> None:
    with served(path, SimulatedBackend(node)) as first, first.connect() as line:
        line.say(wanted("a"))
        line.hear()
        bundle = line.take()
    with bundle, served(path, SimulatedBackend(node)) as second, second.connect() as line:
        line.say(wanted("a"))
        assert line.hear() == handed("a")
        with line.take() as again:
            same = zip(bundle.filenos(), again.filenos(), strict=True)
            assert all(os.path.sameopenfile(*pair) for pair in same)


def test_what_an_earlier_provider_ended_is_confirmed_again(path: Path, node: SimulatedNode) -> None:
    with served(path, SimulatedBackend(node)) as first, first.connect() as line:
        for message in (wanted("a"), ended("a")):
            line.say(message)
            line.hear()
    with served(path, SimulatedBackend(node)) as second, second.connect() as line:
        line.say(ended("a"))
        assert line.hear() == ended("a")


def test_a_backend_that_cannot_recover_stops_the_provider(path: Path, node: SimulatedNode) -> None:
    class Lost(SimulatedBackend):
        def recover(self) -> Recovery:
            raise RuntimeError("no journal")

    async def main() -> None:
        with closing(Lost(node)) as backend:
            await Provider(listen(path), backend).run()

    with pytest.raises(RuntimeError, match="no journal"):
        asyncio.run(main())
    assert not path.exists()


# --- Stopping ----------------------------------------------------------------------------------


def test_what_is_alive_stays_alive_when_it_stops(
    path: Path, node: SimulatedNode, backend: SimulatedBackend
) -> None:
    with Serving(path, backend) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        serving.stop()
        assert line.hear() is None
    assert node.lives["a"].is_init_alive


def test_nothing_of_it_goes_on_in_its_loop_when_it_has_stopped(
    path: Path, node: SimulatedNode, backend: SimulatedBackend
) -> None:
    faults: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        provider = Provider(listen(path), backend, spans=Spans(claim_s=0.01))
        running = loop.create_task(provider.run())
        line = await loop.run_in_executor(None, Line.to, path)
        line.say(wanted("a"))
        await loop.run_in_executor(None, line.hear)
        provider.stop()
        await running
        line.hang_up()
        await asyncio.sleep(0.05)
        assert provider.kernel.state_of("a") is HANDED_OFF

    asyncio.run(main())
    assert not faults
    assert node.lives["a"].is_init_alive


@pytest.mark.clause("CRASH-12")
def test_who_asks_while_it_stops_is_told_and_who_asked_before_is_served(
    path: Path, node: SimulatedNode
) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        assert gate.reached.wait(10)
        serving.stop()
        serving.wait_for(on.ProviderStopping)
        line.say(wanted("b"))
        serving.wait_for(on.RequestReceived, 2)
        gate.let_go()
        assert line.hear() == handed("a")
        assert line.hear() == SocketUnavailable("the provider is shutting down")
        assert line.hear() is None


def test_nobody_can_connect_to_it_while_it_stops(path: Path, node: SimulatedNode) -> None:
    gate = node.hook = Gate(Step.ANCHOR)
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        assert gate.reached.wait(10)
        serving.stop()
        serving.wait_for(on.ProviderStopping)
        with pytest.raises(FileNotFoundError):
            serving.connect()
        gate.let_go()


def test_it_stops_without_waiting_for_what_is_kept_for_a_while(
    path: Path, node: SimulatedNode
) -> None:
    is_kept = threading.Event()

    class Keeping(SimulatedBackend):
        def tidy(self) -> float | None:
            due_s = super().tidy()
            if due_s is not None:
                is_kept.set()
            return due_s

    with served(path, Keeping(node)) as serving, serving.connect() as line:
        line.say(NamespaceRequest("a", (MOUNT,), "hello.sqfs"))
        line.hear()
        line.say(ended("a"))
        line.hear()
        assert is_kept.wait(10)
        # That it is due in a minute is known now; a moment later it is waited for.
        assert is_open(line)
        serving.stop()
        serving._thread.join(1.0)
        assert not serving._thread.is_alive()


def test_it_can_be_stopped_while_it_recovers(
    path: Path, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STOP_TIMEOUT_S", 0.02)
    with recovering(path, node) as (serving, _), serving.connect() as line:
        line.say(wanted("a"))
        serving.wait_for(on.RequestReceived)
        serving.stop()
        assert line.hear() == SocketUnavailable("the provider is shutting down")
        serving.join()


def test_work_that_hangs_does_not_keep_it_from_stopping(
    path: Path, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STOP_TIMEOUT_S", 0.02)
    gate = node.hook = Gate(Step.ANCHOR)
    with served(path, SimulatedBackend(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        assert gate.reached.wait(10)
        serving.stop()
        assert line.hear() is None
        serving.join()
        gate.let_go()
        wait_until(lambda: "a" in node.lives and not _is_working(), "the end of the work")


def _is_working() -> bool:
    return any(thread.name.startswith("backend") for thread in threading.enumerate())


# --- What ends an allocation -------------------------------------------------------------------


def test_what_nobody_uses_and_nobody_claims_is_ended(path: Path, node: SimulatedNode) -> None:
    with served(path, SimulatedBackend(node), spans=Spans(claim_s=0.02)) as serving:
        with serving.connect() as line:
            line.say(wanted("a"))
            line.hear()
        serving.wait_for(on.NamespacesReleased)
        assert serving.saw(on.ClaimExpired) == [on.ClaimExpired("a")]
        assert node.is_clean


def test_what_is_used_needs_nobody_to_claim_it(path: Path, node: SimulatedNode) -> None:
    with (
        served(path, SimulatedBackend(node), spans=Spans(claim_s=0.01)) as serving,
        serving.connect() as line,
        serving.connect() as other,
    ):
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        serving.wait_for(on.ScopePopulated)
        line.hang_up()
        serving.wait_for(on.ConnectionLost)
        other.say(wanted("b"))
        other.hear()
        other.hang_up()
        serving.wait_for(on.ClaimExpired)
        assert serving.state_of("a") is HANDED_OFF


def test_a_claim_in_time_keeps_it(path: Path, node: SimulatedNode) -> None:
    with served(path, SimulatedBackend(node), spans=Spans(claim_s=60)) as serving:
        with serving.connect() as line:
            line.say(wanted("a"))
            line.hear()
        serving.wait_for(on.ConnectionLost)
        with serving.connect() as line:
            line.say(wanted("a"))
            assert line.hear() == handed("a")
            assert serving.ask(lambda: not serving.provider._timers._running)


def test_a_dead_init_ends_it(serving: Serving, node: SimulatedNode) -> None:
    with serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        node.kill_init("a")
        assert line.hear() == ended("a")


def test_an_empty_cgroup_ends_it_at_once_without_a_grace(
    serving: Serving, node: SimulatedNode
) -> None:
    with serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.end_process("a")
        assert line.hear() == ended("a")


@pytest.mark.clause("END-7")
def test_a_grace_lets_one_program_follow_another(path: Path, node: SimulatedNode) -> None:
    with (
        served(path, SimulatedBackend(node), spans=Spans(empty_grace_s=60)) as serving,
        serving.connect() as line,
    ):
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.end_process("a")
        wait_until(lambda: serving.ask(lambda: "a" in serving.provider._watcher._graces))
        node.start_process("a")
        wait_until(lambda: serving.ask(lambda: "a" not in serving.provider._watcher._graces))
        assert serving.state_of("a") is HANDED_OFF


def test_a_grace_that_passes_ends_it(path: Path, node: SimulatedNode) -> None:
    with (
        served(path, SimulatedBackend(node), spans=Spans(empty_grace_s=0.02)) as serving,
        serving.connect() as line,
    ):
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.end_process("a")
        assert line.hear() == ended("a")


def test_freezing_ends_nothing(serving: Serving, node: SimulatedNode) -> None:
    with serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.freeze("a")
        node.freeze("a", is_frozen=False)
        serving.wait_for(on.ScopePopulated, 2)
        assert serving.state_of("a") is HANDED_OFF


class Blurred(SimulatedBackend):
    """Sees that something changed, and its proof of use only when looked at again."""

    def observe(self) -> list[Observation]:
        return [Observation(seen.allocation_id, Sighting.CHANGED) for seen in super().observe()]


def test_a_change_without_proof_is_looked_at_again(path: Path, node: SimulatedNode) -> None:
    with served(path, Blurred(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.end_process("a")
        assert line.hear() == ended("a")


@pytest.mark.clause("END-4")
def test_a_change_without_use_ends_nothing(
    path: Path, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_AGAIN_S", 0.001)
    looked = threading.Event()

    class Unused(Blurred):
        def is_over(self, allocation_id: str) -> bool:
            looked.set()
            return super().is_over(allocation_id)

    with served(path, Unused(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        node.freeze("a")
        with node.lock:
            serving.provider._backend.hear(Observation("a", Sighting.CHANGED))
        assert looked.wait(10)
        assert serving.state_of("a") is HANDED_OFF


# --- Releasing ---------------------------------------------------------------------------------


@pytest.mark.clause("END-9")
def test_a_release_is_tried_until_it_is_done_and_announced_in_time(
    path: Path, node: SimulatedNode
) -> None:
    with (
        served(path, SimulatedBackend(node), spans=Spans(release_s=0.03)) as serving,
        serving.connect() as line,
        serving.connect() as other,
    ):
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.hang("a")
        line.say(ended("a"))
        assert line.hear() == ended("a")
        assert serving.state_of("a") is ENDED
        other.say(wanted("b"))
        assert other.hear() == handed("b")
        node.hang("a", 0)
        serving.wait_for(on.NamespacesReleased)
        assert "a" not in node.lives


def test_a_drain_says_what_it_waits_for(path: Path, node: SimulatedNode) -> None:
    with (
        served(path, SimulatedBackend(node), spans=Spans(release_s=0.01)) as serving,
        serving.connect() as line,
    ):
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.hang("a")
        line.say(ended("a"))
        line.hear()
        line.say(wanted("a"))
        refusal = line.hear()
        assert isinstance(refusal, CreationFailed)
        assert "1 processes do not die" in refusal.reason
        node.hang("a", 0)
        serving.wait_for(on.NamespacesReleased)


def test_the_pauses_between_tries_double_up_to_a_limit() -> None:
    timers = Timers(Spans(), lambda _: None)
    spans = [timers._span_of(Timer.RETRY, "a") for _ in range(40)]
    assert spans[:4] == [0.001, 0.002, 0.004, 0.008]
    assert spans[-1] == RETRY_MAX_S


# --- A backend with bugs -----------------------------------------------------------------------


def _broken(method: str, name: str = "bad") -> Callable[[SimulatedNode], SimulatedBackend]:
    def fail(self: SimulatedBackend, asked: Any, *rest: Any) -> Any:
        if getattr(asked, "allocation_id", asked) == name:
            raise RuntimeError("a bug")
        return getattr(SimulatedBackend, method)(self, asked, *rest)

    return type(f"Broken_{method}", (SimulatedBackend,), {method: fail})


BROKEN: Final = (
    "create_namespaces",
    "bundle_of",
    "watch",
    "record_handed_off",
    "record_ended",
    "is_over",
)


@pytest.mark.clause("ERR-7")
@pytest.mark.parametrize("method", BROKEN)
def test_a_bug_of_the_backend_costs_one_allocation(
    path: Path, node: SimulatedNode, method: str
) -> None:
    with (
        served(path, _broken(method)(node)) as serving,
        serving.connect() as line,
        serving.connect() as other,
    ):
        line.say(wanted("bad"))
        assert isinstance(line.hear(), (CreationFailed, FdPassing, NamespaceResponse))
        with suppress(KeyError):
            node.start_process("bad")
            node.end_process("bad")
        other.say(wanted("good"))
        assert other.hear() == handed("good")
        node.start_process("good")
        node.end_process("good")
        assert other.hear() == ended("good")


def test_what_cannot_be_watched_is_ended(path: Path, node: SimulatedNode) -> None:
    with served(path, _broken("watch")(node)) as serving, serving.connect() as line:
        line.say(wanted("bad"))
        assert line.hear() == handed("bad")
        assert line.hear() == ended("bad")
        assert node.is_clean


@pytest.mark.clause("FD-13")
def test_descriptors_that_cannot_be_had_are_answered_with_the_reason(
    path: Path, node: SimulatedNode
) -> None:
    with served(path, _broken("bundle_of")(node)) as serving, serving.connect() as line:
        line.say(wanted("bad"))
        assert line.hear() == FdPassing("the descriptors of bad cannot be had: a bug")
        assert serving.state_of("bad") is CREATED


def test_a_bundle_that_is_not_what_was_made_is_not_sent(path: Path, node: SimulatedNode) -> None:
    class Mixed(SimulatedBackend):
        def bundle_of(self, allocation_id: str) -> DescriptorBundle:
            with super().bundle_of(allocation_id) as bundle:
                return DescriptorBundle((NET,), [bundle[NET].duplicate()])

    with served(path, Mixed(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        answer = line.hear()
        assert isinstance(answer, FdPassing)
        assert "does not announce" in answer.reason


def test_a_release_with_a_bug_is_tried_again(path: Path, node: SimulatedNode) -> None:
    failures = iter(range(3))

    class Stubborn(SimulatedBackend):
        def release_namespaces(self, allocation_id: str) -> None:
            if next(failures, None) is not None:
                raise RuntimeError("a bug")
            super().release_namespaces(allocation_id)

    with served(path, Stubborn(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        line.say(ended("a"))
        assert line.hear() == ended("a")
        assert node.is_clean


def test_a_backend_that_cannot_observe_is_asked_again_after_a_pause(
    path: Path, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "BACKEND_PAUSE_S", 0.02)
    failures = iter(range(3))

    class Blind(SimulatedBackend):
        def observe(self) -> list[Observation]:
            if next(failures, None) is not None:
                raise RuntimeError("a bug")
            return super().observe()

    with served(path, Blind(node)) as serving, serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        node.start_process("a")
        node.end_process("a")
        assert line.hear() == ended("a")


def test_tidying_up_with_a_bug_is_tried_again(
    path: Path, node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "BACKEND_PAUSE_S", 0.01)
    tries: list[int] = []

    class Untidy(SimulatedBackend):
        def tidy(self) -> float | None:
            tries.append(1)
            if len(tries) < 3:
                raise RuntimeError("a bug")
            return super().tidy()

    with served(path, Untidy(node)) as serving, serving.connect() as line:
        wait_until(lambda: len(tries) >= 3, "the third try")
        assert is_open(line)


# --- To be seen --------------------------------------------------------------------------------


def test_an_observer_sees_every_event_in_order(serving: Serving, node: SimulatedNode) -> None:
    with serving.connect() as line:
        line.say(wanted("a"))
        line.hear()
        line.say(ended("a"))
        line.hear()
    serving.wait_for(on.ConnectionLost)
    names = [type(event).__name__ for event, _ in serving.turns]
    assert names == [
        "ProviderReady",
        "ConnectionOpened",
        "RequestReceived",
        "NamespacesCreated",
        "ResponseSent",
        "EndReceived",
        "NamespacesReleased",
        "ConnectionLost",
    ]


def test_an_idle_provider_does_not_wake_up(path: Path, backend: SimulatedBackend) -> None:
    class Counting(selectors.EpollSelector):
        rounds = 0

        def select(self, timeout: float | None = None) -> Any:
            self.rounds += 1
            return super().select(timeout)

    selector = Counting()
    loop = asyncio.SelectorEventLoop(selector)

    async def main() -> int:
        provider = Provider(listen(path), backend)
        ready = asyncio.Event()
        running = loop.create_task(provider.run(ready.set))
        await ready.wait()
        line = await loop.run_in_executor(None, Line.to, path)
        line.say(wanted("a"))
        await loop.run_in_executor(None, line.hear)
        await asyncio.sleep(0.02)
        before = selector.rounds
        await asyncio.sleep(0.2)
        rounds = selector.rounds - before
        line.hang_up()
        provider.stop()
        await running
        await loop.shutdown_default_executor()
        return rounds

    try:
        # One for the sleep itself, and one in which it is noticed.
        assert loop.run_until_complete(main()) <= 2
    finally:
        loop.close()


@pytest.mark.clause("CRASH-14")
def test_losses_come_before_what_is_said_on_later_connections(serving: Serving) -> None:
    for number in range(50):
        with serving.connect() as first:
            first.say(wanted(f"a{number}"))
        with serving.connect() as second:
            second.say(AllocationEnded(f"a{number}"))
            second.hear()
    said = [event for event, _ in serving.turns]
    ends = [event for event in said if isinstance(event, on.EndReceived)]
    assert len(ends) == 50
    for end in ends:
        lost = said.index(on.ConnectionLost(end.connection - 1, "the peer closed the connection"))
        assert lost < said.index(end)
