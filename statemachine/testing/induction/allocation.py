"""An allocation at its provider, for any number of connections and messages, as a relation.

`VARIABLES` are what the kernel keeps of one allocation, and of each connection what has to do with
it; `Orders` is what each order of `ALLOCATION` does to them; `OCCURRENCES` is what may happen. The
rows, of `ALLOCATION` and of `MESSAGE`, are taken from the tables, and the guards from
`PROVIDER_GUARDS`. `INVARIANTS` holds at every moment; `observed` compares all of it with the
kernel.

Left out is what this allocation does not depend on: limits, other allocations, and which answer is
sent when. A request may be refused at any time, and an answer leaves at any time once it is known.
Messages are counted, for each connection, by what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ... import effects as do
from ... import events as on
from ...effects import Order, Timer
from ...events import Event
from ...lifecycle import (
    ALLOCATION,
    EXPIRIES,
    IS_BEING_MADE,
    IS_BEING_RELEASED,
    IS_MADE,
    IS_NEW,
    IS_OPEN,
    IS_READ,
    IS_RUNNING,
    MESSAGE,
    PROVIDER_GUARDS,
    Guard,
)
from ...states import AllocationState, MessageState
from ...table import Table
from .relation import (
    ACTING,
    STATE,
    Declared,
    Execution,
    Happening,
    Invariant,
    Relation,
    View,
)
from .terms import Sort, Term, Variable, all_of, any_of, choice, every, negated, some

_UNKNOWN: Final = AllocationState.UNKNOWN
_REQUESTED: Final = AllocationState.REQUESTED
_CREATED: Final = AllocationState.CREATED
_HANDED_OFF: Final = AllocationState.HANDED_OFF
_ENDED: Final = AllocationState.ENDED
_RELEASED: Final = AllocationState.RELEASED

TIMERS: Final[Mapping[Timer, str]] = {
    Timer.CLAIM: "claim_timer",
    Timer.RELEASE: "release_timer",
    Timer.RETRY: "retry_timer",
}
"""Which variable says that a timer runs."""

REQUESTS: Final[Mapping[MessageState, str]] = {
    MessageState.OPEN: "waiting",
    MessageState.DEFERRED: "deferred",
    MessageState.GRANTED: "granted",
}
"""Which variable counts the requests of a connection in a state; in others they do not count."""

ENDS: Final[Mapping[MessageState, str]] = {MessageState.OPEN: "ending"}
"""The same for `AllocationEnded`s of a connection."""

VARIABLES: Final = (
    Declared("being_made"),
    Declared("has_response"),
    Declared("populated"),
    Declared("announced"),
    *map(Declared, TIMERS.values()),
    # Work that the backend was asked for and has not reported.
    Declared("creations", Sort.COUNT, is_ghost=True),
    Declared("releases", Sort.COUNT, is_ghost=True),
    # Of each connection: whether it is there, and what the allocation keeps of it.
    Declared("open", is_of_each=True),
    Declared("closing", is_of_each=True),
    Declared("asked", is_of_each=True),
    Declared("party", is_of_each=True),
    Declared("holder", is_of_each=True),
    Declared("queued", Sort.COUNT, is_of_each=True),
    # Of each connection: how many of its messages are in which state.
    *(Declared(name, Sort.COUNT, is_of_each=True) for name in REQUESTS.values()),
    *(Declared(name, Sort.COUNT, is_of_each=True) for name in ENDS.values()),
    # Deferred requests whose turn comes now, because the allocation before is released.
    Declared("due", Sort.COUNT, is_of_each=True),
    # Of each connection: hand-overs not reported, and what was sent to it of this incarnation.
    Declared("sending", Sort.COUNT, is_of_each=True, is_ghost=True),
    Declared("handed", is_of_each=True, is_ghost=True),
    Declared("answered", is_of_each=True, is_ghost=True),
    Declared("pushes", Sort.COUNT, is_of_each=True, is_ghost=True),
)
"""What is known of one allocation; a ghost is what the backend and the connections know of it."""

IS_SAME: Final = Variable("is_it_the_same_request", Sort.TRUTH)
IS_REFUSED: Final = Variable("is_it_refused", Sort.TRUTH)
TURNS: Final = Variable("is_it_so_many", Sort.COUNT)

CounterNames = Mapping[MessageState, str]


class Orders:
    """
    What the orders of a row of `ALLOCATION` do to the variables.

    Args:
        messages: the table of the messages, which says what becomes of one.
    """

    def __init__(self, messages: Table = MESSAGE) -> None:
        self._messages = messages

    def all(self) -> dict[Order, Happening]:
        """List what is done for each order."""
        return {
            do.AddAsker: lambda step: step.put_of("asked", ACTING, _TRUE),
            do.CreateNamespaces: self.create,
            do.Watch: lambda step: None,
            do.RecordHandoff: lambda step: None,
            do.GrantAskers: self.grant,
            do.CheckClaim: check_claim,
            do.ReleaseNamespaces: lambda step: step.put("releases", step.v.releases + 1),
            do.WithdrawGrants: self.withdraw_grants,
            do.DeferRequest: self.defer,
            do.WithdrawDeferred: self.withdraw_deferred,
            do.RefuseConflict: self.refuse_request,
            do.RefuseDraining: self.refuse_request,
            do.RefuseUnknown: lambda step: self._one(step, on.MessageRefused, ENDS),
            do.ConfirmEnd: self.confirm_end,
            do.AnswerEnd: self.answer_end,
            do.PushEnd: push_end,
            do.FailAskers: lambda step: self.fail(step, MessageState.OPEN),
            do.FailAllAskers: lambda step: self.fail(
                step, MessageState.OPEN, MessageState.DEFERRED
            ),
            do.Forget: forget,
        }

    def create(self, step: Execution) -> None:
        step.put("being_made", _TRUE)
        step.put("creations", step.v.creations + 1)

    def grant(self, step: Execution) -> None:
        self._must_be_open(step, step.v.asked)
        self.move(step, on.MessageGranted, REQUESTS, MessageState.OPEN, step.v.asked)

    def withdraw_grants(self, step: Execution) -> None:
        self._must_be_open(step, step.v.asked)
        self.move(step, on.GrantWithdrawn, REQUESTS, MessageState.GRANTED, step.v.asked)

    def defer(self, step: Execution) -> None:
        self._one(step, on.MessageDeferred, REQUESTS)
        step.put_of("queued", ACTING, step.v.queued(ACTING) + 1)

    def withdraw_deferred(self, step: Execution) -> None:
        of = ACTING.equals
        self.move(step, on.MessageRefused, REQUESTS, MessageState.DEFERRED, of)
        step.put_of("queued", ACTING, 0)

    def refuse_request(self, step: Execution) -> None:
        self._one(step, on.MessageRefused, REQUESTS)

    def confirm_end(self, step: Execution) -> None:
        self._one(step, on.EndConfirmed, ENDS)
        step.put_of("answered", ACTING, _TRUE)

    def answer_end(self, step: Execution) -> None:
        party, ending, holder = step.v.party, step.v.ending, step.v.holder
        self._must_be_open(step, party)

        def is_answered(c: Term) -> Term:
            return all_of(party(c), ending(c) > 0)

        answered = step.v.answered
        self.move(step, on.EndConfirmed, ENDS, MessageState.OPEN, party)
        step.put_each("holder", lambda c: all_of(holder(c), negated(is_answered(c))))
        step.put_each("answered", lambda c: any_of(answered(c), is_answered(c)))

    def fail(self, step: Execution, *states: MessageState) -> None:
        self._must_be_open(step, step.v.party)
        for state in states:
            self.move(step, on.MessageRefused, REQUESTS, state, step.v.party)

    def move(
        self,
        step: Execution,
        event: type[Event],
        counts: CounterNames,
        source: MessageState,
        which: Callable[[Term], Term],
    ) -> None:
        """Take a row of `MESSAGE` for all messages in a state, of the connections `which`."""
        count = step.now[counts[source]]
        self._take(step, event, counts, source, lambda c: choice(which(c), count(c), 0))

    def _one(self, step: Execution, event: type[Event], counts: CounterNames) -> None:
        """Take a row of `MESSAGE` for the message that has just been put to the allocation."""
        self._take(step, event, counts, MessageState.OPEN, lambda c: choice(c.equals(ACTING), 1, 0))

    def _take(
        self,
        step: Execution,
        event: type[Event],
        counts: CounterNames,
        source: MessageState,
        many: Callable[[Term], Term],
    ) -> None:
        row = self._messages.row(event, source)
        if row is None:
            none = every(lambda c: negated(many(c) > 0))
            step.insist(none, f"message: {event.__name__} has a row in {source.value}")
            return
        target = counts.get(MessageState(row.target))
        if target == counts[source]:
            return
        before = step.now[counts[source]]
        step.put_each(counts[source], lambda c: before(c) - many(c))
        if target is not None:
            there = step.now[target]
            step.put_each(target, lambda c: there(c) + many(c))

    def put_to_allocation(
        self, step: Execution, counts: CounterNames, source: MessageState
    ) -> None:
        """Dispatch one message of the acting connection; it is open then."""
        if self._messages.row(on.MessageDispatched, source) is None:
            why = f"message: MessageDispatched has a row in {source.value}"
            step.insist(_FALSE, why)
            return
        opened = step.now[counts[MessageState.OPEN]]
        step.put_of(counts[MessageState.OPEN], ACTING, opened(ACTING) + 1)

    def _must_be_open(self, step: Execution, which: Callable[[Term], Term]) -> None:
        is_open = step.v.open
        step.insist(
            every(lambda c: which(c).implies(is_open(c))), "a connection that is looked up is open"
        )


def check_claim(step: Execution) -> None:
    """Name it `Unclaimed`, if so."""
    asked = step.v.asked
    if step.decide(all_of(every(lambda c: negated(asked(c))), negated(step.v.populated))):
        step.fire(on.Unclaimed)


def push_end(step: Execution) -> None:
    v = step.v
    is_open, holder, closing, pushes = v.open, v.holder, v.closing, v.pushes
    step.insist(
        every(lambda c: any_of(v.party(c), holder(c)).implies(is_open(c))),
        "a connection that is looked up is open",
    )
    step.put_each(
        "pushes",
        lambda c: choice(all_of(holder(c), negated(closing(c))), pushes(c) + 1, pushes(c)),
    )
    step.put_each("holder", lambda c: _FALSE)
    step.put("announced", _TRUE)


def forget(step: Execution) -> None:
    """Nothing is kept but the name; the driver's timers and work are not the kernel's to forget."""
    v = step.v
    deferred, due, is_open, party = v.deferred, v.due, v.open, v.party
    step.insist(
        every(lambda c: party(c).implies(is_open(c))), "a connection that is looked up is open"
    )
    step.insist(every(lambda c: deferred(c) <= v.queued(c)), "each deferred request is found again")
    step.put_each("due", lambda c: due(c) + deferred(c))
    step.put_each("deferred", lambda c: 0)
    step.put_each("queued", lambda c: 0)
    for name in ("asked", "party", "holder"):
        step.put_each(name, lambda c: _FALSE)
    for name in ("has_response", "populated", "announced"):
        step.put(name, _FALSE)


# --- Guards, and what an event says ------------------------------------------------------------

_TRUE: Final = all_of()
_FALSE: Final = any_of()

HOLDS: Final[Mapping[Guard, Callable[[View, type[Event]], Term]]] = {
    IS_RUNNING: lambda v, event: getattr(v, TIMERS[EXPIRIES[event]]),
    IS_BEING_MADE: lambda v, event: v.being_made,
    IS_MADE: lambda v, event: negated(v.being_made),
    IS_BEING_RELEASED: lambda v, event: negated(v.retry_timer),
    IS_NEW: lambda v, event: negated(v.open(ACTING)),
    IS_OPEN: lambda v, event: v.open(ACTING),
    IS_READ: lambda v, event: _TRUE,
}
"""What each guard of `PROVIDER_GUARDS` says of the variables."""


def _note_made(step: Execution) -> None:
    step.put("being_made", _FALSE)
    step.put("creations", step.v.creations - 1)


def _note_created(step: Execution) -> None:
    _note_made(step)
    step.put("has_response", _TRUE)


def _note_populated(step: Execution) -> None:
    step.put("populated", _TRUE)


def _note_report(step: Execution) -> None:
    step.put("releases", step.v.releases - 1)


def _note_sent(step: Execution) -> None:
    step.require(step.v.sending(ACTING) > 0)
    step.put_of("sending", ACTING, step.v.sending(ACTING) - 1)
    is_open = step.v.open(ACTING)
    for name in ("holder", "handed"):
        step.put_of(name, ACTING, any_of(step.now[name](ACTING), is_open))


def _note_not_sent(step: Execution) -> None:
    step.require(step.v.sending(ACTING) > 0)
    step.put_of("sending", ACTING, step.v.sending(ACTING) - 1)


def no_hand_over_is_under_way(step: Execution) -> None:
    """Require what `HandOver` asks of a driver; without it a connection may be told twice."""
    sending = step.v.sending
    step.require(every(lambda c: negated(sending(c) > 0)))


NOTES: Final[Mapping[type[Event], tuple[Happening, ...]]] = {
    on.NamespacesCreated: (_note_created,),
    on.NamespacesNotCreated: (_note_made,),
    on.ScopePopulated: (_note_populated,),
    on.ResponseSent: (_note_sent,),
    on.ResponseNotSent: (_note_not_sent,),
    on.ReleaseDelayed: (_note_report,),
    on.NamespacesReleased: (no_hand_over_is_under_way, _note_report),
    on.ReleaseOverdue: (no_hand_over_is_under_way,),
}
"""What an event says, before its row is taken; an expired timer runs no more in any case."""

_IS_DUE: Final[Mapping[type[Event], Callable[[View], Term]]] = {
    **dict.fromkeys(
        (on.NamespacesCreated, on.NamespacesNotCreated), lambda v: any_of(v.creations > 0)
    ),
    # Work for one allocation is done in the order in which it was asked for.
    **dict.fromkeys(
        (on.NamespacesReleased, on.ReleaseDelayed),
        lambda v: all_of(v.releases > 0, negated(v.creations > 0)),
    ),
    **dict.fromkeys((on.ResponseSent, on.ResponseNotSent), lambda v: any_of(v.sending(ACTING) > 0)),
    # What is watched until it is released.
    **dict.fromkeys(
        (on.ScopePopulated, on.ScopeEmptied, on.InitDied),
        lambda v: any_of(_is_made(v), v.state.equals(_ENDED)),
    ),
    on.ReleaseRequested: lambda v: negated(_is_over(v)),
}
"""When a driver may report an event, which the kernel must not refuse then."""


def _is_due(event: type[Event], v: View) -> Term:
    if event in EXPIRIES:
        return any_of(getattr(v, TIMERS[EXPIRIES[event]]))
    return _IS_DUE[event](v)


NAMED_INSIDE: Final = frozenset(
    {
        on.RequestAdmitted,
        on.RequestRepeated,
        on.RequestConflicting,
        on.RequestEarly,
        on.RequestDuringDrain,
        on.EndReceived,
        on.EndRepeated,
        on.Unclaimed,
    }
)
"""What the kernel names itself; the other events of the table come from the driver."""

ADOPTED: Final = (on.CreatedAdopted, on.HandedOffAdopted, on.RemainsFound)


def _reported(
    event: type[Event],
    guards: Mapping[Guard, Callable[..., Term]],
    notes: tuple[Happening, ...],
) -> Happening:
    """Make the occurrence that is an event of the driver: guards, what it says, its row."""

    def happen(step: Execution) -> None:
        is_due = _is_due(event, step.v)
        state = step.state()
        for guard, holds in guards.items():
            if event in guard.events:
                condition = holds(step.v, event)
                step.insist(is_due.implies(condition), f"{event.__name__} meets its guards")
                step.require(condition)
        if step.relation.table.row(event, state) is None:
            step.insist(negated(is_due), f"{event.__name__} is not refused")
        if event in EXPIRIES:
            step.put(TIMERS[EXPIRIES[event]], _FALSE)
        for note in notes:
            note(step)
        step.fire(event, is_refusable=True)

    return happen


def _adopted(event: type[Event]) -> Happening:
    def happen(step: Execution) -> None:
        step.require(step.v.state.among(_UNKNOWN, _RELEASED))
        step.put(STATE, _UNKNOWN)
        if event is not on.RemainsFound:
            step.put("has_response", _TRUE)
        _begin_incarnation(step)
        step.fire(event)

    return happen


def _begin_incarnation(step: Execution) -> None:
    """What was sent of the incarnation before is of no more interest."""
    for name in ("handed", "answered"):
        step.put_each(name, lambda c: _FALSE)
    step.put_each("pushes", lambda c: 0)


# --- What may happen ---------------------------------------------------------------------------


class Occurrences:
    """
    What may happen to one allocation.

    Args:
        orders: what becomes of messages.
        guards: which of the guards are checked, and what they say.
        notes: what events say.
    """

    def __init__(
        self,
        orders: Orders,
        guards: Mapping[Guard, Callable[..., Term]],
        notes: Mapping[type[Event], tuple[Happening, ...]],
    ) -> None:
        self._orders = orders
        self._guards = guards
        self._notes = notes

    def all(self, table: Table) -> dict[str, Happening]:
        """List what may happen, under its name."""
        # Of the kernel's table as well: a variant may have lost an event with its only row.
        events = dict.fromkeys((*ALLOCATION.events, *table.events))
        reported = [e for e in events if e not in NAMED_INSIDE and e not in ADOPTED]
        return {
            "a request arrives": self.request,
            "a deferred request's turn comes": self.due_request,
            "an end arrives": self.end,
            **{
                event.__name__: _reported(event, self._guards, self._notes.get(event, ()))
                for event in reported
            },
            **{event.__name__: _adopted(event) for event in ADOPTED},
            "ConnectionOpened": self.open,
            "ConnectionLost": self.lose,
            "a connection is being closed": self.close,
            "a hand-over is lost with its connection": self.lose_hand_over,
            "an answer's turn comes": self.turn,
            "the provider stops": self.stop,
            "the name is forgotten": self.forget_name,
        }

    def request(self, step: Execution) -> None:
        # One that was held for a while is dropped with its connection.
        self._check(step, on.RequestReceived)
        self._orders.put_to_allocation(step, REQUESTS, MessageState.ARRIVED)
        self._dispatch_request(step)

    def due_request(self, step: Execution) -> None:
        step.require(step.v.due(ACTING) > 0)
        step.put_of("due", ACTING, step.v.due(ACTING) - 1)
        self._orders.put_to_allocation(step, REQUESTS, MessageState.DEFERRED)
        self._dispatch_request(step)

    def _dispatch_request(self, step: Execution) -> None:
        if step.decide(IS_REFUSED):
            self._orders.refuse_request(step)
            return
        state = step.state()
        step.put_of("party", ACTING, _TRUE)
        if state in (_UNKNOWN, _RELEASED):
            step.put(STATE, _UNKNOWN)
            _begin_incarnation(step)
            step.fire(on.RequestAdmitted)
        elif state is _ENDED:
            is_draining = step.decide(step.v.announced)
            step.fire(on.RequestDuringDrain if is_draining else on.RequestEarly)
        else:
            is_same = step.decide(IS_SAME)
            step.fire(on.RequestRepeated if is_same else on.RequestConflicting)

    def end(self, step: Execution) -> None:
        self._check(step, on.EndReceived)
        self._orders.put_to_allocation(step, ENDS, MessageState.ARRIVED)
        state = step.state()
        if state not in (_UNKNOWN, _RELEASED):
            step.put_of("party", ACTING, _TRUE)
        is_over = state is _RELEASED or step.decide(step.v.announced)
        step.fire(on.EndRepeated if is_over else on.EndReceived)

    def open(self, step: Execution) -> None:
        self._check(step, on.ConnectionOpened)
        # A number is used again only when all that concerned the connection before is reported.
        step.require(negated(step.v.sending(ACTING) > 0))
        step.put_of("open", ACTING, _TRUE)

    def lose(self, step: Execution) -> None:
        self._check(step, on.ConnectionLost)
        had_asked = step.decide(step.v.asked(ACTING))
        for name in ("open", "closing", "asked", "party", "holder", "handed", "answered"):
            step.put_of(name, ACTING, _FALSE)
        for name in ("queued", *REQUESTS.values(), *ENDS.values(), "due", "pushes"):
            step.put_of(name, ACTING, 0)
        if had_asked:
            check_claim(step)

    def lose_hand_over(self, step: Execution) -> None:
        """Only the loss is reported, which may have been before."""
        step.require(all_of(step.v.sending(ACTING) > 0, negated(step.v.open(ACTING))))
        step.put_of("sending", ACTING, 0)

    def close(self, step: Execution) -> None:
        step.require(step.v.open(ACTING))
        step.put_of("closing", ACTING, _TRUE)

    def turn(self, step: Execution) -> None:
        """Answers that are known leave, on one connection: with the descriptors."""
        granted, sending = step.v.granted(ACTING), step.v.sending(ACTING)
        step.require(all_of(TURNS > 0, granted >= TURNS, negated(step.v.closing(ACTING))))
        step.insist(step.v.has_response, "what is handed over is there")
        step.insist(step.v.state.among(_CREATED, _HANDED_OFF), "what is handed over is alive")
        step.put_of("granted", ACTING, granted - TURNS)
        step.put_of("sending", ACTING, sending + TURNS)

    def stop(self, step: Execution) -> None:
        self._orders.move(step, on.MessageRefused, REQUESTS, MessageState.DEFERRED, lambda c: _TRUE)

    def forget_name(self, step: Execution) -> None:
        step.require(step.v.state.equals(_RELEASED))
        step.put(STATE, _UNKNOWN)

    def _check(self, step: Execution, event: type[Event]) -> None:
        for guard, holds in self._guards.items():
            if event in guard.events:
                step.require(holds(step.v, event))


def relation_of(
    allocation: Table = ALLOCATION,
    message: Table = MESSAGE,
    guards: tuple[Guard, ...] = PROVIDER_GUARDS,
    notes: Mapping[type[Event], tuple[Happening, ...]] = NOTES,
) -> Relation:
    """
    Make the relation of an allocation.

    Args:
        allocation, message: the tables, or variants of them.
        guards: what the kernel checks besides the rows, or a part of it.
        notes: what events say, and what is required of the driver.
    """
    orders = Orders(message)
    occurrences = Occurrences(orders, {guard: HOLDS[guard] for guard in guards}, notes)
    return Relation(
        allocation,
        VARIABLES,
        orders=orders.all(),
        occurrences=occurrences.all(allocation),
        timers=TIMERS,
    )


# --- Invariants --------------------------------------------------------------------------------


def _is_made(v: View) -> Term:
    return any_of(v.state.among(_CREATED, _HANDED_OFF))


def _is_draining(v: View) -> Term:
    """Say that it has ended, and that its end is not announced."""
    return all_of(v.state.equals(_ENDED), negated(v.announced))


def _is_over(v: View) -> Term:
    """Say that the kernel has no allocation of this name."""
    return any_of(v.state.among(_UNKNOWN, _RELEASED))


def _is_used(v: View) -> Term:
    return any_of(some(lambda c: v.asked(c)), v.populated)


def _is_there_if_named(v: View) -> Term:
    counts = (*REQUESTS.values(), *ENDS.values(), "queued", "due")

    def is_named(c: Term) -> Term:
        flags = [getattr(v, name)(c) for name in ("asked", "party", "holder", "closing")]
        return any_of(*flags, *(getattr(v, name)(c) > 0 for name in counts))

    return every(lambda c: is_named(c).implies(v.open(c)))


def _never_negative(v: View) -> Term:
    each = [d.name for d in VARIABLES if d.sort is Sort.COUNT and d.is_of_each]
    return all_of(
        v.creations >= 0,
        v.releases >= 0,
        every(lambda c: all_of(*(getattr(v, name)(c) >= 0 for name in each))),
    )


INVARIANTS: Final = (
    Invariant("counts", "No count falls below zero.", _never_negative),
    Invariant(
        "open connections",
        "Only a connection that is open is named by an allocation, or has messages.",
        _is_there_if_named,
        ("LIFE-2",),
    ),
    Invariant(
        "nothing kept",
        "Of what is not known, or released, nothing is kept.",
        lambda v: _is_over(v).implies(
            all_of(
                negated(v.populated),
                every(lambda c: negated(any_of(v.asked(c), v.party(c), v.queued(c) > 0))),
            )
        ),
        ("LIFE-6",),
    ),
    Invariant(
        "askers are parties",
        "Who asked for it is among those who have sent something about it.",
        lambda v: every(lambda c: v.asked(c).implies(v.party(c))),
    ),
    Invariant(
        "waiting askers",
        "Who waits for namespaces, or is to be sent them, is among those who asked.",
        lambda v: every(lambda c: any_of(v.waiting(c) > 0, v.granted(c) > 0).implies(v.asked(c))),
        ("LIFE-4",),
    ),
    Invariant(
        "creation",
        "What is being made was requested, and may have ended meanwhile.",
        lambda v: all_of(
            v.state.equals(_REQUESTED).implies(v.being_made),
            v.being_made.implies(v.state.among(_REQUESTED, _ENDED)),
        ),
    ),
    Invariant(
        "one creation",
        "The backend was asked to create once, exactly while the kernel takes it to be being made.",
        lambda v: v.creations.equals(choice(v.being_made, 1, 0)),
        ("LIFE-3",),
    ),
    Invariant(
        "response",
        "What is created has a response.",
        lambda v: _is_made(v).implies(v.has_response),
        ("FD-2",),
    ),
    Invariant(
        "granted alive",
        "Nothing is granted but what is created and has not ended.",
        lambda v: every(lambda c: (v.granted(c) > 0).implies(_is_made(v))),
    ),
    Invariant(
        "waiting",
        "A request waits while the creation is under way, or until the end is announced.",
        lambda v: every(
            lambda c: (v.waiting(c) > 0).implies(
                any_of(v.state.equals(_REQUESTED), _is_draining(v))
            )
        ),
        ("LIFE-4", "END-13"),
    ),
    Invariant(
        "deferred",
        "A request is deferred until the end before it is announced, and its sender is known.",
        lambda v: every(
            lambda c: all_of(
                (v.deferred(c) > 0).implies(all_of(_is_draining(v), v.party(c))),
                v.deferred(c) <= v.queued(c),
            )
        ),
        ("LIFE-6", "LIFE-7"),
    ),
    Invariant(
        "waiting ends",
        "An end waits until the end is announced, and its sender is known.",
        lambda v: every(lambda c: (v.ending(c) > 0).implies(all_of(_is_draining(v), v.party(c)))),
        ("END-13",),
    ),
    Invariant(
        "claim timer in vain",
        "The claim timer runs only for what is created, is not used, and was asked for by no "
        "connection that is open.",
        lambda v: v.claim_timer.implies(all_of(_is_made(v), negated(_is_used(v)))),
        ("END-3",),
    ),
    Invariant(
        "claim timer",
        "What is created, and neither used nor asked for, has its claim timer running.",
        lambda v: all_of(_is_made(v), negated(_is_used(v))).implies(v.claim_timer),
        ("END-3",),
    ),
    Invariant(
        "release timer",
        "The release timer runs from the end until it is announced.",
        lambda v: v.release_timer.equals(_is_draining(v)),
        ("END-9",),
    ),
    Invariant(
        "announced",
        "Announced is only what has ended, and is not released.",
        lambda v: v.announced.implies(v.state.equals(_ENDED)),
    ),
    Invariant(
        "one release",
        "What has ended is being released, or the next try is timed: one of them.",
        lambda v: all_of(
            v.retry_timer.implies(v.state.equals(_ENDED)),
            (v.releases + choice(v.retry_timer, 1, 0)).equals(choice(v.state.equals(_ENDED), 1, 0)),
        ),
        ("END-9", "END-10"),
    ),
    Invariant(
        "retry after creation",
        "No release is tried again before the creation is reported.",
        lambda v: negated(all_of(v.retry_timer, v.being_made)),
    ),
    Invariant(
        "holders",
        "A connection holds only what was handed off, until the end is announced.",
        lambda v: every(
            lambda c: v.holder(c).implies(any_of(v.state.equals(_HANDED_OFF), _is_draining(v)))
        ),
        ("END-12",),
    ),
    Invariant(
        "told once",
        "A connection is told the end when it is announced, and pushed it once at most.",
        lambda v: every(
            lambda c: all_of(
                v.pushes(c) <= 1,
                any_of(v.pushes(c) > 0, v.answered(c)).implies(any_of(v.announced, _is_over(v))),
            )
        ),
        ("END-12",),
    ),
    Invariant(
        "told at all",
        "A connection that was handed it holds it, or was told the end, or is being closed.",
        lambda v: every(
            lambda c: v.handed(c).implies(
                any_of(v.holder(c), v.pushes(c) > 0, v.answered(c), v.closing(c))
            )
        ),
        ("END-12",),
    ),
    Invariant(
        "hand-overs under way",
        "Before a hand-over is reported, its end is not announced, nor a new life begun.",
        lambda v: every(lambda c: (v.sending(c) > 0).implies(any_of(_is_made(v), _is_draining(v)))),
    ),
)
"""What is so at every moment, of every allocation."""
