"""A provider and its consumers in one thread: no socket, no clock, and any brain.

The brain decides: our kernels, or the model of `specs/model.py`. What it decides is performed on a
backend at once, in order, as the drivers of `transport` do; messages and their descriptors wait in
pipes; timers run out when they are told to. Hearing lets the provider work until there is
nothing left to do, so nothing here depends on time.

The consumer's driver is `transport.request`'s own, on a pipe in place of a channel.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Final, Protocol, TypeAlias

from specs import model
from specs.model import Impossible
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    CreationFailed,
    FdPassing,
    LocalProtocolError,
    RemoteProtocolError,
)
from statemachine.events import ConsumerInput, ProviderInput
from statemachine.messages import AllocationEnded, Message, NamespaceRequest, NamespaceResponse
from statemachine.provider import Limits, ProviderKernel, event_of
from statemachine.states import AllocationState, ConsumerState, NoticeState

from ..channel import Delivery, Lost, Received, Rejected
from ..contract import Observation, Sighting
from ..descriptors import DescriptorBundle, Inspector, NamespaceIdentity
from ..request.exchange import Exchange, Patience
from ..serve import event_of_adoption
from ..serve.watch import OBSERVED_STATES
from ..serve.work import try_to_create, try_to_release
from .adapter import History, StalledWork
from .gated_backend import GatedBackend

RETRIES_AT_ONCE: Final = 3
"""How often a release is tried again before that counts as time passing: dying takes two tries."""


# --- Brains ------------------------------------------------------------------------------------


class ProviderBrain(Protocol):
    """What decides for a provider; `ProviderKernel` does."""

    def receive(self, event: ProviderInput) -> Iterable[Effect]: ...
    def remember(self, names: Iterable[str]) -> None: ...
    def state_of(self, allocation_id: str) -> AllocationState: ...


class ProviderModel:
    """
    The model's decisions.

    A kernel runs beside it, to put a name to each situation (the model has no events of its own);
    it decides nothing, and must see the same states.
    """

    def __init__(self, limits: Limits) -> None:
        same = {name: getattr(limits, name) for name in model.Limits._fields}
        self._now = model.Provider(model.Limits(**same))
        self._namer = ProviderKernel(limits)

    def receive(self, event: ProviderInput) -> Iterable[Effect]:
        self._namer.receive(event)
        self._now, effects = model.provider_step(self._now, event)
        for name, state in self._namer.states.items():
            assert self._now.state_of(name) == state.value, (name, state)
        return map(_in_words, effects)

    def remember(self, names: Iterable[str]) -> None:
        self._namer.remember(names)
        self._now = self._now._replace(remembered=tuple(dict.fromkeys(names)))

    def state_of(self, allocation_id: str) -> AllocationState:
        return AllocationState(self._now.state_of(allocation_id))


def _in_words(effect: Effect) -> Effect:
    """Give a reason to a refusal by the model, which says only that it is one."""
    if isinstance(effect, do.Refuse) and effect.error == CreationFailed(""):
        return do.Refuse(effect.connection, CreationFailed("a limit, or the request"))
    return effect


class ConsumerModel(ConsumerKernel):
    """The model's decisions in a kernel's place; the kernel itself only names, as above."""

    def __init__(self, request: NamespaceRequest) -> None:
        super().__init__(request)
        self._now = model.Consumer(request)

    def receive(self, event: ConsumerInput) -> tuple[Effect, ...]:
        try:
            after, effects = model.consumer_step(self._now, event)
        except Impossible as impossible:
            error = RemoteProtocolError if impossible.whose == "peer's" else LocalProtocolError
            raise error(type(event).__name__, self._now.state, "the model's allocation") from None
        super().receive(event)
        self._now = after
        assert (super().state, super().notice) == (self.state, self.notice)
        return tuple(effects)

    @property
    def state(self) -> ConsumerState:
        return ConsumerState(self._now.state)

    @property
    def notice(self) -> NoticeState:
        return NoticeState(self._now.notice)

    @property
    def owes_end(self) -> bool:
        return self.notice not in (NoticeState.SILENT, NoticeState.HEARD)


# --- Pipes -------------------------------------------------------------------------------------


class Pipe:
    """One end of a connection; of `transport.channel.Channel`, what a consumer's driver uses."""

    wants_write = False

    def __init__(self) -> None:
        self._arrived: deque[Received] = deque()
        self.other: Pipe = self
        self.closed = False
        self._is_read_closed = False

    @property
    def has_news(self) -> bool:
        """Whether anything is to be received, if only that the other end is gone."""
        is_lost = self.other.closed and not self._is_read_closed
        return not self.closed and bool(self._arrived or is_lost)

    def send(self, message: Message, bundle: DescriptorBundle | None = None) -> None:
        self.put(Delivery(message, bundle or DescriptorBundle()))

    def put(self, what: Received) -> None:
        """Let anything arrive at the other end."""
        if not self.other.closed:
            self.other._arrived.append(what)
        elif isinstance(what, Delivery):
            what.bundle.close()

    def receive_one(self) -> Received:
        """Take what arrived first, or that the other end is gone."""
        if self._arrived:
            return self._arrived.popleft()
        self._is_read_closed = True
        return Lost("the other end is closed")

    def receive(self) -> list[Received]:
        received = []
        while self.has_news:
            received.append(self.receive_one())
        return received

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        while self._arrived:
            arrived = self._arrived.popleft()
            if isinstance(arrived, Delivery):
                arrived.bundle.close()


def pipe() -> tuple[Pipe, Pipe]:
    """Make both ends of a connection."""
    one, other = Pipe(), Pipe()
    one.other, other.other = other, one
    return one, other


# --- The provider ------------------------------------------------------------------------------


class InProcessProvider:
    """
    A provider's program that works in the thread that asks it to.

    Args:
        brain: decides.
        gate: the backend, and what of its work is held up.
        limits: who may use it, and how much of it; by default this user.
    """

    def __init__(
        self,
        brain: Callable[[Limits], ProviderBrain],
        gate: GatedBackend,
        limits: Limits | None = None,
    ) -> None:
        self.brain = brain(limits or Limits(frozenset({os.geteuid()})))
        self.turns: History = []
        self.timers: set[tuple[Timer, str]] = set()
        self._gate = gate
        self._backend = gate.backend
        self._numbers = count(1)
        self._pipes: dict[int, Pipe] = {}
        self._opened: deque[tuple[int, int]] = deque()
        self._read_closed: set[int] = set()
        self._lanes: dict[str, deque[Effect]] = {}
        self._made: dict[str, ProviderInput] = {}
        self._events: deque[ProviderInput] = deque()
        self._is_ready = False
        self._is_dead = False

    def connect(self, uid: int | None = None) -> Pipe:
        """Call it, as a user; by default as this one."""
        ours, theirs = pipe()
        number = next(self._numbers)
        self._pipes[number] = ours
        self._opened.append((number, os.geteuid() if uid is None else uid))
        return theirs

    def work(self) -> None:
        """Do whatever there is to do now."""
        for _ in range(RETRIES_AT_ONCE):
            while self._step():
                pass
            retries = [name for timer, name in self.timers if timer is Timer.RETRY]
            for name in sorted(retries):
                self.expire(Timer.RETRY, name)
            if not retries:
                return
        while self._step():
            pass

    def stop(self) -> None:
        """Die: nothing is said to any consumer, and nothing is undone."""
        self._is_dead = True
        for end in self._pipes.values():
            end.close()

    def expire(self, timer: Timer, name: str) -> None:
        """Let a timer run out."""
        self.timers.remove((timer, name))
        self._feed(on.ReadinessOverdue() if timer is Timer.READINESS else _EXPIRIES[timer](name))

    def release(self, name: str) -> None:
        """Be told by an operator."""
        self._feed(on.ReleaseRequested(name))

    # What there is to do.

    def _step(self) -> bool:
        if self._is_dead:
            return False
        return self._get_ready() or self._read() or self._observe() or self._do_job()

    def _get_ready(self) -> bool:
        if self._is_ready or self._gate.is_held(StalledWork.RECOVER):
            return False
        self._is_ready = True
        recovery = self._backend.recover()
        self.brain.remember(recovery.remembered)
        for adoption in recovery.adoptions:
            self._feed(event_of_adoption(adoption))
        self._feed(on.ProviderReady())
        return True

    def _read(self) -> bool:
        if self._opened:
            self._feed(on.ConnectionOpened(*self._opened.popleft()))
            return True
        for number, end in tuple(self._pipes.items()):
            if number not in self._read_closed and end.has_news:
                self._hear(number, end.receive_one())
                return True
        return False

    def _hear(self, number: int, received: Received) -> None:
        match received:
            case Delivery(message=message, bundle=bundle):
                bundle.close()
                event = event_of(number, message)
                if isinstance(event, on.FrameRejected):
                    self._read_closed.add(number)
                self._feed(event)
            case Rejected(error=error):
                self._read_closed.add(number)
                self._feed(on.FrameRejected(error.reason, number))
            case Lost(reason=reason):
                self._drop(number, reason)

    def _drop(self, number: int, reason: str) -> None:
        self._pipes.pop(number).close()
        self._feed(on.ConnectionLost(number, reason))

    def _send(self, number: int, message: Message, bundle: DescriptorBundle | None = None) -> None:
        self._pipes[number].send(message, bundle)

    def _observe(self) -> bool:
        seen = self._backend.observe() if self._is_ready else []
        for observation in seen:
            self._see(observation)
        return bool(seen)

    def _see(self, observation: Observation) -> None:
        name = observation.allocation_id
        if self.brain.state_of(name) not in OBSERVED_STATES:
            return
        match observation.sighting:
            case Sighting.POPULATED:
                self._feed(on.ScopePopulated(name))
            case Sighting.INIT_DIED:
                self._feed(on.InitDied(name))
            case Sighting.EMPTIED | Sighting.CHANGED:
                if self._backend.is_over(name):
                    self._feed(on.ScopeEmptied(name))

    def _do_job(self) -> bool:
        for name in sorted(self._made):
            if not self._gate.is_held(StalledWork.REPORT, name):
                self._feed(self._made.pop(name))
                return True
        for name, lane in self._lanes.items():
            if name in self._made or not lane or self._gate.is_held(_WORK[type(lane[0])], name):
                continue
            job = lane.popleft()
            if isinstance(job, do.CreateNamespaces):
                self._made[name] = try_to_create(self._backend, job)
            elif isinstance(job, do.ReleaseNamespaces):
                self._feed(try_to_release(self._backend, job))
            return True
        return False

    @property
    def held_up(self) -> set[tuple[StalledWork, str]]:
        """What waits behind the gate, and on which allocation."""
        begun = {(StalledWork.REPORT, name) for name in self._made}
        lanes = self._lanes.items()
        return begun | {
            (_WORK[type(lane[0])], name) for name, lane in lanes if lane and name not in self._made
        }

    # What the brain wants.

    def _feed(self, event: ProviderInput) -> None:
        self._events.append(event)
        if len(self._events) > 1:
            return
        try:
            while self._events:
                self._turn(self._events[0])
                self._events.popleft()
        finally:
            self._events.clear()

    def _turn(self, event: ProviderInput) -> None:
        effects = tuple(self.brain.receive(event))
        self.turns.append((event, effects))
        for effect in effects:
            # The model has kinds of its own among those that there are.
            kind = next(each for each in type(effect).__mro__ if each in _PERFORMERS)
            _PERFORMERS[kind](self, effect)

    def _start_timer(self, effect: do.StartTimer) -> None:
        self.timers.add((effect.timer, effect.allocation_id))

    def _stop_timer(self, effect: do.StopTimer) -> None:
        self.timers.discard((effect.timer, effect.allocation_id))

    def _create(self, effect: do.CreateNamespaces) -> None:
        self._lanes.setdefault(effect.request.allocation_id, deque()).append(effect)

    def _release(self, effect: do.ReleaseNamespaces) -> None:
        self._backend.record_ended(effect.allocation_id)
        self._lanes.setdefault(effect.allocation_id, deque()).append(effect)

    def _watch(self, effect: do.Watch) -> None:
        self._backend.watch(effect.allocation_id)

    def _record(self, effect: do.RecordHandoff) -> None:
        self._backend.record_handed_off(effect.allocation_id)

    def _hand_over(self, effect: do.HandOver) -> None:
        name, number = effect.response.allocation_id, effect.connection
        try:
            bundle = self._gate.bundle_of(name)
        except FdPassing as error:
            self._send(number, error)
            self._feed(on.ResponseNotSent(name, number, error))
        else:
            self._send(number, effect.response, bundle)
            self._feed(on.ResponseSent(name, number))

    def _refuse(self, effect: do.Refuse) -> None:
        self._send(effect.connection, effect.error)

    def _announce(self, effect: do.AnnounceEnd) -> None:
        self._send(effect.connection, AllocationEnded(effect.allocation_id))

    def _close(self, effect: do.CloseConnection) -> None:
        self._drop(effect.connection, "closed")


_WORK: Final = {do.CreateNamespaces: StalledWork.CREATE, do.ReleaseNamespaces: StalledWork.RELEASE}

_EXPIRIES: Final[dict[Timer, Callable[[str], ProviderInput]]] = {
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
}

_PERFORMERS: Final[dict[type[Effect], Callable[[InProcessProvider, Any], None]]] = {
    do.StartTimer: InProcessProvider._start_timer,
    do.StopTimer: InProcessProvider._stop_timer,
    do.CreateNamespaces: InProcessProvider._create,
    do.ReleaseNamespaces: InProcessProvider._release,
    do.Watch: InProcessProvider._watch,
    do.RecordHandoff: InProcessProvider._record,
    do.HandOver: InProcessProvider._hand_over,
    do.Refuse: InProcessProvider._refuse,
    do.AnnounceEnd: InProcessProvider._announce,
    do.CloseConnection: InProcessProvider._close,
}


# --- The consumer ------------------------------------------------------------------------------


class InsideVoice:
    """A line to a provider inside."""

    def __init__(self, end: Pipe, work: Callable[[], None]) -> None:
        self._end = end
        self._work = work
        self._bundle = DescriptorBundle()

    def say(self, *messages: Message) -> None:
        for message in messages:
            self._end.send(message)
        self._work()

    def hear(self) -> Message | None:
        self._bundle.close()
        self._work()
        assert self._end.has_news, "there is nothing to hear, and nothing left that could happen"
        received = self._end.receive_one()
        if not isinstance(received, Delivery):
            return None
        self._bundle = received.bundle
        return received.message

    def take(self) -> DescriptorBundle:
        taken, self._bundle = self._bundle, DescriptorBundle()
        return taken

    def hang_up(self) -> None:
        self._bundle.close()
        self._end.close()
        self._work()


ConsumerBrain: TypeAlias = Callable[[NamespaceRequest], ConsumerKernel]


class InsideConsumer:
    """A consumer of a provider inside, which serves itself under no circumstances."""

    def __init__(
        self,
        brain: ConsumerBrain,
        inspector: Inspector,
        connect: Callable[[], Pipe],
        work: Callable[[], None],
    ) -> None:
        self._brain = brain
        self._inspector = inspector
        self._connect = connect
        self._work = work

    def obtain(self, request: NamespaceRequest) -> InsideHandoff:
        handoff = self._begin(request, on.NamespacesWanted())
        exchange = handoff.exchange
        try:
            handoff.go_on(lambda: exchange.is_settled)
            assert exchange.is_settled, "nothing is left that could settle this exchange"
            if exchange.refusal is not None:
                raise exchange.refusal
        except BaseException:
            handoff.close()
            raise
        return handoff

    def end(self, allocation_id: str, timeout_s: float) -> None:
        handoff = self._begin(NamespaceRequest(allocation_id, ()), on.EndWanted())
        try:
            assert handoff.end(timeout_s)
            if handoff.exchange.refusal is not None:
                raise handoff.exchange.refusal
        finally:
            handoff.close()

    def _begin(self, request: NamespaceRequest, event: ConsumerInput) -> InsideHandoff:
        brain = self._brain(request)
        exchange = Exchange(brain, self._inspector, None, Patience(), None, "")
        exchange.feed(event)
        return InsideHandoff(exchange, self._connect, self._work)


class InsideHandoff:
    """What a consumer of a provider inside has in hand."""

    is_degraded = False

    def __init__(
        self, exchange: Exchange, connect: Callable[[], Pipe], work: Callable[[], None]
    ) -> None:
        self.exchange = exchange
        self._connect = connect
        self._work = work

    @property
    def response(self) -> NamespaceResponse:
        assert self.exchange.response is not None
        return self.exchange.response

    @property
    def bundle(self) -> DescriptorBundle:
        assert self.exchange.bundle is not None
        return self.exchange.bundle

    @property
    def identities(self) -> tuple[NamespaceIdentity, ...]:
        return self.exchange.identities

    def wait_ended(self, timeout_s: float) -> bool:
        self.go_on(lambda: self.exchange.is_over)
        return self.exchange.is_over

    def end(self, timeout_s: float) -> bool:
        if self.exchange.kernel.state is ConsumerState.HELD:
            self.exchange.feed(on.EndWanted())
        self.go_on(lambda: self.exchange.is_done)
        return self.exchange.is_done

    def close(self) -> None:
        self.exchange.close()
        self._work()

    def go_on(self, is_done: Callable[[], bool]) -> None:
        """Let both sides do what there is to do, until it is done or nothing is left."""
        exchange = self.exchange
        while not is_done():
            self._work()
            if exchange.slow:
                effect = exchange.slow.popleft()
                if isinstance(effect, do.Connect):
                    put_through(exchange, self._connect())
                else:
                    assert isinstance(effect, do.ServeSelf), effect
                    exchange.feed(exchange.serve_self(effect))
            elif isinstance(exchange.channel, Pipe) and exchange.channel.has_news:
                exchange.read()
            else:
                return


def put_through(exchange: Exchange, end: Pipe) -> None:
    """Let a consumer's call be answered by a pipe; as `Exchange.connected`, which has a socket."""
    exchange.channel = end  # type: ignore[assignment]
    exchange._unreachable = None
    exchange.feed(on.Connected())
