"""
Reference model: what a provider and a consumer do next, as two pure functions.

`consumer_step` and `provider_step` take a state and an event and return the next state and the
effects. An event that is not matched below is impossible in that state: `Impossible` is raised and
nothing changes. A step first changes the facts; timers, answers and work for the backend are then
derived from the state before and after.

The model was written from the protocol's text and is independent of `statemachine`'s kernels and
tables, of which it uses only events, effects, errors and messages. Ids such as LIFE-6 are clauses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from statemachine import effects as do
from statemachine import events as ev
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.events import ConnectionId, Event
from statemachine.messages import AllocationEnded, NamespaceRequest, NamespaceResponse, objection


class Impossible(Exception):
    """The event cannot happen in this state; nothing has changed. (LIFE-1)"""

    def __init__(self, whose: Literal["ours", "peer's"]) -> None:
        super().__init__(whose)
        self.whose = whose
        """Whose fault it is: our driver's or the peer's."""


# --- The consumer ------------------------------------------------------------------------------

ConsumerStage: TypeAlias = Literal[
    "idle", "requested", "held", "refused", "serving_self", "self_held", "failed", "ending", "ended"
]


class Consumer(NamedTuple):
    """One allocation at its consumer."""

    request: NamespaceRequest
    stage: ConsumerStage = "idle"
    """How far the caller's request has come."""
    connection: Literal["closed", "connecting", "open"] = "closed"
    """The connection to the provider."""
    end: Literal["not owed", "owed", "confirmed"] = "not owed"
    """
    Whether the consumer has to tell the provider that the allocation is over.

    It owes that when the provider may keep a set of namespaces without a user. (SELF-7, SELF-8)
    """

    @property
    def state(self) -> str:
        """The lifecycle's name for the stage."""
        if self.stage == "requested":
            return "asking" if self.connection == "open" else "connecting"
        return self.stage

    @property
    def notice(self) -> str:
        """The lifecycle's name for the state of the end notice."""
        if self.end != "owed":
            return {"not owed": "silent", "confirmed": "heard"}[self.end]
        return {"open": "told", "connecting": "dialling", "closed": "owed"}[self.connection]

    @property
    def timers(self) -> set[tuple[Timer, str]]:
        """The timers that run, each with its allocation."""
        runs = {Timer.ANSWER: self.state == "asking"}
        runs |= {Timer.NOTICE: self.notice == "told", Timer.REDIAL: self.notice == "owed"}
        return {(timer, self.request.allocation_id) for timer, is_on in runs.items() if is_on}


def consumer_step(before: Consumer, event: Event) -> tuple[Consumer, list[Effect]]:
    """
    Apply an event to a consumer.

    Raises:
        Impossible: the event cannot happen now.
    """
    _check_timer_runs(event, before.timers)
    after = _change_consumer(before, event)
    if before.end == "not owed" and after.end == "owed" and after.connection == "closed":
        after = after._replace(connection="connecting")
    return after, list(_consumer_effects(before, event, after))


def _change_consumer(consumer: Consumer, event: Event) -> Consumer:
    stage, connection = consumer.stage, consumer.connection
    match event:
        case ev.NamespacesWanted() if stage == "idle":
            return consumer._replace(stage="requested", connection="connecting")
        case ev.Connected() if connection == "connecting":
            return consumer._replace(connection="open")
        case ev.ProviderUnreachable() if connection == "connecting":  # ERR-6, SELF-10
            stage = "serving_self" if stage == "requested" else stage
            return consumer._replace(stage=stage, connection="closed")
        case ev.NoticeDue():
            return consumer._replace(connection="connecting")
        case ev.AnswerOverdue():  # SELF-1, SELF-8
            return consumer._replace(stage="serving_self", end="owed")
        case ev.NoticeOverdue():
            return consumer._replace(connection="closed")
        case ev.SelfServed() if stage == "serving_self":
            return consumer._replace(stage="self_held")
        case ev.SelfServiceFailed() if stage == "serving_self":  # SELF-5
            return consumer._replace(stage="failed")
        case ev.EndWanted() if stage == "self_held":
            return consumer._replace(stage="ended")
        case ev.EndWanted() if consumer.state == "connecting":
            return consumer._replace(stage="ended", connection="closed")
        case ev.EndWanted() if stage in ("idle", "requested", "held"):  # SELF-11
            return consumer._replace(stage="ending", end="owed")
        case ev.PeerEvent() if connection == "open":
            return _receive_from_provider(consumer, event)
    raise Impossible("peer's" if isinstance(event, ev.PeerEvent) else "ours")


def _receive_from_provider(consumer: Consumer, event: Event) -> Consumer:
    """
    Apply a message of the provider, or the loss of the connection.

    While the consumer is asking, it is the answer: an end is owed unless the answer makes certain
    that the provider keeps nothing. While it holds the provider's namespaces, it can only be the
    end. While it owes an end, `AllocationEnded` or `AllocationNotFound` confirms that one, and an
    answer to the earlier request is late and ignored.
    """
    is_asking = consumer.stage == "requested"
    is_held = consumer.stage == "held"
    is_end_owed = consumer.end == "owed"
    match event:
        case ev.ConnectionLost() | ev.PassingFailed() | ev.FrameRejected() if not is_asking:
            return consumer._replace(connection="closed")  # CRASH-13
        case (
            ev.ConnectionLost() | ev.PassingFailed() | ev.FrameRejected() | ev.ResponseMismatched()
        ) if is_asking:  # ERR-6, SELF-8
            return consumer._replace(stage="serving_self", connection="closed", end="owed")
        case ev.ProviderUnavailable() if is_asking or is_end_owed:  # ERR-6, SELF-10
            stage = "serving_self" if is_asking else consumer.stage
            return consumer._replace(stage=stage, connection="closed")
        case ev.ResponseReceived() if is_asking:
            return consumer._replace(stage="held")
        case ev.CreationRefused() | ev.NotFoundReceived() if is_asking:  # ERR-5
            return consumer._replace(stage="refused", connection="closed")
        case ev.ResponseReceived() | ev.ResponseMismatched() | ev.CreationRefused() if is_end_owed:
            return consumer  # SELF-9
        case ev.EndAnnounced() if is_held:
            return consumer._replace(stage="ended", connection="closed")
        case ev.EndAnnounced() | ev.NotFoundReceived() if is_end_owed:  # END-15
            stage = "ended" if consumer.stage == "ending" else consumer.stage
            return consumer._replace(stage=stage, connection="closed", end="confirmed")
    raise Impossible("peer's")


def _consumer_effects(before: Consumer, event: Event, after: Consumer) -> Iterator[Effect]:
    """Derive the effects of a step from the state before and after."""
    name = after.request.allocation_id
    new_stage = after.stage if after.stage != before.stage else ""
    is_asking, was_asking = after.state == "asking", before.state == "asking"
    # To the provider, in this order.
    is_response = isinstance(event, ev.ResponseReceived | ev.ResponseMismatched)
    if is_response and new_stage != "held":
        yield do.DiscardDescriptors()
    is_fault = was_asking or not is_response
    if isinstance(event, ev.FrameRejected | ev.ResponseMismatched) and is_fault:
        yield do.SendFault(event.reason)
    is_moved_by_event = isinstance(event, ev.ConnectionLost | ev.ProviderUnreachable | ev.Connected)
    has_changed = after.connection != before.connection
    if before.connection != "closed" and has_changed and not is_moved_by_event:
        yield do.CloseChannel()
    if after.connection == "connecting" and has_changed:
        yield do.Connect()
    if is_asking and not was_asking:
        yield do.SendRequest(after.request)
    if after.notice == "told" != before.notice:
        yield do.SendEnd(name)
    # To the caller.
    is_silence = isinstance(event, ev.AnswerOverdue | ev.ConnectionLost)
    error = getattr(event, "error", None) or (SocketUnavailable if is_silence else FdPassing)("")
    if new_stage == "serving_self":  # SELF-2, SELF-4
        yield do.ReportFallback(name, error)
        yield do.ServeSelf(after.request)
    is_not_found = isinstance(event, ev.NotFoundReceived)
    if new_stage in ("refused", "failed") or (new_stage and is_not_found):
        yield do.ReportRefusal(error)
    if new_stage in ("held", "self_held"):
        assert isinstance(event, ev.ResponseReceived | ev.SelfServed)
        yield do.DeliverDescriptors(event.response, is_degraded=new_stage == "self_held")
    if new_stage == "ended" and before.stage == "self_held":
        yield do.ReleaseOwn(name)
    if new_stage == "ended":
        yield do.ReportEnd(name)
    yield from _timer_effects(before.timers, after.timers, event)


# --- The provider ------------------------------------------------------------------------------

K = TypeVar("K")
V = TypeVar("V")
ConsumerMessage: TypeAlias = NamespaceRequest | AllocationEnded
AnswerState: TypeAlias = Literal["waiting", "granted", "ending", "ended", "pushed"] | NamespaceError

FAILED, UNAVAILABLE, UNREADABLE = CreationFailed(""), SocketUnavailable(""), FdPassing("")


class Map(dict[K, V]):
    """An immutable dict with a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Limits(NamedTuple):
    """Who may use the provider, and how much of it. (PEER-2, PEER-4)"""

    allowed_uids: frozenset[int] = frozenset({0})
    waiting: int = 128
    open_per_connection: int = 64
    open_per_uid: int = 1024
    allocations_per_uid: int = 4096
    connections_per_uid: int = 4096
    remembered: int = 1024


class Unanswered(NamedTuple):
    """An entry in a connection's queue of answers; it is sent when it is the oldest. (WIRE-14)"""

    message: ConsumerMessage | None
    """What it answers. None: an unreadable frame, or no message; the connection closes after it."""
    outcome: AnswerState = "waiting"
    """
    What is known of the answer.

    - waiting: the message has not been judged yet;
    - granted: a response, as soon as the namespaces exist;
    - ending: `AllocationEnded`, as soon as the end is announced;
    - ended: `AllocationEnded`, now;
    - pushed: `AllocationEnded`, now, and it answers no message;
    - an error: that error, now.
    """


class Peer(NamedTuple):
    """A connection, until its loss."""

    uid: int
    queue: tuple[Unanswered, ...] = ()
    granted: frozenset[str] = frozenset()
    """Allocations that it was granted and that have not ended."""
    sending: tuple[str, ...] = ()
    """Allocations whose response has been given to the driver and is not reported yet."""
    holds: frozenset[str] = frozenset()
    """Allocations whose response was sent to it and whose end was not announced."""
    is_closed: bool = False
    """Whether the provider has closed it."""


class Allocation(NamedTuple):
    """One incarnation of an allocation. It is created when there is a response."""

    request: NamespaceRequest
    uid: int | None = None
    """The user for whose limit it counts: the first to ask; none after an adoption. (PEER-4)"""
    is_being_created: bool = False
    response: NamespaceResponse | None = None
    was_handed_off: bool = False
    was_used: bool = False
    has_ended: bool = False
    is_being_released: bool = False
    is_announced: bool = False


class Provider(NamedTuple):
    """Everything that a provider knows."""

    limits: Limits = Limits()
    is_ready: bool = False
    is_stopping: bool = False
    peers: Map[ConnectionId, Peer] = Map()
    allocations: Map[str, Allocation] = Map()
    waiting: tuple[tuple[ConnectionId, ConsumerMessage], ...] = ()
    """Messages that are not judged yet, in the order in which they came. (LIFE-6, LIFE-13)"""
    remembered: tuple[str, ...] = ()
    """Names of released allocations, oldest first. (END-18)"""

    @property
    def phase(self) -> str:
        """The lifecycle's name for the provider's own state."""
        if self.is_stopping:
            return "stopping" if self.is_ready else "aborted"
        return "ready" if self.is_ready else "starting"

    def state_of(self, name: str) -> str:
        """Return the lifecycle's name for an allocation's state."""
        allocation = self.allocations.get(name)
        if allocation is None:
            return "released" if name in self.remembered else "unknown"
        if allocation.has_ended:
            return "ended"
        if allocation.was_handed_off:
            return "handed_off"
        return "created" if allocation.response else "requested"

    @property
    def timers(self) -> set[tuple[Timer, str]]:
        """The timers that run, each with its allocation."""
        runs = {(Timer.READINESS, "")} if self.waiting and not self.is_ready else set()
        granted = {name for peer in self.peers.values() for name in peer.granted}
        for name, allocation in self.allocations.items():
            if allocation.response and not allocation.was_used and name not in granted:
                runs.add((Timer.CLAIM, name))  # END-3
            if allocation.has_ended and not allocation.is_announced:
                runs.add((Timer.RELEASE, name))
            if allocation.has_ended and not allocation.is_being_released:
                runs.add((Timer.RETRY, name))  # END-9
        return runs

    def with_peer(self, number: ConnectionId, **changes: Any) -> Provider:
        """Change some facts of a connection."""
        changed = self.peers[number]._replace(**changes)
        return self._replace(peers=Map({**self.peers, number: changed}))

    def with_allocation(self, name: str, **changes: Any) -> Provider:
        """Change some facts of an allocation."""
        changed = self.allocations[name]._replace(**changes)
        return self._replace(allocations=Map({**self.allocations, name: changed}))


def provider_step(before: Provider, event: Event) -> tuple[Provider, list[Effect]]:
    """
    Apply an event to a provider. Whatever a peer sends is possible, and has an answer.

    Raises:
        Impossible: the event cannot happen now.
    """
    _check_timer_runs(event, before.timers)
    answers: list[Effect] = []
    after = _send_answers(_change_provider(before, event), answers)
    while changed := _judge_next_message(after):
        after = _send_answers(changed, answers)
    work = _backend_effects(before, after)
    return after, [*answers, *work, *_timer_effects(before.timers, after.timers, event)]


def _change_provider(provider: Provider, event: Event) -> Provider:
    match event:
        case ev.ConnectionOpened(number, uid) if number not in provider.peers:
            limits = provider.limits
            of_uid = sum(peer.uid == uid for peer in provider.peers.values())
            error: NamespaceError | None = None
            if uid not in limits.allowed_uids:
                error = UNAVAILABLE  # ERR-3, PEER-2
            elif of_uid >= limits.connections_per_uid:
                error = FAILED  # ERR-4
            peer = Peer(uid, (Unanswered(None, error),) if error else ())
            return provider._replace(peers=Map({**provider.peers, number: peer}))
        case ev.ConnectionLost(number) if number in provider.peers:  # LIFE-2
            waiting = tuple(each for each in provider.waiting if each[0] != number)
            return provider._replace(peers=_without(provider.peers, number), waiting=waiting)
        case ev.RequestReceived(number, request):
            return _receive_message(provider, number, request)
        case ev.EndReceived(number, name):
            return _receive_message(provider, number, AllocationEnded(name))
        case ev.FrameRejected(connection=number):
            return _receive_message(provider, number, None)
        case ev.ProviderReady() if provider.phase == "starting":
            return provider._replace(is_ready=True)
        case ev.ReadinessOverdue() | ev.ProviderStopping() if not provider.is_stopping:
            is_stopping = isinstance(event, ev.ProviderStopping)  # LIFE-14, CRASH-12
            provider = _resolve(provider, {"waiting": UNAVAILABLE})
            return provider._replace(waiting=(), is_stopping=is_stopping)
        case ev.CreatedAdopted(name) | ev.HandedOffAdopted(name) | ev.RemainsFound(name) if (
            provider.phase == "starting" and name not in provider.allocations
        ):  # CRASH-2, CRASH-4
            found = Allocation(event.request, has_ended=True, is_being_released=True)
            if not isinstance(event, ev.RemainsFound):
                found = Allocation(event.request, response=event.response)
            is_handed_off = isinstance(event, ev.HandedOffAdopted)
            return _add_allocation(provider, found._replace(was_handed_off=is_handed_off))
        case ev.AllocationEvent(name) if name in provider.allocations:
            return _change_allocation(provider, name, event)
    raise Impossible("ours")


def _change_allocation(provider: Provider, name: str, event: Event) -> Provider:
    """
    Apply an event about one allocation.

    The backend reports what it was asked for, each once and in that order; to whom a response was
    sent is reported before the end is announced. What a watch reports may be late.
    """
    allocation = provider.allocations[name]
    exists = allocation.response or allocation.has_ended
    is_releasing = allocation.is_being_released and not allocation.is_being_created
    match event:
        case ev.NamespacesCreated(_, response) if allocation.is_being_created:
            usable = None if allocation.has_ended else response
            return provider.with_allocation(name, is_being_created=False, response=usable)
        case ev.NamespacesNotCreated() if allocation.is_being_created:  # LIFE-8
            return _end(provider.with_allocation(name, is_being_created=False), name)
        case ev.ResponseSent(_, number) | ev.ResponseNotSent(_, number) if (
            number in provider.peers and name in provider.peers[number].sending
        ):
            sending, holds = [*provider.peers[number].sending], provider.peers[number].holds
            sending.remove(name)
            if isinstance(event, ev.ResponseSent):
                holds |= {name}
                provider = provider.with_allocation(name, was_handed_off=not allocation.has_ended)
            return provider.with_peer(number, sending=tuple(sending), holds=holds)
        case ev.ScopePopulated() if exists:
            return provider.with_allocation(name, was_used=not allocation.has_ended)
        case ev.ScopeEmptied() | ev.InitDied() if exists:  # END-1
            return _end(provider, name)
        case ev.ReleaseRequested() | ev.ClaimExpired():  # END-1
            return _end(provider, name)
        case ev.RetryDue():
            return provider.with_allocation(name, is_being_released=True)
        case ev.ReleaseDelayed() if is_releasing:
            return provider.with_allocation(name, is_being_released=False)
        case ev.ReleaseOverdue():
            return _announce(provider.with_allocation(name, is_announced=True), name)
        case ev.NamespacesReleased() if is_releasing:
            names = (*provider.remembered, name)
            names = names[max(0, len(names) - provider.limits.remembered) :]  # END-18
            left = _without(provider.allocations, name)
            return _announce(provider._replace(allocations=left, remembered=names), name)
    raise Impossible("ours")


def _receive_message(
    provider: Provider, number: ConnectionId, message: ConsumerMessage | None
) -> Provider:
    """Queue a message behind its sender's earlier ones; refuse what is over a limit. (LIFE-15)"""
    peer, limits = provider.peers.get(number), provider.limits
    # After an unreadable frame nothing is read from a connection.
    if peer is None or peer.is_closed or any(entry.message is None for entry in peer.queue):
        raise Impossible("ours")
    count = len(peer.queue)
    of_uid = sum(len(each.queue) for each in provider.peers.values() if each.uid == peer.uid)
    is_request = isinstance(message, NamespaceRequest)
    is_full = not provider.is_ready and len(provider.waiting) >= limits.waiting
    outcome: AnswerState = "waiting"
    is_flood = message and count >= 2 * limits.open_per_connection
    if message is None:
        outcome = UNREADABLE  # WIRE-11
    elif is_flood:
        outcome = FAILED  # Never sent: the answer put before it closes the connection. (PEER-6)
    elif is_request and (count >= limits.open_per_connection or of_uid >= limits.open_per_uid):
        outcome = FAILED  # ERR-4, END-20
    elif (provider.is_stopping and (is_request or not provider.is_ready)) or is_full:
        outcome = UNAVAILABLE  # LIFE-14, LIFE-16
    else:
        provider = provider._replace(waiting=(*provider.waiting, (number, message)))
    first = (Unanswered(None, UNREADABLE),) if is_flood else ()
    return provider.with_peer(number, queue=(*first, *peer.queue, Unanswered(message, outcome)))


def _judge_next_message(provider: Provider) -> Provider | None:
    """Judge the oldest message that need not wait any longer, if there is one."""
    outcomes = (_judge(provider, *each) for each in provider.waiting if provider.is_ready)
    judged = ((i, outcome) for i, outcome in enumerate(outcomes) if outcome != "waiting")
    index, outcome = next(judged, (-1, None))
    if outcome is None:
        return None
    number, message = provider.waiting[index]
    name = message.allocation_id
    decided = {index: outcome}
    if outcome == "granted":
        if name not in provider.allocations:
            assert isinstance(message, NamespaceRequest)
            new = Allocation(message, provider.peers[number].uid, is_being_created=True)
            provider = _add_allocation(provider, new)
        granted = provider.peers[number].granted | {name}
        provider = provider.with_peer(number, granted=granted)
    elif outcome == "ending":
        provider = _end(provider, name)
        for i, (sender, earlier) in enumerate(provider.waiting[:index]):
            if (sender, earlier.allocation_id) == (number, name):
                decided[i] = FAILED  # END-17
    queue = [*provider.peers[number].queue]
    for i in sorted(decided):
        decided_message = provider.waiting[i][1]
        queue[queue.index(Unanswered(decided_message))] = Unanswered(decided_message, decided[i])
    waiting = tuple(each for i, each in enumerate(provider.waiting) if i not in decided)
    return provider.with_peer(number, queue=tuple(queue))._replace(waiting=waiting)


def _judge(provider: Provider, number: ConnectionId, message: ConsumerMessage) -> AnswerState:
    """Decide the outcome of a message now; waiting if it has to wait for a release. (LIFE-6)"""
    name, uid = message.allocation_id, provider.peers[number].uid
    allocation = provider.allocations.get(name)
    if isinstance(message, AllocationEnded):  # END-13
        if allocation is None and name not in provider.remembered:
            return AllocationNotFound(name)
        return "ended" if allocation is None or allocation.is_announced else "ending"
    of_uid = sum(each.uid == uid for each in provider.allocations.values())
    is_over = allocation is None and of_uid >= provider.limits.allocations_per_uid
    if objection(message) or is_over:  # LIFE-10, LIFE-12, ERR-4
        return FAILED
    if allocation and allocation.has_ended:  # LIFE-6, LIFE-7
        return FAILED if allocation.is_announced else "waiting"
    is_granted = allocation is None or allocation.request == message  # LIFE-3, LIFE-5
    return "granted" if is_granted else FAILED


def _resolve(
    provider: Provider, outcomes: dict[AnswerState, AnswerState], name: str | None = None
) -> Provider:
    """Replace outcomes in every queue; with a name, only of messages about that allocation."""
    for number, peer in provider.peers.items():
        queue = tuple(
            Unanswered(message, outcomes[outcome])
            if message and outcome in outcomes and name in (None, message.allocation_id)
            else Unanswered(message, outcome)
            for message, outcome in peer.queue
        )
        provider = provider.with_peer(number, queue=queue)
    return provider


def _add_allocation(provider: Provider, new: Allocation) -> Provider:
    name = new.request.allocation_id
    names = tuple(each for each in provider.remembered if each != name)
    allocations = Map({**provider.allocations, name: new})
    return provider._replace(allocations=allocations, remembered=names)


def _end(provider: Provider, name: str) -> Provider:
    """End an allocation unless it has ended, and begin its release. (END-2)"""
    allocation = provider.allocations[name]
    if allocation.has_ended:
        return provider
    for number, peer in provider.peers.items():
        provider = provider.with_peer(number, granted=peer.granted - {name})
    request, uid, is_being_created = allocation[:3]
    ended = Allocation(request, uid, is_being_created, has_ended=True, is_being_released=True)
    return provider.with_allocation(name, **ended._asdict())


def _announce(provider: Provider, name: str) -> Provider:
    """Announce an end: answer those who asked, push it to those who hold it. (END-12, END-16)"""
    for number, peer in provider.peers.items():
        has_asked = Unanswered(AllocationEnded(name), "ending") in peer.queue
        is_pushed = name in peer.holds and not has_asked and not peer.is_closed
        first = (Unanswered(AllocationEnded(name), "pushed"),) if is_pushed else ()
        sending = tuple(each for each in peer.sending if each != name)
        holds = peer.holds - {name}
        provider = provider.with_peer(
            number, queue=first + peer.queue, sending=sending, holds=holds
        )
    return _resolve(provider, {"granted": FAILED, "ending": "ended"}, name)


def _without(items: Map[K, V], key: K) -> Map[K, V]:
    return Map({k: v for k, v in items.items() if k != key})


@dataclass(frozen=True, slots=True)
class PushedEnd(do.AnnounceEnd):
    """An end that answers no message; it may come anywhere between the answers. (WIRE-15)"""


def _send_answers(provider: Provider, answers: list[Effect]) -> Provider:
    """On each connection, send every answer that is known and is the oldest. (WIRE-14)"""
    for number in provider.peers:
        while (peer := provider.peers[number]).queue and not peer.is_closed:
            answer = _answer(provider, number)
            if answer is None:
                break
            is_last = peer.queue[0].message is None
            answers += [answer, do.CloseConnection(number)] if is_last else [answer]
            sent = (answer.response.allocation_id,) if isinstance(answer, do.HandOver) else ()
            provider = provider.with_peer(
                number, queue=peer.queue[1:], sending=peer.sending + sent, is_closed=is_last
            )
    return provider


def _answer(provider: Provider, number: ConnectionId) -> Effect | None:
    """Return the answer that is the oldest on a connection, or None while it is not known."""
    message, outcome = provider.peers[number].queue[0]
    if isinstance(outcome, NamespaceError):
        return do.Refuse(number, outcome)
    assert message is not None
    name = message.allocation_id
    if outcome in ("ended", "pushed"):
        return (PushedEnd if outcome == "pushed" else do.AnnounceEnd)(number, name)
    response = provider.allocations[name].response if outcome == "granted" else None
    return do.HandOver(number, response) if response else None


def _backend_effects(before: Provider, after: Provider) -> Iterator[Effect]:
    """Derive the work for the backend from the state before and after."""
    for name, now in after.allocations.items():
        was = before.allocations.get(name, Allocation(now.request))
        if now.is_being_created and not was.is_being_created:
            yield do.CreateNamespaces(now.request)
        if now.response and not was.response:
            yield do.Watch(name)
        if was.response and now.was_handed_off and not was.was_handed_off:
            yield do.RecordHandoff(name)
        if now.is_being_released and not was.is_being_released:
            yield do.ReleaseNamespaces(name)


# --- Timers, and comparing with a kernel -------------------------------------------------------

EXPIRY = {
    ev.ReadinessOverdue: Timer.READINESS,
    ev.ClaimExpired: Timer.CLAIM,
    ev.ReleaseOverdue: Timer.RELEASE,
    ev.RetryDue: Timer.RETRY,
    ev.AnswerOverdue: Timer.ANSWER,
    ev.NoticeOverdue: Timer.NOTICE,
    ev.NoticeDue: Timer.REDIAL,
}
"""The timer whose expiry each event reports; an expired timer is not stopped."""


def _check_timer_runs(event: Event, timers: set[tuple[Timer, str]]) -> None:
    timer, name = EXPIRY.get(type(event)), getattr(event, "allocation_id", None)
    if timer and not any(timer is t and name in (None, n) for t, n in timers):
        raise Impossible("ours")


def _timer_effects(
    before: set[tuple[Timer, str]], after: set[tuple[Timer, str]], event: Event
) -> Iterator[Effect]:
    for timer, name in sorted(before - after, key=str):
        if timer is not EXPIRY.get(type(event)):
            yield do.StopTimer(timer, name)
    for timer, name in sorted(after - before, key=str):
        yield do.StartTimer(timer, name)


def comparable(effect: Effect) -> tuple[object, ...]:
    """Return what of an effect is compared: everything but the text of a reason."""
    kind = do.AnnounceEnd if isinstance(effect, do.AnnounceEnd) else type(effect)
    values = [getattr(effect, field.name) for field in fields(effect) if field.name != "reason"]
    has_text = (SocketUnavailable, CreationFailed, FdPassing)
    return (kind.__name__, *(type(v) if isinstance(v, has_text) else v for v in values))


def receiver_of(effect: Effect) -> object:
    """Return the connection on which an effect has its order, or None where order means nothing."""
    on_the_wire = (do.Connect, do.SendRequest, do.SendEnd, do.SendFault, do.CloseChannel)
    only = "the provider" if isinstance(effect, on_the_wire) else None
    return getattr(effect, "connection", only)


def differences(kernel: Iterable[Effect], model: Iterable[Effect]) -> list[str]:
    """Compare two steps: the same effects, in the same order on each connection."""
    actual, expected = list(kernel), list(model)
    count = Counter(map(comparable, actual))
    count.subtract(Counter(map(comparable, expected)))
    found = [f"the kernel {n:+d} {what}" for what, n in count.items() if n]
    unordered = {comparable(effect) for effect in expected if isinstance(effect, PushedEnd)}
    for receiver in {receiver_of(effect) for effect in actual} - {None}:
        orders = [
            [comparable(e) for e in effects if receiver_of(e) == receiver]
            for effects in (actual, expected)
        ]
        ordered = [[one for one in order if one not in unordered] for order in orders]
        if not found and ordered[0] != ordered[1]:
            found.append(f"to {receiver} the kernel sends {ordered[0]}, the model {ordered[1]}")
    return found
