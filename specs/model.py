"""
The protocol once more, as short as it can be said: what a provider and a consumer do next.

This is not how it is built (`statemachine` is) but what it is held to. It was written from the
protocol's text; nothing is looked up in a table, and as little as possible is remembered. A step
says what becomes of the facts; whatever can be told from the facts before and after (which timers
run, what is answered, what the backend is to do) is told from them. An event that is not named, or
not while that is so, cannot come. Both steps are pure: (state, event) -> (state, outputs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeAlias, TypeVar

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
    """This event cannot come now: a bug of our own driver, or the peer's fault. No change."""

    def __init__(self, whose: Literal["ours", "peer's"]) -> None:
        super().__init__(whose)
        self.whose = whose


# --- The consumer ------------------------------------------------------------------------------


class Consumer(NamedTuple):
    """One allocation as its consumer sees it: what its caller has, its line, and its debt."""

    request: NamespaceRequest
    has: Literal[
        "nothing", "hopes", "theirs", "refusal", "makes own", "own", "failure", "waits", "end"
    ] = "nothing"
    line: Literal["down", "calling", "up"] = "down"
    debt: Literal["none", "owed", "paid"] = "none"
    """Whether the provider must hear that it is over: it may hold a set that nobody uses."""

    @property
    def state(self) -> str:
        """What the lifecycle calls this."""
        return {
            "nothing": "idle",
            "hopes": "asking" if self.line == "up" else "connecting",
            "theirs": "held",
            "refusal": "refused",
            "makes own": "serving_self",
            "own": "self_held",
            "failure": "failed",
            "waits": "ending",
            "end": "ended",
        }[self.has]

    @property
    def notice(self) -> str:
        """What the lifecycle calls its debt."""
        if self.debt != "owed":
            return {"none": "silent", "paid": "heard"}[self.debt]
        return {"up": "told", "calling": "dialling", "down": "owed"}[self.line]

    @property
    def timers(self) -> set[tuple[Timer, str]]:
        """What is waited for, no longer than so long."""
        waits = {Timer.ANSWER: self.state == "asking"}
        waits |= {Timer.NOTICE: self.notice == "told", Timer.REDIAL: self.notice == "owed"}
        return {(timer, self.request.allocation_id) for timer, runs in waits.items() if runs}


def consumer_step(before: Consumer, event: Event) -> tuple[Consumer, list[Effect]]:
    """
    Say what becomes of a consumer.

    Raises:
        Impossible: the event cannot come now.
    """
    _must_be_running(event, before.timers)
    after = _consumer_facts(before, event)
    if before.debt == "none" and after.debt == "owed" and after.line == "down":
        after = after._replace(line="calling")
    return after, list(_consumer_effects(before, event, after))


def _consumer_facts(it: Consumer, event: Event) -> Consumer:
    match event:
        case ev.NamespacesWanted() if it.has == "nothing":
            return it._replace(has="hopes", line="calling")
        case ev.Connected() if it.line == "calling":
            return it._replace(line="up")
        case ev.ProviderUnreachable() if it.line == "calling":
            return it._replace(has="makes own" if it.has == "hopes" else it.has, line="down")
        case ev.NoticeDue():
            return it._replace(line="calling")
        case ev.AnswerOverdue():
            return it._replace(has="makes own", debt="owed")
        case ev.NoticeOverdue():
            return it._replace(line="down")
        case ev.SelfServed() if it.has == "makes own":
            return it._replace(has="own")
        case ev.SelfServiceFailed() if it.has == "makes own":
            return it._replace(has="failure")
        case ev.EndWanted() if it.has == "own":
            return it._replace(has="end")
        case ev.EndWanted() if it.state == "connecting":
            return it._replace(has="end", line="down")
        case ev.EndWanted() if it.has in ("nothing", "hopes", "theirs"):
            return it._replace(has="waits", debt="owed")
        case ev.PeerEvent() if it.line == "up":
            return _consumer_hears(it, event)
    raise Impossible("peer's" if isinstance(event, ev.PeerEvent) else "ours")


def _consumer_hears(it: Consumer, event: Event) -> Consumer:
    """
    The line is up and the provider says something, or the line breaks.

    To one who hopes, it is the answer. What makes it certain that the provider holds nothing for
    it leaves no debt; whatever leaves it unknown does. To one who has, it can only be the end. To
    one who owes, an end or an unknown allocation is what it waits for, and an answer to what it had
    asked before is late, and nothing.
    """
    hopes, owes, holds = it.has == "hopes", it.debt == "owed", it.has == "theirs"
    match event:
        case ev.ConnectionLost() | ev.PassingFailed() | ev.FrameRejected() if not hopes:
            return it._replace(line="down")
        case (
            ev.ConnectionLost() | ev.PassingFailed() | ev.FrameRejected() | ev.ResponseMismatched()
        ) if hopes:
            return it._replace(has="makes own", line="down", debt="owed")
        case ev.ProviderUnavailable() if hopes or owes:
            return it._replace(has="makes own" if hopes else it.has, line="down")
        case ev.ResponseReceived() if hopes:
            return it._replace(has="theirs")
        case ev.CreationRefused() | ev.NotFoundReceived() if hopes:
            return it._replace(has="refusal", line="down")
        case ev.ResponseReceived() | ev.ResponseMismatched() | ev.CreationRefused() if owes:
            return it
        case ev.EndAnnounced() if holds:
            return it._replace(has="end", line="down")
        case ev.EndAnnounced() | ev.NotFoundReceived() if owes:
            return it._replace(has="end" if it.has == "waits" else it.has, line="down", debt="paid")
    raise Impossible("peer's")


def _consumer_effects(b: Consumer, event: Event, a: Consumer) -> Iterator[Effect]:
    """Tell what is to be done from the facts before and after."""
    name = a.request.allocation_id
    became = a.has if a.has != b.has else ""
    hopes, hoped = a.state == "asking", b.state == "asking"
    # On the line, in this order.
    is_response = isinstance(event, ev.ResponseReceived | ev.ResponseMismatched)
    if is_response and became != "theirs":
        yield do.DiscardDescriptors()
    if isinstance(event, ev.FrameRejected) or (isinstance(event, ev.ResponseMismatched) and hoped):
        yield do.SendFault(event.reason)
    broke = isinstance(event, ev.ConnectionLost | ev.ProviderUnreachable | ev.Connected)
    if b.line != "down" and a.line != b.line and not broke:
        yield do.CloseChannel()
    if a.line == "calling" != b.line:
        yield do.Connect()
    if hopes and not hoped:
        yield do.SendRequest(a.request)
    if a.notice == "told" != b.notice:
        yield do.SendEnd(name)
    # To the caller.
    is_silence = isinstance(event, ev.AnswerOverdue | ev.ConnectionLost)
    error = getattr(event, "error", None) or (SocketUnavailable if is_silence else FdPassing)("")
    if became == "makes own":
        yield do.ReportFallback(name, error)
        yield do.ServeSelf(a.request)
    if became in ("refusal", "failure") or (became and isinstance(event, ev.NotFoundReceived)):
        yield do.ReportRefusal(error)
    if became in ("theirs", "own"):
        assert isinstance(event, ev.ResponseReceived | ev.SelfServed)
        yield do.DeliverDescriptors(event.response, is_degraded=became == "own")
    if became == "end" and b.has == "own":
        yield do.ReleaseOwn(name)
    if became == "end":
        yield do.ReportEnd(name)
    yield from _timing(b.timers, a.timers, event)


# --- The provider ------------------------------------------------------------------------------

K = TypeVar("K")
V = TypeVar("V")
Message: TypeAlias = NamespaceRequest | AllocationEnded
Fate: TypeAlias = Literal["unread", "granted", "ending", "over", "push"] | NamespaceError

FAILED, UNAVAILABLE, UNREADABLE = CreationFailed(""), SocketUnavailable(""), FdPassing("")


class Map(dict[K, V]):
    """A dict as a value: it has a hash, and nobody changes it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class Limits(NamedTuple):
    """Who may use the provider, and how much of it."""

    allowed_uids: frozenset[int] = frozenset({0})
    waiting: int = 128
    open_per_connection: int = 64
    open_per_uid: int = 1024
    allocations_per_uid: int = 4096
    connections_per_uid: int = 4096
    remembered: int = 1024


class Open(NamedTuple):
    """What a peer has said and was not answered. Its answer comes when it is the oldest."""

    message: Message | None  # None: unreadable, or nothing; its answer is the last word.
    fate: Fate = "unread"
    """
    Not looked at yet; granted, until there is something to hand over; ending, until that is
    announced; then over. An error is decided. A push is the same word as over, but unasked.
    """


class Peer(NamedTuple):
    """A connection, until its loss. All that is known of it goes with it."""

    uid: int
    open: tuple[Open, ...] = ()
    wants: frozenset[str] = frozenset()  # What it was granted and is alive.
    underway: tuple[str, ...] = ()  # What it is being sent.
    holds: frozenset[str] = frozenset()  # What it was sent, and no end of that was announced.
    is_closed: bool = False  # By the provider.


class Allocation(NamedTuple):
    """One life of an allocation. It is created when there is a response."""

    request: NamespaceRequest
    uid: int | None = None  # Whose limit it counts for: who asked first; after a restart, nobody's.
    is_in_making: bool = False
    response: NamespaceResponse | None = None
    was_handed: bool = False
    was_used: bool = False
    has_ended: bool = False
    is_in_release: bool = False
    is_announced: bool = False


class Provider(NamedTuple):
    """Everything a provider knows."""

    limits: Limits = Limits()
    is_ready: bool = False
    is_stopping: bool = False
    peers: Map[ConnectionId, Peer] = Map()
    allocations: Map[str, Allocation] = Map()
    unread: tuple[tuple[ConnectionId, Message], ...] = ()  # In the order in which it came.
    remembered: tuple[str, ...] = ()  # Names of what was released, the oldest first.

    @property
    def phase(self) -> str:
        """What the lifecycle calls the provider's own state."""
        if self.is_stopping:
            return "stopping" if self.is_ready else "aborted"
        return "ready" if self.is_ready else "starting"

    def state_of(self, name: str) -> str:
        """Say what the lifecycle calls an allocation's state."""
        a = self.allocations.get(name)
        if a is None:
            return "released" if name in self.remembered else "unknown"
        if a.has_ended:
            return "ended"
        return "handed_off" if a.was_handed else "created" if a.response else "requested"

    @property
    def timers(self) -> set[tuple[Timer, str]]:
        """What is waited for, no longer than so long."""
        runs = {(Timer.READINESS, "")} if self.unread and not self.is_ready else set()
        claimed = {name for peer in self.peers.values() for name in peer.wants}
        for name, a in self.allocations.items():
            if a.response and not a.was_used and name not in claimed:
                runs.add((Timer.CLAIM, name))
            if a.has_ended and not a.is_announced:
                runs.add((Timer.RELEASE, name))
            if a.has_ended and not a.is_in_release:
                runs.add((Timer.RETRY, name))
        return runs

    def peer(self, c: ConnectionId, **changes: object) -> Provider:
        """Change what is known of a connection."""
        return self._replace(peers=Map({**self.peers, c: self.peers[c]._replace(**changes)}))

    def allocation(self, name: str, **changes: object) -> Provider:
        """Change what is known of an allocation."""
        changed = self.allocations[name]._replace(**changes)
        return self._replace(allocations=Map({**self.allocations, name: changed}))


def provider_step(before: Provider, event: Event) -> tuple[Provider, list[Effect]]:
    """
    Say what becomes of a provider. Whatever a peer does is possible, and has an answer.

    Raises:
        Impossible: the event cannot come now.
    """
    _must_be_running(event, before.timers)
    now = _provider_facts(before, event)
    said: list[Effect] = []
    now = _speak(now, said)
    while later := _read(now):
        now = _speak(later, said)
    said += _backend_effects(before, now)
    return now, [*said, *_timing(before.timers, now.timers, event)]


def _provider_facts(it: Provider, event: Event) -> Provider:
    match event:
        case ev.ConnectionOpened(c, uid) if c not in it.peers:
            of_uid = sum(peer.uid == uid for peer in it.peers.values())
            error = FAILED if of_uid >= it.limits.connections_per_uid else None
            error = error if uid in it.limits.allowed_uids else UNAVAILABLE
            peer = Peer(uid, (Open(None, error),) if error else ())
            return it._replace(peers=Map({**it.peers, c: peer}))
        case ev.ConnectionLost(c) if c in it.peers:
            unread = tuple(each for each in it.unread if each[0] != c)
            return it._replace(peers=_without(it.peers, c), unread=unread)
        case ev.RequestReceived(c, request):
            return _hear(it, c, request)
        case ev.EndReceived(c, name):
            return _hear(it, c, AllocationEnded(name))
        case ev.FrameRejected(connection=c):
            return _hear(it, c, None)
        case ev.ProviderReady() if it.phase == "starting":
            return it._replace(is_ready=True)
        case ev.ReadinessOverdue() | ev.ProviderStopping() if not it.is_stopping:
            stops = isinstance(event, ev.ProviderStopping)
            return _decide(it, {"unread": UNAVAILABLE})._replace(unread=(), is_stopping=stops)
        case ev.CreatedAdopted(name) | ev.HandedOffAdopted(name) | ev.RemainsFound(name) if (
            it.phase == "starting" and name not in it.allocations
        ):
            found = Allocation(event.request, has_ended=True, is_in_release=True)
            if not isinstance(event, ev.RemainsFound):
                found = Allocation(event.request, response=event.response)
            return _enter(it, found._replace(was_handed=isinstance(event, ev.HandedOffAdopted)))
        case ev.AllocationEvent(name) if name in it.allocations:
            return _allocation_facts(it, name, it.allocations[name], event)
    raise Impossible("ours")


def _allocation_facts(it: Provider, name: str, a: Allocation, event: Event) -> Provider:
    """
    Something happened to an allocation.

    The backend reports what it was asked for, each once and in that order; who was sent a response
    is known before the end is announced. A watch may be late.
    """
    match event:
        case ev.NamespacesCreated(_, response) if a.is_in_making:
            response = None if a.has_ended else response
            return it.allocation(name, is_in_making=False, response=response)
        case ev.NamespacesNotCreated() if a.is_in_making:
            return _end(it.allocation(name, is_in_making=False), name)
        case ev.ResponseSent(_, c) | ev.ResponseNotSent(_, c) if (
            c in it.peers and name in it.peers[c].underway
        ):
            rest, holds = [*it.peers[c].underway], it.peers[c].holds
            rest.remove(name)
            if isinstance(event, ev.ResponseSent):
                holds |= {name}
                it = it.allocation(name, was_handed=not a.has_ended)
            return it.peer(c, underway=tuple(rest), holds=holds)
        case ev.ScopePopulated() if a.response or a.has_ended:
            return it.allocation(name, was_used=not a.has_ended)
        case ev.ScopeEmptied() | ev.InitDied() if a.response or a.has_ended:
            return _end(it, name)
        case ev.ReleaseRequested() | ev.ClaimExpired():
            return _end(it, name)
        case ev.RetryDue():
            return it.allocation(name, is_in_release=True)
        case ev.ReleaseDelayed() if a.is_in_release and not a.is_in_making:
            return it.allocation(name, is_in_release=False)
        case ev.ReleaseOverdue():
            return _announce(it.allocation(name, is_announced=True), name)
        case ev.NamespacesReleased() if a.is_in_release and not a.is_in_making:
            names = (*it.remembered, name)
            names = names[max(0, len(names) - it.limits.remembered) :]
            it = it._replace(allocations=_without(it.allocations, name), remembered=names)
            return _announce(it, name)
    raise Impossible("ours")


def _hear(it: Provider, c: ConnectionId, message: Message | None) -> Provider:
    """Put what was said behind what its sender said before. What is over a limit is decided."""
    peer, limits = it.peers.get(c), it.limits
    # After what cannot be read, nothing is read.
    if peer is None or peer.is_closed or any(entry.message is None for entry in peer.open):
        raise Impossible("ours")
    count = len(peer.open)
    of_uid = sum(len(each.open) for each in it.peers.values() if each.uid == peer.uid)
    is_request = isinstance(message, NamespaceRequest)
    is_full = not it.is_ready and len(it.unread) >= limits.waiting
    fate: Fate = "unread"
    is_flood = message and count >= 2 * limits.open_per_connection
    if message is None:
        fate = UNREADABLE
    elif is_flood:
        fate = FAILED  # It is not looked at: the word before it closes the connection.
    elif is_request and (count >= limits.open_per_connection or of_uid >= limits.open_per_uid):
        fate = FAILED
    elif (it.is_stopping and (is_request or not it.is_ready)) or is_full:
        fate = UNAVAILABLE
    else:
        it = it._replace(unread=(*it.unread, (c, message)))
    first = (Open(None, UNREADABLE),) if is_flood else ()
    return it.peer(c, open=(*first, *peer.open, Open(message, fate)))


def _read(it: Provider) -> Provider | None:
    """Take up the oldest message that need not wait any longer, if there is one."""
    fates = (_fate(it, c, message) for c, message in it.unread if it.is_ready)
    turn, fate = next(((i, fate) for i, fate in enumerate(fates) if fate != "unread"), (-1, None))
    if fate is None:
        return None
    (c, message), name = it.unread[turn], it.unread[turn][1].allocation_id
    decided = {turn: fate}
    if fate == "granted":
        if name not in it.allocations:
            it = _enter(it, Allocation(message, it.peers[c].uid, is_in_making=True))
        it = it.peer(c, wants=it.peers[c].wants | {name})
    elif fate == "ending":
        it = _end(it, name)
        for i, (sender, earlier) in enumerate(it.unread[:turn]):
            if (sender, earlier.allocation_id) == (c, name):
                decided[i] = FAILED  # The end takes back what its sender asked for before it.
    opened = [*it.peers[c].open]
    for i in sorted(decided):
        opened[opened.index(Open(it.unread[i][1]))] = Open(it.unread[i][1], decided[i])
    unread = tuple(each for i, each in enumerate(it.unread) if i not in decided)
    return it.peer(c, open=tuple(opened))._replace(unread=unread)


def _fate(it: Provider, c: ConnectionId, message: Message) -> Fate:
    """Say what becomes of a message that is read now; unread if it waits for a release."""
    name, uid = message.allocation_id, it.peers[c].uid
    a = it.allocations.get(name)
    if isinstance(message, AllocationEnded):
        if a is None and name not in it.remembered:
            return AllocationNotFound(name)
        return "over" if a is None or a.is_announced else "ending"
    of_uid = sum(each.uid == uid for each in it.allocations.values())
    if objection(message) or (a is None and of_uid >= it.limits.allocations_per_uid):
        return FAILED
    if a and a.has_ended:
        return FAILED if a.is_announced else "unread"
    return "granted" if a is None or a.request == message else FAILED


def _decide(it: Provider, fates: dict[Fate, Fate], name: str | None = None) -> Provider:
    """Decide all that waits for one thing; with a name, only what is about that."""
    for c, peer in it.peers.items():
        opened = tuple(
            Open(message, fates[fate])
            if message and fate in fates and name in (None, message.allocation_id)
            else Open(message, fate)
            for message, fate in peer.open
        )
        it = it.peer(c, open=opened)
    return it


def _enter(it: Provider, new: Allocation) -> Provider:
    name = new.request.allocation_id
    names = tuple(each for each in it.remembered if each != name)
    return it._replace(allocations=Map({**it.allocations, name: new}), remembered=names)


def _end(it: Provider, name: str) -> Provider:
    """Whatever ends it first counts; what can only matter to the living is forgotten."""
    a = it.allocations[name]
    if a.has_ended:
        return it
    for c, peer in it.peers.items():
        it = it.peer(c, wants=peer.wants - {name})
    rest = Allocation(a.request, a.uid, a.is_in_making, has_ended=True, is_in_release=True)
    return it.allocation(name, **rest._asdict())


def _announce(it: Provider, name: str) -> Provider:
    """Tell who asked and, unasked, who holds it. Who was to be given it cannot be."""
    for c, peer in it.peers.items():
        asks = Open(AllocationEnded(name), "ending") in peer.open
        is_pushed = name in peer.holds and not asks and not peer.is_closed
        first = (Open(AllocationEnded(name), "push"),) if is_pushed else ()
        underway = tuple(each for each in peer.underway if each != name)
        it = it.peer(c, open=first + peer.open, underway=underway, holds=peer.holds - {name})
    return _decide(it, {"granted": FAILED, "ending": "over"}, name)


def _without(it: Map[K, V], key: K) -> Map[K, V]:
    return Map({k: v for k, v in it.items() if k != key})


@dataclass(frozen=True, slots=True)
class Unasked(do.AnnounceEnd):
    """The word of an end that answers nothing; it may come anywhere between the answers."""


def _speak(it: Provider, said: list[Effect]) -> Provider:
    """On each connection, give every answer that is known and whose turn has come."""
    for c in it.peers:
        while (peer := it.peers[c]).open and not peer.is_closed and (word := _answer(it, c)):
            is_last = peer.open[0].message is None
            said += [word, do.CloseConnection(c)] if is_last else [word]
            sent = (word.response.allocation_id,) if isinstance(word, do.HandOver) else ()
            it = it.peer(c, open=peer.open[1:], underway=peer.underway + sent, is_closed=is_last)
    return it


def _answer(it: Provider, c: ConnectionId) -> Effect | None:
    message, fate = it.peers[c].open[0]
    if isinstance(fate, NamespaceError):
        return do.Refuse(c, fate)
    if fate in ("over", "push"):
        return (Unasked if fate == "push" else do.AnnounceEnd)(c, message.allocation_id)
    response = it.allocations[message.allocation_id].response if fate == "granted" else None
    return response and do.HandOver(c, response)


def _backend_effects(b: Provider, a: Provider) -> Iterator[Effect]:
    for name, now in a.allocations.items():
        was = b.allocations.get(name, Allocation(now.request))
        if now.is_in_making and not was.is_in_making:
            yield do.CreateNamespaces(now.request)
        if now.response and not was.response:
            yield do.Watch(name)
        if was.response and now.was_handed and not was.was_handed:
            yield do.RecordHandoff(name)
        if now.is_in_release and not was.is_in_release:
            yield do.ReleaseNamespaces(name)


# --- What both have in common ------------------------------------------------------------------

EXPIRY = {
    ev.ReadinessOverdue: Timer.READINESS,
    ev.ClaimExpired: Timer.CLAIM,
    ev.ReleaseOverdue: Timer.RELEASE,
    ev.RetryDue: Timer.RETRY,
    ev.AnswerOverdue: Timer.ANSWER,
    ev.NoticeOverdue: Timer.NOTICE,
    ev.NoticeDue: Timer.REDIAL,
}
"""By which event a timer runs out; it is not to be stopped then."""


def _must_be_running(event: Event, timers: set[tuple[Timer, str]]) -> None:
    timer, name = EXPIRY.get(type(event)), getattr(event, "allocation_id", None)
    if timer and not any(timer is t and name in (None, n) for t, n in timers):
        raise Impossible("ours")


def _timing(
    before: set[tuple[Timer, str]], after: set[tuple[Timer, str]], event: Event
) -> Iterator[Effect]:
    for timer, name in sorted(before - after, key=str):
        if timer is not EXPIRY.get(type(event)):
            yield do.StopTimer(timer, name)
    for timer, name in sorted(after - before, key=str):
        yield do.StartTimer(timer, name)


def likeness(effect: Effect) -> tuple[object, ...]:
    """Say what of an effect is compared: everything but the words of a reason."""
    kind = do.AnnounceEnd if isinstance(effect, do.AnnounceEnd) else type(effect)
    values = [getattr(effect, field.name) for field in fields(effect) if field.name != "reason"]
    is_words = (SocketUnavailable, CreationFailed, FdPassing)
    return (kind.__name__, *(type(v) if isinstance(v, is_words) else v for v in values))


def line_of(effect: Effect) -> object:
    """Say where an effect has its order: its connection, or None where order means nothing."""
    spoken = (do.Connect, do.SendRequest, do.SendEnd, do.SendFault, do.CloseChannel)
    return getattr(effect, "connection", "the line" if isinstance(effect, spoken) else None)


def agree(kernel: Iterable[Effect], model: Iterable[Effect]) -> list[str]:
    """Compare two steps: the same effects, in the same order on each connection."""
    ours, theirs = list(kernel), list(model)
    difference = Counter(map(likeness, ours))
    difference.subtract(Counter(map(likeness, theirs)))
    found = [f"the kernel {n:+d} {what}" for what, n in difference.items() if n]
    free = {likeness(effect) for effect in theirs if isinstance(effect, Unasked)}
    for line in {line_of(effect) for effect in ours} - {None}:
        orders = [
            [likeness(e) for e in each if line_of(e) == line and likeness(e) not in free]
            for each in (ours, theirs)
        ]
        if not found and orders[0] != orders[1]:
            found.append(f"on {line} the kernel says {orders[0]}, the model {orders[1]}")
    return found
