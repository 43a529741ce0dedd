"""A consumer that keeps its connections: fewer of them, and no word is taken for another one's."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from linux.simulated import SimulatedInspector
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing, SocketUnavailable
from statemachine.messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from statemachine.states import ConsumerState
from tests.transport.test_request import ALL, HASTY, Bench, plain, rig
from transport.channel import Channel
from transport.request import Consumer, Patience
from transport.request.exchange import ANSWER_TIMEOUT_S, Exchange
from transport.request.kept import FORMER_MAX, KeptConnection, KeptConnections
from transport.testing.peer import Line, frame_of, wait_until

__all__ = ["plain", "rig"]


def request(name: str) -> NamespaceRequest:
    return NamespaceRequest(name, ALL)


def lead(consumer: Any, name: str) -> tuple[Any, ...]:
    """Lead a whole life; return which namespaces it had."""
    with consumer.obtain(request(name)) as handoff:
        assert not handoff.is_degraded
        assert handoff.end()
        identities: tuple[Any, ...] = handoff.identities
        return identities


def connections(serving: Any) -> int:
    return len(serving.provider._connections)


def serve_lives(rig: Bench, count: int) -> Callable[[Line], None]:
    """Be a provider for some lives on one connection."""

    def script(line: Line) -> None:
        for _ in range(count):
            wanted = line.hear()
            assert isinstance(wanted, NamespaceRequest)
            line.say(NamespaceResponse(wanted.allocation_id, ALL), rig.lent)
            line.say(line.hear())  # type: ignore[arg-type]

    return script


def test_lives_one_after_the_other_share_a_connection(rig: Bench, allocation_id: str) -> None:
    liar = rig.lie(serve_lives(rig, 3))
    consumer = rig.consumer(keeps=1)
    for number in range(3):
        lead(consumer, f"{allocation_id}-{number}")
    assert len(liar.lines) == 1


def test_a_real_provider_sees_one_connection_and_it_ends_with_the_consumer(
    rig: Bench, allocation_id: str
) -> None:
    serving = rig.provide()
    consumer = rig.consumer(keeps=1)
    seen = {lead(consumer, allocation_id) for _ in range(3)}
    assert (len(seen), connections(serving)) == (3, 1)
    consumer.close()
    wait_until(lambda: connections(serving) == 0)


def test_without_being_told_no_connection_is_kept(rig: Bench, allocation_id: str) -> None:
    serving = rig.provide()
    lead(rig.consumer(), allocation_id)
    wait_until(lambda: connections(serving) == 0)


def test_no_more_are_kept_than_was_said(rig: Bench, allocation_id: str) -> None:
    serving = rig.provide()
    consumer = rig.consumer(keeps=2)
    handoffs = [consumer.obtain(request(f"{allocation_id}-{n}")) for n in range(3)]
    for handoff in handoffs:
        with handoff:
            assert handoff.end()
    wait_until(lambda: connections(serving) == 2)


def test_what_is_refused_and_what_is_not_known_keep_it_too(rig: Bench, allocation_id: str) -> None:
    def refuse(line: Line) -> None:
        line.hear()
        line.say(CreationFailed("not this one"))
        line.hear()
        line.say(AllocationNotFound(f"{allocation_id}-other"))
        serve_lives(rig, 1)(line)

    liar = rig.lie(refuse)
    consumer = rig.consumer(keeps=1)
    with pytest.raises(CreationFailed, match="not this one"):
        consumer.obtain(request(allocation_id))
    with pytest.raises(AllocationNotFound):
        consumer.end(f"{allocation_id}-other")
    lead(consumer, allocation_id)
    assert len(liar.lines) == 1


@pytest.mark.clause("END-23")
def test_an_allocation_that_lives_on_keeps_none(rig: Bench, allocation_id: str) -> None:
    # Else it would count as asked for, and what is never used would not end by itself.
    serving = rig.provide()
    rig.consumer(keeps=1).obtain(request(allocation_id)).close()
    wait_until(lambda: connections(serving) == 0)


@pytest.mark.clause("END-22")
@pytest.mark.parametrize("error", [AllocationNotFound, AllocationEnded])
@pytest.mark.parametrize("is_same", [True, False])
def test_what_has_crossed_the_last_end_is_not_the_next_ones(
    rig: Bench, allocation_id: str, error: type, *, is_same: bool
) -> None:
    def cross(line: Line) -> None:
        serve_lives(rig, 1)(line)
        wanted = line.hear()
        assert isinstance(wanted, NamespaceRequest)
        line.say(error(allocation_id))  # of the one before
        line.say(NamespaceResponse(wanted.allocation_id, ALL), rig.lent)
        if not is_same:
            line.say(error(allocation_id))
        line.say(line.hear())  # type: ignore[arg-type]

    liar = rig.lie(cross)
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    lead(consumer, allocation_id if is_same else f"{allocation_id}-next")
    assert [type(message) for message in liar.lines[0].heard].count(AllocationEnded) == 2


@pytest.mark.clause("END-22")
def test_an_end_of_this_one_is_its_own_though_it_had_the_same_name_before(
    rig: Bench, allocation_id: str
) -> None:
    def push(line: Line) -> None:
        serve_lives(rig, 1)(line)
        rig.hand_over(line)
        line.say(rig.ended)

    rig.lie(push)
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    with consumer.obtain(rig.wanted) as handoff:
        assert handoff.wait_ended(20.0)


@pytest.mark.clause("END-22")
def test_an_end_of_an_allocation_that_was_never_had_there_is_a_fault(
    rig: Bench, allocation_id: str
) -> None:
    def lie(line: Line) -> None:
        serve_lives(rig, 1)(line)
        line.hear()
        line.say(AllocationEnded(f"{allocation_id}-another"))

    rig.lie(lie)
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    with pytest.raises(FdPassing, match="never asked for"):
        consumer.obtain(request(f"{allocation_id}-next"))


@pytest.mark.clause("END-23")
def test_after_a_fault_it_is_not_kept(rig: Bench, allocation_id: str) -> None:
    def lie(line: Line) -> None:
        rig.hand_over(line)
        line.say(AllocationEnded(f"{allocation_id}-another"))

    liar = rig.lie(lie, serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    with closing(consumer.obtain(rig.wanted)) as handoff:
        assert not handoff.wait_ended(0.05)
    lead(consumer, f"{allocation_id}-next")
    assert isinstance(liar.told(0)[-1], FdPassing)


def test_what_comes_on_it_meanwhile_spoils_it(rig: Bench, allocation_id: str) -> None:
    said = threading.Event()

    def say_more(line: Line) -> None:
        serve_lives(rig, 1)(line)
        assert release.wait(20.0)
        line.say(CreationFailed("nothing was asked"))
        said.set()

    release = threading.Event()
    liar = rig.lie(say_more, serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    release.set()
    assert said.wait(20.0)
    lead(consumer, f"{allocation_id}-next")
    assert len(liar.lines) == 2


def test_what_is_free_after_the_consumer_was_closed_is_closed(
    rig: Bench, allocation_id: str
) -> None:
    liar = rig.lie(serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    handoff = consumer.obtain(rig.wanted)
    wait = threading.Thread(target=liar.told, args=(0,))
    wait.start()
    if isinstance(consumer, Consumer):  # the other form ends its loop with it
        consumer.close()
    else:
        consumer._runner.run(consumer._inner.close())
    with handoff:
        assert handoff.end()
    wait.join()
    assert liar.lines[0].is_over.is_set()


@pytest.mark.clause("END-23")
def test_what_follows_the_last_word_spoils_it(rig: Bench, allocation_id: str) -> None:
    def say_more(line: Line) -> None:
        line.hear()
        line.say(NamespaceResponse(allocation_id, ALL), rig.lent)
        line.hear()
        # At once, so that it is seen before the connection is free.
        line.say(frame_of(rig.ended) + frame_of(CreationFailed("nothing was asked")))

    liar = rig.lie(say_more, serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    lead(consumer, f"{allocation_id}-next")
    assert len(liar.lines) == 2


def test_one_that_the_provider_has_closed_is_replaced(rig: Bench, allocation_id: str) -> None:
    liar = rig.lie(_served_and_gone(rig), serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    wait_until(liar.lines[0].is_over.is_set)
    lead(consumer, f"{allocation_id}-next")


def _served_and_gone(rig: Bench) -> Callable[[Line], None]:
    def script(line: Line) -> None:
        serve_lives(rig, 1)(line)
        line.hang_up()

    return script


@pytest.mark.clause("SELF-17")
def test_a_request_that_meets_a_closing_provider_is_said_again(
    rig: Bench, allocation_id: str
) -> None:
    def hear_and_hang_up(line: Line) -> None:
        serve_lives(rig, 1)(line)
        line.hear()
        line.hang_up()

    liar = rig.lie(hear_and_hang_up, serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    lead(consumer, f"{allocation_id}-next")
    assert [type(message) for message in liar.lines[1].heard] == [NamespaceRequest, AllocationEnded]


@pytest.mark.clause("SELF-17")
def test_it_is_not_said_again_after_the_deadline(allocation_id: str) -> None:
    now = 0.0
    kept = KeptConnections(1)
    ours, theirs = socket.socketpair()
    kept.put(KeptConnection(Channel(ours, accepts_descriptors=True), frozenset({allocation_id})))
    exchange = Exchange(
        ConsumerKernel(request(f"{allocation_id}-next")),
        SimulatedInspector(),
        None,
        Patience(),
        None,
        "not used",
        lambda: now,
        kept,
    )
    with closing(exchange):
        exchange.feed(on.NamespacesWanted())
        assert exchange.slow.popleft() == do.Connect()
        assert exchange.reuse()
        theirs.close()
        exchange.read()
        assert list(exchange.slow) == [do.Connect()]
        now += ANSWER_TIMEOUT_S
        exchange.expire()
        ours, theirs = socket.socketpair()
        with Line(theirs) as line:
            exchange.connected(ours)
            assert line.hear() is None
    assert exchange.kernel.state is ConsumerState.SERVING_SELF


@pytest.mark.clause("SELF-17")
def test_it_is_said_again_once(rig: Bench, allocation_id: str) -> None:
    def hear_and_hang_up(line: Line) -> None:
        line.hear()
        line.hang_up()

    def first(line: Line) -> None:
        serve_lives(rig, 1)(line)
        hear_and_hang_up(line)

    liar = rig.lie(first, hear_and_hang_up)
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    wanted = request(f"{allocation_id}-next")
    with pytest.raises(SocketUnavailable, match="closed"):
        consumer.obtain(wanted)
    assert [line.heard.count(wanted) for line in liar.lines][:2] == [1, 1]


@pytest.mark.clause("SELF-17")
def test_if_it_cannot_be_said_again_the_provider_counts_as_lost(
    rig: Bench, allocation_id: str
) -> None:
    def hear_and_vanish(line: Line) -> None:
        serve_lives(rig, 1)(line)
        line.hear()
        liar.stop_listening()
        line.hang_up()

    liar = rig.lie(hear_and_vanish)
    consumer = rig.consumer(keeps=1, service=rig.service, patience=HASTY)
    lead(consumer, allocation_id)
    with closing(consumer.obtain(request(f"{allocation_id}-next"))) as handoff:
        assert handoff.is_degraded
        assert isinstance(handoff.fallback, SocketUnavailable)


def test_an_end_by_id_of_what_was_had_there_goes_over_another_connection(
    rig: Bench, allocation_id: str
) -> None:
    liar = rig.lie(serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    lead(consumer, allocation_id)
    consumer.end(allocation_id)
    consumer.close()
    assert liar.told(1) == [AllocationEnded(allocation_id)]


def test_one_that_had_many_allocations_is_closed(rig: Bench, allocation_id: str) -> None:
    liar = rig.lie(serve_lives(rig, FORMER_MAX), serve_lives(rig, 1))
    consumer = rig.consumer(keeps=1)
    for number in range(FORMER_MAX + 1):
        lead(consumer, f"{allocation_id}-{number}")
    assert len(liar.lines) == 2


def test_threads_do_not_share_one(plain: Bench, allocation_id: str) -> None:
    plain.provide()
    consumer = plain.consumer(keeps=2)
    failures: list[BaseException] = []

    def live(thread: int) -> None:
        try:
            for number in range(20):
                lead(consumer, f"{allocation_id}-{thread}-{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_child_does_not_speak_on_its_parents(plain: Bench, allocation_id: str) -> None:
    serving = plain.provide()
    with closing(plain.consumer(keeps=1)) as consumer:
        lead(consumer, allocation_id)
        kept = consumer._kept
        assert kept is not None
        pid = os.fork()
        if pid == 0:
            os._exit(0 if kept.take() is None else 1)
        assert os.waitpid(pid, 0)[1] == 0
        lead(consumer, f"{allocation_id}-next")
        assert connections(serving) == 1
