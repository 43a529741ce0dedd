"""Invariants by induction: proved of a relation, which is the kernel's, and none in vain."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from functools import cache
from typing import Any, ClassVar, Final

import pytest

from specs._build import refresh
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import KernelOrder, Timer
from statemachine.events import Event, LocalEvent, PeerEvent
from statemachine.lifecycle import ALLOCATION, CONSUMER, NOTICE
from statemachine.messages import NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.provider import ProviderKernel
from statemachine.provider.models import Allocation, Message
from statemachine.provider.state import State
from statemachine.states import AllocationState
from statemachine.table import Row, Table, compile_table
from statemachine.testing.explore import Counterexample, Explorer
from statemachine.testing.induction.allocation import INVARIANTS, VARIABLES, relation_of
from statemachine.testing.induction.observed import Comparer
from statemachine.testing.induction.proof import Proof, Prover
from statemachine.testing.induction.relation import (
    ACTING,
    Declared,
    Execution,
    Invariant,
    Relation,
    Transition,
    obligations,
    occurrences_of,
)
from statemachine.testing.induction.terms import (
    FALSE,
    TRUE,
    Sort,
    all_of,
    any_of,
    choice,
    compiled,
    every,
    negated,
    some,
)
from statemachine.testing.induction.variants import Variant, variants, without_order
from statemachine.testing.kit.mutants import edited
from tests.explore.spaces import SPACES, Space

NAMES: Final = [invariant.name for invariant in INVARIANTS]

WIDE: Final = SPACES["a stranger, one fault, any number of crashes"]
"""The space in which most rows are taken."""

COMPARED: Final = (
    "a stranger, one fault, any number of crashes",
    "a stranger who does not wait for answers, any number of crashes",
    "a stranger who floods, among few",
    "a request twice",
    "a response that is spoiled",
    "adopted, and asked for and ended before it is ready",
    "two allocations",
    "two consumers, one fault",
    "two consumers who want different things",
)
"""Spaces that make every transition that larger ones make, in the least time."""


@cache
def relation() -> Relation:
    return relation_of()


@cache
def observed() -> Comparer:
    """What the kernels of all compared spaces did; this is where a difference shows."""
    comparer = Comparer(relation())
    for name in COMPARED:
        explore(comparer, SPACES[name])
    return comparer


def explore(comparer: Comparer, space: Space, provider: type[ProviderKernel] | None = None) -> None:
    kernel = comparer.kernel(provider or ProviderKernel)
    # The model would find most of what is found here, and is left out so that it does not.
    Explorer(space.bounds, provider=kernel, lockstep=False, also=comparer.check_world).explore()


# --- The proof ---------------------------------------------------------------------------------


def test_basic_every_obligation_is_discharged() -> None:
    proof = Prover(relation(), INVARIANTS).prove()

    assert [str(each) for each in proof.refuted] == []
    assert proof.is_complete
    assert proof.discharged == len(list(obligations(relation(), INVARIANTS))) > 1700


def test_it_is_a_proof_of_something() -> None:
    prover = Prover(relation(), INVARIANTS)

    assert prover.are_consistent()
    made = [t for t in relation().transitions if t.is_made]
    assert [t.name for t in made if not prover.is_possible(t)] == []


def test_every_row_is_in_the_relation() -> None:
    taken = {row for transition in relation().transitions for row in transition.rows}

    assert taken == {(row.event, row.source) for row in ALLOCATION.rows}


@pytest.mark.parametrize("variant", variants(), ids=lambda v: f"{v.breaks}: {v.says}")
def test_a_broken_variant_is_refuted(variant: Variant) -> None:
    sound = set(relation().transitions)
    prover, proof = Prover(variant.relation, INVARIANTS), Proof()
    for one in obligations(variant.relation, INVARIANTS):
        if one.invariant == variant.breaks and one.transition not in sound:
            prover.judge(one, proof)

    assert proof.refuted != []
    assert proof.undecided == []


def test_every_invariant_has_a_variant_that_breaks_it() -> None:
    assert {variant.breaks for variant in variants()} >= set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


def test_a_counterexample_can_be_read() -> None:
    (variant,) = (v for v in variants() if v.says.startswith("InitDied") or v.breaks == "response")
    proof = Prover(variant.relation, INVARIANTS).prove()

    (refuted,) = [each for each in proof.refuted if each.obligation.invariant == "response"]
    heading, before, event, after = str(refuted).splitlines()
    assert heading == "response does not hold"
    assert before.startswith("before: state requested; being_made; creations 1")
    assert event == "event:  NamespacesNotCreated: NamespacesNotCreated in requested"
    assert after.startswith("after:  state created")


def test_z3_is_imported_only_for_a_proof() -> None:
    program = "import sys, statemachine.testing.induction.observed; print('z3' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


# --- The relation and the kernel ---------------------------------------------------------------


def test_basic_every_step_of_the_kernel_is_a_transition() -> None:
    comparer = observed()

    assert comparer.rows == {(row.event, row.source) for row in ALLOCATION.rows}
    assert sum(comparer.taken.values()) > 5_000
    assert comparer.states > 20_000


AT_ONCE: Final = {
    "a connection is being closed",
    "an answer's turn comes",
    "a hand-over is lost with its connection",
    "the name is forgotten",
}
"""What may follow in the same step, and is looked at apart; or is nothing to a kernel."""


def test_transitions_that_no_kernel_makes_are_known() -> None:
    made = {t.name for t in relation().transitions if t.is_made}
    left = made - set(observed().taken) - AT_ONCE

    # Of the requests whose turn comes together, the first is admitted, and the rest are the same or
    # others; nothing comes in between, which the relation does not say.
    assert {name.partition(":")[0] for name in left} == {"a deferred request's turn comes"}


@pytest.mark.parametrize(
    ("event", "state", "order"),
    [
        (on.RequestRepeated, AllocationState.CREATED, do.AddAsker),
        (on.NamespacesReleased, AllocationState.ENDED, do.PushEnd),
        (on.ReleaseOverdue, AllocationState.ENDED, do.FailAllAskers),
        (on.RetryDue, AllocationState.ENDED, do.ReleaseNamespaces),
    ],
)
def test_a_relation_that_is_not_the_kernels_is_noticed(
    event: type[Event], state: AllocationState, order: Any
) -> None:
    other = relation_of(without_order(ALLOCATION, event, state, order))

    with pytest.raises(Counterexample, match=r", not "):
        explore(Comparer(other), WIDE)


def not_withdrawn(state: State, allocation: Allocation, _: object) -> None:
    """Leave everything as it is."""


def not_deferred(state: State, allocation: Allocation, message: Message) -> None:
    state.fire_message(message, on.MessageDeferred)


def not_counted(state: State, allocation: Allocation, message: Message) -> None:
    """Do what is right, and lose count of it."""
    ProviderKernel.orders[do.AddAsker](state, allocation, message)
    state.usage[0].messages += 1


def told_early(state: State, allocation: Allocation, _: object) -> None:
    state.effects.append(do.ReleaseNamespaces(allocation.allocation_id))
    allocation.is_announced = True


@pytest.mark.parametrize(
    ("order", "handler"),
    [
        (do.WithdrawDeferred, not_withdrawn),
        (do.CheckClaim, not_withdrawn),
        (do.DeferRequest, not_deferred),
        (do.ReleaseNamespaces, told_early),
        (do.AddAsker, not_counted),
    ],
)
def test_a_kernel_that_does_something_else_is_noticed(order: Any, handler: Any) -> None:
    class Broken(ProviderKernel):
        orders: ClassVar = {**ProviderKernel.orders, order: handler}

    with pytest.raises(Counterexample, match=r", not |, the relation "):
        explore(Comparer(relation()), WIDE, Broken)


@pytest.mark.parametrize(
    ("breaks", "event", "state", "order"),
    [
        ("waiting ends", on.ReleaseOverdue, AllocationState.ENDED, do.AnswerEnd),
        ("waiting", on.NamespacesCreated, AllocationState.REQUESTED, do.GrantAskers),
        ("claim timer", on.NamespacesCreated, AllocationState.REQUESTED, do.CheckClaim),
        ("told at all", on.NamespacesReleased, AllocationState.ENDED, do.PushEnd),
    ],
)
def test_what_breaks_an_invariant_in_the_proof_breaks_it_in_a_kernel(
    breaks: str, event: type[Event], state: AllocationState, order: Any
) -> None:
    broken = without_order(ALLOCATION, event, state, order)
    invariants = [each for each in INVARIANTS if each.name == breaks]
    comparer = Comparer(relation_of(broken), invariants)

    with pytest.raises(Counterexample, match=f"{breaks} does not hold"):
        Explorer(
            WIDE.bounds,
            provider=comparer.kernel(),
            tables=(broken, CONSUMER, NOTICE),
            lockstep=False,
            also=comparer.check_world,
        ).explore()


@pytest.mark.clause("END-24")
def test_a_hand_over_that_is_reported_too_late_makes_the_end_be_pushed_twice() -> None:
    """Why `HandOver` says when to report it; the proof needs it in the same two places."""
    request = NamespaceRequest("a", (NamespaceType.NET,))
    kernel = ProviderKernel()
    sent = [
        effect
        for event in (
            on.ProviderReady(),
            on.ConnectionOpened(1, 0),
            on.RequestReceived(1, request),
            on.RequestReceived(1, request),
            on.NamespacesCreated("a", NamespaceResponse("a", request.namespaces)),
            on.ResponseSent("a", 1),
            on.InitDied("a"),
            on.ReleaseOverdue("a"),
            on.ResponseSent("a", 1),
            on.NamespacesReleased("a"),
        )
        for effect in kernel.receive(event)
    ]

    assert sent.count(do.AnnounceEnd(1, "a")) == 2


def test_the_book_lists_every_invariant() -> None:
    drawn = refresh.refreshed("<!-- generated: invariants allocation -->\n<!-- end -->")

    assert [name for name in NAMES if f"| {name} |" not in drawn] == []


# --- Formulas ----------------------------------------------------------------------------------


def test_basic_a_formula_means_the_same_in_python() -> None:
    now = Relation(LEASE, LEASES, orders=LEASE_ORDERS, occurrences={}, timers=LEASE_TIMERS).before()
    wants = now["wants"]
    values = {"wants": {1: True, 2: False}, "expiry": True}

    assert compiled(some(wants))(values, [1, 2])
    assert not compiled(every(wants))(values, [1, 2])
    assert compiled(every(wants))(values, [])
    assert not compiled(every(lambda c: wants(c).implies(every(wants))))(values, [1, 2])
    assert compiled(choice(now["expiry"], 3, 4))(values, []) == 3


def test_what_is_plain_is_decided_at_once() -> None:
    assert all_of(TRUE, TRUE) == TRUE
    assert any_of(FALSE, TRUE, ACTING.equals(ACTING)) == TRUE
    assert negated(negated(ACTING.equals(ACTING))) == TRUE
    assert every(lambda c: c.equals(c)) == TRUE


# --- Another table: a lease, which one of any number of clients has ------------------------------


class LeaseState(Enum):
    FREE = "free"
    TAKEN = "taken"
    CLOSED = "closed"


class LeaseAsked(PeerEvent):
    pass


class LeaseRenewed(PeerEvent):
    pass


class LeaseReturned(PeerEvent):
    pass


class LeaseExpired(LocalEvent):
    pass


class LeaseClosed(LocalEvent):
    pass


class Give(KernelOrder):
    pass


class Take(KernelOrder):
    pass


def lease(*, returned: tuple[Any, ...] = (Take, do.stop(Timer.CLAIM))) -> Table:
    free, taken, closed = LeaseState
    return compile_table(
        "lease",
        (
            Row(LeaseAsked, free, taken, (Give, do.start(Timer.CLAIM))),
            Row(LeaseAsked, taken, taken),
            Row(LeaseRenewed, taken, taken, (do.start(Timer.CLAIM),)),
            Row(LeaseReturned, taken, free, returned),
            Row(LeaseExpired, taken, free, (Take,)),
            Row(LeaseClosed, free, closed),
        ),
        initial=free,
        finals=(closed,),
    )


LEASE: Final = lease()
LEASES: Final = (
    Declared("wants", is_of_each=True),
    Declared("has", is_of_each=True),
    Declared("renewals", Sort.COUNT, is_of_each=True),
    Declared("expiry"),
)
LEASE_TIMERS: Final = {Timer.CLAIM: "expiry"}
LEASE_ORDERS: Final = {
    Give: lambda step: step.put_of("has", ACTING, TRUE),
    Take: lambda step: step.put_each("has", lambda c: FALSE),
}


def _ask(step: Execution) -> None:
    step.put_of("wants", ACTING, TRUE)
    step.fire(LeaseAsked, is_refusable=True)


def _renew(step: Execution) -> None:
    step.require(step.v.has(ACTING))
    step.put_of("renewals", ACTING, step.v.renewals(ACTING) + 1)
    step.fire(LeaseRenewed)


def _return(step: Execution) -> None:
    step.require(step.v.has(ACTING))
    step.fire(LeaseReturned)


def _expire(step: Execution) -> None:
    step.require(step.v.expiry)
    step.put("expiry", FALSE)
    step.fire(LeaseExpired)


LEASE_INVARIANTS: Final = (
    Invariant(
        "one tenant",
        "Two clients never have it.",
        lambda v: every(lambda c: every(lambda d: all_of(v.has(c), v.has(d)).implies(c.equals(d)))),
    ),
    Invariant(
        "taken",
        "What a client has is taken, and its expiry is timed.",
        lambda v: all_of(
            some(v.has).equals(v.state.among(LeaseState.TAKEN)),
            v.expiry.equals(v.state.among(LeaseState.TAKEN)),
        ),
    ),
    Invariant(
        "asked for",
        "Who has it, or has renewed it, has wanted it.",
        lambda v: every(
            lambda c: any_of(v.has(c), v.renewals(c) > 0).implies(v.wants(c)),
        ),
    ),
)


def prove_lease(table: Table) -> Proof:
    made = Relation(
        table,
        LEASES,
        orders=LEASE_ORDERS,
        occurrences={"ask": _ask, "renew": _renew, "return": _return, "expire": _expire},
        timers=LEASE_TIMERS,
    )
    return Prover(made, LEASE_INVARIANTS).prove()


def test_basic_another_table_is_proved_in_the_same_way() -> None:
    proof = prove_lease(LEASE)

    assert proof.is_complete, proof.refuted[0]
    assert proof.discharged > 15


def test_of_another_table_a_broken_variant_is_refuted() -> None:
    (refuted, *_) = prove_lease(lease(returned=(Take,))).refuted

    assert refuted.before["state"] is LeaseState.TAKEN
    assert refuted.after["state"] is LeaseState.FREE
    assert refuted.after["expiry"] is True
    assert refuted.inputs["acting"] in refuted.before["has"]
    assert refuted.obligation.invariant == "taken"


def test_an_order_of_which_nothing_is_declared_is_an_error() -> None:
    orders = {Give: LEASE_ORDERS[Give]}
    with pytest.raises(ValueError, match="not declared what Take does"):
        Relation(LEASE, LEASES, orders=orders, occurrences={}, timers=LEASE_TIMERS)


def test_an_event_without_a_row_is_refused_or_an_obligation() -> None:
    def renew(step: Execution) -> None:
        step.fire(LeaseRenewed)

    made: Relation = Relation(
        LEASE, LEASES, orders=LEASE_ORDERS, occurrences={"renew": renew}, timers=LEASE_TIMERS
    )
    found: tuple[Transition, ...] = made.transitions
    assert [(t.is_made, len(t.insisted)) for t in found] == [(False, 1), (True, 0), (False, 1)]
    assert [t.name for t in found][1] == "renew: LeaseRenewed in taken"


def test_each_event_of_a_table_may_happen_and_is_refused_without_a_row() -> None:
    made = Relation(
        LEASE,
        LEASES,
        orders=LEASE_ORDERS,
        occurrences=occurrences_of(LEASE),
        timers=LEASE_TIMERS,
    )
    taken = {transition.rows for transition in made.transitions}
    assert taken == {((row.event, row.source),) for row in LEASE.rows}
    assert all(transition.is_made for transition in made.transitions)


def test_rows_that_lead_to_each_other_for_ever_are_an_obligation() -> None:
    def ask_again(step: Execution) -> None:
        step.fire(LeaseAsked)

    loop = edited(
        LEASE,
        LeaseAsked,
        LeaseState.TAKEN,
        Row(LeaseAsked, LeaseState.TAKEN, LeaseState.TAKEN, (Give,)),
    )
    made = Relation(
        loop,
        LEASES,
        orders={**LEASE_ORDERS, Give: ask_again},
        occurrences={"ask": ask_again},
        timers=LEASE_TIMERS,
    )
    whys = {why for t in made.transitions for *_, why in t.insisted}
    assert "lease: one row leads to the next for ever" in whys


def test_a_variable_that_is_not_declared_is_an_error() -> None:
    def happen(step: Execution) -> None:
        _ = step.v.nothing

    made = Relation(
        LEASE, LEASES, orders=LEASE_ORDERS, occurrences={"x": happen}, timers=LEASE_TIMERS
    )
    with pytest.raises(AttributeError, match="no variable 'nothing'"):
        _ = made.transitions


def test_variables_are_declared_once() -> None:
    names = [each.name for each in VARIABLES]
    assert len(set(names)) == len(names)
