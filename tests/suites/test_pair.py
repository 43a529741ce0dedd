"""A provider and its consumers keep every promise, however their world delays, loses and kills.

The worlds are the explorer's. It visits all within narrow bounds; here they are wide, with more
consumers, requests and faults than can be visited, and are walked through at random. No model is
beside the kernels: what is asked is whether the promises alone show a mistake.
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import Phase as HypothesisPhase
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from specs import invariants as always
from statemachine.errors import AllocationNotFound, CreationFailed, FdPassing, SocketUnavailable
from statemachine.messages import (
    AllocationEnded,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from statemachine.states import ConsumerState, NoticeState
from statemachine.testing.explore import BY_ITSELF, Bounds, Explorer, Move
from statemachine.testing.explore.explorer import _first, _make, _moves
from statemachine.testing.explore.liveness import check_at_rest
from statemachine.testing.explore.server import may_crash
from statemachine.testing.explore.world import NOTHING

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT

REQUESTS: Final = (
    NamespaceRequest("a", (NET, PID, MOUNT)),
    NamespaceRequest("a", (PID,)),
    NamespaceRequest("b", (PID, NET)),
)
"""Two allocations; one of them also under another request."""

WIDE: Final = Bounds(
    consumers=3,
    requests=REQUESTS,
    requests_each=None,
    connections=6,
    crashes=None,
    faults=None,
    without=frozenset({"duplicate"}),
)
STEPS: Final = 40
EXAMPLES_FACTOR: Final = 4
"""A step here costs microseconds: more examples than elsewhere in the same time."""

STEPS_TO_REST_MAX: Final = 300
"""More steps than any world here needs to come to rest once nothing fails any more."""

_pick: Final = st.integers(min_value=0, max_value=63)
"""Chooses among what may happen now: the first at 0, so that failures shrink to the first."""


class Pair(RuleBasedStateMachine):
    """What each party may do at any time; the world says what there is to do."""

    def __init__(self) -> None:
        super().__init__()
        self.setting = Explorer(WIDE, lockstep=False)._setting
        self.world = _first(self.setting)

    def moves(self, *kinds: str) -> list[Move]:
        """List what may happen now, of these kinds or, if there are none, of all."""
        moves = _moves(self.setting, self.world)
        return [move for move in moves if not kinds or move[0] in kinds]

    def make(self, move: Move) -> None:
        """Make a move, which must keep every promise."""
        note(str(move))
        self.world = _make(self.setting, self.world, move)

    # Without this, half of all runs would be over before anything was handed over.
    @rule(steps=st.integers(1, 12))
    def things_take_their_course(self, steps: int) -> None:
        for _ in range(steps):
            for move in self.moves(*BY_ITSELF)[:1]:
                self.make(move)

    @rule(pick=_pick)
    def something_happens(self, pick: int) -> None:
        """Of one kind first, so that what can happen in many ways does not crowd out the rest."""
        kinds = sorted({move[0] for move in self.moves()})
        moves = self.moves(kinds[pick % len(kinds)])
        self.make(moves[pick // len(kinds) % len(moves)])

    @precondition(lambda self: may_crash(self.setting, self.world.server) and self.moves("read"))
    @rule(pick=_pick, effects=st.integers(0, 3))
    def the_provider_dies_on_the_way(self, pick: int, effects: int) -> None:
        reads = self.moves("read")
        self.make(("crash in", effects, *reads[pick % len(reads)]))

    def settle(self) -> None:
        """Let nothing fail any more, and go on until nothing happens; then all must be well."""
        for _ in range(STEPS_TO_REST_MAX):
            moves = self.moves(*BY_ITSELF)
            if not moves:
                break
            self.make(moves[0])
        assert not moves, "it never comes to rest"
        check_at_rest(self.setting, self.world.server, self.world.clients)

    def clear(self) -> None:
        """Let every consumer go and nothing be claimed; afterwards nothing is left."""
        while moves := self.moves("die", "empty"):
            self.make(moves[0])
        self.settle()
        while moves := self.moves("expire"):
            self.make(moves[0])
        self.settle()
        assert not any(node.life or node.jobs or node.timers for node in self.world.server.nodes)

    def teardown(self) -> None:
        self.settle()
        self.clear()


TestPair = Pair.TestCase
TestPair.settings = settings(
    max_examples=EXAMPLES_FACTOR * settings().max_examples,
    stateful_step_count=STEPS,
    # Explaining a failure costs minutes here, and says less than the shrunk steps do.
    phases=[phase for phase in HypothesisPhase if phase is not HypothesisPhase.explain],
)


# --- By example ---------------------------------------------------------------------------------

UNDER_WAY: Final[tuple[Move, ...]] = (
    ("ready",),
    ("want", 0, 0),
    ("connect", 0),
    ("read", 1),
    ("read", 1),
)


def replay(*moves: Move) -> tuple[ConsumerState, NoticeState, list[int]]:
    """Let things happen; say where the last consumer that asked is, and what is on the node."""
    explorer = Explorer(WIDE)
    world = explorer.replay(moves)
    views = [explorer._setting.kernels.consumer_views[client.kernel] for client in world.clients]
    *_, view = [view for view in views if view is not None]
    return view.hold, view.notice, [node.life for node in world.server.nodes]


@pytest.mark.clause("SELF-7")
def test_an_answer_after_the_fallback_leaves_one_live_set() -> None:
    late = [("overdue", 0, "answer"), ("serve self", 0), ("work", 0), ("hear", 0)]
    ended = [("read", 1), ("work", 0), ("hear", 0)]
    own_alone = (ConsumerState.SELF_HELD, NoticeState.HEARD, [NOTHING, NOTHING])
    assert replay(*UNDER_WAY, *late, *ended) == own_alone


@pytest.mark.clause("END-17")
def test_a_caller_who_is_done_while_its_request_waits_for_a_release_gets_no_second_set() -> None:
    ending = [("work", 0), ("hear", 0), ("end", 0), ("read", 1)]
    early = [("want", 1, 0), ("connect", 1), ("read", 2), ("read", 2), ("overdue", 1, "answer")]
    rest = [("read", 2), ("serve self", 1), ("work", 0), ("hear", 0), ("hear", 1), ("hear", 1)]
    own_alone = (ConsumerState.SELF_HELD, NoticeState.HEARD, [NOTHING, NOTHING])
    assert replay(*UNDER_WAY, *ending, *early, *rest) == own_alone


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
    ("permuted", always.answers_come_in_order([("read", OVER), ("sent", GIVEN)], is_closed=False)),
    (
        "answered twice",
        always.answers_come_in_order(
            [("read", ASKED), ("sent", GIVEN), ("sent", CreationFailed("x"))], is_closed=False
        ),
    ),
    (
        "the id of another",
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
    closing: list[always.Spoken] = [("sent", SocketUnavailable("user 7 may not"))]
    always.require(
        always.answers_come_in_order(history, is_closed=True),
        always.answers_come_in_order(closing, is_closed=True),
        always.every_message_is_answered(history),
        always.nothing_follows_a_close(["sent", "closed"]),
        always.response_answers_its_request(ASKED, GIVEN),
        always.descriptors_are_what_the_response_says((), ()),
        always.an_incarnation_is_one_set_of_namespaces([(1, (7,)), (1, (7,)), (2, (8,)), (3, ())]),
        always.every_holder_has_heard([(9, 1), (8, 1), (9, 2)], [(9, 1)], [1], [9]),
        always.at_most_one_live_set([("c", "a"), ("d", "b")], ["c"], [("c", "a")]),
        always.an_error_changes_nothing((1,), (1,)),
    )
