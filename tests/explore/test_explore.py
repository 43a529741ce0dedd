"""Every world within small bounds keeps every promise; and the search would say if one did not."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar, Final

import pytest

from specs.invariants import InvariantBroken
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect, Timer
from statemachine.events import Event
from statemachine.lifecycle import ALLOCATION, CONSUMER, NOTICE, TABLES
from statemachine.provider import Limits, ProviderKernel
from statemachine.provider.models import Service
from statemachine.provider.state import State
from statemachine.snapshots import ProviderSnapshot
from statemachine.states import AllocationState, NoticeState
from statemachine.table import Row, Table, compile_table
from statemachine.testing.explore import (
    Bounds,
    Counterexample,
    Explorer,
    Move,
    Result,
    Violation,
    only,
)
from statemachine.testing.kit import all_rows
from tests.campaign import explore_campaign
from tests.campaign.outcome import Outcome
from tests.campaign.report_summary import BEYOND
from tests.explore.spaces import LARGE, SPACES, TWO_BY_TWO, A, B
from transport.testing.explored import trace_of
from transport.trace import read_lines
from transport.trace.check import ImpossibleLine, Replay
from transport.trace.diagram import sequence_diagram

SITUATIONS: Final = {
    *(f"{error} reaches a consumer" for error in ("CreationFailed", "AllocationNotFound")),
    *(f"{error} reaches a consumer" for error in ("SocketUnavailable", "FdPassing")),
    *(f"an end is read of what is {state.value}" for state in AllocationState),
    *(f"a request is read for what is {state.value}" for state in AllocationState),
    "a creation is overtaken by the end",
    "an answer after the fallback",
    "an end is pushed",
    "another request",
    "descriptors cannot be had",
    "ends cross",
    "fallback: FdPassing",
    "fallback: SocketUnavailable",
    "remains are found",
    "the provider says what it may not say now",
    "what was created is adopted",
    "what was handed off is adopted",
}


COVERED: Final = (
    "a stranger who does not wait for answers, and a crash",
    "two consumers who want different things",
    "two consumers, one connection lost",
    "two consumers, one fault",
)
"""Spaces that have no row and no situation that smaller ones have not."""

QUICK: Final = [name for name, space in SPACES.items() if space.seconds < 5 and name not in COVERED]
"""The spaces that are explored in every run of the tests; they have all rows and situations."""


@cache
def explored(name: str) -> Result:
    """A space, explored to its end; this is where a broken promise shows."""
    return Explorer(SPACES[name].bounds).explore()


def all_of(attribute: str) -> set[Any]:
    return set().union(*(getattr(explored(name), attribute) for name in QUICK))


def expect_whole(name: str) -> None:
    result = explored(name)
    assert result.is_complete
    assert result.states >= SPACES[name].states
    assert result.at_rest > 0


# One test, so that one process explores each of them once.
def test_basic_every_world_keeps_every_promise() -> None:
    for name in QUICK:
        expect_whole(name)
    beyond = {(table, event, state) for table, state, event in BEYOND}
    assert all_rows(*TABLES) - all_of("rows") == beyond
    assert all_of("seen") == SITUATIONS
    # The provider dies between every two effects.
    moments = all_of("moments")
    assert {after for _, after in moments} == set(OF_A_PROVIDER)
    assert moments - all_of("cuts") == set()


@pytest.mark.deep("explore")
@pytest.mark.parametrize("name", [name for name in SPACES if name not in QUICK])
def test_every_world_of_a_larger_space_keeps_every_promise(name: str) -> None:
    expect_whole(name)


def test_they_are_enough_worlds() -> None:
    assert sum(space.states for space in SPACES.values()) >= 200_000


OF_A_PROVIDER: Final = (
    do.AnnounceEnd,
    do.CloseConnection,
    do.CreateNamespaces,
    do.HandOver,
    do.RecordHandoff,
    do.Refuse,
    do.ReleaseNamespaces,
    do.StartTimer,
    do.StopTimer,
    do.Watch,
)

ONE: Final = Bounds()
ONE_CRASH: Final = Bounds(crashes=1)
SMALL: Final = Bounds(consumers=2, requests=(A, B), without=only("want", "end"))


def test_the_same_space_is_the_same_each_time() -> None:
    assert Explorer(SMALL).explore() == Explorer(SMALL).explore()


def test_names_are_all_that_symmetry_leaves_out() -> None:
    few, many = Explorer(SMALL).explore(), Explorer(SMALL, has_symmetry=False).explore()
    assert many.states > 3 * few.states
    assert few.rows == many.rows


def test_the_model_beside_the_kernels_hardly_adds_worlds() -> None:
    alone, beside = Explorer(ONE, lockstep=False).explore(), Explorer(ONE).explore()
    assert alone.states <= beside.states <= 1.1 * alone.states
    assert alone.rows == beside.rows


def test_progress_is_told_and_a_search_can_be_cut_short() -> None:
    told: list[tuple[int, int]] = []
    result = Explorer(ONE_CRASH).explore(
        states_max=100, progress=lambda found, waiting: told.append((found, waiting))
    )
    assert told
    assert not result.is_complete


def test_without_losses_first_an_end_misses_what_waits_on_a_lost_connection() -> None:
    """
    A second set may live until the provider notices the loss, and then for the claim timeout.

    A consumer's request waits for a release on a connection that is lost; the consumer serves
    itself, calls again and says its end, which is read before the loss is. The end is confirmed,
    and the waiting request begins a new life for none. Hence the rule that losses come first,
    which drivers keep, and with which no promise is broken here: "two consumers, one connection
    lost" is this space. Without the rule this is a shortest script.
    """
    apart = Bounds(
        consumers=2,
        connections=3,
        faults=1,
        without=only("want", "end", "lose"),
        has_losses_first=False,
    )
    asked: list[Move] = [
        *(("ready",), ("want", 0, 0), ("want", 1, 0), ("connect", 0), ("read", 1), ("read", 1)),
        *(("work", 0), ("connect", 1), ("read", 2), ("end", 0), ("read", 1), ("read", 2)),
        *(("lose", 2), ("hear", 1), ("connect", 1), ("read", 3), ("read", 3), ("work", 0)),
    ]
    Explorer(apart).replay(asked)
    with pytest.raises(InvariantBroken, match="has a twice"):
        Explorer(apart).replay([*asked, ("hear", 1)])


# --- A mutant of each kind is found ------------------------------------------------------------


def changed(
    table: Table,
    event: type[Event],
    *sources: Any,
    without: Any = None,
    plus: tuple[Any, ...] = (),
    to: Any = None,
) -> Table:
    """Make a table that differs in some rows."""
    rows = []
    for row in table.rows:
        if row.event is event and (not sources or row.source in sources):
            then = tuple(order for order in row.effects if order != without)
            row = Row(event, row.source, to or row.target, (*then, *plus))
        rows.append(row)
    return compile_table(table.name, rows, initial=table.initial, finals=table.finals)


class TellsTwice(ProviderKernel):
    def receive(self, event: Event) -> tuple[Effect, ...]:
        found: list[Effect] = []
        for effect in super().receive(event):
            found += [effect] * (1 + isinstance(effect, do.AnnounceEnd))
        return tuple(found)


def dispatch_all_but_one(state: State, service: Service, cause: object) -> None:
    del service.held[-1:]
    ProviderKernel.orders[do.DispatchHeld](state, service, cause)


class ForgetsWaiters(ProviderKernel):
    orders: ClassVar[Any] = {**ProviderKernel.orders, do.DispatchHeld: dispatch_all_but_one}


class AnswersTheLastFirst(ProviderKernel):
    def receive(self, event: Event) -> tuple[Effect, ...]:
        kinds = (do.Refuse, do.HandOver, do.AnnounceEnd)
        effects = super().receive(event)
        answers = [effect for effect in effects if isinstance(effect, kinds)]
        return tuple(answers.pop() if isinstance(e, kinds) else e for e in effects)


class ForgetsNames(ProviderKernel):
    @classmethod
    def restore(cls, snapshot: ProviderSnapshot, limits: Limits | None = None) -> ProviderKernel:
        return super().restore(snapshot._replace(remembered=()), limits)


class ChangesOnError(ConsumerKernel):
    def receive(self, event: Event) -> tuple[Effect, ...]:
        try:
            return super().receive(event)
        except Exception:
            self._state.timers.add(Timer.REDIAL)
            raise


class TellsAStranger(ProviderKernel):
    """Tells of the end the one that connected last, too."""

    def receive(self, event: Event) -> tuple[Effect, ...]:
        effects = super().receive(event)
        last = max(self._state.connections, default=0)
        ends = {e.allocation_id for e in effects if isinstance(e, do.AnnounceEnd)}
        told = {e.connection for e in effects if isinstance(e, do.AnnounceEnd)}
        is_open = last > 1 and last not in told
        return (*effects, *(do.AnnounceEnd(last, name) for name in ends if is_open))


def edited(table: Table, *args: Any, **kwargs: Any) -> dict[str, Any]:
    other = changed(table, *args, **kwargs)
    return {"tables": tuple(other if t is table else t for t in (ALLOCATION, CONSUMER, NOTICE))}


S: Final = AllocationState
PAIR: Final = Bounds(consumers=2, without=only("want", "end", "crash"))

MUTANTS: Final[dict[str, tuple[Bounds, dict[str, Any], str, int]]] = {
    "a repeated request is not answered": (
        PAIR,
        edited(ALLOCATION, on.RequestRepeated, S.CREATED, S.HANDED_OFF, without=do.GrantAskers),
        "never answered|consumer is asking",
        12,
    ),
    "the end is announced twice": (
        ONE,
        {"provider": TellsTwice},
        "told of the end of a|was told 2 times|answered",
        11,
    ),
    "it is released before its end": (
        ONE,
        edited(ALLOCATION, on.ResponseSent, S.CREATED, plus=(do.ReleaseNamespaces,)),
        "before its end",
        6,
    ),
    "a waiter is forgotten": (
        ONE,
        {"provider": ForgetsWaiters},
        "never answered|consumer is asking",
        5,
    ),
    "the claim timer is not stopped": (
        replace(PAIR, crashes=1),
        edited(ALLOCATION, on.RequestRepeated, without=do.stop(Timer.CLAIM)),
        "runs in vain",
        15,
    ),
    "answers come out of order": (
        ONE,
        {"provider": AnswersTheLastFirst},
        "told of the end of a|was answered by",
        9,
    ),
    "remains are not released": (
        replace(ONE, crashes=1),
        edited(ALLOCATION, on.RemainsFound, without=do.ReleaseNamespaces),
        "before it is durable",
        13,
    ),
    "nothing is owed after a deadline": (
        ONE,
        edited(CONSUMER, on.AnswerOverdue, without=do.OweEnd),
        "twice|wrong|nothing is",
        3,
    ),
    "a late answer's descriptors are kept": (
        ONE,
        edited(CONSUMER, on.ResponseReceived, without=do.DiscardDescriptors),
        "neither delivered nor discarded",
        9,
    ),
    "no consumer calls again": (
        replace(ONE, crashes=1),
        edited(NOTICE, on.ProviderUnreachable, without=do.start(Timer.REDIAL)),
        "owes an end|consumer is ending",
        9,
    ),
    "a confirmation is not taken": (
        Bounds(without=only("want", "end", "overdue")),
        edited(NOTICE, on.EndAnnounced, plus=(do.start(Timer.REDIAL),), to=NoticeState.OWED),
        "comes to rest|twice|does not run",
        20,
    ),
    "a kernel cannot be restored": (ONE, {"provider": ForgetsNames}, "does not restore", 9),
    "an error leaves a trace": (
        replace(ONE, faults=1),
        {"consumer": ChangesOnError},
        "an error changed",
        12,
    ),
}


def broken(name: str, **more: Any) -> Counterexample:
    """A mutant's counterexample."""
    bounds, mutation, finding, _ = MUTANTS[name]
    with pytest.raises(Counterexample, match=finding if more else None) as caught:
        Explorer(bounds, **mutation, **more).explore()
    return caught.value


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_breaks_a_promise_by_a_shortest_script(name: str) -> None:
    bounds, mutation, _, length = MUTANTS[name]
    caught = broken(name, lockstep=False)
    assert len(caught.script) <= length
    assert "sequenceDiagram" in caught.chart
    # The script does it again, if it ends with something that must not be.
    if "comes to rest" not in caught.finding:
        with pytest.raises((Violation, InvariantBroken)):
            Explorer(bounds, lockstep=False, **mutation).replay(caught.script)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_model_sees_a_mutant_no_later(name: str) -> None:
    assert len(broken(name).script) <= MUTANTS[name][3]


# --- A counterexample is told in three ways ----------------------------------------------------


def test_a_counterexample_is_a_test_that_fails() -> None:
    name = "the claim timer is not stopped"
    program = broken(name).test.replace("Explorer(", "Mutant(")
    told: dict[str, Any] = {"Mutant": partial(Explorer, **MUTANTS[name][1])}
    exec(program, told)
    with pytest.raises((Violation, InvariantBroken)):
        told["test_counterexample"]()


def test_a_counterexample_calls_each_by_one_name() -> None:
    """The search numbers connections anew and changes names; who reads a script must not see it."""
    with pytest.raises(Counterexample) as caught:
        Explorer(SMALL, provider=TellsAStranger).explore()
    assert {move[1] for move in caught.value.script if move[0] == "read"} == {1, 2}
    assert {move[1] for move in caught.value.script if move[0] == "want"} == {0, 1}
    with pytest.raises((Violation, InvariantBroken)):
        Explorer(SMALL, provider=TellsAStranger).replay(caught.value.script)


# It decides as it should; only this search sees that it would not after a restart.
SILENT: Final = "a kernel cannot be restored"
BY_THE_PROVIDER: Final = [
    name
    for name, (_, m, _, _) in MUTANTS.items()
    if name != SILENT and ("provider" in m or m.get("tables", TABLES)[0] is not ALLOCATION)
]


@pytest.mark.parametrize("name", BY_THE_PROVIDER)
def test_the_trace_of_a_counterexample_is_refused_at_its_last_event(name: str) -> None:
    lines = trace_of(broken(name)).splitlines(keepends=True)
    with pytest.raises(ImpossibleLine, match="has other effects") as refusal:
        Replay().take_all(lines)
    assert refusal.value.line == len(lines)


def test_the_trace_of_a_sound_provider_is_possible() -> None:
    """A consumer's bug is none of the provider's: what the provider did can have happened."""
    lines = trace_of(broken("a late answer's descriptors are kept")).splitlines(keepends=True)
    assert len(lines) > 3
    Replay().take_all(lines)
    drawn = sequence_diagram(entry for _, _, entry in read_lines(lines))
    assert any("NamespaceRequest" in line for line in drawn)


# --- A campaign --------------------------------------------------------------------------------


def test_a_campaign_shows_what_was_explored() -> None:
    names = {task.name for task in explore_campaign.tasks(1.0)}
    assert names < {task.name for task in explore_campaign.tasks(2.0)} == {*SPACES, *LARGE}
    assert any(explore_campaign.ALL[name].bounds == TWO_BY_TWO for name in names)
    outcome = explore_campaign.run(0, "a request twice")
    assert outcome.rows[0]["complete"] == "yes"
    assert outcome.figures["worlds"] >= SPACES["a request twice"].states
    cells = {f"{table} {state} {event}" for table, event, state in all_rows(*TABLES)}
    assert {*outcome.cells["explorer"]} <= cells
    assert min(outcome.cells["explorer"].values()) > 0
    assert Outcome.of_json(json.loads(json.dumps(outcome.as_json()))) == outcome


def test_a_campaign_tells_of_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mutation, _, _ = MUTANTS["a waiter is forgotten"]
    monkeypatch.setattr(explore_campaign, "Explorer", partial(Explorer, **mutation))
    (found,) = explore_campaign.run(0, "two allocations").discoveries
    assert "def test_counterexample" in found.script
    assert '"event":{"ProviderReady"' in found.script
    assert found.diagram.startswith("sequenceDiagram")


def test_a_finding_comes_out_of_another_process_as_what_it_was() -> None:
    """Spaces may be explored in a pool; a finding that could not be sent would be lost."""
    found = broken("the end is announced twice")
    copy = pickle.loads(pickle.dumps(found))
    assert (str(copy), copy.script) == (str(found), found.script)
