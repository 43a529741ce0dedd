"""What notices that one thing is different in a table of this protocol, and what is no change.

All mutants of `statemachine.testing.kit` are made of every table. One is *killed* if any of these
says no:

- the checks that every table passes when it is imported (`UnsoundTable`);
- the reference model, which is led through the same events beside the kernel that runs the mutant:
  the consumer's through every state there is, the provider's through moments of long random lives
  in which the cell was looked up, and what came after them.

What neither notices is a hole in the suite, or no change at all. Which of them is none, and why,
stands in `ARGUMENTS`: one for every kind.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any, Final, NamedTuple

from specs import model
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Order
from statemachine.errors import FdPassing
from statemachine.events import Event
from statemachine.lifecycle import NOTICE, TABLES
from statemachine.provider import Limits, ProviderKernel
from statemachine.snapshots import ProviderSnapshot
from statemachine.states import AllocationState, ConsumerState, NoticeState, ServiceState
from statemachine.table import Table, check_vocabulary
from statemachine.testing import kit
from statemachine.testing.kit import Mutant
from statemachine.testing.kit.mutants import TableCell
from statemachine.testing.lockstep import (
    LIMITS,
    REQUESTS,
    explore_consumer,
    model_limits,
    provider_events,
    response_to,
    step,
)
from statemachine.testing.tables import HOMES

MOMENTS_MAX: Final = 150
"""How many moments are kept in which a cell was looked up."""
AFTERMATH: Final = 25
"""How many events are replayed after such a moment."""
TIGHT: Final = replace(LIMITS, open_per_uid=2)
"""Here a message that is left over on a closed connection is missed by its user."""
WIDE: Final = replace(LIMITS, open_per_connection=4)
"""Here one connection can have three requests waiting for a release."""
LIVES_STEPS: Final = 60_000
"""How long the provider's random lives are, all together."""
LIFE_STEPS: Final = 150
"""From one new start to the next."""
IMPOSSIBLE_SHARES: Final = (0.1, 0.1, 0.5)
"""How often an event is fed that cannot be, when it comes up; lives differ in that."""


# --- Who notices -------------------------------------------------------------------------------


def killer_of(mutant: Mutant) -> str | None:
    """Say what notices a mutant: a few words of its finding; None if nothing does."""
    original = next(table for table in TABLES if table.name == mutant.table)
    moments()  # what is wrong with the table as it is counts for no mutant

    def check() -> None:
        _check_vocabulary(original, HOMES.running(mutant.table))
        _challenge(mutant)

    return kit.killer_of(mutant, original, HOMES, check)


def _check_vocabulary(original: Table, table: Table) -> None:
    """Check what `lifecycle` checks when it is imported: that nothing is defined in vain."""
    tables = [table if each is original else each for each in TABLES]
    events = {row.event for each in TABLES for row in each.rows}
    orders = {order for each in TABLES for row in each.rows for order in row.effects}
    check_vocabulary(tables, events=events, orders=orders - _TIMINGS)


_TIMINGS: Final = {
    order
    for table in TABLES
    for row in table.rows
    for order in row.effects
    if isinstance(order, do.Timing)
}
"""Every order for a timer; the check on import asks for effects only."""


def _challenge(mutant: Mutant) -> None:
    if mutant.table in ("consumer", "notice"):
        explore_consumer()
        return
    for moment in moments().get(mutant.cell, ()):
        _relive(moment, moment.events)
        _relive(moment, moment.events[:1], settles=True)


def _relive(moment: Moment, events: Sequence[Event], *, settles: bool = False) -> None:
    kernel, known = ProviderKernel.restore(moment.snapshot, moment.limits), moment.known
    for event in events:
        kernel, known = step(kernel, known, event)
    for event in _COMPLETIONS if settles else ():
        if _can_be(known, event):
            kernel, known = step(kernel, known, event)


def _completions() -> Iterator[Event]:
    """Whatever a backend can still report, so that each that waits gets an answer."""
    requests = [request for of_one in REQUESTS.values() for request in of_one]
    yield from (on.NamespacesCreated(r.allocation_id, response_to(r)) for r in requests)
    for name in REQUESTS:
        yield from (on.ReleaseOverdue(name), on.NamespacesReleased(name))
        yield from (on.ScopeEmptied(name), on.NamespacesReleased(name))


_COMPLETIONS: Final = tuple(_completions())


# --- Moments of a provider's life --------------------------------------------------------------


class Moment(NamedTuple):
    """A provider and what the model knows of it, before an event; and what happened then."""

    snapshot: ProviderSnapshot
    known: model.Provider
    limits: Limits
    events: Sequence[Event]


@cache
def moments() -> dict[TableCell, list[Moment]]:
    """Lead a provider through random lives; for each cell keep moments when it was looked up."""
    found: defaultdict[TableCell, dict[Any, Moment]] = defaultdict(dict)
    for seed in range(LIVES_STEPS // LIFE_STEPS):
        life = _RandomRun(seed)
        for at, cells in enumerate(life.cells):
            shape = (*_shape(life.befores[at][0]), life.limits)
            for cell in cells:
                if len(found[cell]) < MOMENTS_MAX:
                    found[cell].setdefault(shape, life.moment(at))
    return {cell: list(kept.values()) for cell, kept in found.items()}


def _shape(snapshot: ProviderSnapshot) -> Any:
    """Say how the answers stand in line: moments that differ in nothing else tell the same."""
    lines = tuple(
        tuple((message.question, message.state) for message in connection.messages)
        for connection in snapshot.connections
    )
    return lines, tuple((a.allocation_id, a.state) for a in snapshot.allocations)


class _RandomRun:
    """One random life of a provider, from an empty node on."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        alphabet = provider_events(("a", "ab", "ab", "abc")[seed % 4])
        share = IMPOSSIBLE_SHARES[seed % 3]
        self.befores: list[tuple[ProviderSnapshot, model.Provider]] = []
        self.events: list[Event] = []
        self.cells: list[set[TableCell]] = []
        beginning = list(_BEGINNINGS[seed % len(_BEGINNINGS)])
        self.limits = _LIMITS_OF.get(tuple(beginning), LIMITS)
        kernel, known = ProviderKernel(self.limits), model.Provider(model_limits(self.limits))
        lookups: set[TableCell] = set()

        def note(table: str, event: type[Event], state: Any) -> None:
            lookups.add((event, state))

        with HOMES.watched(note, asked=note):
            while len(self.events) < LIFE_STEPS:
                event = beginning.pop(0) if beginning else chance.choice(alphabet)
                if not _can_be(known, event) and chance.random() >= share:
                    continue
                self.befores.append((kernel.snapshot(), known))
                self.events.append(event)
                kernel, known = step(kernel, known, event)
                self.cells.append(set(lookups))
                lookups.clear()

    def moment(self, at: int) -> Moment:
        return Moment(*self.befores[at], self.limits, self.events[at : at + AFTERMATH])


_A: Final = REQUESTS["a"][0]
_QUEUE: Final[tuple[Event, ...]] = (
    *(on.ConnectionOpened(c, c % 2) for c in (1, 2, 3)),
    on.ProviderReady(),
    on.RequestReceived(1, REQUESTS["b"][0]),
    *(on.RequestReceived(c, _A) for c in (1, 2, 3)),
    on.NamespacesCreated("a", response_to(_A)),
    on.ResponseSent("a", 2),
)
"""A granted answer that waits behind another one, and one that is on its way."""

_HELD_A: Final[tuple[Event, ...]] = (
    on.ConnectionOpened(1, 1),
    on.ProviderReady(),
    on.RequestReceived(1, _A),
    on.NamespacesCreated("a", response_to(_A)),
    on.ResponseSent("a", 1),
)
"""One allocation in the hands of its only user."""

_OVERTAKEN: Final[tuple[Event, ...]] = (
    *(on.ConnectionOpened(c, c - 1) for c in (1, 2)),
    on.ProviderReady(),
    on.RequestReceived(1, _A),
    on.EndReceived(2, "a"),
    on.ReleaseDelayed("a", "x"),
)
"""A request whose allocation has ended before it was made."""

_UNREADABLE: Final[tuple[Event, ...]] = (
    _HELD_A[0],
    on.ConnectionOpened(2, 0),
    *_HELD_A[1:],
    on.ReleaseRequested("a"),
    on.RequestReceived(1, _A),
    on.FrameRejected("x", 1),
)
"""A holder whose unreadable frame waits for the answer before it."""

_BEHIND: Final[tuple[Event, ...]] = (
    *_HELD_A,
    on.RequestReceived(1, REQUESTS["b"][0]),
    on.RequestReceived(1, _A),
    on.FrameRejected("x", 1),
    on.ScopeEmptied("a"),
    on.NamespacesCreated("b", response_to(REQUESTS["b"][0])),
    on.NamespacesReleased("a"),
)
"""The same, with an answer that was granted and comes too late."""

_CROWDED: Final[tuple[Event, ...]] = (
    *(on.ConnectionOpened(c, 1) for c in (1, 3, 2)),
    *(on.ConnectionLost(c) for c in (2, 3)),
    on.ConnectionOpened(3, 1),
)
"""A connection too many of one user, which leaves room when it is lost."""

_LEFT_OVER: Final[tuple[Event, ...]] = (
    *(on.ConnectionOpened(c, 1) for c in (1, 3)),
    on.ProviderReady(),
    on.FrameRejected("x", 1),
    *(on.RequestReceived(3, REQUESTS[name][0]) for name in "ab"),
)
"""A connection that is closed by an unreadable frame, beside another one of its user."""

_FLOODED: Final[tuple[Event, ...]] = (
    on.ConnectionOpened(1, 1),
    *[on.EndReceived(1, "a")] * 4,
    *[on.RequestReceived(1, _A)] * 5,
    on.ProviderReady(),
)
"""More messages than may be, before the provider is ready."""

_FLOODED_AND_STOPPED: Final[tuple[Event, ...]] = (
    *(on.ConnectionOpened(c, 1) for c in (1, 3)),
    *[on.RequestReceived(1, _A)] * 5,
    on.ProviderStopping(),
    on.RequestReceived(3, _A),
)
"""Messages left over on a closed connection, and their user over its limit by them."""

_DEFERRED: Final[tuple[Event, ...]] = (
    *_HELD_A,
    on.ScopeEmptied("a"),
    *(on.RequestReceived(1, request) for request in (_A, _A, REQUESTS["a"][1], _A)),
    on.NamespacesReleased("a"),
)
"""Requests of one connection that wait for a release; one of them wants something else."""

_AGAIN: Final[tuple[Event, ...]] = (
    on.CreatedAdopted("a", _A, response_to(_A)),
    on.HandedOffAdopted("a", _A, response_to(_A)),
    on.RemainsFound("a", _A),
)
_LIMITS_OF: Final[dict[tuple[Event, ...], Limits]] = {_LEFT_OVER: TIGHT, _DEFERRED: WIDE}
_BEGINNINGS: Final[tuple[tuple[Event, ...], ...]] = (
    # The first ones fill what is kept of a cell before chance does.
    _LEFT_OVER,
    _CROWDED,
    (on.ProviderReady(), *_CROWDED),
    (on.ProviderReady(), on.ProviderStopping(), *_CROWDED),
    (on.ProviderStopping(), *_CROWDED),
    _FLOODED,
    _FLOODED_AND_STOPPED,
    _DEFERRED,
    (),
    _QUEUE,
    (*_QUEUE[:-1], on.ScopeEmptied("a")),
    (*_QUEUE, on.ResponseNotSent("a", 3, FdPassing("x"))),
    (*_QUEUE, on.ScopeEmptied("a"), on.ResponseSent("a", 3)),
    (*_QUEUE, on.ScopeEmptied("a"), on.ResponseNotSent("a", 3, FdPassing("x"))),
    _OVERTAKEN,
    (*_QUEUE[:-1], on.ResponseNotSent("a", 3, FdPassing("x"))),
    _BEHIND,
    _UNREADABLE,
    (*_UNREADABLE, on.ReleaseOverdue("a")),
    *((first, *_AGAIN) for first in _AGAIN),
)
"""What comes about too rarely by chance; the last ones are adopted, and then again."""


def _can_be(known: model.Provider, event: Event) -> bool:
    try:
        model.provider_step(known, event)
    except model.Impossible:
        return False
    return True


# --- What is no change -------------------------------------------------------------------------


class Argument(NamedTuple):
    """Why a kind of mutants behaves like the table as it is."""

    text: str
    holds_for: Callable[[Mutant], bool]


def argument_for(mutant: Mutant) -> str | None:
    """Find why a mutant is none; None if nothing says so."""
    return next((each.text for each in ARGUMENTS if each.holds_for(mutant)), None)


def _is_named_by_the_kernel(mutant: Mutant) -> bool:
    """Say whether a kernel names the event, of an allocation or of a message, by its state."""
    event = mutant.cell[0]
    is_put = event is on.EndReceived and mutant.table == "allocation"
    is_first = event is on.FrameRejected and mutant.table == "message"
    return issubclass(event, on.KernelEvent) or is_put or is_first


_EXPIRIES: Final = (on.ReadinessOverdue, on.ClaimExpired, on.RetryDue, on.ReleaseOverdue)
_ADOPTIONS: Final = (on.CreatedAdopted, on.HandedOffAdopted, on.RemainsFound)
_TAKING_HELD: Final = (on.ProviderReady, on.ReadinessOverdue, on.ProviderStopping)
_HELD: Final = (do.DispatchHeld, do.RefuseUnready, do.RefuseHeld)
_RESOLVING: Final = (
    *_HELD,
    do.RefuseDeferred,
    do.AddAsker,
    do.GrantAskers,
    do.WithdrawGrants,
    do.WithdrawDeferred,
    do.AnswerEnd,
    do.PushEnd,
    do.FailAskers,
    do.FailAllAskers,
    do.CloseChannel,
)
_WITHOUT_A_LINE: Final = (
    ConsumerState.IDLE,
    ConsumerState.CONNECTING,
    ConsumerState.REFUSED,
    NoticeState.OWED,
    NoticeState.DIALLING,
    NoticeState.HEARD,
)
_EXISTS: Final = (AllocationState.CREATED, AllocationState.HANDED_OFF)
_ORDERED: Final = (
    {do.AnswerEnd, do.PushEnd},
    {do.PushEnd, do.FailAskers},
    {do.PushEnd, do.FailAllAskers},
    {do.PushEnd, do.Forget},
    {do.FailAskers, do.Forget},
    {do.AddAsker, do.GrantAskers},
    {do.RefuseFlood, do.CloseConnection},
    {do.RefusePeer, do.CloseConnection},
    {do.AddConnection, do.CloseConnection},
    {do.Refuse, do.CloseConnection},
    {do.SendFault, do.CloseChannel},
    {do.CloseChannel, do.OweEnd},
)
"""Orders of one row of which one must come before the other."""
_NO_ALLOCATION: Final = (AllocationState.UNKNOWN, AllocationState.RELEASED)


def _is_starting(mutant: Mutant) -> bool:
    return mutant.cell[1] is ServiceState.STARTING


def _turned_round(mutant: Mutant) -> list[set[Order]]:
    """List the pairs of which the second comes first now: those swapped, and what is between."""
    assert mutant.before is not None
    assert mutant.after is not None
    place = mutant.after.effects.index
    pairs = combinations(mutant.before.effects, 2)
    return [{one, other} for one, other in pairs if place(one) > place(other)]


def _has_no_open_request(mutant: Mutant) -> bool:
    """Say whether no request for the allocation is open after a row."""
    event, state = mutant.cell
    assert mutant.after is not None
    is_told = event in (on.RequestDuringDrain, on.EndRepeated, on.ReleaseOverdue)
    is_unclaimed = event in (on.Unclaimed, on.ClaimExpired)
    is_none = state is AllocationState.UNKNOWN and event in (on.EndReceived, on.RemainsFound)
    return mutant.after.target in _EXISTS or is_told or is_unclaimed or is_none


def _has_no_deferred_request(mutant: Mutant) -> bool:
    """Say whether no request waits for the release of the allocation."""
    assert mutant.after is not None
    is_ended = mutant.after.target is AllocationState.ENDED
    is_fresh = mutant.before is not None and mutant.before.source is not AllocationState.ENDED
    return not is_ended or is_fresh or _is_told_already(mutant)


def _is_claimed_or_over(mutant: Mutant) -> bool:
    """Say whether `Unclaimed` is not named, or tolerated, after a row."""
    event, _ = mutant.cell
    assert mutant.after is not None
    if mutant.after.target in _EXISTS:
        return event in (on.ResponseSent, on.ResponseNotSent, on.RequestRepeated, on.ScopePopulated)
    is_alive_or_ended = mutant.after.target in (AllocationState.REQUESTED, AllocationState.ENDED)
    return is_alive_or_ended and event is not on.Unclaimed


def _adds_row(mutant: Mutant, *events: type[Event]) -> bool:
    return mutant.edit == "add a row" and mutant.cell[0] in events


def _adds(mutant: Mutant, *orders: Order) -> bool:
    return mutant.edit == "add an effect" and mutant.surplus in orders


def _is_told_already(mutant: Mutant) -> bool:
    return mutant.cell[0] in (on.RequestDuringDrain, on.EndRepeated)


ARGUMENTS: Final = (
    Argument(
        "the event cannot be brought about in this state: the kernel itself names it, by the state",
        lambda m: m.edit == "add a row" and _is_named_by_the_kernel(m),
    ),
    Argument(
        "the expiry is refused before its row is looked at: its timer does not run in this state",
        lambda m: _adds_row(m, *_EXPIRIES),
    ),
    Argument(
        "the report is refused, because what it reports is not under way in this state",
        lambda m: (
            (
                _adds_row(m, on.NamespacesCreated, on.NamespacesNotCreated)
                and m.cell[1] is not AllocationState.REQUESTED
            )
            or _adds_row(m, on.ReleaseDelayed, on.NamespacesReleased)
        ),
    ),
    Argument(
        "adoptions are reported before the provider is ready, once for each name: nothing is "
        "requested then, and what is remembered as released counts as unknown",
        lambda m: (
            _adds_row(m, *_ADOPTIONS)
            and m.cell[1] in (AllocationState.REQUESTED, AllocationState.RELEASED)
        ),
    ),
    Argument(
        "without a connection the consumer's kernel hears no peer, whatever the rows say",
        lambda m: (
            m.edit == "add a row"
            and issubclass(m.cell[0], on.PeerEvent)
            and m.cell[1] in _WITHOUT_A_LINE
        ),
    ),
    Argument(
        "the notice's table takes the event whenever it can come, and this row does nothing more",
        lambda m: (
            m.edit == "add a row"
            and m.table == "consumer"
            and m.after is not None
            and m.after.source is m.after.target
            and m.cell[0] in NOTICE.events
        ),
    ),
    Argument(
        "of what is unknown or released nothing is kept that could be elsewhere afterwards",
        lambda m: m.edit == "redirect a row" and m.cell[1] in _NO_ALLOCATION,
    ),
    Argument(
        "to stop a timer that does not run is left out, and in this state it does not run, or not "
        "any more",
        lambda m: (
            isinstance(m.surplus, do.Timing)
            and not m.surplus.starts
            and not (
                _is_starting(m) and m.edit == "add an effect" and m.cell[0] not in _TAKING_HELD
            )
        ),
    ),
    Argument(
        "it takes up all that waits for it: the second finds nothing",
        lambda m: m.edit == "repeat an effect" and m.surplus in _RESOLVING,
    ),
    Argument(
        "messages are held only while the provider starts, and this row has taken them up",
        lambda m: m.surplus in _HELD and (not _is_starting(m) or m.cell[0] in _TAKING_HELD),
    ),
    Argument(
        "requests are deferred only while the provider is ready, and refused when it stops",
        lambda m: (
            m.surplus is do.RefuseDeferred
            and m.cell[1] is not ServiceState.READY
            and m.cell[0] is not on.ProviderReady
        ),
    ),
    Argument(
        "the connection is closed: what its messages come to makes no difference",
        lambda m: (
            m.surplus in (do.RefuseLate, do.RefuseFrame) and m.cell[0] is on.ConnectionFlooded
        ),
    ),
    Argument(
        "no request for it is open: each is granted or answered",
        lambda m: _adds(m, do.GrantAskers, do.FailAskers) and _has_no_open_request(m),
    ),
    Argument(
        "no request for it is open or deferred",
        lambda m: (
            _adds(m, do.FailAllAskers)
            and _has_no_open_request(m)
            and (_has_no_deferred_request(m) or m.cell[0] is on.ClaimExpired)
        ),
    ),
    Argument(
        "nothing is granted, or not any more",
        lambda m: (
            _adds(m, do.WithdrawGrants)
            and (m.cell[1] not in _EXISTS or m.cell[0] in (on.Unclaimed, on.ClaimExpired))
            and m.cell != (on.NamespacesCreated, AllocationState.REQUESTED)
        ),
    ),
    Argument(
        "it is claimed or used, or not alive: then nothing follows from having no asker",
        lambda m: m.surplus is do.CheckClaim and _is_claimed_or_over(m),
    ),
    Argument(
        "an asker of what is over, or of what never was, counts for nothing",
        lambda m: (
            m.surplus is do.AddAsker
            and m.cell[0]
            in (on.RequestEarly, on.RequestDuringDrain, on.EndReceived, on.EndRepeated)
        ),
    ),
    Argument(
        "no request of the connection is deferred to the release of this incarnation",
        lambda m: (
            m.surplus is do.WithdrawDeferred
            and (
                _is_told_already(m)
                or (
                    m.cell[0] in (on.RequestRepeated, on.RequestConflicting)
                    and m.cell[1] in _EXISTS
                )
                or (m.cell[0] is on.EndReceived and m.cell[1] is not AllocationState.ENDED)
            )
        ),
    ),
    Argument(
        "no end of it is open: one that comes while it is alive ends it, and one that comes after "
        "the end was told is answered at once",
        lambda m: (
            _adds(m, do.AnswerEnd)
            and (
                _is_told_already(m)
                or m.cell == (on.EndReceived, AllocationState.UNKNOWN)
                or (m.cell[0] is not on.EndReceived and m.cell[1] is not AllocationState.ENDED)
            )
        ),
    ),
    Argument(
        "the end has been told already, or nothing is there to tell",
        lambda m: (
            m.surplus is do.PushEnd
            and (
                _is_told_already(m)
                or (m.cell[0] is on.EndReceived and m.cell[1] is AllocationState.UNKNOWN)
            )
        ),
    ),
    Argument(
        "a held message is found in the list of what is held, and dispatched or refused alike",
        lambda m: m.name == "TurnCame in held to deferred",
    ),
    Argument(
        "there is no connection left to be closed",
        lambda m: m.surplus is do.CloseChannel,
    ),
    Argument(
        "the two touch different things, and what is said on one connection stands in line there: "
        "done in the other order they do the same",
        lambda m: m.edit == "swap effects" and not any(x in _ORDERED for x in _turned_round(m)),
    ),
)
"""For whatever is not killed; that none of them is killed either is part of the campaign."""
