"""What one peer does makes no other wait: counts and order, on a simulated node."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, Final

import pytest

from linux.simulated import SimulatedBackend, SimulatedNode
from statemachine import events as on
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    SocketUnavailable,
)
from statemachine.messages import (
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits
from statemachine.states import AllocationState
from tests.support.serving import Serving, connect_as
from tests.transport.test_serve import Rig, ended, is_open, limits_for_us, rig
from transport.contract import Step
from transport.descriptors import DescriptorBundle
from transport.serve import Spans, peers, work
from transport.testing.peer import DEADLINE_S, Line, copies_of, frame_of, wait_until

__all__ = ["rig"]

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
OTHER: Final = 54_321


def wanted(name: str, image: str | None = None) -> NamespaceRequest:
    return NamespaceRequest(name, (MOUNT,), image)


def handed(name: str) -> NamespaceResponse:
    return NamespaceResponse(name, (MOUNT,))


@contextmanager
def held_up(serving: Serving) -> Iterator[None]:
    """Meanwhile the event loop does nothing; what happens then is all there when it goes on."""
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        assert may_go_on.wait(DEADLINE_S)

    serving.loop.call_soon_threadsafe(hold)
    assert is_held.wait(DEADLINE_S)
    try:
        yield
    finally:
        may_go_on.set()


def questions(serving: Serving) -> list[int]:
    """The connections of the messages that were handled, in order."""
    kinds = (on.EndReceived, on.RequestReceived)
    return [event.connection for event, _ in tuple(serving.turns) if isinstance(event, kinds)]


# --- Messages ------------------------------------------------------------------------------------


@pytest.mark.clause("PEER-12")
def test_connections_take_turns_message_by_message(rig: Rig) -> None:
    serving, lines = rig.serve(), [rig.connect() for _ in range(3)]
    serving.wait_for(on.ConnectionOpened, 3)
    with held_up(serving):
        for line in lines[:2]:
            line.say(frame_of(ended("none")) * 200)
        lines[2].say(ended("none"))
    assert lines[2].hear() == AllocationNotFound("none")
    assert questions(serving).index(3) <= 2
    wait_until(lambda: len(questions(serving)) == 401)


@pytest.mark.needs_root
@pytest.mark.clause("PEER-12")
def test_users_take_turns_however_many_connections_one_has(rig: Rig) -> None:
    limits = Limits(frozenset({os.geteuid(), OTHER}))
    serving = rig.serve(limits=limits)
    with ExitStack() as stack:
        others = [stack.enter_context(connect_as(rig.path, OTHER)) for _ in range(10)]
        line = rig.connect()
        serving.wait_for(on.ConnectionOpened, 11)
        with held_up(serving):
            for other in others:
                other.say(frame_of(ended("none")) * 20)
            line.say(frame_of(ended("none")) * 5)
        wait_until(lambda: questions(serving).count(11) == 5)
        # One of the ten for each of ours.
        assert [n for n, c in enumerate(questions(serving)) if c == 11][-1] <= 10


def test_few_messages_are_handled_before_the_loop_looks_at_everything_else(rig: Rig) -> None:
    serving, line = rig.serve(), rig.connect()
    serving.wait_for(on.ConnectionOpened)
    handled: list[int] = []

    def look() -> None:
        handled.append(len(questions(serving)))
        if handled[-1] < 100:
            serving.loop.call_soon(look)

    with held_up(serving):
        line.say(frame_of(ended("none")) * 100)
        serving.loop.call_soon(look)
    wait_until(lambda: handled and handled[-1] == 100)
    steps = [after - before for before, after in itertools.pairwise(handled)]
    assert max(steps) <= peers.MESSAGES_PER_TURN_MAX


# --- Peers that do not read ----------------------------------------------------------------------


@pytest.mark.clause("PEER-13")
def test_who_does_not_read_is_not_read_and_dropped_in_time(rig: Rig) -> None:
    serving, line = rig.serve(spans=Spans(unread_s=0.3)), rig.connect()
    polite, sent = rig.connect(), 0
    serving.wait_for(on.ConnectionOpened, 2)
    connection = serving.provider._connections.get(1)
    assert connection is not None

    def send() -> None:
        nonlocal sent
        with suppress(OSError):
            while True:
                line.say(frame_of(ended("n" * 100)))
                sent += 1

    sender = threading.Thread(target=send)
    sender.start()
    wait_until(lambda: serving.ask(lambda: connection.is_blocked))
    # What was read and answered fits into the socket, but for one answer.
    assert serving.ask(lambda: len(connection._unsent)) <= 1
    assert is_open(polite)
    serving.wait_for(on.ConnectionLost)
    assert serving.saw(on.ConnectionLost) == [
        on.ConnectionLost(1, "the peer did not read for 0.3 s")
    ]
    sender.join()
    assert is_open(polite)


UNREAD: Final = 400
"""More answers than fit into a socket."""


def serve_unread(rig: Rig, backend: Any = SimulatedBackend) -> tuple[Serving, Line]:
    """Have a peer that has asked many times for one allocation, and read none of the answers."""
    gate = rig.gate("a")
    serving = rig.serve(backend, limits=limits_for_us(open_per_connection=2 * UNREAD))
    line = rig.connect()
    line.say(frame_of(wanted("a")) * UNREAD)
    serving.wait_for(on.RequestReceived, UNREAD)
    gate.let_go()
    serving.wait_for(on.ResponseSent, UNREAD)
    return serving, line


@pytest.mark.clause("PEER-14")
def test_descriptors_are_opened_when_there_is_room_to_send_them(rig: Rig) -> None:
    serving, line = serve_unread(rig)
    with serving.provider._backend.bundle_of("a") as bundle:
        # The node's own, and the one just opened; what is in the socket is in no process.
        assert copies_of(bundle.filenos()) == 2
    for _ in range(UNREAD):
        assert line.hear() == handed("a")
        line.take().close()


@pytest.mark.clause("PEER-14", "END-12")
@pytest.mark.parametrize("is_made_anew", [False, True])
def test_what_ends_while_it_waits_for_room_is_not_handed_over(rig: Rig, is_made_anew: bool) -> None:
    (_, line), other = serve_unread(rig), rig.connect()
    assert other.ask(ended("a")) == ended("a")
    if is_made_anew:
        assert other.ask(wanted("a")) == handed("a")
    answers = [line.hear() for _ in range(UNREAD + 1)]
    late = CreationFailed("the allocation ended before it could be handed over")
    first_late = answers.index(late)
    assert 0 < first_late < UNREAD
    assert answers == [
        *[handed("a")] * first_late,
        *[late] * (UNREAD - first_late),
        ended("a"),
    ]


def test_a_bundle_that_is_not_what_was_made_is_not_sent_when_there_is_room_either(rig: Rig) -> None:
    class Mixed(SimulatedBackend):
        is_mixed = False

        def bundle_of(self, allocation_id: str) -> DescriptorBundle:
            bundle = super().bundle_of(allocation_id)
            if not self.is_mixed:
                return bundle
            with bundle:
                return DescriptorBundle((NET,), [bundle[MOUNT].duplicate()])

    serving, line = serve_unread(rig, Mixed)
    serving.provider._backend.is_mixed = True
    *_, last = [line.hear() for _ in range(UNREAD)]
    assert isinstance(last, FdPassing)
    assert "does not announce" in last.reason


@pytest.mark.clause("PEER-9")
@pytest.mark.parametrize("limit", ["UNSENT_BYTES_PER_CONNECTION_MAX", "unsent"])
def test_more_answers_than_may_wait_cost_the_connection(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    gate = rig.gate("a")
    serving = rig.serve(limits=limits_for_us(open_per_connection=2 * UNREAD))
    if limit == "unsent":
        connections = serving.provider._connections
        serving.ask(lambda: setattr(connections, "unsent", peers.Budget(200, 10**9)))
    else:
        monkeypatch.setattr(peers, limit, 200)
    line, other = rig.connect(), rig.connect()
    line.say(frame_of(wanted("a")) * UNREAD)
    serving.wait_for(on.RequestReceived, UNREAD)
    gate.let_go()
    serving.wait_for(on.ResponseNotSent)
    serving.wait_for(on.ConnectionLost)
    assert is_open(other)


@pytest.mark.parametrize(("per_user", "in_sum"), [(100, 10_000), (10_000, 100)])
def test_a_budget_counts_for_a_user_and_in_sum(per_user: int, in_sum: int) -> None:
    budget = peers.Budget(per_user, in_sum)
    assert budget.change(0, 60)
    assert budget.change(1, 60) is (in_sum > 100)
    assert budget.change(1, -60)
    assert not budget.change(0, 60)
    assert budget.change(0, -60)


@pytest.mark.clause("PEER-9")
def test_frames_that_are_not_whole_are_limited_for_a_user(rig: Rig) -> None:
    serving = rig.serve()
    connections = serving.provider._connections
    serving.ask(lambda: setattr(connections, "unread", peers.Budget(1_000, 10**9)))
    one, two = rig.connect(), rig.connect()
    for line in (one, two):
        line.say(b"\0\0\xff\xff" + bytes(596))
    answer = two.hear()
    assert isinstance(answer, FdPassing)
    assert "not whole take up too much" in answer.reason
    two.hear_rest()
    # What the other connection took up is free again, and counted no more.
    with rig.connect() as three:
        three.say(b"\0\0\xff\xff" + bytes(300))
        wait_until(lambda: serving.ask(lambda: connections.unread._used[os.geteuid()]) == 904)


# --- Peers that have left ------------------------------------------------------------------------


@pytest.mark.clause("CRASH-14")
def test_all_that_a_lost_connection_said_comes_before_a_later_connection(rig: Rig) -> None:
    serving, first, busy = rig.serve(), rig.connect(), rig.connect()
    serving.wait_for(on.ConnectionOpened, 2)
    with held_up(serving):
        first.say(frame_of(ended("none")) * 20)
        first.hang_up()
        later = rig.connect()
        later.say(ended("none"))
        busy.say(frame_of(ended("none")) * 5)
    assert later.hear() == AllocationNotFound("none")
    said = [event for event, _ in serving.turns]
    assert questions(serving).count(1) == 20
    assert said.index(on.ConnectionLost(1, "the peer closed the connection")) < said.index(
        on.EndReceived(3, "none")
    )
    # Those that were there before do not wait for it.
    assert questions(serving).index(2) <= 1


@pytest.mark.clause("CRASH-14")
def test_connections_that_were_lost_while_they_waited_keep_the_order(rig: Rig) -> None:
    serving, first = rig.serve(), rig.connect()
    serving.wait_for(on.ConnectionOpened)
    with held_up(serving):
        first.say(frame_of(ended("none")) * 3)
        first.hang_up()
        for _ in range(3):
            with rig.connect() as line:
                line.say(frame_of(ended("none")) * 3)
        last = rig.connect()
        last.say(ended("none"))
    assert last.hear() == AllocationNotFound("none")
    assert questions(serving) == [n for n in (1, 2, 3, 4) for _ in range(3)] + [5]


@pytest.mark.clause("PEER-8", "PEER-10")
def test_who_has_left_and_reads_nothing_makes_no_later_connection_wait(rig: Rig) -> None:
    _, line = serve_unread(rig)
    line.sock.shutdown(socket.SHUT_WR)
    assert is_open(rig.connect())


@pytest.mark.clause("PEER-8", "PEER-10")
@pytest.mark.parametrize("is_lost_first", [False, True])
def test_who_has_left_and_is_read_no_more_makes_no_later_connection_wait(
    rig: Rig, is_lost_first: bool
) -> None:
    gate = rig.gate("a")
    serving, line = rig.serve(), rig.connect()
    line.say(wanted("a"))
    gate.wait_reached()
    with held_up(serving) if is_lost_first else ExitStack():
        # The refusal has to wait for its turn: for a creation that takes long.
        line.say(b"\0\0\0\0")
        if not is_lost_first:
            serving.wait_for(on.FrameRejected)
        line.hang_up()
    assert is_open(rig.connect())
    assert not serving.saw(on.NamespacesNotCreated), "it waited until the creation was given up"
    gate.let_go()


@pytest.mark.clause("PEER-6")
def test_of_what_a_lost_connection_said_no_more_counts_than_may_be_unanswered(rig: Rig) -> None:
    limits = limits_for_us(open_per_connection=4)
    serving, line = rig.serve(limits=limits), rig.connect()
    serving.wait_for(on.ConnectionOpened)
    with held_up(serving):
        line.say(frame_of(ended("none")) * 100)
        line.hang_up()
    serving.wait_for(on.ConnectionLost)
    assert len(questions(serving)) == limits.flood
    assert is_open(rig.connect())


@pytest.mark.clause("PEER-15")
def test_who_comes_and_goes_without_a_word_is_never_taken_up(rig: Rig) -> None:
    serving = rig.serve()
    with held_up(serving):
        for _ in range(100):
            rig.connect().hang_up()
        line = rig.connect()
    assert is_open(line)
    assert len(serving.saw(on.ConnectionOpened)) == 1


# --- Strangers -----------------------------------------------------------------------------------


@pytest.mark.clause("PEER-15")
def test_strangers_are_refused_before_anything_is_made_and_counted_in_one_line(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers, "REFUSALS_LOG_PAUSE_S", 0.1)
    serving = rig.serve(limits=Limits(frozenset({OTHER})))
    caplog.set_level(logging.WARNING)
    with held_up(serving):
        lines = [rig.connect() for _ in range(50)]
    refusal = SocketUnavailable(f"user {os.geteuid()} may not use this provider")
    for line in lines:
        assert line.hear() == refusal
        assert line.hear() is None

    def counts() -> list[int]:
        lines = [r for r in caplog.records if getattr(r, "event", "") == "connections_refused"]
        return [record.__dict__["fields"]["count"] for record in lines]

    wait_until(lambda: sum(counts()) == 50)
    assert counts() == [1, 49]
    assert [type(event) for event, _ in serving.turns] == [on.ProviderReady]


# --- Backend work --------------------------------------------------------------------------------


class Creations(SimulatedBackend):
    """Notes the creations in the order in which they begin."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__(node)
        self.begun: list[str] = []

    def create_namespaces(self, request: NamespaceRequest) -> NamespaceResponse:
        self.begun.append(request.allocation_id)
        return super().create_namespaces(request)


def storm(line: Line, first: int, count: int = 30) -> None:
    line.say(b"".join(frame_of(wanted(f"s{first + number}")) for number in range(count)))


@pytest.mark.clause("PEER-12")
def test_backend_work_is_shared_out_by_connection(rig: Rig) -> None:
    gate = rig.gate(*(f"s{number}" for number in range(60)))
    serving, noisy, line = rig.serve(Creations), rig.connect(), rig.connect()
    begun = serving.provider._backend.begun
    storm(noisy, 0)
    serving.wait_for(on.RequestReceived, 30)
    gate.wait_reached()
    line.say(wanted("polite"))
    serving.wait_for(on.RequestReceived, 31)
    gate.let_go()
    assert line.hear() == handed("polite")
    # After those that had begun, and one that was next.
    assert begun.index("polite") <= work.CREATORS_MAX + 1


@pytest.mark.needs_root
@pytest.mark.clause("PEER-12")
def test_backend_work_is_shared_out_by_user(rig: Rig) -> None:
    gate = rig.gate(*(f"s{number}" for number in range(300)))
    limits = Limits(frozenset({os.geteuid(), OTHER}))
    serving = rig.serve(Creations, limits=limits)
    begun = serving.provider._backend.begun
    with ExitStack() as stack:
        others = [stack.enter_context(connect_as(rig.path, OTHER)) for _ in range(10)]
        line = rig.connect()
        for number, other in enumerate(others):
            storm(other, 30 * number)
        serving.wait_for(on.RequestReceived, 300)
        gate.wait_reached()
        for name in ("one", "two", "three"):
            line.say(wanted(name))
        serving.wait_for(on.RequestReceived, 303)
        gate.let_go()
        assert [line.hear() for _ in range(3)] == [handed(x) for x in ("one", "two", "three")]
        assert begun.index("three") <= work.CREATORS_MAX + 2 * 3


@pytest.mark.clause("PEER-12")
def test_a_release_does_not_wait_for_anothers_creations(rig: Rig) -> None:
    serving, noisy, line = rig.serve(Creations), rig.connect(), rig.connect()
    line.ask(wanted("polite"))
    gate = rig.gate(*(f"s{number}" for number in range(30)))
    storm(noisy, 0)
    serving.wait_for(on.RequestReceived, 31)
    gate.wait_reached()
    assert line.ask(ended("polite")) == ended("polite")


class Releases(SimulatedBackend):
    """Refuses the first try to release each allocation; holds all tries while it is told to."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__(node)
        self.tries: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def release_namespaces(self, allocation_id: str) -> None:
        self.may_go_on.wait(DEADLINE_S)
        self.tries.append(allocation_id)
        if self.tries.count(allocation_id) > 1:
            super().release_namespaces(allocation_id)


def create(line: Line, *names: str) -> None:
    for name in names:
        assert line.ask(wanted(name)) == handed(name)


@pytest.mark.clause("PEER-12")
def test_a_creation_does_not_wait_for_releases(rig: Rig) -> None:
    """Not even for those of its own connection, which are before it."""
    serving, line = rig.serve(Releases), rig.connect()
    backend: Any = serving.provider._backend
    create(line, "s0", "s1")
    backend.may_go_on.clear()
    line.say(b"".join(map(frame_of, (ended("s0"), ended("s1"), wanted("polite")))))
    serving.wait_for(on.NamespacesCreated, 3)
    assert not backend.tries
    backend.may_go_on.set()
    assert line.hear() == ended("s0")


@pytest.mark.clause("PEER-12")
def test_another_try_to_release_is_in_the_turn_of_the_first(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transport.serve.timers.RETRY_FIRST_S", 0.5)
    serving, noisy, line = rig.serve(Releases), rig.connect(), rig.connect()
    backend: Any = serving.provider._backend
    names = [f"s{number}" for number in range(30)]
    create(noisy, *names)
    create(line, "polite")
    noisy.say(b"".join(frame_of(ended(name)) for name in names))
    wait_until(lambda: len(backend.tries) == 30)
    line.say(ended("polite"))
    wait_until(lambda: len(backend.tries) == 31)
    backend.may_go_on.clear()
    serving.wait_for(on.RetryDue, 31)
    backend.may_go_on.set()
    assert line.hear() == ended("polite")
    assert backend.tries[31:].index("polite") <= 2
    wait_until(lambda: not serving.provider._lanes)


# --- What hangs ----------------------------------------------------------------------------------

HANGING: Final = work.IMAGE_WORKERS_MAX + 3


def hang_images(rig: Rig, line: Line, count: int = HANGING) -> list[str]:
    """Ask for allocations each of which hangs at its own image, more than there are workers."""
    names = [f"h{number}" for number in range(count)]
    for name in names:
        line.say(wanted(name, f"{name}.sqfs"))
    return names


@pytest.mark.clause("PEER-16")
def test_images_that_hang_make_nothing_else_wait(rig: Rig) -> None:
    gate = rig.gate(step=Step.IMAGE)
    serving = rig.serve(spans=Spans(image_s=0.3))
    hanging, line = rig.connect(), rig.connect()
    names = hang_images(rig, hanging)
    gate.wait_reached()
    for number in range(20):
        assert line.ask(wanted(f"a{number}")) == handed(f"a{number}")
        assert line.ask(ended(f"a{number}")) == ended(f"a{number}")
    answers = [hanging.hear() for _ in names]
    reasons = [answer.reason for answer in answers if isinstance(answer, CreationFailed)]
    assert len(reasons) == HANGING
    assert all(name in reason for name, reason in zip(names, reasons, strict=True))
    assert sum("the image hangs" in reason for reason in reasons) == work.IMAGE_WORKERS_MAX
    assert sum("there was no turn" in reason for reason in reasons) == 3
    # What had not begun is over; what had is, when it comes back.
    wait_until(lambda: serving.state_of(names[-1]) is AllocationState.RELEASED)
    gate.let_go()
    wait_until(lambda: all(serving.state_of(x) is AllocationState.RELEASED for x in names))
    assert rig.node.is_clean
    assert line.ask(wanted("h0")) == handed("h0")


@pytest.mark.clause("PEER-16")
def test_one_image_that_hangs_makes_no_other_image_wait(rig: Rig) -> None:
    names = [f"h{number}" for number in range(HANGING)]
    gate = rig.gate(*names, step=Step.IMAGE)
    rig.serve()
    hanging, line = rig.connect(), rig.connect()
    for name in names:
        hanging.say(wanted(name, "h0.sqfs"))
    gate.wait_reached()
    # Turn and turn about with those that hang, so that more threads than one would be found.
    for number in range(1, work.IMAGE_WORKERS_MAX + 2):
        answer = line.ask(wanted(f"a{number}", f"h{number}.sqfs"))
        assert isinstance(answer, NamespaceResponse)
    gate.let_go()
    assert all(isinstance(hanging.hear(), NamespaceResponse) for _ in names)


def test_images_that_hang_do_not_keep_it_from_stopping(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STOP_TIMEOUT_S", 0.02)
    monkeypatch.setattr(work, "HANG_TIMEOUT_S", 0.02)
    gate = rig.gate(step=Step.IMAGE)
    serving, line = rig.serve(), rig.connect()
    hang_images(rig, line)
    gate.wait_reached()
    serving.stop()
    serving.join()
    assert serving.provider.has_hung
    gate.let_go()
    wait_until(lambda: not _workers())


def test_what_has_not_begun_when_it_stops_is_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "STOP_TIMEOUT_S", 0.02)
    gate = rig.gate("s0")
    serving, line = rig.serve(Creations), rig.connect()
    storm(line, 0, 60)
    serving.wait_for(on.RequestReceived, 60)
    serving.stop()
    serving.wait_for(on.ProviderStopping)
    wait_until(lambda: serving.provider._work._is_over)
    gate.let_go()
    serving.join()
    assert not serving.provider.has_hung
    assert not _workers()


def test_a_stop_takes_two_seconds_at_most() -> None:
    assert work.STOP_TIMEOUT_S + work.HANG_TIMEOUT_S < 2.0


# --- Threads -------------------------------------------------------------------------------------


def _workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("backend")]


def refuse_threads(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Let no thread of the backend start any more, as Linux does at pids.max."""
    start: Callable[[threading.Thread], None] = threading.Thread.start
    started: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("backend") and len(started) >= after:
            raise RuntimeError("can't start new thread")
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.clause("PEER-17")
def test_every_thread_is_there_before_anything_is_served(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.serve()
    before = _workers()
    assert len(before) == work.THREADS_MAX
    refuse_threads(monkeypatch)
    line = rig.connect()
    for number in range(20):
        assert line.ask(wanted(f"a{number}")) == handed(f"a{number}")
    assert isinstance(line.ask(wanted("i", "h0.sqfs")), NamespaceResponse)
    assert _workers() == before


@pytest.mark.clause("PEER-17")
def test_without_its_threads_it_does_not_start(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_threads(monkeypatch, after=3)
    with (
        closing(SimulatedBackend(rig.node)) as backend,
        pytest.raises(SocketUnavailable, match=r"not all of them can be started .*pids\.max"),
        Serving(rig.path, backend, waits_ready=False),
    ):
        pass
    assert not _workers()
    assert not rig.path.exists()


@pytest.mark.parametrize("refused", [1, 2])
def test_without_an_event_loop_that_listens_to_it_nothing_is_left(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    with closing(SimulatedBackend(rig.node)) as backend:
        serving = Serving(rig.path, backend, waits_ready=False)
        calls = itertools.count(1)
        add_reader = serving.loop.add_reader

        def refuse(*arguments: Any) -> None:
            if next(calls) == refused:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            add_reader(*arguments)

        monkeypatch.setattr(serving.loop, "add_reader", refuse)
        with pytest.raises(OSError, match="memory"), serving:
            pass
    assert not _workers()
    assert not rig.path.exists()
