"""Lives in which consumers' own drivers take part, of both kinds, with a provider that is real."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final

from statemachine.errors import AllocationNotFound, NamespaceError
from statemachine.messages import NamespaceRequest, NamespaceType
from transport.descriptors import Descriptor
from transport.request import AsyncConsumer, Cancelled, Consumer, Patience
from transport.testing.virtual.consumer import ConsumerProgram, LoopConsumerProgram
from transport.testing.virtual.program import VirtualStage
from transport.testing.virtual.rules import expect
from transport.testing.virtual.world import Actor, ActorSteps

WANTED: Final = NamespaceRequest("a", (NamespaceType.NET,))
OTHER: Final = NamespaceRequest("b", (NamespaceType.NET,))


def _all_gone(stage: VirtualStage) -> None:
    """Have the life go on until nothing is left that was made, be it for lack of a claim."""

    def steps() -> ActorSteps:
        yield lambda: all(each.has_ended for each in stage.consumers)
        yield lambda: not stage.backend.made

    stage.world.add(Actor("all is gone", steps()))


def _right(stage: VirtualStage, handoff: Any) -> None:
    """Expect that a handoff has what the backend made."""
    name = handoff.request.allocation_id
    inodes = [os.fstat(each.fileno()).st_ino for _, each in handoff.bundle]
    if name in stage.backend.made and not handoff.is_ended:
        made = stage.backend.made[name]
        if not made.has_ended:
            expect(inodes == stage.backend.identities_of(name), "descriptors of another set")


def _obtains(stage: VirtualStage, name: str, then: str = "end") -> ConsumerProgram:
    """Have a consumer that blocks obtain namespaces, and end them, or wait for the end."""
    program = ConsumerProgram(stage, name)

    def life(consumer: Consumer) -> None:
        with suppress(NamespaceError), consumer.obtain(WANTED) as handoff:
            _right(stage, handoff)
            if then == "end":
                handoff.end()
            else:
                handoff.wait_ended(600.0)

    program.start(life)
    return program


def _obtains_in_a_loop(stage: VirtualStage, name: str, then: str = "end") -> LoopConsumerProgram:
    program = LoopConsumerProgram(stage, name)

    async def life(consumer: AsyncConsumer) -> None:
        with suppress(NamespaceError):
            async with await consumer.obtain(WANTED) as handoff:
                _right(stage, handoff)
                if then == "end":
                    await handoff.end()
                else:
                    await handoff.wait_ended(600.0)

    program.start_async(life)
    return program


def blocks(stage: VirtualStage) -> None:
    _obtains(stage, "A")
    _all_gone(stage)


def loops(stage: VirtualStage) -> None:
    _obtains_in_a_loop(stage, "A")
    _all_gone(stage)


def both(stage: VirtualStage) -> None:
    """Two share an allocation, and one of them ends it."""
    _obtains(stage, "A", "wait")
    _obtains_in_a_loop(stage, "B")
    _all_gone(stage)


def both_and_a_kill(stage: VirtualStage) -> None:
    stage.may("kill -9 of the provider", stage.kill_and_start)
    both(stage)


def killed(kind: Callable[[VirtualStage, str], ConsumerProgram]) -> Callable[[VirtualStage], None]:
    """A consumer is killed at any time; what it had is released in time."""

    def prepare(stage: VirtualStage) -> None:
        program = kind(stage, "A")
        stage.may("kill -9 of the consumer", program.kill)
        _all_gone(stage)

    return prepare


blocks_and_is_killed = killed(_obtains)
loops_and_is_killed = killed(_obtains_in_a_loop)


def loops_and_is_cancelled(stage: VirtualStage) -> None:
    program = _obtains_in_a_loop(stage, "A", "wait")

    def cancel() -> None:
        program.cancel()

    def other() -> ActorSteps:
        yield lambda: program.has_ended or stage.world.now > 1100.0
        program.cancel()

    stage.may("cancelled", cancel)
    stage.world.add(Actor("cancelled in the end", other()))
    _all_gone(stage)


def blocks_and_is_cancelled(stage: VirtualStage) -> None:
    program = ConsumerProgram(stage, "A")
    stack = ExitStack()
    event = stack.enter_context(Descriptor(os.eventfd(0, os.EFD_CLOEXEC)))

    def life(consumer: Consumer) -> None:
        with stack, suppress(NamespaceError, Cancelled):
            handoff = consumer.obtain(WANTED, cancel=event.fileno())
            with handoff:
                handoff.end()

    def cancel() -> None:
        if not event.closed:
            os.eventfd_write(event.fileno(), 1)

    program.start(life)
    stage.may("cancelled", cancel)
    _all_gone(stage)


def keeps(stage: VirtualStage) -> None:
    """One allocation after the other on a connection that is kept, and the provider is killed."""
    stage.may("kill -9 of the provider", stage.kill_and_start)
    program = ConsumerProgram(stage, "A", keeps=1)

    def life(consumer: Consumer) -> None:
        for request in (WANTED, OTHER, WANTED):
            with suppress(NamespaceError), consumer.obtain(request) as handoff:
                _right(stage, handoff)
                handoff.end()

    program.start(life)
    _all_gone(stage)


def impatient(stage: VirtualStage) -> None:
    """An answer and the time for it come together, for both kinds."""
    patience = Patience(answer_s=2.0)
    first = ConsumerProgram(stage, "A", patience=patience)
    second = LoopConsumerProgram(stage, "B", patience=patience)
    image = NamespaceRequest("a", (NamespaceType.MOUNT,), "i.sqfs")
    stage.backend.hanging.add("i.sqfs")

    def heal() -> ActorSteps:
        yield lambda: stage.world.now >= 1002.0
        stage.backend.hanging.clear()

    def life(consumer: Consumer) -> None:
        with suppress(NamespaceError), consumer.obtain(image) as handoff:
            handoff.end()
        with suppress(AllocationNotFound, NamespaceError):
            consumer.end("a")

    async def async_life(consumer: AsyncConsumer) -> None:
        with suppress(NamespaceError):
            async with await consumer.obtain(image) as handoff:
                await handoff.end()
        with suppress(AllocationNotFound, NamespaceError):
            await consumer.end("a")

    first.start(life)
    second.start_async(async_life)
    stage.world.add(Actor("the node: the image answers", heal()))
    _all_gone(stage)
