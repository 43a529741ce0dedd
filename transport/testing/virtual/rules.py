"""What a provider's driver must keep to, looked at from outside while it runs.

`ProviderRules` follows the driver in three ways. Every event must be one that the environment has
produced (a message that was said, work that was done, a timer that has run its time), in its order,
and once. What the kernel decides must be what the model of `specs` decides; and it must be done:
sent on the right connection, in order, begun at the backend, timed for as long as was asked. And
nothing may be left undone when only time could bring anything about.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from specs import model
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect, Timer
from statemachine.errors import CreationFailed, FdPassing, NamespaceError, SocketUnavailable
from statemachine.events import ProviderInput
from statemachine.messages import AllocationEnded, Message, NamespaceRequest, NamespaceResponse
from statemachine.provider import Limits
from statemachine.testing.lockstep import model_limits

from ...contract import Sighting
from ...serve import Provider, Spans
from ...serve.timers import RETRY_FIRST_S, RETRY_MAX_S
from .backend import VirtualBackend
from .loop import Firing, VirtualLoop
from .network import VirtualConnection, VirtualNetwork
from .world import VirtualWorld

OTHERS_MAX: Final = 12
"""How many messages of others may be handled while a whole one of a connection waits. Of another
user two in a turn; of the same user each of its connections, and what was idle before it four
times."""

_EXPIRED: Final = {
    on.ClaimExpired: Timer.CLAIM,
    on.RetryDue: Timer.RETRY,
    on.ReleaseOverdue: Timer.RELEASE,
    on.ReadinessOverdue: Timer.READINESS,
}


class Broken(AssertionError):
    """A driver did what it must not, or did not what it must."""


def expect(is_so: object, what: str) -> None:
    if not is_so:
        raise Broken(what)


R = TypeVar("R", bound="ProviderRules")
P = ParamSpec("P")


def _noted(check: Callable[Concatenate[R, P], None]) -> Callable[Concatenate[R, P], None]:
    """Let what is found end the run, also where the caller takes it for a failure of its own."""

    def noting(rules: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            check(rules, *args, **kwargs)
        except Broken as error:
            rules.world.fail(error)
            raise

    return noting


class FollowedConnection:
    """What is due on a connection that the provider has told its kernel of."""

    def __init__(self, link: VirtualConnection) -> None:
        self.link = link
        self.due: deque[Effect] = deque()
        """What is to be sent, in order."""
        self.unreported: Counter[str] = Counter()
        """Hand-overs that nothing was reported of."""
        self.frame_timer: tuple[asyncio.TimerHandle, int] | None = None
        self.blocked_since: float | None = None
        self.is_close_due = False
        self.is_given_up = False
        """Whether it was for too long that its peer did not read."""
        self.others = 0
        """How many messages of others were handled while one of this one waited."""

    @property
    def number(self) -> int:
        """What the provider calls it."""
        assert self.link.number is not None
        return self.link.number

    @property
    def waits(self) -> bool:
        """Whether a whole message waits to be handled."""
        return bool(self.link.unfed) or self.link.said.count > self.link.read.count


class ProviderRules:
    """
    Follows one life of a provider.

    Args:
        world: where it lives.
        loop: its event loop.
        network: its sockets.
        backend: its backend.
        limits: its limits.
        spans: how long its timers run.
    """

    provider: Provider

    def __init__(
        self,
        world: VirtualWorld,
        loop: VirtualLoop,
        network: VirtualNetwork,
        backend: VirtualBackend,
        limits: Limits,
        spans: Spans,
    ) -> None:
        self.model = model.Provider(model_limits(limits))
        self.events = 0
        self.is_over = False
        """Whether the program is dead or has stopped."""
        self.is_stopping = False
        self.world, self._loop, self._network = world, loop, network
        self._backend, self._spans = backend, spans
        self._served: dict[int, FollowedConnection] = {}
        self._asked: defaultdict[str, deque[str]] = defaultdict(deque)
        """Of each allocation, the work that was asked for and has not begun."""
        self._doing: dict[str, str] = {}
        self._done: Counter[tuple[str, str]] = Counter()
        """Work that is done and not reported."""
        self._images: defaultdict[str, str | None] = defaultdict(lambda: None)
        self._had_no_turn = False
        """Whether no worker has taken up the creation that is given up."""
        self._abandoned: set[str] = set()
        """Creations that were given up while a worker was at it."""
        self._unrecorded: set[str] = set()
        self._sightings: Counter[tuple[str, Sighting]] = Counter()
        self._starting: deque[do.StartTimer] = deque()
        self._tries: Counter[str] = Counter()
        self._suspects: deque[FollowedConnection] = deque()
        """Those whose time to read is over."""
        loop.on_timer, loop.on_fire = self._note_timer, self._note_firing
        world.after_step.append(self._check_step)
        world.at_rest.append(self._check_rest)

    def remember(self) -> None:
        """Take up what the backend remembers, as the driver has its kernel do."""
        self.model = self.model._replace(remembered=tuple(self._backend.remembered))

    def end(self) -> None:
        """Follow no further."""
        self.is_over = True

    # --- Events ----------------------------------------------------------------------------------

    def observe(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        """Be the provider's observer."""
        if self.is_over:
            return
        try:
            self._observe(event, effects)
        except Broken as error:
            self.world.fail(error)

    def _observe(self, event: ProviderInput, effects: tuple[Effect, ...]) -> None:
        self.events += 1
        self.world.story.append(f"    event {event}")
        expect(not self._starting, f"{self._starting} was not started")
        check = _EVENTS.get(type(event))
        if check is not None:
            check(self, event)
        if type(event) in _EXPIRED:
            self._check_expiry(event)
        try:
            self.model, said = model.provider_step(self.model, event)
        except model.Impossible:
            raise Broken(f"{event} cannot be") from None
        found = model.differences(effects, said)
        expect(not found, f"{event}: {found}")
        for effect in effects:
            self.world.story.append(f"        effect {effect}")
            order = _EFFECTS.get(type(effect))
            if order is not None:
                order(self, effect)

    def _opened(self, event: on.ConnectionOpened) -> None:
        served = self.provider._connections._open.get(event.connection)
        expect(served is not None, f"{event}: there is no such connection")
        assert served is not None
        link = self._network.of_served(served.channel.sock)
        expect(link.number is None, f"{link} is opened again as {event.connection}")
        expect(link.uid == event.uid, f"{link} is of user {link.uid}, not {event.uid}")
        link.number = event.connection
        self._served[event.connection] = FollowedConnection(link)

    def _message(self, event: on.RequestReceived | on.EndReceived) -> None:
        served = self._of(event)
        expect(served.link.unfed, f"{served.link} has not said {event}")
        message = served.link.unfed.popleft()
        said: Message
        if isinstance(event, on.RequestReceived):
            said = event.request
        else:
            said = AllocationEnded(event.allocation_id)
        expect(message == said, f"{served.link} has said {message}, not {said}")
        served.others = 0
        for other in self._served.values():
            # Who connects again has closed what it was connected by before.
            is_before = other.link in served.link.left_before
            expect(not is_before, f"{event} is read before the loss of {other.link}")
            if other is not served and other.waits and not self._is_blocked(other):
                other.others += 1
                expect(
                    other.others <= OTHERS_MAX,
                    f"{other.link} waits for {other.others} messages of others",
                )

    def _rejected(self, event: on.FrameRejected) -> None:
        link = self._of(event).link
        is_slow = self._fires("ServedConnection._reject_slow")
        is_whole = is_slow and link.said.count > link.read.count
        expect(not is_whole, f"{link} has said the whole frame, and is refused: {event.reason}")
        is_none = bool(link.unfed) and not isinstance(
            link.unfed[0], NamespaceRequest | AllocationEnded
        )
        announced = int.from_bytes(link.read.rest[:4], "big") if len(link.read.rest) >= 4 else 1
        is_bad = not 1 <= announced <= 65_536
        expect(is_slow or is_none or is_bad, f"{link} has done nothing wrong: {event.reason}")

    def _lost(self, event: on.ConnectionLost) -> None:
        served = self._served.pop(event.connection)
        firing = self._loop.firing
        is_timed = self._fires("ServedConnection.drop") and firing is not None and firing.is_timer
        link = served.link
        is_excused = link.has_left or is_timed or self.is_stopping
        expect(
            is_excused or served.is_close_due or served.is_given_up,
            f"{link} is dropped: {event.reason}",
        )
        if not (is_excused or served.is_given_up):
            expect(not served.due, f"{link} is closed, and was not sent {list(served.due)}")
        if not is_timed and not self.is_stopping and link.has_left and not served.is_close_due:
            is_all_fed = not link.unfed and link.read.count == link.said.count
            expect(is_all_fed or served.is_given_up, f"{link} is lost before it is read")

    def _stopping(self, _: on.ProviderStopping) -> None:
        self.is_stopping = True

    def _made(self, event: on.NamespacesCreated | on.NamespacesNotCreated) -> None:
        name = event.allocation_id
        if self._fires("BackendWork._give_up"):
            if self._had_no_turn:
                self._asked[name].remove("create")
            elif self._done["create", name]:
                self._done["create", name] -= 1
            else:
                self._abandoned.add(name)
            return
        expect(self._done["create", name], f"{event}, which was not done")
        self._done["create", name] -= 1

    def _released(self, event: on.NamespacesReleased | on.ReleaseDelayed) -> None:
        name = event.allocation_id
        expect(self._done["release", name], f"{event}, which was not tried")
        self._done["release", name] -= 1
        is_gone = isinstance(event, on.NamespacesReleased)
        expect(is_gone == (name not in self._backend.made), f"{event}, which is not so")
        if is_gone:
            self._tries[name] = 0

    def _reported(self, event: on.ResponseSent | on.ResponseNotSent) -> None:
        name, served = event.allocation_id, self._of(event)
        expect(served.unreported[name], f"{event}: nothing was to be handed over")
        served.unreported[name] -= 1
        if isinstance(event, on.ResponseSent):
            connection = self.provider._connections.get(event.connection)
            is_taken = connection is not None and not connection.write_closed
            expect(is_taken, f"{event}, and {served.link} takes nothing any more")

    def _populated(self, event: on.ScopePopulated) -> None:
        self._see(event.allocation_id, Sighting.POPULATED, event)

    def _init_died(self, event: on.InitDied) -> None:
        self._see(event.allocation_id, Sighting.INIT_DIED, event)

    def _emptied(self, event: on.ScopeEmptied) -> None:
        expect(self._backend.is_over(event.allocation_id), f"{event}, which is not so")

    def _see(self, name: str, sighting: Sighting, event: ProviderInput) -> None:
        expect(self._sightings[name, sighting], f"{event} was not seen")
        self._sightings[name, sighting] -= 1

    def _check_expiry(self, event: ProviderInput) -> None:
        timer, name = _EXPIRED[type(event)], getattr(event, "allocation_id", "")
        firing = self._loop.firing
        is_so = firing is not None and firing.arguments == (timer, name)
        is_so = is_so and self._fires("Timers.expire")
        expect(is_so, f"{event}, and no timer of that has run out")

    def _of(self, event: Any) -> FollowedConnection:
        served = self._served.get(event.connection)
        expect(served is not None, f"{event}: the connection is lost")
        assert served is not None
        return served

    def _fires(self, callback: str) -> bool:
        return self._loop.firing is not None and self._loop.firing.callback == callback

    # --- Effects ---------------------------------------------------------------------------------

    def _to_send(self, effect: do.HandOver | do.Refuse | do.AnnounceEnd) -> None:
        served = self._served.get(effect.connection)
        if served is None:
            return
        served.due.append(effect)
        if isinstance(effect, do.HandOver):
            served.unreported[effect.response.allocation_id] += 1

    def _to_close(self, effect: do.CloseConnection) -> None:
        self._served[effect.connection].is_close_due = True

    def _to_create(self, effect: do.CreateNamespaces) -> None:
        self._asked[effect.request.allocation_id].append("create")
        self._images[effect.request.allocation_id] = effect.request.uenv_image

    def _to_release(self, effect: do.ReleaseNamespaces) -> None:
        self._asked[effect.allocation_id].append("release")
        self._unrecorded.add(effect.allocation_id)

    def _to_start(self, effect: do.StartTimer) -> None:
        self._starting.append(effect)

    # --- What is sent ----------------------------------------------------------------------------

    def note_said(self, link: VirtualConnection) -> None:
        """A client has said something."""

    def note_read(self, link: VirtualConnection) -> None:
        """The provider has read something."""

    @_noted
    def note_leaving(self, link: VirtualConnection, inodes: list[int]) -> None:
        """The first byte of a frame leaves, with these descriptors."""
        expect(not self._unrecorded, f"the end of {self._unrecorded} is not recorded yet")
        if link.number is None:
            return
        served = self._served.get(link.number)
        expect(served is not None and served.due, f"{link} is sent what is not due")
        assert served is not None
        effect = served.due[0]
        if not inodes:
            return
        expect(isinstance(effect, do.HandOver), f"{link} is sent descriptors for {effect}")
        assert isinstance(effect, do.HandOver)
        name = effect.response.allocation_id
        allocation = self.model.allocations.get(name)
        is_alive = allocation is not None and allocation.response is effect.response
        expect(is_alive, f"{link} is handed over {name}, which is gone")
        expect(allocation and not allocation.has_ended, f"{link} gets {name}, which has ended")
        expect(inodes == self._backend.identities_of(name), f"{link}: descriptors of another")

    @_noted
    def note_sent(self, link: VirtualConnection, message: Message) -> None:
        """A frame has left whole."""
        self.world.story.append(f"        to {link}: {message}")
        if link.number is None:
            expect(isinstance(message, SocketUnavailable), f"{link} is sent {message}")
            return
        served = self._served[link.number]
        effect = served.due.popleft()
        expect(self._is_answer(effect, message), f"{link} is sent {message} for {effect}")

    def _is_answer(self, effect: Effect, message: Message) -> bool:
        match effect:
            case do.Refuse(error=error):
                is_same = isinstance(message, NamespaceError) and type(message) is type(error)
                return is_same and getattr(message, "text", "")[:99] == error.text[:99]
            case do.AnnounceEnd(allocation_id=name):
                return message == AllocationEnded(name)
            case do.HandOver(response=response):
                if isinstance(message, NamespaceResponse):
                    return message == response
                allocation = self.model.allocations.get(response.allocation_id)
                is_gone = allocation is None or allocation.response is not response
                is_gone = is_gone or bool(allocation and allocation.has_ended)
                may_fail = is_gone or self._backend.is_short
                return may_fail and isinstance(message, FdPassing | CreationFailed)
            case _:
                return False

    # --- What the backend does -------------------------------------------------------------------

    @_noted
    def begin_work(self, name: str, kind: str) -> None:
        expect(not self.is_over, f"{kind} {name}: the program is dead")
        expect(name not in self._doing, f"{kind} {name} while it is {self._doing.get(name)}d")
        expect(self._asked[name], f"{kind} {name} was not asked for, or is begun twice")
        asked = self._asked[name].popleft()
        expect(asked == kind, f"{kind} {name}, where it is time for {asked}")
        # A creation that one turn asks for before the release may begin before it is ended.
        is_recorded = kind == "create" or name not in self._unrecorded
        expect(is_recorded, f"{kind} {name}, whose end is not recorded")
        self._doing[name] = kind

    @_noted
    def end_work(self, name: str, kind: str) -> None:
        del self._doing[name]
        if name in self._abandoned and kind == "create":
            self._abandoned.discard(name)
        else:
            self._done[kind, name] += 1

    def note_ended(self, name: str) -> None:
        self._unrecorded.discard(name)

    def note_sighting(self, name: str, sighting: Sighting) -> None:
        self._sightings[name, sighting] += 1

    # --- Timers ----------------------------------------------------------------------------------

    def _note_timer(self, timer: asyncio.TimerHandle, span_s: float) -> None:
        if self.is_over:
            return
        check = _TIMERS.get(callback_of(timer))
        if check is not None:
            check(self, timer, round(span_s, 9))

    def _kernel_timer(self, timer: asyncio.TimerHandle, span_s: float) -> None:
        which, name = _arguments(timer)
        wanted = self._starting.popleft() if self._starting else None
        is_wanted = wanted is not None and (wanted.timer, wanted.allocation_id) == (which, name)
        expect(is_wanted, f"{which} of {name} is started, and {wanted} was to be")
        spans = self._spans
        if which is Timer.RETRY:
            expected = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** self._tries[name])
            self._tries[name] += 1
        else:
            expected = {
                Timer.CLAIM: spans.claim_s,
                Timer.RELEASE: spans.release_s,
                Timer.READINESS: spans.readiness_s,
            }[which]
        expect(span_s == round(expected, 9), f"{which} of {name} runs {span_s:g} s")

    def _frame_timer(self, timer: asyncio.TimerHandle, span_s: float) -> None:
        served = self._connection_of(timer)
        expect(span_s == self._spans.partial_frame_s, f"a frame has {span_s:g} s")
        expect(served.link.read.rest, f"{served.link} has no frame that is not whole")
        served.frame_timer = timer, served.link.read.count

    def _unread_timer(self, timer: asyncio.TimerHandle, span_s: float) -> None:
        served = self._connection_of(timer)
        expect(span_s == self._spans.unread_s, f"{served.link} may be slow for {span_s:g} s")

    def _linger_timer(self, timer: asyncio.TimerHandle, span_s: float) -> None:
        served = self._connection_of(timer)
        expect(span_s == self._spans.linger_s, f"{served.link} lingers for {span_s:g} s")

    def _image_timer(self, _: asyncio.TimerHandle, span_s: float) -> None:
        expect(span_s == self._spans.image_s, f"an image has {span_s:g} s")

    def _connection_of(self, timer: asyncio.TimerHandle) -> FollowedConnection:
        served = self._served.get(owner_of(timer).number)
        expect(served is not None, f"{timer} is of a connection that is lost")
        assert served is not None
        return served

    def _note_firing(self, timer: asyncio.TimerHandle) -> None:
        if self.is_over:
            return
        kind = callback_of(timer)
        if kind == "ServedConnection._reject_slow":
            served = self._connection_of(timer)
            self._check_frame_timer(served)
        elif kind == "ServedConnection._close_slow":
            served = self._connection_of(timer)
            since = served.blocked_since
            latest = self.world.now - self._spans.unread_s + 1e-6
            is_slow = since is not None and since <= latest
            expect(is_slow, f"{served.link} reads, and is given up")
            self._suspects.append(served)
        elif kind == "BackendWork._give_up":
            self._had_no_turn = _is_waiting(_arguments(timer)[0])
        elif kind == "ServedConnection.drop":
            self._connection_of(timer).is_given_up = True

    # --- After every step ------------------------------------------------------------------------

    def _check_step(self) -> None:
        # In the middle of a callback, what it is to do is not done yet.
        if self.is_over or self._loop.firing is not None or not hasattr(self, "provider"):
            return
        if self.provider._is_closed:
            return
        running = {_arguments(t) for t, _ in self._loop.timers() if _is_kernels(t)}
        expect(not self._starting, f"{list(self._starting)} was not started")
        expect(not self._unrecorded, f"the end of {self._unrecorded} is not recorded")
        expect(
            running == self.model.timers,
            f"timers that run: {_named(running)}; that should: {_named(self.model.timers)}",
        )
        while self._suspects:
            self._check_given_up(self._suspects.popleft())
        for served in self._served.values():
            self._check_frame_timer(served)
            if not self._is_blocked(served):
                served.blocked_since = None
            elif served.blocked_since is None:
                served.blocked_since = self.world.now

    def _check_given_up(self, served: FollowedConnection) -> None:
        connection = self.provider._connections.get(served.number)
        if connection is None or not connection.write_closed:
            return
        served.is_given_up = True
        client = served.link.client
        waits = served.link.has_left or _has_news(client)
        expect(waits, f"{served.link} has read all it was sent, and is given up")

    def _check_frame_timer(self, served: FollowedConnection) -> None:
        if served.frame_timer is None:
            return
        timer, count = served.frame_timer
        if timer.cancelled() or id(timer) not in self._loop.started:
            served.frame_timer = None
            return
        is_of_it = count == served.link.read.count and bool(served.link.read.rest)
        # What was read with the end of a frame is looked at when it is its turn.
        is_of_it = is_of_it or bool(served.link.unfed)
        expect(is_of_it, f"{served.link}: the deadline of a frame runs on for the next")

    def _is_blocked(self, served: FollowedConnection) -> bool:
        assert served.link.number is not None
        connection = self.provider._connections.get(served.link.number)
        return connection is not None and connection.is_blocked

    # --- When only time can bring anything about -------------------------------------------------

    def _check_rest(self) -> None:
        if self.is_over or self.provider._is_closed:
            return
        for served in self._served.values():
            self._check_served_at_rest(served)
        expect(not self._doing or self._backend.hanging, f"{self._doing} is not done")
        reports = {key for key, count in self._done.items() if count}
        expect(not reports, f"{reports} is not reported")
        idle = {
            name: list(kinds)
            for name, kinds in self._asked.items()
            if kinds and name not in self._doing and self._images[name] not in self._backend.hanging
        }
        expect(not idle or self.is_stopping, f"{idle} is not begun")

    def _check_served_at_rest(self, served: FollowedConnection) -> None:
        link = served.link
        assert link.number is not None
        assert link.served is not None
        connection = self.provider._connections.get(link.number)
        assert connection is not None
        expect(not any(served.unreported.values()), f"{link}: {served.unreported} is not reported")
        if connection.is_blocked or served.is_given_up or connection.write_closed:
            return
        expect(not served.due, f"{link} is not sent {list(served.due)}")
        expect(not served.is_close_due, f"{link} is not closed")
        if connection.read_closed or connection.is_in_order:
            return
        expect(not link.unfed, f"{link} has said {list(link.unfed)}, which is not handled")
        expect(not _has_news(link.served), f"{link} has something to read, and is not read")
        if link.read.rest:
            is_timed = served.frame_timer is not None and not served.frame_timer[0].cancelled()
            expect(is_timed, f"{link} may take as long as it likes for a frame")


def _is_waiting(job: Any) -> bool:
    """Say whether no worker has taken up a piece of work."""
    user, connection = job.lane
    lanes = job.workers._turns._users.find(user)
    queue = None if lanes is None else lanes.find(connection)
    return queue is not None and job in queue


def _has_news(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def callback_of(handle: asyncio.Handle) -> str:
    return Firing.of(handle).callback


def owner_of(handle: asyncio.Handle) -> Any:
    return Firing.of(handle).owner


def _arguments(handle: asyncio.Handle) -> Any:
    return Firing.of(handle).arguments


def _is_kernels(timer: asyncio.TimerHandle) -> bool:
    return callback_of(timer) == "Timers.expire"


def _named(timers: set[tuple[Timer, str]]) -> list[str]:
    return sorted(f"{timer.value} {name}" for timer, name in timers)


_EVENTS: Final[dict[type[Any], Callable[[ProviderRules, Any], None]]] = {
    on.ConnectionOpened: ProviderRules._opened,
    on.RequestReceived: ProviderRules._message,
    on.EndReceived: ProviderRules._message,
    on.FrameRejected: ProviderRules._rejected,
    on.ConnectionLost: ProviderRules._lost,
    on.ProviderStopping: ProviderRules._stopping,
    on.NamespacesCreated: ProviderRules._made,
    on.NamespacesNotCreated: ProviderRules._made,
    on.NamespacesReleased: ProviderRules._released,
    on.ReleaseDelayed: ProviderRules._released,
    on.ResponseSent: ProviderRules._reported,
    on.ResponseNotSent: ProviderRules._reported,
    on.ScopePopulated: ProviderRules._populated,
    on.InitDied: ProviderRules._init_died,
    on.ScopeEmptied: ProviderRules._emptied,
}

_EFFECTS: Final[dict[type[Any], Callable[[ProviderRules, Any], None]]] = {
    do.HandOver: ProviderRules._to_send,
    do.Refuse: ProviderRules._to_send,
    do.AnnounceEnd: ProviderRules._to_send,
    do.CloseConnection: ProviderRules._to_close,
    do.CreateNamespaces: ProviderRules._to_create,
    do.ReleaseNamespaces: ProviderRules._to_release,
    do.StartTimer: ProviderRules._to_start,
}

_TIMERS: Final[dict[str, Callable[[ProviderRules, asyncio.TimerHandle, float], None]]] = {
    "Timers.expire": ProviderRules._kernel_timer,
    "ServedConnection._reject_slow": ProviderRules._frame_timer,
    "ServedConnection._close_slow": ProviderRules._unread_timer,
    "ServedConnection.drop": ProviderRules._linger_timer,
    "BackendWork._give_up": ProviderRules._image_timer,
}
