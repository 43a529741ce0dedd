"""The provider's driver on a real socket: in order, in time, and each peer pays for itself."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import resource
import select
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from linux.simulated import SimulatedBackend, SimulatedFailure, SimulatedNode
from statemachine import events as on
from statemachine.effects import Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import WAITING_MAX, Limits
from statemachine.states import AllocationState
from tests.support.scarcity import descriptors_left
from tests.support.serving import Serving
from transport.contract import Observation, Recovery, Sighting, Step
from transport.descriptors import DescriptorBundle
from transport.endpoint import SO_PASSRIGHTS, listen
from transport.serve import Provider, Spans, peers, watch, work
from transport.serve.timers import RETRY_MAX_S, Timers
from transport.testing.peer import Line, copies_of, frame_of, wait_until

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL: Final = (PID, NET, MOUNT)
CREATED, HANDED_OFF, ENDED, UNKNOWN = (
    AllocationState.CREATED,
    AllocationState.HANDED_OFF,
    AllocationState.ENDED,
    AllocationState.UNKNOWN,
)


def wanted(name: str) -> NamespaceRequest:
    return NamespaceRequest(name, ALL)


def handed(name: str) -> NamespaceResponse:
    return NamespaceResponse(name, ALL)


def ended(name: str) -> AllocationEnded:
    return AllocationEnded(name)


class StepGate:
    """A hook that lets every step pass but one, which waits until it is let go."""

    def __init__(self, step: Step, *names: str) -> None:
        self._step, self._names = step, names
        self._is_open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, step: Step, name: str) -> None:
        if step is self._step and (not self._names or name in self._names):
            self.reached.set()
            assert self._is_open.wait(10)

    def wait_reached(self) -> None:
        assert self.reached.wait(10)

    def let_go(self) -> None:
        self._is_open.set()


class Recovering(SimulatedBackend):
    """Recovers when a test lets it."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__(node)
        self._is_released = threading.Event()

    def recover(self) -> Recovery:
        assert self._is_released.wait(10)
        return super().recover()

    def let_go(self) -> None:
        self._is_released.set()


IMAGES: Final = frozenset({"hello.sqfs", *(f"h{number}.sqfs" for number in range(20))})

limits_for_us: Final = partial(Limits, frozenset({os.geteuid()}))


class Rig:
    """A simulated node, and the providers and peers that a test starts; closed after it."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path: Final = path
        self.node: Final = stack.enter_context(closing(SimulatedNode(IMAGES)))
        self._stack: Final = stack
        self.held: Final[list[StepGate | Recovering]] = []

    def serve(self, backend: Any = SimulatedBackend, **options: Any) -> Serving:
        """Start a provider on the node, with a backend of this kind."""
        made = self._stack.enter_context(closing(backend(self.node)))
        return self._stack.enter_context(Serving(self.path, made, **options))

    def serve_recovering(self, **options: Any) -> tuple[Serving, Recovering]:
        """Start a provider that is not ready before its backend is let go."""
        made = self._stack.enter_context(closing(Recovering(self.node)))
        self.held.append(made)
        serving = Serving(self.path, made, waits_ready=False, **options)
        return self._stack.enter_context(serving), made

    def connect(self) -> Line:
        return self._stack.enter_context(Line.to(self.path))

    def use(self, name: str) -> None:
        """Let a process come and go in an allocation."""
        self.node.start_process(name)
        self.node.end_process(name)

    def gate(self, *names: str, step: Step = Step.ANCHOR) -> StepGate:
        """Hold up one step, of some allocations or of all."""
        made = self.node.hook = StepGate(step, *names)
        self.held.append(made)
        return made


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with ExitStack() as stack:
        made = Rig(tmp_path / "s", stack)
        try:
            yield made
        finally:
            for each in made.held:
                each.let_go()


def hear_all(line: Line, count: int) -> list[Message | None]:
    return [line.hear() for _ in range(count)]


def is_open(line: Line) -> bool:
    """Whether the provider still answers on a connection."""
    return line.ask(ended("none")) == AllocationNotFound("none")


def is_same(one: DescriptorBundle, other: DescriptorBundle) -> bool:
    pairs = zip(one.filenos(), other.filenos(), strict=True)
    return all(os.path.sameopenfile(*pair) for pair in pairs)


# --- Answers -----------------------------------------------------------------------------------


def test_basic_request_is_answered_with_its_descriptors(rig: Rig) -> None:
    rig.serve()
    line = rig.connect()
    assert line.ask(wanted("a")) == handed("a")
    with line.take() as bundle:
        assert bundle.types == ALL


def test_an_end_is_answered_once_everything_is_gone(rig: Rig) -> None:
    rig.serve()
    line = rig.connect()
    line.ask(wanted("a"))
    assert line.ask(ended("a")) == ended("a")
    assert rig.node.is_clean


@pytest.mark.clause("WIRE-14")
def test_answers_come_in_the_order_of_the_questions(rig: Rig) -> None:
    gate = rig.gate("slow")
    serving, line = rig.serve(), rig.connect()
    line.say(b"".join(map(frame_of, (wanted("slow"), wanted("fast"), ended("none")))))
    serving.wait_for(on.NamespacesCreated)
    gate.let_go()
    assert hear_all(line, 3) == [handed("slow"), handed("fast"), AllocationNotFound("none")]


@pytest.mark.clause("WIRE-15")
def test_a_push_comes_in_between_and_takes_no_answers_place(rig: Rig) -> None:
    gate = rig.gate("slow")
    rig.serve()
    line = rig.connect()
    line.ask(wanted("a"))
    line.say(wanted("slow"))
    gate.wait_reached()
    rig.use("a")
    assert line.hear() == ended("a")
    gate.let_go()
    assert line.hear() == handed("slow")


@pytest.mark.clause("PEER-8")
@pytest.mark.parametrize("step", [Step.ANCHOR, Step.PUBLISH, Step.END_INIT])
def test_slow_work_for_one_allocation_makes_no_other_wait(rig: Rig, step: Step) -> None:
    gate = rig.gate("slow", step=step)
    rig.serve()
    slow, fast = rig.connect(), rig.connect()
    slow.say(wanted("slow"))
    expected: Message = handed("slow")
    if step is Step.END_INIT:
        assert slow.hear() == expected
        slow.say(expected := ended("slow"))
    gate.wait_reached()
    for number in range(20):
        assert fast.ask(wanted(f"a{number}")) == handed(f"a{number}")
    gate.let_go()
    assert slow.hear() == expected


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


def test_a_release_waits_for_the_creation_before_it(rig: Rig) -> None:
    gate = rig.gate("a")
    serving, line, other = rig.serve(Noted), rig.connect(), rig.connect()
    line.say(wanted("a"))
    line.say(ended("a"))
    serving.wait_for(on.EndReceived)
    # Whatever was handed to the backend with the end has begun before this is done.
    assert other.ask(wanted("b")) == handed("b")
    gate.let_go()
    refusal, confirmation = hear_all(line, 2)
    assert isinstance(refusal, CreationFailed)
    assert confirmation == ended("a")
    calls = serving.provider._backend.calls
    assert [call for call in calls if call.endswith(" a")] == ["create a", "release a"]


def test_all_of_an_events_effects_come_before_what_they_bring_about(rig: Rig) -> None:
    gate = rig.gate()
    serving, lines = rig.serve(Noted), [rig.connect(), rig.connect()]
    for line in lines:
        line.say(wanted("a"))
    serving.wait_for(on.RequestReceived, 2)
    gate.let_go()
    assert [line.hear() for line in lines] == [handed("a")] * 2
    serving.wait_for(on.ResponseSent, 2)
    assert serving.provider._backend.calls == ["create a", "open a", "open a", "record a"]


def test_an_end_counts_though_its_sender_takes_no_answers_any_more(rig: Rig) -> None:
    # The repeated request is answered at once, in vain. The end behind it counts all the same.
    rig.serve()
    line = rig.connect()
    line.ask(wanted("a"))
    line.sock.shutdown(socket.SHUT_RD)
    line.say(frame_of(wanted("a")) + frame_of(ended("a")))
    wait_until(lambda: rig.node.is_clean, "the release")


def test_a_peer_that_takes_no_answers_is_dropped_after_the_linger_time(rig: Rig) -> None:
    serving, line = rig.serve(spans=Spans(linger_s=0.02)), rig.connect()
    line.sock.shutdown(socket.SHUT_RD)
    line.say(ended("none"))
    serving.wait_for(on.ConnectionLost)


# --- Peers that read slowly, or send slowly -------------------------------------------------------


@pytest.mark.clause("PEER-8")
def test_answers_to_a_peer_that_does_not_read_wait_for_it(rig: Rig) -> None:
    rig.serve()
    line, questions = rig.connect(), 4000
    sender = threading.Thread(
        target=lambda: [line.say(frame_of(ended("n" * 100)) * 40) for _ in range(100)]
    )
    sender.start()
    try:
        assert is_open(rig.connect())
        assert hear_all(line, questions) == [AllocationNotFound("n" * 100)] * questions
    finally:
        sender.join()


def test_a_peer_that_never_reads_is_dropped_and_holds_no_descriptors(rig: Rig) -> None:
    limits = limits_for_us(open_per_connection=1_000_000, open_per_uid=1_000_000)
    serving, line = rig.serve(limits=limits, spans=Spans(unread_s=0.1)), rig.connect()
    with suppress(BrokenPipeError, ConnectionResetError):
        while True:
            line.say(frame_of(wanted("a")) * 10)
    serving.wait_for(on.ConnectionLost)
    line.hear_rest()
    with serving.provider._backend.bundle_of("a") as bundle:
        # The node's own, and the one just opened.
        assert copies_of(bundle.filenos()) == 2 * len(ALL)


@pytest.mark.clause("PEER-7")
def test_a_frame_that_does_not_become_whole_is_refused_in_time(rig: Rig) -> None:
    rig.serve(spans=Spans(partial_frame_s=0.03))
    line, idle = rig.connect(), rig.connect()
    idle.ask(wanted("a"))
    line.say(frame_of(wanted("b"))[:-1])
    assert line.hear() == FdPassing("a frame was not whole within 0.03 s")
    assert line.hear() is None
    # Where no frame has begun, there is no deadline.
    assert is_open(idle)


def test_bytes_that_trickle_in_buy_no_more_time(rig: Rig) -> None:
    rig.serve(spans=Spans(partial_frame_s=0.2))
    line = rig.connect()
    for byte in frame_of(wanted("x" * 30)):
        line.say(bytes([byte]))
        if select.select([line.sock], [], [], 0.02)[0]:
            break
    assert line.hear() == FdPassing("a frame was not whole within 0.2 s")


# --- Frames that cannot be read ----------------------------------------------------------------

UNREADABLE: Final = {
    "garbage": (b"\0\0\0\x01\xc1", "0xc1 is not MessagePack"),
    "not for it": (frame_of(NamespaceResponse("a", ())), "NamespaceResponse is not for the"),
}


@pytest.mark.clause("WIRE-11", "WIRE-12")
@pytest.mark.parametrize(("frame", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_frame_is_refused_in_its_turn_and_is_the_last(
    rig: Rig, frame: bytes, reason: str
) -> None:
    gate = rig.gate("a")
    serving, line, other = rig.serve(), rig.connect(), rig.connect()
    other.ask(wanted("other"))
    line.say(frame_of(wanted("a")) + frame + frame_of(wanted("b")))
    serving.wait_for(on.FrameRejected)
    gate.let_go()
    answer, refusal = hear_all(line, 2)
    assert answer == handed("a")
    assert isinstance(refusal, FdPassing)
    assert reason in refusal.reason
    line.hear_rest()
    assert serving.state_of("b") is UNKNOWN
    assert is_open(other)
    assert serving.state_of("other") is HANDED_OFF


@pytest.mark.clause("WIRE-13")
@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("x" * 70_000, f"{Step.ANCHOR.value}: {'x' * 70_000}"[: peers.ERROR_CHARACTERS_MAX]),
        (f"open: ENOENT: {os.fsdecode(b'/caf%c' % 0xE9)}", r"open: ENOENT: /caf\udce9"),
    ],
    ids=["fits into no frame", "is not Unicode"],
)
def test_an_error_that_cannot_be_sent_as_it_is_is_sent_all_the_same(
    rig: Rig, text: str, sent: str
) -> None:
    def fail(step: Step, name: str) -> None:
        if step is Step.ANCHOR:
            raise SimulatedFailure(text)

    rig.node.hook = fail
    rig.serve()
    line = rig.connect()
    answer = line.ask(wanted("a"))
    assert isinstance(answer, CreationFailed)
    assert answer.reason.endswith(sent)
    assert is_open(line)


def test_descriptors_are_refused_where_they_are_sent(rig: Rig) -> None:
    rig.serve()
    line = rig.connect()
    try:
        line.sock.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
    except OSError:
        pytest.skip("kernel lacks SO_PASSRIGHTS")
    with socket.socket() as some, pytest.raises(PermissionError) as raised:
        line.say(wanted("a"), [some.fileno()])
    assert raised.value.errno == errno.EPERM
    assert is_open(line)


@pytest.mark.clause("FD-11")
def test_descriptors_are_dropped_where_they_cannot_be_refused(rig: Rig) -> None:
    serving, line = rig.serve(use_passrights=False), rig.connect()
    with socket.socket() as some:
        line.say(wanted("a"), [some.fileno()])
        answer = line.hear()
        assert isinstance(answer, FdPassing)
        assert "none are accepted here" in answer.reason
        assert line.hear() is None
        assert copies_of([some.fileno()]) == 1
    assert serving.state_of("a") is UNKNOWN


# --- Who may, and how much -----------------------------------------------------------------------


@pytest.mark.clause("PEER-2")
def test_a_user_who_is_not_allowed_is_told_and_has_no_effect(rig: Rig) -> None:
    limits = Limits(allowed_uids=frozenset({54_321}))
    serving, line = rig.serve(limits=limits), rig.connect()
    with suppress(BrokenPipeError):
        line.say(wanted("a"))
    assert line.hear() == SocketUnavailable(f"user {os.geteuid()} may not use this provider")
    assert line.hear() is None
    assert not serving.saw(on.RequestReceived)


def refused(reason: str) -> CreationFailed:
    return CreationFailed(f"limit reached: {reason}")


@pytest.mark.clause("PEER-4")
def test_too_many_connections_are_refused_by_name(rig: Rig) -> None:
    rig.serve(limits=limits_for_us(connections_per_uid=2))
    one, two, three = rig.connect(), rig.connect(), rig.connect()
    assert three.hear() == refused("connections of one user, at most 2")
    assert three.hear() is None
    assert is_open(one)
    assert is_open(two)


@pytest.mark.clause("PEER-4")
def test_a_connection_that_its_user_has_closed_does_not_count(rig: Rig) -> None:
    rig.serve(limits=limits_for_us(connections_per_uid=2))
    lines = [rig.connect(), rig.connect()]
    for number in range(200):
        lines[number].say(ended("never"))  # it is read late, if ever
        lines[number].hang_up()
        lines.append(rig.connect())
        assert lines[-1].ask(ended("never")) == AllocationNotFound("never")


@pytest.mark.clause("ERR-4", "PEER-4")
def test_too_many_live_allocations_are_refused_by_name(rig: Rig) -> None:
    rig.serve(limits=limits_for_us(allocations_per_uid=1))
    line = rig.connect()
    line.say(wanted("a"))
    line.say(wanted("b"))
    assert line.hear() == handed("a")
    assert line.hear() == refused("live allocations of one user, at most 1")
    assert line.ask(ended("a")) == ended("a")
    assert line.ask(wanted("b")) == handed("b")


@pytest.mark.clause("ERR-4", "PEER-4")
def test_too_many_open_messages_of_a_connection_are_refused_by_name(rig: Rig) -> None:
    gate = rig.gate()
    serving, line = rig.serve(limits=limits_for_us(open_per_connection=2)), rig.connect()
    for name in "abc":
        line.say(wanted(name))
    serving.wait_for(on.RequestReceived, 3)
    gate.let_go()
    assert hear_all(line, 2) == [handed("a"), handed("b")]
    assert line.hear() == refused("unanswered messages of one connection, at most 2")


@pytest.mark.clause("PEER-6")
def test_far_too_many_open_messages_close_the_connection(rig: Rig) -> None:
    rig.gate()
    rig.serve(limits=limits_for_us(open_per_connection=2))
    line, other = rig.connect(), rig.connect()
    refusal = line.ask(b"".join(frame_of(wanted(f"a{number}")) for number in range(9)))
    assert isinstance(refusal, NamespaceError)
    assert "unanswered messages of one connection" in refusal.text
    assert line.hear() is None
    assert is_open(other)


@pytest.mark.clause("PEER-5")
def test_too_many_open_messages_of_a_user_are_refused_by_name(rig: Rig) -> None:
    gate = rig.gate()
    serving = rig.serve(limits=limits_for_us(open_per_uid=1))
    line, other = rig.connect(), rig.connect()
    line.say(wanted("a"))
    serving.wait_for(on.RequestReceived)
    assert other.ask(wanted("b")) == refused("unanswered messages of one user, at most 1")
    gate.let_go()
    assert line.hear() == handed("a")


def test_many_connections_at_once_are_all_served(rig: Rig) -> None:
    count = 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    try:
        serving, lines = rig.serve(), [rig.connect() for _ in range(count)]
        for line in lines:
            line.say(wanted("a"))
        assert [line.hear() for line in lines] == [handed("a")] * count
        assert len(serving.saw(on.NamespacesCreated)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.clause("PEER-11")
def test_without_descriptors_connections_are_turned_away_and_later_served(rig: Rig) -> None:
    serving = rig.serve()
    with ExitStack() as stack:
        waiting = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3)]
        lines = [Line(sock) for sock in waiting]
        with descriptors_left(0):
            for line in lines:
                line.sock.connect(str(serving.path))
            reason = "the provider has no file descriptor left"
            assert [line.hear() for line in lines] == [SocketUnavailable(reason)] * 3
        assert is_open(rig.connect())


# --- Before it is ready ------------------------------------------------------------------------


@pytest.mark.clause("LIFE-13")
def test_what_is_asked_before_it_is_ready_waits_in_order(rig: Rig) -> None:
    serving, backend = rig.serve_recovering()
    lines = [rig.connect() for _ in range(5)]
    for number, line in enumerate(lines):
        line.say(wanted(f"a{number}"))
        serving.wait_for(on.RequestReceived, number + 1)
    backend.let_go()
    assert [line.hear() for line in lines] == [handed(f"a{number}") for number in range(5)]
    ready = next(effects for event, effects in serving.turns if isinstance(event, on.ProviderReady))
    created = [e.request.allocation_id for e in ready if hasattr(e, "request")]
    assert created == [f"a{number}" for number in range(5)]


def test_no_more_wait_before_it_is_ready_than_may(rig: Rig) -> None:
    serving, backend = rig.serve_recovering()
    lines = [rig.connect() for _ in range(3)]
    for line in lines:
        for number in range(WAITING_MAX // 2):
            line.say(wanted(f"a{number}"))
    serving.wait_for(on.RequestReceived, 3 * WAITING_MAX // 2)
    backend.let_go()
    heard = [line.hear() for line in lines for _ in range(WAITING_MAX // 2)]
    reason = f"{WAITING_MAX} messages already wait for the provider"
    assert heard.count(SocketUnavailable(reason)) == WAITING_MAX // 2


@pytest.mark.clause("LIFE-14")
def test_what_waits_too_long_for_it_to_be_ready_is_told(rig: Rig) -> None:
    _, backend = rig.serve_recovering(spans=Spans(readiness_s=0.02))
    line = rig.connect()
    line.say(wanted("a"))
    line.say(ended("a"))
    late = SocketUnavailable("the provider did not become ready in time")
    assert hear_all(line, 2) == [late] * 2
    backend.let_go()
    assert line.ask(wanted("a")) in (handed("a"), late)


def test_what_an_earlier_provider_left_is_handed_over_again(rig: Rig) -> None:
    first, line = rig.serve(), rig.connect()
    line.ask(wanted("a"))
    with line.take() as bundle:
        first.end()
        rig.serve()
        line = rig.connect()
        assert line.ask(wanted("a")) == handed("a")
        with line.take() as again:
            assert is_same(bundle, again)


def test_what_an_earlier_provider_ended_is_confirmed_again(rig: Rig) -> None:
    first, line = rig.serve(), rig.connect()
    line.ask(wanted("a"))
    line.ask(ended("a"))
    first.end()
    rig.serve()
    assert rig.connect().ask(ended("a")) == ended("a")


def test_a_backend_that_cannot_recover_stops_the_provider(rig: Rig) -> None:
    class Lost(SimulatedBackend):
        def recover(self) -> Recovery:
            raise RuntimeError("no journal")

    async def main() -> None:
        with closing(Lost(rig.node)) as backend:
            await Provider(listen(rig.path), backend).run()

    with pytest.raises(RuntimeError, match="no journal"):
        asyncio.run(main())
    assert not rig.path.exists()


# --- Stopping ----------------------------------------------------------------------------------


@pytest.mark.clause("CRASH-12")
def test_what_is_alive_stays_alive_when_it_stops(rig: Rig) -> None:
    serving, line = rig.serve(), rig.connect()
    line.ask(wanted("a"))
    serving.stop()
    assert line.hear() is None
    serving.join()
    assert rig.node.allocations["a"].is_init_alive


def test_nothing_of_it_goes_on_in_its_loop_when_it_has_stopped(rig: Rig) -> None:
    faults: list[object] = []

    async def main(backend: SimulatedBackend) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        provider = Provider(listen(rig.path), backend, spans=Spans(claim_s=0.01))
        running = loop.create_task(provider.run())
        line = await loop.run_in_executor(None, rig.connect)
        await loop.run_in_executor(None, line.ask, wanted("a"))
        provider.stop()
        await running
        line.hang_up()
        await asyncio.sleep(0.05)
        assert provider.kernel.state_of("a") is HANDED_OFF

    with closing(SimulatedBackend(rig.node)) as backend:
        asyncio.run(main(backend))
    assert not faults
    assert rig.node.allocations["a"].is_init_alive


@pytest.mark.clause("CRASH-12")
def test_what_was_asked_before_it_stops_is_served_and_what_is_asked_then_refused(rig: Rig) -> None:
    gate = rig.gate()
    serving, line = rig.serve(), rig.connect()
    line.say(wanted("a"))
    gate.wait_reached()
    serving.stop()
    serving.wait_for(on.ProviderStopping)
    with pytest.raises(FileNotFoundError):
        rig.connect()
    line.say(wanted("b"))
    serving.wait_for(on.RequestReceived, 2)
    gate.let_go()
    assert line.hear() == handed("a")
    assert line.hear() == SocketUnavailable("the provider is shutting down")
    assert line.hear() is None


@pytest.fixture
def keeping() -> tuple[type[SimulatedBackend], threading.Event]:
    """A backend, and what is set when it keeps something for a while."""
    is_kept = threading.Event()

    class Keeping(SimulatedBackend):
        def tidy(self) -> float | None:
            due_s = super().tidy()
            if due_s is not None:
                is_kept.set()
            return due_s

    return Keeping, is_kept


def test_it_stops_without_waiting_for_what_is_kept_for_a_while(
    rig: Rig, keeping: tuple[type[SimulatedBackend], threading.Event]
) -> None:
    backend, is_kept = keeping
    serving, line = rig.serve(backend), rig.connect()
    line.ask(NamespaceRequest("a", (MOUNT,), "hello.sqfs"))
    line.ask(ended("a"))
    assert is_kept.wait(10)
    # That it is due in a minute is known now; a moment later it is waited for.
    assert is_open(line)
    serving.stop()
    serving._thread.join(1.0)
    assert not serving._thread.is_alive()


def test_what_an_earlier_provider_mounted_is_tidied_up_after_its_end(
    rig: Rig, keeping: tuple[type[SimulatedBackend], threading.Event]
) -> None:
    with (
        closing(SimulatedBackend(rig.node)) as earlier,
        Serving(rig.path, earlier),
        Line.to(rig.path) as line,
    ):
        line.ask(NamespaceRequest("a", (MOUNT,), "hello.sqfs"))
    backend, is_kept = keeping
    rig.serve(backend)
    assert not is_kept.is_set()
    rig.connect().ask(ended("a"))
    assert is_kept.wait(10)


def test_it_can_be_stopped_while_it_recovers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "STOP_TIMEOUT_S", 0.02)
    serving, _ = rig.serve_recovering()
    line = rig.connect()
    line.say(wanted("a"))
    serving.wait_for(on.RequestReceived)
    serving.stop()
    assert line.hear() == SocketUnavailable("the provider is shutting down")
    serving.join()


def test_work_that_hangs_does_not_keep_it_from_stopping(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STOP_TIMEOUT_S", 0.02)
    gate = rig.gate()
    serving, line = rig.serve(), rig.connect()
    line.say(wanted("a"))
    gate.wait_reached()
    serving.stop()
    assert line.hear() is None
    serving.join()
    assert serving.provider.has_hung
    gate.let_go()
    wait_until(lambda: "a" in rig.node.allocations and not _is_working(), "the end of the work")


def _is_working() -> bool:
    return any(thread.name.startswith("backend") for thread in threading.enumerate())


# --- What ends an allocation -------------------------------------------------------------------


def test_what_is_neither_used_nor_claimed_is_ended(rig: Rig) -> None:
    serving, line = rig.serve(spans=Spans(claim_s=0.02)), rig.connect()
    line.ask(wanted("a"))
    line.hang_up()
    serving.wait_for(on.NamespacesReleased)
    assert serving.saw(on.ClaimExpired) == [on.ClaimExpired("a")]
    assert rig.node.is_clean


def test_what_is_used_needs_no_claim(rig: Rig) -> None:
    serving, line, other = rig.serve(spans=Spans(claim_s=0.01)), rig.connect(), rig.connect()
    line.ask(wanted("a"))
    rig.node.start_process("a")
    serving.wait_for(on.ScopePopulated)
    line.hang_up()
    serving.wait_for(on.ConnectionLost)
    other.ask(wanted("b"))
    other.hang_up()
    serving.wait_for(on.ClaimExpired)
    assert serving.state_of("a") is HANDED_OFF


def test_a_claim_in_time_keeps_it(rig: Rig) -> None:
    serving, line = rig.serve(spans=Spans(claim_s=60)), rig.connect()
    line.ask(wanted("a"))
    line.hang_up()
    serving.wait_for(on.ConnectionLost)
    assert rig.connect().ask(wanted("a")) == handed("a")
    assert serving.ask(lambda: not serving.provider._timers._running)


class Blurred(SimulatedBackend):
    """Sees that something changed, and its proof of use only when looked at again."""

    def observe(self) -> list[Observation]:
        return [Observation(seen.allocation_id, Sighting.CHANGED) for seen in super().observe()]


@pytest.mark.parametrize(
    ("happens", "backend", "grace_s"),
    [
        (lambda rig: rig.node.kill_init("a"), SimulatedBackend, 0.0),
        (lambda rig: rig.use("a"), SimulatedBackend, 0.0),
        (lambda rig: rig.use("a"), SimulatedBackend, 0.02),
        (lambda rig: rig.use("a"), Blurred, 0.0),
    ],
    ids=["a dead init", "an empty cgroup", "a grace that passes", "a change, looked at again"],
)
def test_its_end_is_seen(
    rig: Rig, happens: Callable[[Rig], None], backend: Any, grace_s: float
) -> None:
    rig.serve(backend, spans=Spans(empty_grace_s=grace_s))
    line = rig.connect()
    line.ask(wanted("a"))
    happens(rig)
    assert line.hear() == ended("a")


@pytest.mark.clause("END-7")
def test_a_grace_lets_one_program_follow_another(rig: Rig) -> None:
    serving, line = rig.serve(spans=Spans(empty_grace_s=60)), rig.connect()
    graces = serving.provider._watcher._graces
    line.ask(wanted("a"))
    rig.use("a")
    wait_until(lambda: serving.ask(lambda: "a" in graces))
    rig.node.start_process("a")
    wait_until(lambda: serving.ask(lambda: "a" not in graces))
    assert serving.state_of("a") is HANDED_OFF


def test_freezing_ends_nothing(rig: Rig) -> None:
    serving, line = rig.serve(), rig.connect()
    line.ask(wanted("a"))
    rig.node.start_process("a")
    rig.node.freeze("a")
    rig.node.freeze("a", is_frozen=False)
    serving.wait_for(on.ScopePopulated, 2)
    assert serving.state_of("a") is HANDED_OFF


@pytest.mark.clause("END-4")
def test_a_change_without_use_ends_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_AGAIN_S", 0.001)
    looked = threading.Event()

    class Unused(Blurred):
        def is_over(self, allocation_id: str) -> bool:
            looked.set()
            return super().is_over(allocation_id)

    serving, line = rig.serve(Unused), rig.connect()
    line.ask(wanted("a"))
    rig.node.freeze("a")
    with rig.node.lock:
        serving.provider._backend.notify(Observation("a", Sighting.CHANGED))
    assert looked.wait(10)
    assert serving.state_of("a") is HANDED_OFF


# --- Releasing ---------------------------------------------------------------------------------


@pytest.mark.clause("END-9")
def test_a_release_is_tried_until_it_is_done_and_announced_in_time(rig: Rig) -> None:
    serving, line, other = rig.serve(spans=Spans(release_s=0.03)), rig.connect(), rig.connect()
    line.ask(wanted("a"))
    rig.node.start_process("a")
    rig.node.hang("a")
    assert line.ask(ended("a")) == ended("a")
    assert serving.state_of("a") is ENDED
    assert other.ask(wanted("b")) == handed("b")
    refusal = line.ask(wanted("a"))
    assert isinstance(refusal, CreationFailed)
    assert "1 processes do not die" in refusal.reason
    rig.node.hang("a", 0)
    serving.wait_for(on.NamespacesReleased)
    assert "a" not in rig.node.allocations


def test_the_pauses_between_tries_double_up_to_a_limit() -> None:
    timers = Timers(Spans(), lambda _: None)
    spans = [timers._span_of(Timer.RETRY, "a") for _ in range(40)]
    assert spans[:4] == [0.001, 0.002, 0.004, 0.008]
    assert spans[-1] == RETRY_MAX_S


# --- A backend with bugs -----------------------------------------------------------------------


def _broken(method: str, times: float = float("inf")) -> type[SimulatedBackend]:
    """A backend of which one method fails, some times, for the allocation `bad` or for all."""
    failures = itertools.count()

    def fail(self: SimulatedBackend, *asked: Any) -> Any:
        is_meant = not asked or getattr(asked[0], "allocation_id", asked[0]) == "bad"
        if is_meant and next(failures) < times:
            raise RuntimeError("a bug")
        return getattr(SimulatedBackend, method)(self, *asked)

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
def test_a_bug_of_the_backend_costs_one_allocation(rig: Rig, method: str) -> None:
    rig.serve(_broken(method))
    line, other = rig.connect(), rig.connect()
    answer = line.ask(wanted("bad"))
    assert isinstance(answer, (CreationFailed, FdPassing, NamespaceResponse))
    with suppress(KeyError):
        rig.use("bad")
    assert other.ask(wanted("good")) == handed("good")
    rig.use("good")
    assert other.hear() == ended("good")


def test_what_cannot_be_watched_is_ended(rig: Rig) -> None:
    rig.serve(_broken("watch"))
    line = rig.connect()
    assert line.ask(wanted("bad")) == handed("bad")
    assert line.hear() == ended("bad")
    assert rig.node.is_clean


@pytest.mark.clause("FD-13")
def test_descriptors_that_cannot_be_had_are_answered_with_the_reason(rig: Rig) -> None:
    serving, line = rig.serve(_broken("bundle_of")), rig.connect()
    assert line.ask(wanted("bad")) == FdPassing("the descriptors of bad cannot be had: a bug")
    assert serving.state_of("bad") is CREATED


def test_a_bundle_that_is_not_what_was_made_is_not_sent(rig: Rig) -> None:
    class Mixed(SimulatedBackend):
        def bundle_of(self, allocation_id: str) -> DescriptorBundle:
            with super().bundle_of(allocation_id) as bundle:
                return DescriptorBundle((NET,), [bundle[NET].duplicate()])

    rig.serve(Mixed)
    answer = rig.connect().ask(wanted("a"))
    assert isinstance(answer, FdPassing)
    assert "does not announce" in answer.reason


def test_a_release_with_a_bug_is_tried_again(rig: Rig) -> None:
    rig.serve(_broken("release_namespaces", 3))
    line = rig.connect()
    line.ask(wanted("bad"))
    assert line.ask(ended("bad")) == ended("bad")
    assert rig.node.is_clean


def test_a_backend_that_cannot_observe_is_asked_again_after_a_pause(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "BACKEND_PAUSE_S", 0.02)
    rig.serve(_broken("observe", 3))
    line = rig.connect()
    line.ask(wanted("a"))
    rig.use("a")
    assert line.hear() == ended("a")


def test_tidying_up_with_a_bug_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "BACKEND_PAUSE_S", 0.01)
    tries: list[int] = []

    class Untidy(SimulatedBackend):
        def tidy(self) -> float | None:
            tries.append(1)
            if len(tries) < 3:
                raise RuntimeError("a bug")
            return super().tidy()

    rig.serve(Untidy)
    wait_until(lambda: len(tries) >= 3, "the third try")
    assert is_open(rig.connect())


# --- To be seen --------------------------------------------------------------------------------


def test_an_observer_sees_every_event_in_order(rig: Rig) -> None:
    serving, line = rig.serve(), rig.connect()
    line.ask(wanted("a"))
    line.ask(ended("a"))
    line.hang_up()
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


def test_a_provider_shows_what_it_is(rig: Rig) -> None:
    serving, line = rig.serve(), rig.connect()
    line.ask(wanted("a"))
    shown = f"<Provider on {rig.path}: 1 allocations, 1 connections>"
    assert serving.ask(lambda: repr(serving.provider)) == shown


def test_an_idle_provider_does_not_wake_up(rig: Rig) -> None:
    class Counting(selectors.EpollSelector):
        rounds = 0

        def select(self, timeout: float | None = None) -> Any:
            self.rounds += 1
            return super().select(timeout)

    selector = Counting()
    loop = asyncio.SelectorEventLoop(selector)

    async def main(backend: SimulatedBackend) -> int:
        provider = Provider(listen(rig.path), backend)
        ready = asyncio.Event()
        running = loop.create_task(provider.run(ready.set))
        await ready.wait()
        line = await loop.run_in_executor(None, rig.connect)
        await loop.run_in_executor(None, line.ask, wanted("a"))
        await asyncio.sleep(0.02)
        before = selector.rounds
        await asyncio.sleep(0.2)
        rounds = selector.rounds - before
        line.hang_up()
        provider.stop()
        await running
        await loop.shutdown_default_executor()
        return rounds

    with closing(SimulatedBackend(rig.node)) as backend, closing(loop):
        # One for the sleep itself, and one in which it is noticed.
        assert loop.run_until_complete(main(backend)) <= 2


@pytest.mark.clause("CRASH-14")
def test_losses_come_before_what_is_said_on_later_connections(rig: Rig) -> None:
    serving = rig.serve()
    for number in range(50):
        with Line.to(rig.path) as first:
            first.say(wanted(f"a{number}"))
        with Line.to(rig.path) as second:
            second.ask(AllocationEnded(f"a{number}"))
    said = [event for event, _ in serving.turns]
    ends = [event for event in said if isinstance(event, on.EndReceived)]
    assert len(ends) == 50
    lost = {
        event.connection: at for at, event in enumerate(said) if type(event) is on.ConnectionLost
    }
    for end in ends:
        assert lost[end.connection - 1] < said.index(end)
