"""
The protocol once more, as short as it can be said: what a provider and a consumer do next.

This is not how it is built (`statemachine` is) but what it is held to. Here nothing is looked up in
a table and as little as possible is remembered. A step says what became of the facts; whatever can
be told from the facts before and after (which timers run, what is answered, what the backend is to
do) is told from them. Both steps are pure: (state, event) -> (state, outputs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields
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
from statemachine.messages import NamespaceRequest, NamespaceResponse, objection


class Impossible(Exception):
    """This event cannot come now: a bug of our own driver, or the peer's fault. No change."""

    def __init__(self, whose: Literal["ours", "peer's"]) -> None:
        super().__init__(whose)
        self.whose = whose


def possible(condition: object, event: Event | None = None) -> None:
    """Insist that an event can come now; its class says whose fault it is if not."""
    if not condition:
        raise Impossible("peer's" if isinstance(event, ev.PeerEvent) else "ours")


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
    after = _consumer_facts(before, event)
    if before.debt == "none" and after.debt == "owed" and after.line == "down":
        after = after._replace(line="calling")
    return after, list(_consumer_effects(before, event, after))


def _consumer_facts(it: Consumer, event: Event) -> Consumer:
    match event:
        case ev.NamespacesWanted():
            possible(it.has == "nothing", event)
            return it._replace(has="hopes", line="calling")
        case ev.Connected():
            possible(it.line == "calling", event)
            return it._replace(line="up")
        case ev.ProviderUnreachable():
            possible(it.line == "calling", event)
            has = "makes own" if it.has == "hopes" else it.has
            return it._replace(has=has, line="down")
        case ev.NoticeDue():
            possible(it.notice == "owed", event)
            return it._replace(line="calling")
        case ev.AnswerOverdue():
            possible(it.state == "asking", event)
            return it._replace(has="makes own", debt="owed")
        case ev.NoticeOverdue():
            possible(it.notice == "told", event)
            return it._replace(line="down")
        case ev.SelfServed():
            possible(it.has == "makes own", event)
            return it._replace(has="own")
        case ev.SelfServiceFailed():
            possible(it.has == "makes own", event)
            return it._replace(has="failure")
        case ev.EndWanted():
            possible(it.has in ("nothing", "hopes", "theirs", "own"), event)
            if it.has == "own":
                return it._replace(has="end")
            if it.state == "connecting":
                return it._replace(has="end", line="down")
            return it._replace(has="waits", debt="owed")
        case _:
            possible(it.line == "up", event)
            return _consumer_hears(it, event)


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
        case ev.ConnectionLost() | ev.PassingFailed() | ev.FrameRejected():
            if hopes:
                return it._replace(has="makes own", line="down", debt="owed")
            return it._replace(line="down")
        case ev.ProviderUnavailable():
            possible(hopes or owes, event)
            return it._replace(has="makes own" if hopes else it.has, line="down")
        case ev.ResponseReceived():
            possible(hopes or owes, event)
            return it._replace(has="theirs" if hopes else it.has)
        case ev.ResponseMismatched():
            possible(hopes or owes, event)
            return it._replace(has="makes own", line="down", debt="owed") if hopes else it
        case ev.CreationRefused():
            possible(hopes or owes, event)
            return it._replace(has="refusal", line="down") if hopes else it
        case ev.NotFoundReceived() | ev.EndAnnounced():
            possible(owes or (hopes if isinstance(event, ev.NotFoundReceived) else holds), event)
            if hopes:
                return it._replace(has="refusal", line="down")
            has = "end" if it.has in ("theirs", "waits") else it.has
            return it._replace(has=has, line="down", debt="paid" if owes else it.debt)
        case _:
            possible(False, event)
            return it


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

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Hashable)


class Map(dict[K, V]):
    """A mapping that nobody changes, and that is therefore a value."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def put(self, key: K, value: V) -> Map[K, V]:
        """Make one that differs in a single key."""
        return Map({**self, key: value})

    def without(self, key: K) -> Map[K, V]:
        """Make one that lacks a key."""
        return Map({k: v for k, v in self.items() if k != key})


class Limits(NamedTuple):
    """Who may use the provider, and how much of it."""

    allowed_uids: frozenset[int] = frozenset({0})
    waiting: int = 128
    open_per_connection: int = 64
    open_per_uid: int = 1024
    allocations_per_uid: int = 4096
    connections_per_uid: int = 4096
    remembered: int = 1024


Asked: TypeAlias = ev.RequestReceived | ev.EndReceived


class Open(NamedTuple):
    """What a connection is still to be told; kept in the order in which the messages came."""

    connection: ConnectionId
    message: Asked | None
    """What this answers; None: it is the last word, and the connection is closed after it."""
    fate: Literal["unread", "its allocation's"] | Effect = "unread"
    """Not looked at yet; its allocation decides; or the answer, which waits for its turn."""

    def asks_for(self, name: str, kind: type[Asked]) -> bool:
        """Whether it is about this allocation."""
        return isinstance(self.message, kind) and name_of(self.message) == name


def name_of(message: Asked) -> str:
    """Say which allocation a message is about."""
    if isinstance(message, ev.EndReceived):
        return message.allocation_id
    return message.request.allocation_id


class Allocation(NamedTuple):
    """One life of a name, from the request to the release."""

    request: NamespaceRequest
    stage: Literal["requested", "created", "handed_off", "ended"] = "requested"
    uid: int | None = None
    """Whose limits it counts for; nobody's if it was adopted."""
    response: NamespaceResponse | None = None
    askers: frozenset[ConnectionId] = frozenset()
    holders: frozenset[ConnectionId] = frozenset()
    is_used: bool = False
    is_stuck: bool = False
    """The last try to release it has failed."""
    is_announced: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether it can be handed over."""
        return self.stage in ("created", "handed_off")

    @property
    def timers(self) -> set[Timer]:
        """
        What is waited for, no longer than so long.

        While it can be handed over: that somebody claims it, if nobody has used it and nobody who
        asked is there. After its end: the next try, and the moment when the end is told anyway.
        """
        if self.is_alive:
            return set() if self.is_used or self.askers else {Timer.CLAIM}
        due = {Timer.RETRY: self.is_stuck, Timer.RELEASE: not self.is_announced}
        return {timer for timer, runs in due.items() if runs and self.stage == "ended"}


class Peer(NamedTuple):
    """A connection."""

    uid: int
    is_closing: bool = False


class Provider(NamedTuple):
    """Everything a provider knows."""

    limits: Limits = Limits()
    is_ready: bool = False
    """It knows every allocation there is. Before that, whoever says anything waits."""
    is_stopping: bool = False
    peers: Map[ConnectionId, Peer] = Map()
    allocations: Map[str, Allocation] = Map()
    open: tuple[Open, ...] = ()
    remembered: tuple[str, ...] = ()
    """Names of what was released, oldest first."""

    @property
    def phase(self) -> str:
        """Where the provider as a whole stands."""
        return "stopping" if self.is_stopping else "ready" if self.is_ready else "starting"

    @property
    def timers(self) -> set[tuple[Timer, str]]:
        """What is waited for, and in whose name."""
        waits = self.phase == "starting" and any(each.fate == "unread" for each in self.open)
        allocations = {(t, name) for name, a in self.allocations.items() for t in a.timers}
        return allocations | ({(Timer.READINESS, "")} if waits else set())

    def state_of(self, name: str) -> str:
        """Say where an allocation stands."""
        allocation = self.allocations.get(name)
        if allocation is None:
            return "released" if name in self.remembered else "unknown"
        return allocation.stage


def provider_step(before: Provider, event: Event) -> tuple[Provider, list[Effect]]:
    """
    Say what becomes of a provider.

    First the event is taken in, and whoever has an answer now and whose turn it is gets it; then
    who holds what has ended is told; then every message that can be looked at now is looked at, the
    oldest first. A peer can do nothing that a provider has no answer to, so what is impossible here
    is our own driver's doing.

    Raises:
        Impossible: the event cannot come now.
    """
    now = _provider_facts(before, event)
    out = [*_provider_effects(before, now, event)]
    now = _speak(now, out)
    if isinstance(event, ev.NamespacesReleased | ev.ReleaseOverdue):
        name = event.allocation_id
        told = {e.connection for e in before.open if _waits_for(e, name, ev.EndReceived)}
        for c in sorted(before.allocations[name].holders - told):
            if not now.peers[c].is_closing:
                out.append(do.AnnounceEnd(c, name))
    index = 0
    while index < len(now.open):
        later = _read(now, index)
        out += _provider_effects(now, later)
        left = _speak(later, out)
        index = 0 if left != now else index + 1
        now = left
    return now, out


def _provider_facts(it: Provider, event: Event) -> Provider:
    match event:
        case ev.ConnectionOpened(connection=c, uid=uid):
            possible(c not in it.peers)
            others = sum(peer.uid == uid for peer in it.peers.values())
            it = it._replace(peers=it.peers.put(c, Peer(uid)))
            if uid not in it.limits.allowed_uids:
                return _tell_last(it, c, SocketUnavailable("not for you"))
            is_crowded = others >= it.limits.connections_per_uid
            return _tell_last(it, c, CreationFailed("connections")) if is_crowded else it
        case ev.ConnectionLost(connection=c):
            possible(c in it.peers)
            left = {
                name: a._replace(askers=a.askers - {c}, holders=a.holders - {c})
                for name, a in it.allocations.items()
            }
            rest = tuple(each for each in it.open if each.connection != c)
            return it._replace(peers=it.peers.without(c), allocations=Map(left), open=rest)
        case ev.RequestReceived() | ev.EndReceived() | ev.FrameRejected():
            possible(event.connection in it.peers and not it.peers[event.connection].is_closing)
            return _hear(it, event)
        case ev.ProviderReady():
            possible(it.phase == "starting")
            return it._replace(is_ready=True)
        case ev.ProviderStopping():
            possible(not it.is_stopping)
            return _turn_away(it)._replace(is_stopping=True)
        case ev.ReadinessOverdue():
            possible((Timer.READINESS, "") in it.timers)
            return _turn_away(it)
        case ev.CreatedAdopted() | ev.HandedOffAdopted() | ev.RemainsFound():
            possible(it.phase == "starting" and event.allocation_id not in it.allocations)
            if isinstance(event, ev.RemainsFound):
                return _enter(it, Allocation(event.request, "ended"))
            adopted = Allocation(event.request, "created", response=event.response)
            is_fresh = isinstance(event, ev.CreatedAdopted)
            return _enter(it, adopted if is_fresh else adopted._replace(stage="handed_off"))
        case ev.AllocationEvent(allocation_id=name):
            possible(name in it.allocations)
            allocation = _allocation_facts(it, it.allocations[name], event)
            it = it._replace(allocations=it.allocations.put(name, allocation))
            if isinstance(event, ev.NamespacesReleased):
                names = (*(n for n in it.remembered if n != name), name)
                names = names[max(0, len(names) - it.limits.remembered) :]
                it = it._replace(allocations=it.allocations.without(name), remembered=names)
            elif not isinstance(event, ev.ReleaseOverdue):
                return it
            return _announce(it, name)
        case _:
            raise Impossible("ours")


def _allocation_facts(it: Provider, a: Allocation, event: ev.AllocationEvent) -> Allocation:
    """
    Say what becomes of an allocation by what was done to it or happened to it.

    The first reason to end counts; after the end, whatever was still under way changes nothing.
    """
    match event:
        case ev.NamespacesCreated(response=response):
            possible(not a.is_alive)
            is_wanted = a.stage == "requested"
            return a._replace(stage="created", response=response) if is_wanted else a
        case ev.NamespacesNotCreated():
            possible(not a.is_alive)
            return a._replace(stage="ended")
        case ev.ReleaseRequested():
            return a._replace(stage="ended")
        case ev.ClaimExpired():
            possible(Timer.CLAIM in a.timers)
            return a._replace(stage="ended")
        case ev.RetryDue():
            possible(Timer.RETRY in a.timers)
            return a._replace(is_stuck=False)
        case ev.ReleaseOverdue():
            possible(Timer.RELEASE in a.timers)
            return a._replace(is_announced=True, holders=frozenset())
        case ev.ReleaseDelayed() | ev.NamespacesReleased():
            possible(a.stage == "ended" and not a.is_stuck)
            return a._replace(is_stuck=True)
    possible(a.stage != "requested" and not isinstance(event, ev.Unclaimed))
    match event:
        case ev.ScopeEmptied() | ev.InitDied():
            return a._replace(stage="ended")
        case ev.ScopePopulated():
            return a._replace(is_used=True)
        case ev.ResponseSent(connection=c):
            stage = "handed_off" if a.stage == "created" else a.stage
            return a._replace(stage=stage, holders=a.holders | ({c} & it.peers.keys()))
        case _:
            return a


def _enter(it: Provider, allocation: Allocation) -> Provider:
    name = allocation.request.allocation_id
    memory = tuple(n for n in it.remembered if n != name)
    return it._replace(allocations=it.allocations.put(name, allocation), remembered=memory)


def _tell_last(it: Provider, c: ConnectionId, error: NamespaceError) -> Provider:
    """Turn a connection away, out of turn."""
    return it._replace(open=(Open(c, None, do.Refuse(c, error)), *it.open))


def _turn_away(it: Provider) -> Provider:
    """Tell everyone who waits, for the provider or for a release, that it cannot serve."""
    return _decide(it, lambda e: e.fate == "unread", SocketUnavailable("not now"))


def _announce(it: Provider, name: str) -> Provider:
    """Decide what waited for the end; nobody waits longer for a release that takes so long."""
    draining = name in it.allocations and it.phase != "starting"
    fates = ("its allocation's", "unread") if draining else ("its allocation's",)
    it = _decide(
        it,
        lambda e: e.asks_for(name, ev.RequestReceived) and e.fate in fates,
        CreationFailed("it has ended"),
    )
    return it._replace(
        open=tuple(
            e._replace(fate=do.AnnounceEnd(e.connection, name))
            if _waits_for(e, name, ev.EndReceived)
            else e
            for e in it.open
        )
    )


def _waits_for(entry: Open, name: str, kind: type[Asked]) -> bool:
    return entry.fate == "its allocation's" and entry.asks_for(name, kind)


def _decide(it: Provider, whom: Callable[[Open], bool], error: NamespaceError) -> Provider:
    """Give an error to all of some who have no answer yet."""
    return it._replace(
        open=tuple(
            e._replace(fate=do.Refuse(e.connection, error)) if whom(e) else e for e in it.open
        )
    )


def _hear(it: Provider, event: Asked | ev.FrameRejected) -> Provider:
    """Put a message at the end of the queue; what is over a limit has its answer already."""
    c, limits = event.connection, it.limits
    if isinstance(event, ev.FrameRejected):
        return it._replace(open=(*it.open, Open(c, None, do.Refuse(c, FdPassing("unreadable")))))
    uid = it.peers[c].uid
    mine = sum(e.connection == c for e in it.open)
    error: NamespaceError | None = None
    if mine >= limits.open_per_connection:
        error = CreationFailed("messages of a connection")
    elif sum(it.peers[e.connection].uid == uid for e in it.open) >= limits.open_per_uid:
        error = CreationFailed("messages of a user")
    elif it.is_stopping and (isinstance(event, ev.RequestReceived) or not it.is_ready):
        # Of an end, too: one that was never ready does not know what is alive.
        error = SocketUnavailable("stopping")
    elif it.phase == "starting" and sum(e.fate == "unread" for e in it.open) >= limits.waiting:
        error = SocketUnavailable("waiting")
    entry = Open(c, event, do.Refuse(c, error) if error else "unread")
    it = it._replace(open=(*it.open, entry))
    is_flood = mine + 1 > 2 * limits.open_per_connection
    return _tell_last(it, c, FdPassing("flood")) if is_flood else it


def _read(it: Provider, index: int) -> Provider:
    """Look at a message, if it can be looked at now: what does it mean for its allocation?"""
    c, message, fate = it.open[index]
    if message is None or fate != "unread" or it.phase == "starting":
        return it
    name = name_of(message)
    a = it.allocations.get(name)
    if isinstance(message, ev.EndReceived):
        earlier = tuple(
            e._replace(fate=do.Refuse(c, CreationFailed("taken back")))
            if e.connection == c and e.fate == "unread" and e.asks_for(name, ev.RequestReceived)
            else e
            for e in it.open[:index]
        )
        it = it._replace(open=earlier + it.open[index:])
        if a is not None and not a.is_announced:
            it = it._replace(allocations=it.allocations.put(name, a._replace(stage="ended")))
            return _judge(it, index, "its allocation's")
        if a is not None or name in it.remembered:
            return _judge(it, index, do.AnnounceEnd(c, name))
        error = AllocationNotFound(name)
        return _judge(it, index, do.Refuse(c, error))
    request, uid = message.request, it.peers[c].uid
    live = sum(each.uid == uid for each in it.allocations.values())
    is_over = a is None and live >= it.limits.allocations_per_uid
    if not (objection(request) or is_over):
        if a is None:
            it = _enter(it, Allocation(request, uid=uid, askers=frozenset({c})))
            return _judge(it, index, "its allocation's")
        if a.stage != "ended" and a.request == request:
            put = it.allocations.put(name, a._replace(askers=a.askers | {c}))
            return _judge(it._replace(allocations=put), index, "its allocation's")
        if a.stage == "ended" and not a.is_announced:
            return it
    return _judge(it, index, do.Refuse(c, CreationFailed("no")))


def _judge(it: Provider, index: int, fate: Literal["its allocation's"] | Effect) -> Provider:
    judged = it.open[index]._replace(fate=fate)
    return it._replace(open=(*it.open[:index], judged, *it.open[index + 1 :]))


def _speak(it: Provider, out: list[Effect]) -> Provider:
    """Give every connection the answers that are decided, up to the first that is not."""
    left: list[Open] = []
    for entry in it.open:
        c, answer = entry.connection, _answer(it, entry)
        if answer is None or it.peers[c].is_closing or any(e.connection == c for e in left):
            left.append(entry)
            continue
        out.append(answer)
        if entry.message is None:
            out.append(do.CloseConnection(c))
            it = it._replace(peers=it.peers.put(c, it.peers[c]._replace(is_closing=True)))
    return it._replace(open=tuple(left))


def _answer(it: Provider, entry: Open) -> Effect | None:
    if isinstance(entry.fate, Effect):
        return entry.fate
    if entry.fate == "unread" or not isinstance(entry.message, ev.RequestReceived):
        return None
    a = it.allocations[name_of(entry.message)]
    return do.HandOver(entry.connection, a.response) if a.is_alive and a.response else None


def _provider_effects(b: Provider, a: Provider, event: Event | None = None) -> Iterator[Effect]:
    """Tell what the backend and the clock are to do from the facts before and after."""
    for name in sorted(a.allocations):
        was, now = b.allocations.get(name), a.allocations[name]
        if was is None and now.stage == "requested":
            yield do.CreateNamespaces(now.request)
        if now.is_alive and not (was and was.is_alive):
            yield do.Watch(name)
        if was and was.stage == "created" and now.stage == "handed_off":
            yield do.RecordHandoff(name)
        was_trying = was and was.stage == "ended" and not was.is_stuck
        if now.stage == "ended" and not now.is_stuck and not was_trying:
            yield do.ReleaseNamespaces(name)
    yield from _timing(b.timers, a.timers, event)


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


def _timing(
    before: set[tuple[Timer, str]], after: set[tuple[Timer, str]], event: Event | None
) -> Iterator[Effect]:
    over = EXPIRY.get(type(event)) if event else None
    for timer, name in sorted(before - after, key=str):
        if timer is not over:
            yield do.StopTimer(timer, name)
    for timer, name in sorted(after - before, key=str):
        yield do.StartTimer(timer, name)


def likeness(effect: Effect) -> tuple[object, ...]:
    """Say what of an effect is compared: everything but the words of a reason."""
    values = [getattr(effect, field.name) for field in fields(effect) if field.name != "reason"]
    is_words = (SocketUnavailable, CreationFailed, FdPassing)
    return (type(effect).__name__, *(type(v) if isinstance(v, is_words) else v for v in values))


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
    for line in {line_of(effect) for effect in ours} - {None}:
        orders = [[likeness(e) for e in each if line_of(e) == line] for each in (ours, theirs)]
        if not found and orders[0] != orders[1]:
            found.append(f"on {line} the kernel says {orders[0]}, the model {orders[1]}")
    return found
