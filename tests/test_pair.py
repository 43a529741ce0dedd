"""A provider and its consumers keep every promise, however their world delays, loses and kills."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pair import Client, Link, World

from specs import invariants as always
from statemachine import effects as do
from statemachine.effects import Timer
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing, SocketUnavailable
from statemachine.lifecycle import ConsumerState, NoticeState
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.provider import Limits, Phase

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT

REQUESTS: Final = (
    NamespaceRequest("a", (NET, PID, MOUNT), "tools/hello.sqfs"),
    NamespaceRequest("a", (PID,)),
    NamespaceRequest("b", (PID, NET)),
)
"""Two allocations; one of them also under another request."""

CLIENTS: Final = 3
STEPS: Final = 40

_pick: Final = st.integers(min_value=0, max_value=5)
"""Chooses among what is there now: the first at 0, so that failures shrink to the first."""


class Pair(RuleBasedStateMachine):
    """What anybody may do at any time; the world says what there is to do."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(CLIENTS)

    # What there is.

    def clients(self, has: str) -> list[Client]:
        return [client for client in self.world.present if getattr(client, has)]

    def endable(self) -> list[Client]:
        states = ConsumerState
        able = (states.CONNECTING, states.ASKING, states.HELD, states.SELF_HELD)
        return [client for client in self.world.present if client.kernel.state in able]

    def listeners(self) -> list[Client]:
        return [client for client in self.world.present if self.world.has_news_for(client)]

    def busy_links(self) -> list[Link]:
        world = self.world
        return [link for link in world.links.values() if world.has_news_for_provider(link)]

    def free(self) -> list[int]:
        clients = enumerate(self.world.clients)
        return [index for index, client in clients if client is None or client.is_done]

    def running(self) -> list[tuple[Timer, str]]:
        return sorted(self.world.timers, key=str)

    def running_for(self) -> list[tuple[Client, Timer]]:
        return [
            (client, timer)
            for client in self.world.present
            for timer in sorted(client.timers, key=str)
        ]

    def under_way(self) -> list[Any]:
        return [
            parcel
            for link in self.world.links.values()
            for parcel in link.to_consumer
            if isinstance(parcel.message, NamespaceResponse)
        ]

    @property
    def is_up(self) -> bool:
        return self.world.provider is not None

    # The consumers and their callers.

    @precondition(lambda self: self.free())
    @rule(pick=_pick, request=st.sampled_from(REQUESTS))
    def somebody_wants_namespaces(self, pick: int, request: NamespaceRequest) -> None:
        free = self.free()
        self.world.want(free[pick % len(free)], request)

    @precondition(lambda self: self.clients("is_calling"))
    @rule(pick=_pick)
    def a_call_gets_through_or_not(self, pick: int) -> None:
        calling = self.clients("is_calling")
        self.world.answer_call(calling[pick % len(calling)])

    @precondition(lambda self: self.listeners())
    @rule(pick=_pick)
    def a_consumer_hears(self, pick: int) -> None:
        listeners = self.listeners()
        self.world.hear(listeners[pick % len(listeners)])

    @precondition(lambda self: self.clients("is_serving_self"))
    @rule(pick=_pick, is_able=st.booleans())
    def self_service_comes_out(self, pick: int, is_able: bool) -> None:
        serving = self.clients("is_serving_self")
        self.world.serve_self(serving[pick % len(serving)], is_able=is_able)

    @precondition(lambda self: self.endable())
    @rule(pick=_pick)
    def a_caller_is_done(self, pick: int) -> None:
        endable = self.endable()
        self.world.end(endable[pick % len(endable)])

    @precondition(lambda self: self.running_for())
    @rule(pick=_pick)
    def a_timer_of_a_consumer_expires(self, pick: int) -> None:
        running = self.running_for()
        self.world.expire_for(*running[pick % len(running)])

    @rule(index=st.integers(0, CLIENTS - 1))
    def a_consumer_dies(self, index: int) -> None:
        self.world.drop(index)

    # The link.

    @precondition(lambda self: self.busy_links())
    @rule(pick=_pick)
    def the_provider_hears(self, pick: int) -> None:
        links = self.busy_links()
        self.world.listen_to(links[pick % len(links)])

    @precondition(lambda self: self.under_way())
    @rule(pick=_pick)
    def a_response_is_spoilt(self, pick: int) -> None:
        parcels = self.under_way()
        parcels[pick % len(parcels)].is_spoilt = True

    # The provider and its node.

    @precondition(lambda self: self.is_up and self.world.kernel.phase is Phase.STARTING)
    @rule()
    def the_provider_is_ready(self) -> None:
        self.world.get_ready()

    @precondition(lambda self: self.is_up and self.world.lanes)
    @rule(pick=_pick, is_able=st.booleans())
    def the_backend_works(self, pick: int, is_able: bool) -> None:
        names = sorted(self.world.lanes)
        self.world.work(names[pick % len(names)], is_able=is_able)

    @precondition(lambda self: self.is_up and self.world.lanes)
    @rule(pick=_pick)
    def the_backend_begins_to_work(self, pick: int) -> None:
        names = sorted(self.world.lanes)
        self.world.begin_work(names[pick % len(names)])

    @precondition(lambda self: self.is_up and self.world.sightings)
    @rule()
    def the_backend_sees_something(self) -> None:
        self.world.observe()

    @precondition(lambda self: self.is_up and self.running())
    @rule(pick=_pick)
    def a_timer_of_the_provider_expires(self, pick: int) -> None:
        running = self.running()
        self.world.expire(*running[pick % len(running)])

    @rule(can_open=st.booleans())
    def descriptors_run_out_or_are_back(self, can_open: bool) -> None:
        self.world.can_open_descriptors = can_open

    @precondition(lambda self: self.world.lives)
    @rule(pick=_pick, is_populated=st.booleans())
    def a_scope_fills_or_empties(self, pick: int, is_populated: bool) -> None:
        names = sorted(self.world.lives)
        self.world.populate(names[pick % len(names)], is_populated=is_populated)

    @precondition(lambda self: self.world.lives)
    @rule(pick=_pick)
    def an_init_dies(self, pick: int) -> None:
        names = sorted(self.world.lives)
        self.world.kill_init(names[pick % len(names)])

    @precondition(lambda self: self.world.lives)
    @rule(pick=_pick, is_hung=st.booleans())
    def a_process_hangs_or_dies(self, pick: int, is_hung: bool) -> None:
        names = sorted(self.world.lives)
        self.world.lives[names[pick % len(names)]].is_hung = is_hung

    @precondition(lambda self: self.is_up)
    @rule()
    def the_provider_dies(self) -> None:
        self.world.crash()

    @precondition(lambda self: self.is_up and self.world.kernel.phase is not Phase.STOPPING)
    @rule()
    def the_provider_is_stopped(self) -> None:
        self.world.stop()

    @precondition(lambda self: not self.is_up)
    @rule()
    def the_provider_is_started_again(self) -> None:
        self.world.restart()

    # What is true.

    @invariant()
    def every_promise_is_kept(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if self.is_up and self.world.kernel.phase is Phase.STOPPING:
            self.world.crash()
        self.world.settle()
        self.world.check_at_rest()
        self.world.clear()
        self.world.check_at_rest()
        self.world.check_cleared()


TestPair = Pair.TestCase
TestPair.settings = settings(stateful_step_count=STEPS)
