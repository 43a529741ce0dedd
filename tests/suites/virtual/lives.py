"""What peers, the node and an operator do to a provider, each life small enough for every order.

python -m tests.suites.virtual LIFE [PLACE:OPTION ...]      one run, told step by step
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing, SocketUnavailable
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits
from tests.suites.virtual import consumers
from transport.contract import Sighting
from transport.serve import Spans
from transport.testing.peer import frame_of
from transport.testing.virtual.choices import ChoiceScript, Scheduler, written
from transport.testing.virtual.program import VirtualPeer, VirtualStage, staged
from transport.testing.virtual.world import Actor, ActorSteps

NET: Final = (NamespaceType.NET,)
OTHER_UID: Final = 4242
SMALL_ROOM: Final = 1
"""How much may wait in a connection; Linux makes of it the least that there is."""


@dataclass(frozen=True)
class VirtualLife:
    """What happens, and how the world is in which it does."""

    name: str
    prepare: Callable[[VirtualStage], None]
    world: dict[str, Any] = field(default_factory=dict)
    """For `VirtualStage`."""
    is_start_chosen: bool = False
    orders: int | None = None
    """How many of the orders with one preemption a run of the tests tries; None for all."""

    def run(self, scheduler: Scheduler) -> VirtualStage:
        """
        Live it once.

        Raises:
            BaseException: what was found.
        """
        with tempfile.TemporaryDirectory() as directory:
            stage = VirtualStage(scheduler, Path(directory), **self.world)
            before = len(os.listdir("/proc/self/fd"))
            try:
                with staged(stage):
                    self.prepare(stage)
                    stage.run(is_start_chosen=self.is_start_chosen)
            except BaseException as error:
                error.add_note("\n".join(stage.world.story))
                raise
            # The backend's own was open before.
            left = len(os.listdir("/proc/self/fd")) - before + 1
            assert not left, f"{left} descriptors are left open"
            return stage

    def replay(self, script: ChoiceScript) -> str:
        """Say how a run is lived again."""
        return f'python -m tests.suites.virtual "{self.name}" {written(script)}'


# --- One peer ------------------------------------------------------------------------------------


def _whole_life(peer: VirtualPeer) -> ActorSteps:
    peer.connect()
    yield None
    peer.ask("a", NET)
    yield None
    answer = yield from peer.hear()
    assert isinstance(answer, NamespaceResponse), answer
    peer.end("a")
    yield None
    answer = yield from peer.hear()
    assert answer == AllocationEnded("a"), answer
    peer.close()


def _one_after_the_other(stage: VirtualStage) -> None:
    """Two lives of one id, asked for in one breath, where a release takes three tries."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        yield None
        for _ in range(2):
            peer.ask("a", NET)
            peer.end("a")
        yield None
        answers = []
        for _ in range(4):
            answers.append((yield from peer.hear()))
        refused = CreationFailed, AllocationEnded
        assert isinstance(answers[0], NamespaceResponse | CreationFailed), answers
        assert isinstance(answers[1], refused), answers
        peer.close()

    stage.peer("A", life)


def _again_and_again(stage: VirtualStage) -> None:
    """A release that takes three tries, twice of one id."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        yield None
        for _ in range(2):
            peer.ask("a", NET)
            yield None
            answer = yield from peer.hear()
            assert isinstance(answer, NamespaceResponse | CreationFailed), answer
            if isinstance(answer, CreationFailed):
                break
            peer.end("a")
            yield None
            answer = yield from peer.hear()
            assert answer == AllocationEnded("a"), answer
        peer.close()

    stage.peer("A", life)


def _in_pieces(stage: VirtualStage) -> None:
    """Frames come in pieces, of which the last of all never comes."""

    def life(peer: VirtualPeer) -> ActorSteps:
        ask, end = frame_of(NamespaceRequest("a", NET)), frame_of(AllocationEnded("a"))
        peer.connect()
        yield None
        peer.say(ask[:3])
        yield None
        peer.say(ask[3:])
        yield None
        answer = yield from peer.hear()
        if isinstance(answer, NamespaceResponse):
            peer.say(end[:6])
            yield None
            yield from peer.pause(3.0)
            peer.say(end[6:] + ask[:9])
            yield None
        yield from peer.hear_all()
        assert peer.heard[-1] is not None
        peer.close()

    stage.peer("A", life)


def _left_alone(stage: VirtualStage) -> None:
    """What is asked for is not waited for; it is claimed in time, or not."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        peer.ask("a", NET)
        yield lambda: "a" in stage.backend.made
        peer.close()
        yield None
        peer.connect()
        yield None
        peer.ask("a", NET)
        yield None
        answer = yield from peer.hear()
        assert isinstance(answer, NamespaceResponse | CreationFailed), answer
        peer.close()

    stage.peer("A", life)


# --- Several peers -------------------------------------------------------------------------------


def _shared(stage: VirtualStage) -> None:
    """Two have one allocation; one ends it, the other hears of it."""

    def one(peer: VirtualPeer) -> ActorSteps:
        yield from _whole_life(peer)

    def other(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        yield None
        peer.ask("a", NET)
        yield None
        answer = yield from peer.hear()
        assert isinstance(answer, NamespaceResponse | CreationFailed), answer
        if isinstance(answer, NamespaceResponse):
            yield lambda: stage.peers[0].heard[-1:] == [AllocationEnded("a")]
            if stage.backend.made:
                peer.end("a")
            answer = yield from peer.hear()
            assert answer == AllocationEnded("a"), answer
        peer.close()

    stage.peer("A", one)
    stage.peer("B", other)


def _called_again(stage: VirtualStage) -> None:
    """A connection is lost, and its number given to that of another user at once."""

    def one(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        peer.ask("a", NET)
        yield None
        peer.close()

    def other(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        yield None
        peer.ask("b", NET)
        yield None
        answer = yield from peer.hear()
        assert isinstance(answer, NamespaceResponse), answer
        assert answer.allocation_id == "b", answer
        peer.end("b")
        yield None
        assert (yield from peer.hear()) == AllocationEnded("b")
        peer.close()

    stage.peer("A", one)
    stage.peer("B", other, OTHER_UID)


def _calls_back(stage: VirtualStage) -> None:
    """A peer leaves while much of what it said is unread, and connects again."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        yield None
        peer.ask("a", NET)
        for _ in range(5):
            peer.end("x")
        yield None
        peer.close()
        yield None
        peer.connect()
        peer.end("a")
        yield None
        answer = yield from peer.hear()
        assert answer == AllocationEnded("a"), answer
        peer.close()

    stage.peer("A", life)


def _late_together(stage: VirtualStage) -> None:
    """Half a frame of each of four, and the rest of all at once; the provider may be slow."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        peer.say(frame_of(AllocationEnded(peer.name))[:3])
        yield None
        answer = yield from peer.hear()
        # Refused, if the rest is late; that it is, the rules see to.
        assert isinstance(answer, AllocationNotFound | FdPassing), answer
        peer.close()

    def rest() -> ActorSteps:
        links = stage.network.links
        yield lambda: [link.number is not None for link in links] == [True] * 4
        yield lambda: not stage.world.is_able(stage.program)
        for peer in stage.peers:
            if not peer.has_heard_all:
                peer.say(frame_of(AllocationEnded(peer.name))[3:])

    for name in "ABCD":
        stage.peer(name, life)
    stage.world.add(Actor("the rest of all four", rest()))


def _half_and_blocked(stage: VirtualStage) -> None:
    """A peer has said half a frame when it is sent more than it reads, and then says the rest."""

    def life(peer: VirtualPeer) -> ActorSteps:
        end = frame_of(AllocationEnded("y"))
        peer.connect()
        peer.ask("a", NET)
        for _ in range(ANSWERS_IN_ROOM):
            peer.end("x")
        peer.say(end[:3])
        yield lambda: not stage.world.is_able(stage.program)
        peer.say(end[3:])
        yield from peer.pause(7.0)
        yield from _some(peer, ANSWERS_IN_ROOM + 2)
        if stage.world.now < 1012.0:
            assert peer.heard[-1] == AllocationNotFound("y"), peer.heard
        peer.close()

    stage.peer("A", life)


def _slow_reader(stage: VirtualStage) -> None:
    """A peer reads late what it has asked for, and meanwhile it ends."""

    def slow(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        for _ in range(ANSWERS_IN_ROOM):
            peer.end("x")
        peer.ask("a", NET)
        yield lambda: bool(stage.peers[1].heard)
        yield from _some(peer, ANSWERS_IN_ROOM + 1)
        peer.close()

    def quick(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        # Or it is over already, because the other was given up in the meantime.
        yield lambda: "a" in stage.backend.made or "a" in stage.backend.remembered
        peer.end("a")
        yield None
        assert (yield from peer.hear()) == AllocationEnded("a"), peer.heard

    stage.peer("A", slow)
    stage.peer("B", quick)


def _answers_in_room() -> int:
    """Count the answers that wait in a connection with little room before one does not fit."""
    answer, count = frame_of(AllocationNotFound("x")), 0
    ours, other = socket.socketpair()
    with ours, other, suppress(BlockingIOError):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_ROOM)
        while ours.send(answer, socket.MSG_DONTWAIT):
            count += 1
    return count


def _some(peer: VirtualPeer, count: int) -> ActorSteps:
    for _ in range(count):
        yield from peer.hear()


def _never_reads(stage: VirtualStage) -> None:
    """A peer reads now and then, for a while, and then no more."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        for _ in range(14):
            peer.end("x")
        yield None
        yield from _some(peer, 14)
        yield from peer.pause(20.0)
        for _ in range(16):
            peer.end("y")
        yield None
        yield lambda: len(stage.program.provider._connections) == 0

    stage.peer("A", life)


def _closed_while_it_waits(stage: VirtualStage) -> None:
    """A peer says what is no frame, and then reads all that it is owed."""

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        for _ in range(ANSWERS_IN_ROOM):
            peer.end("x")
        peer.say(bytes(4))
        yield None
        yield lambda: not stage.world.is_able(stage.program)
        yield from peer.hear_all()
        # Unless it has read so late that it was given up.
        if stage.world.now < 1001.0:
            assert len(peer.heard) == ANSWERS_IN_ROOM + 1, peer.heard
            assert isinstance(peer.heard[-1], FdPassing), peer.heard
        peer.close()

    stage.peer("A", life)


def _crowd(stage: VirtualStage) -> None:
    """Of two users one has three connections with much to say, and the other one."""

    def flood(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        for _ in range(8):
            peer.end("x")
        yield None
        yield from _some(peer, 8)
        peer.close()

    def modest(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        yield None
        for name in ("y", "z"):
            peer.end(name)
            yield None
            yield from peer.hear()
        peer.close()

    for name in "ABC":
        stage.peer(name, flood)
    stage.peer("D", modest, OTHER_UID)


# --- The node, the operator, the images ----------------------------------------------------------


def _used(stage: VirtualStage) -> None:
    """Its cgroup is used and empties, while it is ended by its consumer."""
    backend = stage.backend
    stage.may("the node: used", lambda: backend.see("a", Sighting.POPULATED))
    stage.may("the node: empty", lambda: backend.see("a", Sighting.EMPTIED))
    stage.may("the node: the init dies", lambda: backend.see("a", Sighting.INIT_DIED))

    def life(peer: VirtualPeer) -> ActorSteps:
        peer.connect()
        peer.ask("a", NET)
        yield None
        answer = yield from peer.hear()
        assert isinstance(answer, NamespaceResponse | CreationFailed), answer
        peer.end("a")
        yield None
        assert (yield from peer.hear()) == AllocationEnded("a")
        peer.close()

    stage.peer("A", life)


def _images(stage: VirtualStage) -> None:
    """Three ask for images, two for the same, which hangs for a while."""
    stage.backend.hanging.add("i.sqfs")

    def asks(name: str, image: str) -> Callable[[VirtualPeer], ActorSteps]:
        def life(peer: VirtualPeer) -> ActorSteps:
            peer.connect()
            peer.ask(name, (NamespaceType.MOUNT,), image)
            yield None
            answer = yield from peer.hear()
            assert isinstance(answer, NamespaceResponse | CreationFailed), answer
            peer.end(name)
            yield None
            yield from peer.hear()
            peer.close()

        return life

    for name, image in (("a", "i.sqfs"), ("b", "i.sqfs"), ("c", "j.sqfs")):
        stage.peer(name.upper(), asks(name, image))
    stage.may("the node: the image answers", stage.backend.hanging.clear)


def _stopped(stage: VirtualStage) -> None:
    """It is stopped at any time."""
    stage.may("the operator: stop", lambda: stage.program.stop())

    def life(peer: VirtualPeer) -> ActorSteps:
        if not peer.connect():
            return
        yield None
        peer.ask("a", NET)
        yield None
        answer = yield from peer.hear()
        right = NamespaceResponse | SocketUnavailable | None
        assert isinstance(answer, right), answer
        if answer is not None:
            peer.end("a")
            yield None
            yield from peer.hear()
        peer.close()

    stage.peer("A", life)


def _killed(stage: VirtualStage) -> None:
    """It is killed at any time, and another one goes on with what there is."""
    stage.may("kill -9", stage.kill_and_start)

    def life(peer: VirtualPeer) -> ActorSteps:
        answer: object = None
        while not isinstance(answer, NamespaceResponse):
            yield lambda: stage.program.is_ready
            peer.connect()
            yield None
            peer.ask("a", NET)
            yield None
            answer = yield from peer.hear()
            if isinstance(answer, CreationFailed | FdPassing):
                break
        ended: object = None
        while ended is None:
            yield lambda: stage.program.is_ready
            peer.connect()
            peer.end("a")
            yield None
            ended = yield from peer.hear()
        assert isinstance(answer, CreationFailed | FdPassing) or ended == AllocationEnded("a")
        peer.close()
        yield lambda: not stage.backend.made

    stage.peer("A", life)


ANSWERS_IN_ROOM: Final = _answers_in_room()
BOTH: Final = Limits(frozenset({os.geteuid(), OTHER_UID}))
QUICK: Final = Spans(partial_frame_s=5.0, unread_s=30.0, linger_s=1.0, empty_grace_s=0.5)


def _of_consumers(name: str, prepare: Callable[[VirtualStage], None]) -> VirtualLife:
    return VirtualLife(name, prepare, orders=70)


LIVES: Final = {
    life.name: life
    for life in (
        VirtualLife("a life", lambda stage: stage.peer("A", _whole_life)),
        VirtualLife(
            "a life, cut",
            lambda stage: stage.peer("A", _whole_life),
            {"cuts": True},
        ),
        VirtualLife("one after the other", _one_after_the_other, {"tries": 3}),
        VirtualLife("again and again", _again_and_again, {"tries": 3}),
        VirtualLife("in pieces", _in_pieces),
        VirtualLife("left alone", _left_alone),
        VirtualLife("shared", _shared),
        VirtualLife("called again", _called_again, {"limits": BOTH}),
        VirtualLife("it calls back", _calls_back),
        VirtualLife("late together", _late_together),
        VirtualLife("half a frame, and blocked", _half_and_blocked, {"room": SMALL_ROOM}),
        VirtualLife("a slow reader", _slow_reader, {"room": SMALL_ROOM}),
        VirtualLife("it reads no more", _never_reads, {"room": SMALL_ROOM}),
        VirtualLife("closed while it waits", _closed_while_it_waits, {"room": SMALL_ROOM}),
        VirtualLife("a crowd", _crowd, {"limits": BOTH}),
        VirtualLife("used", _used, {"spans": QUICK}),
        VirtualLife("images", _images),
        VirtualLife("stopped", _stopped, is_start_chosen=True),
        VirtualLife("killed", _killed, is_start_chosen=True),
        # Consumers' own drivers.
        _of_consumers("a consumer blocks", consumers.blocks),
        _of_consumers("a consumer loops", consumers.loops),
        _of_consumers("consumers of both kinds", consumers.both),
        _of_consumers("consumers, and a kill", consumers.both_and_a_kill),
        _of_consumers("it blocks, and is killed", consumers.blocks_and_is_killed),
        _of_consumers("it loops, and is killed", consumers.loops_and_is_killed),
        _of_consumers("it blocks, and is cancelled", consumers.blocks_and_is_cancelled),
        _of_consumers("it loops, and is cancelled", consumers.loops_and_is_cancelled),
        _of_consumers("a connection is kept", consumers.keeps),
        _of_consumers("impatient", consumers.impatient),
    )
}
