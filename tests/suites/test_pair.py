"""A provider and its consumers keep every promise, however their world delays, loses and kills."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specs import invariants as always
from statemachine.effects import Timer
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing, SocketUnavailable
from statemachine.lifecycle import ConsumerState, NoticeState, ServiceState
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from tests.suites.pair import Client, Link, World

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT

REQUESTS: Final = (
    NamespaceRequest("a", (NET, PID, MOUNT), "tools/hello.sqfs"),
    NamespaceRequest("a", (PID,)),
    NamespaceRequest("b", (PID, NET)),
)
"""Two allocations; one of them also under another request."""

CLIENTS: Final = 3
STEPS: Final = 40
EXAMPLES_FACTOR: Final = 4
"""A step here costs microseconds: more examples than elsewhere in the same time."""

_pick: Final = st.integers(min_value=0, max_value=5)
"""Chooses among what is there now: the first at 0, so that failures shrink to the first."""


def run(world: World, client: Client, *steps: str) -> None:
    """Let named things happen to one consumer, one after the other, and hold each to the rules."""
    for step in steps:
        match step:
            case "call":
                world.answer_call(client)
            case "hear":
                world.hear(client)
            case "read" if client.link is not None:
                world.listen_to(client.link)
            case "create" | "release":
                world.work(client.kernel.request.allocation_id)
            case "answer is late":
                world.expire_for(client, Timer.ANSWER)
            case "serve itself":
                world.serve_self(client, is_able=True)
            case "end":
                world.end(client)
            case _:
                raise AssertionError(step)
        world.check()


def begin(request: NamespaceRequest = REQUESTS[0]) -> tuple[World, Client]:
    """Bring up a provider that is ready and a consumer that calls it."""
    world = World(CLIENTS)
    world.get_ready()
    return world, join(world, 0, request)


def join(world: World, index: int, request: NamespaceRequest = REQUESTS[0]) -> Client:
    world.want(index, request)
    client = world.clients[index]
    assert client is not None
    return client


def finish(world: World) -> None:
    world.settle()
    world.check_at_rest()
    world.clear()
    world.check_at_rest()
    world.check_cleared()


def test_basic_asked_created_handed_over_and_ended() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "create", "hear")
    assert client.kernel.state is ConsumerState.HELD
    run(world, client, "end", "read", "release", "hear")
    assert client.is_done
    assert (len(world.ends), len(world.releases)) == (1, 1)
    finish(world)


def test_ends_that_cross_count_as_one() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "create", "hear")
    world.populate("a", is_populated=True)
    world.populate("a", is_populated=False)
    while world.sightings:
        world.observe()
    run(world, client, "end", "release", "hear")
    assert client.kernel.state is ConsumerState.ENDED
    assert len(world.ends) == 1
    finish(world)


@pytest.mark.clause("SELF-7")
def test_an_answer_after_the_fallback_leaves_one_live_set() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "answer is late", "serve itself")
    run(world, client, "create", "hear", "read", "release", "hear")
    assert client.kernel.state is ConsumerState.SELF_HELD
    assert client.kernel.notice is NoticeState.HEARD
    assert world.lives == {}
    finish(world)


def test_a_provider_that_dies_before_the_answer_is_told_after_its_restart() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "create")
    link = client.link
    assert link is not None
    link.to_consumer.clear()
    world.crash()
    run(world, client, "hear", "serve itself")
    assert client.kernel.owes_end
    incarnation = world.lives["a"].incarnation
    finish(world)
    assert incarnation in world.ends


def test_what_was_handed_over_survives_the_provider() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "create", "hear")
    world.crash()
    run(world, client, "hear")
    assert client.kernel.state is ConsumerState.HELD
    world.restart()
    other = join(world, 1)
    world.settle()
    assert other.kernel.state is ConsumerState.HELD
    (first, again) = world.hand_overs
    assert first == again
    finish(world)


def test_a_name_in_use_again_survives_the_provider() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "create", "hear", "end", "read", "release", "hear")
    again = join(world, 0)
    run(world, again, "call", "read", "read", "create", "hear")
    world.crash()
    world.restart()
    assert list(world.kernel.states) == ["a"]
    finish(world)


@pytest.mark.clause("END-17")
def test_a_caller_who_is_done_while_its_request_waits_for_a_release_gets_no_second_set() -> None:
    world, client = begin()
    run(world, client, "call", "read", "read", "create", "hear", "end", "read")
    early = join(world, 1)
    run(world, early, "call", "read", "read", "answer is late", "read", "serve itself")
    world.settle()
    assert early.kernel.state is ConsumerState.SELF_HELD
    assert world.lives == {}
    finish(world)


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

    # Without this, half of all runs would be over before anything was handed over.
    @rule(steps=st.integers(1, 12))
    def things_take_their_course(self, steps: int) -> None:
        self.world.go_on(steps)

    # The consumers and their callers.

    @precondition(lambda self: self.free())
    @rule(pick=_pick, request=st.sampled_from(REQUESTS))
    def somebody_wants_namespaces(self, pick: int, request: NamespaceRequest) -> None:
        free = self.free()
        self.world.want(free[pick % len(free)], request)

    @precondition(lambda self: self.free())
    @rule(pick=_pick, request=st.sampled_from(REQUESTS))
    def somebody_ends_by_name(self, pick: int, request: NamespaceRequest) -> None:
        free = self.free()
        self.world.end_by_name(free[pick % len(free)], request)

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

    @precondition(lambda self: self.world.present)
    @rule(pick=_pick)
    def a_consumer_dies(self, pick: int) -> None:
        present = self.world.present
        self.world.drop(self.world.clients.index(present[pick % len(present)]))

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

    @precondition(lambda self: self.is_up and self.world.kernel.service is ServiceState.STARTING)
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

    @precondition(lambda self: self.is_up and not self.world.kernel.service.is_stopping)
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
        if self.is_up and self.world.kernel.service.is_stopping:
            self.world.crash()
        self.world.settle()
        self.world.check_at_rest()
        self.world.clear()
        self.world.check_at_rest()
        self.world.check_cleared()


TestPair = Pair.TestCase
TestPair.settings = settings(
    max_examples=EXAMPLES_FACTOR * settings().max_examples,
    stateful_step_count=STEPS,
    # Explaining a failure costs minutes here, and says less than the shrunk steps do.
    phases=[phase for phase in HypothesisPhase if phase is not HypothesisPhase.explain],
)


# --- Every invariant can fail ------------------------------------------------------------------

ASKED: Final = NamespaceRequest("a", (NET, PID))
GIVEN: Final = NamespaceResponse("a", (NET, PID))
OVER: Final = AllocationEnded("a")

BROKEN: Final[list[tuple[str, list[str]]]] = [
    ("id", always.response_answers_its_request(ASKED, NamespaceResponse("b", (NET, PID)))),
    ("order", always.response_answers_its_request(ASKED, NamespaceResponse("a", (PID, NET)))),
    ("mount", always.response_answers_its_request(ASKED, NamespaceResponse("a", (NET, PID), "/"))),
    ("kinds", always.descriptors_are_what_the_response_says((NET, PID), (PID, NET))),
    ("count", always.descriptors_are_what_the_response_says((NET, PID), (NET,))),
    ("shared", always.allocations_are_isolated({"a": [1, 2], "b": [2]})),
    ("other set", always.an_incarnation_is_one_set_of_namespaces([(1, (7,)), (1, (8,))])),
    ("reused set", always.an_incarnation_is_one_set_of_namespaces([(1, (7,)), (2, (7,))])),
    ("ended twice", always.ended_at_most_once([1, 2, 1])),
    ("released twice", always.released_at_most_once([1, 1])),
    ("released alive", always.released_only_after_its_end([1], [1])),
    ("pushed twice", always.end_is_pushed_at_most_once([(9, 1), (9, 1)])),
    ("pushed astray", always.end_is_told_only_to_whom_it_concerns([(9, 1)], [(8, 1)])),
    ("never heard", always.every_holder_has_heard([(9, 1)], [(8, 1)], [1], [9])),
    ("two sets", always.at_most_one_live_set([("c", "a")], [], [("c", "a")])),
    ("swapped", always.answers_come_in_order([("read", OVER), ("sent", GIVEN)], is_closed=False)),
    (
        "answered twice",
        always.answers_come_in_order(
            [("read", ASKED), ("sent", GIVEN), ("sent", CreationFailed("x"))], is_closed=False
        ),
    ),
    (
        "somebody else's id",
        always.answers_come_in_order(
            [("read", OVER), ("sent", AllocationNotFound("b"))], is_closed=False
        ),
    ),
    ("unanswered", always.every_message_is_answered([("read", ASKED), ("sent", OVER)])),
    ("after the close", always.nothing_follows_a_close(["sent", "closed", "sent"])),
    ("moved", always.an_error_changes_nothing(1, 2)),
]


@pytest.mark.parametrize(("name", "finding"), BROKEN, ids=[name for name, _ in BROKEN])
def test_an_invariant_sees_when_it_is_broken(name: str, finding: list[str]) -> None:
    assert len(finding) == 1
    with pytest.raises(always.InvariantBroken):
        always.require([], finding)


def test_no_invariant_forbids_what_is_right() -> None:
    history: list[always.Spoken] = [
        ("read", ASKED),
        ("read", AllocationEnded("nobody")),
        ("sent", GIVEN),
        ("sent", OVER),
        ("sent", AllocationNotFound("nobody")),
        ("read", OVER),
        ("sent", OVER),
        ("read", None),
        ("sent", FdPassing("unreadable")),
    ]
    assert always.told_unasked(history) == ["a"]
    assert always.unanswered(history) == []
    farewell: list[always.Spoken] = [("sent", SocketUnavailable("user 7 may not"))]
    always.require(
        always.answers_come_in_order(history, is_closed=True),
        always.answers_come_in_order(farewell, is_closed=True),
        always.every_message_is_answered(history),
        always.nothing_follows_a_close(["sent", "closed"]),
        always.response_answers_its_request(ASKED, GIVEN),
        always.descriptors_are_what_the_response_says((), ()),
        always.an_incarnation_is_one_set_of_namespaces([(1, (7,)), (1, (7,)), (2, (8,)), (3, ())]),
        always.every_holder_has_heard([(9, 1), (8, 1), (9, 2)], [(9, 1)], [1], [9]),
        always.at_most_one_live_set([("c", "a"), ("d", "b")], ["c"], [("c", "a")]),
        always.an_error_changes_nothing((1,), (1,)),
    )


def test_the_harness_sees_a_provider_that_says_everything_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, client = begin()
    once = World._send

    def twice(self: World, link: Link, parcel: Any) -> None:
        once(self, link, parcel)
        once(self, link, parcel)

    monkeypatch.setattr(World, "_send", twice)
    with pytest.raises(always.InvariantBroken):
        run(world, client, "call", "read", "read", "create")
