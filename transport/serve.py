"""The provider's driver: one event loop that feeds the kernel and performs what it decides.

Frames become events, effects become backend work and frames. The loop itself never waits: backend
work runs in threads, one piece at a time for each allocation and side by side for different ones,
and a peer that sends slowly or does not read costs a timer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect, Timer
from statemachine.errors import (
    AllocationNotFound,
    CreationFailed,
    FdPassing,
    NamespaceError,
    SocketUnavailable,
)
from statemachine.events import Event
from statemachine.lifecycle import AllocationState
from statemachine.messages import AllocationEnded, Message, NamespaceRequest
from statemachine.provider import Limits, ProviderKernel, event_of

from .channel import Channel, Delivery, Rejected
from .contract import Adoption, Backend, Observation, Sighting
from .descriptors import DescriptorBundle
from .endpoint import Accepted, Listener, PeerCredentials

READINESS_TIMEOUT_S: Final = 30.0
"""Longest wait of a message for the provider to be ready."""

CLAIM_TIMEOUT_S: Final = 300.0
"""How long an allocation lives that nobody uses and nobody is there to claim."""

RELEASE_DEADLINE_S: Final = 2.0
"""How long an end stays unannounced while the release is not complete."""

PARTIAL_FRAME_TIMEOUT_S: Final = 5.0
"""Longest time from the first byte of a frame to its last."""

FAREWELL_TIMEOUT_S: Final = 1.0
"""How long a connection that is being closed may take to read what was sent to it."""

LOOK_AGAIN_S: Final = 0.05
"""When to look again at a cgroup that changed and does not prove its use: some scheduler ticks."""

BACKEND_PAUSE_S: Final = 1.0
"""Pause before a backend is asked again that failed where none may fail."""

STOP_TIMEOUT_S: Final = 5.0
"""How long a provider that shuts down waits for backend work that is under way."""

RETRY_FIRST_S: Final = 0.001
"""Pause before the second try to release; it doubles with each further try."""

RETRY_MAX_S: Final = 1.0
"""Longest pause between two tries to release."""

ACCEPT_PAUSE_S: Final = 0.1
"""Pause in accepting when there is no descriptor left at all: that takes time to pass."""

ACCEPTS_PER_TURN_MAX: Final = 64
"""Most connections accepted before others get their turn."""

ERROR_CHARACTERS_MAX: Final = 1024
"""Longest text of an error that cannot be sent as it is: too long for a frame, or not Unicode."""

WORKERS_MAX: Final = 8
"""Most pieces of backend work at a time: more than cores, because images may be slow to mount."""

Observer: TypeAlias = Callable[[Event, tuple[Effect, ...]], None]
"""Told of every event and of what the kernel decided; must not raise."""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Spans:
    """How long the provider's timers run, in seconds. The defaults are the constants above."""

    readiness_s: float = READINESS_TIMEOUT_S
    """The wait of a message for the provider to be ready."""
    claim_s: float = CLAIM_TIMEOUT_S
    """The life of what nobody uses or waits for."""
    release_s: float = RELEASE_DEADLINE_S
    """From an end to its announcement, at most."""
    partial_frame_s: float = PARTIAL_FRAME_TIMEOUT_S
    """From a frame's first byte to its last, at most."""
    farewell_s: float = FAREWELL_TIMEOUT_S
    """For a peer to read what was sent before its connection is closed."""
    empty_grace_s: float = 0.0
    """How long a used cgroup must stay empty to count as ended."""


@dataclass(slots=True)
class _Peer:
    """A connection, as the driver sees it."""

    number: int
    channel: Channel
    credentials: PeerCredentials
    """Held as long as the connection: its pidfd pins who it was opened by."""
    is_deaf: bool = False
    """Whether nothing more is read from it."""
    is_mute: bool = False
    """Whether nothing more can be sent to it."""
    is_leaving: bool = False
    """Whether it is closed as soon as it has read what was sent."""
    deadline: asyncio.TimerHandle | None = None
    """For the frame that has begun to arrive."""
    farewell: asyncio.TimerHandle | None = None
    """For all of it, once one direction is done."""


@dataclass(slots=True)
class _Clock:
    """The timers that run, and how often each release has been tried."""

    handles: dict[tuple[Timer, str], asyncio.TimerHandle] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    graces: dict[str, asyncio.TimerHandle] = field(default_factory=dict)


class Provider:
    """
    A provider at work on a socket.

    Args:
        listener: where consumers connect; closed when the provider stops.
        backend: what makes and releases namespaces; the caller closes it after `run`.
        limits: who may use the provider, and how much of it; by default only this user may.
        spans: how long the timers run.
        observer: told of every event and its effects.
    """

    # Keeps PEER-8.

    def __init__(
        self,
        listener: Listener,
        backend: Backend,
        *,
        limits: Limits | None = None,
        spans: Spans | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._listener = listener
        self._backend = backend
        self._limits = limits or Limits(frozenset({os.geteuid()}))
        self._spans = spans or Spans()
        self._observer = observer
        self._kernel = ProviderKernel(self._limits)
        self._peers: dict[int, _Peer] = {}
        self._next_number = 1
        self._events: deque[Event] = deque()
        self._is_pumping = False
        self._clock = _Clock()
        self._lanes: dict[str, asyncio.Task[None]] = {}
        self._tidying: asyncio.Task[None] | None = None
        self._untidy = asyncio.Event()
        self._pool = ThreadPoolExecutor(WORKERS_MAX, thread_name_prefix="backend")
        self._stop_asked = asyncio.Event()
        self._is_closed = False
        self._has_hung = False

    @property
    def kernel(self) -> ProviderKernel:
        """The kernel, for looking at; only this driver feeds it."""
        return self._kernel

    @property
    def has_hung(self) -> bool:
        """
        Whether backend work was still under way when `run` returned.

        Its threads cannot be ended, and Python waits for them when it exits. A program that must
        be gone now leaves with `os._exit`: that is no worse than being killed, which is provided
        for.
        """
        return self._has_hung

    async def run(
        self,
        on_ready: Callable[[], None] | None = None,
        *,
        on_recovered: Callable[[Iterable[str]], None] | None = None,
    ) -> None:
        """
        Serve until `stop` is called.

        Connections are accepted at once; what they ask waits until the backend has recovered.
        Afterwards every connection and the listener are closed, and what is alive is still alive.

        Args:
            on_ready: called once, when requests are served.
            on_recovered: called once before that, and before anything is adopted, with the names
                of released allocations that the backend remembers.

        Raises:
            Exception: the backend could not recover; everything is closed.
        """
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.fileno(), self._accept)
        starting = self._loop.create_task(self._start(on_ready, on_recovered))
        stopping = self._loop.create_task(self._stop_asked.wait())
        try:
            # Recovering may take long, or hang; a provider can be stopped nevertheless.
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await stopping
        finally:
            await self._wind_up(starting)

    def stop(self) -> None:
        """Ask `run` to return; to be called in the loop's thread. May be called again."""
        self._stop_asked.set()
        self._untidy.set()

    # --- Starting and stopping -----------------------------------------------------------------

    async def _start(
        self,
        on_ready: Callable[[], None] | None,
        on_recovered: Callable[[Iterable[str]], None] | None,
    ) -> None:
        recovery = await self._loop.run_in_executor(self._pool, self._backend.recover)
        if self._stop_asked.is_set():
            return
        if on_recovered is not None:
            on_recovered(recovery.remembered)
        self._kernel.remember(recovery.remembered)
        for adoption in recovery.adoptions:
            self._feed(_adopted(adoption))
        self._loop.add_reader(self._backend.fileno(), self._observe)
        self._feed(on.ProviderReady())
        self._tidying = self._loop.create_task(self._keep_tidy())
        if on_ready is not None:
            on_ready()

    async def _wind_up(self, starting: asyncio.Task[None]) -> None:
        # Keeps CRASH-12.
        self.stop()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._feed(on.ProviderStopping())
        left = await self._wait_for_work(starting)
        self._has_hung = bool(left)
        self._loop.remove_reader(self._backend.fileno())
        for peer in tuple(self._peers.values()):
            self._drop(peer, "the provider is shutting down")
        # Last of all, because a connection that is lost can start a timer. What is alive now stays
        # alive, whatever else this loop does.
        self._is_closed = True
        for handle in (*self._clock.handles.values(), *self._clock.graces.values()):
            handle.cancel()
        for task in left:
            task.cancel()
        # Work that still hangs is not waited for: its intent is in the journal.
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_work(self, starting: asyncio.Task[None]) -> set[asyncio.Task[None]]:
        """Let backend work finish, and what follows from it; return what does not in time."""
        deadline = self._loop.time() + STOP_TIMEOUT_S
        left = {starting, *([self._tidying] if self._tidying else [])}
        while left := {task for task in (*left, *self._lanes.values()) if not task.done()}:
            timeout_s = deadline - self._loop.time()
            if timeout_s <= 0:
                break
            await asyncio.wait(left, timeout=timeout_s)
        return left

    # --- Events in, effects out ----------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        """Give the kernel an event, and whatever events performing its effects brings about."""
        if self._is_closed:
            return
        self._events.append(event)
        if self._is_pumping:
            return
        self._is_pumping = True
        try:
            while self._events:
                self._turn(self._events.popleft())
        finally:
            self._is_pumping = False

    def _turn(self, event: Event) -> None:
        effects = self._kernel.receive(event)
        if self._observer is not None:
            self._observer(event, effects)
        for effect in effects:
            _PERFORMERS[type(effect)](self, effect)

    # --- Connections ---------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            accepted = self._accept_next()
            if accepted is None:
                return
            peer = _Peer(self._next_number, accepted.channel, accepted.credentials)
            try:
                self._loop.add_reader(peer.channel.fileno(), self._read, peer)
            except OSError as error:
                _turn_away(accepted, f"the provider cannot listen to it: {error.strerror}")
                continue
            self._next_number += 1
            self._peers[peer.number] = peer
            self._feed(on.ConnectionOpened(peer.number, peer.credentials.uid))

    def _accept_next(self) -> Accepted | None:
        # The listener stays readable while a connection waits that cannot be accepted: without a
        # pause, this would spin.
        try:
            accepted = self._listener.accept()
        except OSError:
            _log.exception("accepting on %s failed", self._listener.path)
            self._pause_accepting()
            return None
        if accepted is None and self._listener.is_starved:
            self._pause_accepting()
        return accepted

    def _pause_accepting(self) -> None:
        # Keeps PEER-11.
        self._loop.remove_reader(self._listener.fileno())
        self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if not self._stop_asked.is_set():
            try:
                self._loop.add_reader(self._listener.fileno(), self._accept)
            except OSError:
                _log.exception("listening to %s failed", self._listener.path)
                self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)

    def _read(self, peer: _Peer) -> None:
        for received in peer.channel.receive():
            if peer.is_deaf:
                return
            if isinstance(received, Delivery):
                self._stop_deadline(peer)
                self._hear(peer, event_of(peer.number, received.message))
            elif isinstance(received, Rejected):
                self._hear(peer, on.FrameRejected(received.error.reason, peer.number))
            else:
                self._drop(peer, received.reason)
        self._time_frame(peer)

    def _hear(self, peer: _Peer, event: Event) -> None:
        # Keeps WIRE-11, WIRE-12.
        if isinstance(event, on.FrameRejected):
            # What follows is not listened to, though the refusal may have to wait for its turn.
            self._stop_reading(peer)
        self._feed(event)

    def _stop_reading(self, peer: _Peer) -> None:
        peer.is_deaf = True
        self._stop_deadline(peer)
        self._loop.remove_reader(peer.channel.fileno())

    def _time_frame(self, peer: _Peer) -> None:
        """Give the frame that has begun to arrive its deadline, once."""
        if peer.is_deaf:
            return
        if not peer.channel.is_mid_frame:
            self._stop_deadline(peer)
        elif peer.deadline is None:
            span_s = self._spans.partial_frame_s
            peer.deadline = self._loop.call_later(span_s, self._reject_slow, peer)

    def _reject_slow(self, peer: _Peer) -> None:
        # Keeps PEER-7.
        reason = f"a frame was not whole within {self._spans.partial_frame_s:g} s"
        self._hear(peer, on.FrameRejected(reason, peer.number))

    def _stop_deadline(self, peer: _Peer) -> None:
        if peer.deadline is not None:
            peer.deadline.cancel()
            peer.deadline = None

    def _send(self, number: int, message: Message) -> None:
        # Keeps WIRE-13.
        peer = self._peers.get(number)
        if peer is None:
            return
        try:
            self._put(peer, message)
        except ValueError:
            # Only an error quotes what it likes, of a peer or of the machine. Its kind is what
            # counts, and order is how it is matched: so it must leave, whatever it says.
            assert isinstance(message, NamespaceError)
            self._put(peer, _sendable(message))

    def _put(self, peer: _Peer, message: Message, bundle: DescriptorBundle | None = None) -> bool:
        """
        Put a message on its way; say whether the peer still takes any.

        Raises:
            ValueError: it cannot be put into a frame; nothing was sent, the bundle is closed.
        """
        try:
            peer.channel.send(message, bundle)
            if peer.channel.wants_write:
                self._loop.add_writer(peer.channel.fileno(), self._write, peer)
        except FdPassing as error:
            self._stop_writing(peer, error.reason)
            return False
        except OSError as error:
            self._stop_writing(peer, f"the rest cannot be sent: {error.strerror}")
            return False
        return True

    def _write(self, peer: _Peer) -> None:
        try:
            is_done = peer.channel.flush()
        except FdPassing as error:
            self._stop_writing(peer, error.reason)
            return
        if is_done:
            self._loop.remove_writer(peer.channel.fileno())
            if peer.is_leaving:
                self._drop(peer, "closed")

    def _stop_writing(self, peer: _Peer, reason: str) -> None:
        """Give up telling a peer anything. What it said before it went away still counts."""
        self._loop.remove_writer(peer.channel.fileno())
        if peer.is_deaf:
            self._drop(peer, reason)
        elif not peer.is_mute:
            peer.is_mute = True
            self._bid_farewell(peer, reason)

    def _leave(self, peer: _Peer) -> None:
        """Close a connection as soon as the peer has what was sent, or the farewell is over."""
        peer.is_leaving = True
        self._stop_reading(peer)
        if peer.channel.wants_write:
            self._bid_farewell(peer, "closed")
        else:
            self._drop(peer, "closed")

    def _bid_farewell(self, peer: _Peer, reason: str) -> None:
        if peer.farewell is not None:
            peer.farewell.cancel()
        peer.farewell = self._loop.call_later(self._spans.farewell_s, self._drop, peer, reason)

    def _drop(self, peer: _Peer, reason: str) -> None:
        # Keeps PEER-10, CRASH-14.
        if self._peers.pop(peer.number, None) is None:
            return
        self._stop_reading(peer)
        self._loop.remove_writer(peer.channel.fileno())
        if peer.farewell is not None:
            peer.farewell.cancel()
        peer.channel.close()
        peer.credentials.close()
        self._feed(on.ConnectionLost(peer.number, reason))

    # --- What the backend sees -----------------------------------------------------------------

    def _observe(self) -> None:
        if self._is_closed:
            return
        try:
            observations = self._backend.observe()
        except Exception:
            # It may stay readable for ever: without a pause, this would spin.
            _log.exception("observing failed")
            self._loop.remove_reader(self._backend.fileno())
            self._loop.call_later(BACKEND_PAUSE_S, self._resume_observing)
            return
        for observation in observations:
            self._see(observation)

    def _resume_observing(self) -> None:
        if not self._stop_asked.is_set():
            try:
                self._loop.add_reader(self._backend.fileno(), self._observe)
            except OSError:
                _log.exception("listening to the backend failed")
                self._loop.call_later(BACKEND_PAUSE_S, self._resume_observing)

    def _see(self, observation: Observation) -> None:
        name = observation.allocation_id
        if self._kernel.state_of(name) not in _OBSERVED:
            return
        match observation.sighting:
            case Sighting.POPULATED:
                self._stop_grace(name)
                self._feed(on.ScopePopulated(name))
            case Sighting.EMPTIED:
                self._start_grace(name)
            case Sighting.CHANGED:
                self._loop.call_later(LOOK_AGAIN_S, self._look_again, name)
            case Sighting.INIT_DIED:
                self._feed(on.InitDied(name))

    def _look_again(self, name: str) -> None:
        if name not in self._clock.graces and self._is_over(name):
            self._start_grace(name)

    def _is_over(self, name: str) -> bool:
        if self._is_closed or self._kernel.state_of(name) not in _OBSERVED:
            return False
        try:
            return self._backend.is_over(name)
        except Exception:
            _log.exception("looking at %s failed", name)
            self._loop.call_later(BACKEND_PAUSE_S, self._look_again, name)
            return False

    def _start_grace(self, name: str) -> None:
        self._stop_grace(name)
        if self._spans.empty_grace_s <= 0:
            self._end_grace(name)
        else:
            span_s = self._spans.empty_grace_s
            self._clock.graces[name] = self._loop.call_later(span_s, self._end_grace, name)

    def _stop_grace(self, name: str) -> None:
        handle = self._clock.graces.pop(name, None)
        if handle is not None:
            handle.cancel()

    def _end_grace(self, name: str) -> None:
        # Keeps END-4, END-7.
        self._clock.graces.pop(name, None)
        if self._is_over(name):
            self._feed(on.ScopeEmptied(name))

    # --- Performing ----------------------------------------------------------------------------

    def _start_timer(self, effect: do.StartTimer) -> None:
        self._stop_timer(effect)
        key = (effect.timer, effect.allocation_id)
        span_s = self._span_of(effect.timer, effect.allocation_id)
        self._clock.handles[key] = self._loop.call_later(span_s, self._expire, *key)

    def _stop_timer(self, effect: do.StartTimer | do.StopTimer) -> None:
        handle = self._clock.handles.pop((effect.timer, effect.allocation_id), None)
        if handle is not None:
            handle.cancel()

    def _span_of(self, timer: Timer, name: str) -> float:
        if timer is Timer.RETRY:
            tries = self._clock.tries[name] = self._clock.tries.get(name, -1) + 1
            return min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(tries, 30))
        spans = self._spans
        return {
            Timer.READINESS: spans.readiness_s,
            Timer.CLAIM: spans.claim_s,
            Timer.RELEASE: spans.release_s,
        }[timer]

    def _expire(self, timer: Timer, name: str) -> None:
        del self._clock.handles[timer, name]
        self._feed(on.ReadinessOverdue() if timer is Timer.READINESS else _EXPIRIES[timer](name))

    def _create(self, effect: do.CreateNamespaces) -> None:
        self._work(effect.request.allocation_id, lambda: _try_to_create(self._backend, effect))

    def _release(self, effect: do.ReleaseNamespaces) -> None:
        self._record_end(effect.allocation_id)
        self._stop_grace(effect.allocation_id)
        self._work(effect.allocation_id, lambda: _try_to_release(self._backend, effect))

    def _record_end(self, name: str) -> None:
        # Keeps END-14.
        try:
            self._backend.record_ended(name)
        except Exception:
            # The release is tried all the same, and notes it as well.
            _log.exception("recording the end of %s failed", name)

    def _work(self, name: str, job: Callable[[], Event]) -> None:
        """Run a job in a thread, after the jobs of the same allocation that came before it."""
        # Keeps END-9.
        before = self._lanes.get(name)
        self._lanes[name] = self._loop.create_task(self._run_in_lane(name, before, job))

    async def _run_in_lane(
        self, name: str, before: asyncio.Task[None] | None, job: Callable[[], Event]
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        event = await self._loop.run_in_executor(self._pool, job)
        if self._lanes.get(name) is asyncio.current_task():
            del self._lanes[name]
        self._feed(event)
        if isinstance(event, on.NamespacesReleased):
            self._clock.tries.pop(name, None)
            self._untidy.set()

    async def _keep_tidy(self) -> None:
        """Have the backend tidy up whenever something is due, and after every release."""
        while not self._stop_asked.is_set():
            self._untidy.clear()
            due_s = await self._loop.run_in_executor(self._pool, _try_to_tidy, self._backend)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._untidy.wait(), due_s)

    def _watch(self, effect: do.Watch) -> None:
        try:
            self._backend.watch(effect.allocation_id)
        except Exception:
            # What nobody watches would never end. So it ends now.
            _log.exception("watching %s failed", effect.allocation_id)
            self._loop.call_soon(self._give_up, effect.allocation_id)
            return
        # What is so already has made nothing readable that the loop would wake for.
        self._loop.call_soon(self._observe)

    def _give_up(self, name: str) -> None:
        if self._kernel.state_of(name) in _OBSERVED:
            self._feed(on.ReleaseRequested(name))

    def _record(self, effect: do.RecordHandoff) -> None:
        try:
            self._backend.record_handed_off(effect.allocation_id)
        except Exception:
            # Adopted after a restart, it counts as not handed over yet, which is as good.
            _log.exception("recording the hand-off of %s failed", effect.allocation_id)

    def _hand_over(self, effect: do.HandOver) -> None:
        # Keeps FD-13.
        peer = self._peers.get(effect.connection)
        if peer is None:
            return
        name = effect.response.allocation_id
        try:
            is_sent = self._put(peer, effect.response, self._backend.bundle_of(name))
        except Exception as error:
            if not isinstance(error, NamespaceError):
                _log.exception("opening %s failed", name)
            failure = FdPassing(f"the descriptors of {name} cannot be had: {error}")
            self._send(effect.connection, failure)
            self._feed(on.ResponseNotSent(name, effect.connection, failure))
            return
        if is_sent:
            self._feed(on.ResponseSent(name, effect.connection))
        else:
            # Its loss may be reported only when it was heard out; the release does not wait for it.
            gone = FdPassing("the consumer takes nothing any more")
            self._feed(on.ResponseNotSent(name, effect.connection, gone))

    def _refuse(self, effect: do.Refuse) -> None:
        self._send(effect.connection, effect.error)

    def _announce(self, effect: do.AnnounceEnd) -> None:
        self._send(effect.connection, AllocationEnded(effect.allocation_id))

    def _close(self, effect: do.CloseConnection) -> None:
        peer = self._peers.get(effect.connection)
        if peer is not None:
            self._leave(peer)


_OBSERVED: Final = frozenset(
    {AllocationState.CREATED, AllocationState.HANDED_OFF, AllocationState.ENDED}
)
"""States in which a sighting means something."""

_EXPIRIES: Final[dict[Timer, Callable[[str], Event]]] = {
    Timer.CLAIM: on.ClaimExpired,
    Timer.RELEASE: on.ReleaseOverdue,
    Timer.RETRY: on.RetryDue,
}

_PERFORMERS: Final[dict[type[Effect], Callable[[Provider, Any], None]]] = {
    do.StartTimer: Provider._start_timer,
    do.StopTimer: Provider._stop_timer,
    do.CreateNamespaces: Provider._create,
    do.ReleaseNamespaces: Provider._release,
    do.Watch: Provider._watch,
    do.RecordHandoff: Provider._record,
    do.HandOver: Provider._hand_over,
    do.Refuse: Provider._refuse,
    do.AnnounceEnd: Provider._announce,
    do.CloseConnection: Provider._close,
}


def _try_to_create(backend: Backend, effect: do.CreateNamespaces) -> Event:
    # Keeps ERR-7.
    request: NamespaceRequest = effect.request
    name = request.allocation_id
    try:
        return on.NamespacesCreated(name, backend.create_namespaces(request))
    except CreationFailed as error:
        return on.NamespacesNotCreated(name, error)
    except Exception as error:
        # A bug of the backend costs this allocation, not the provider.
        _log.exception("creating %s failed", name)
        return on.NamespacesNotCreated(name, CreationFailed(f"{type(error).__name__}: {error}"))


def _try_to_release(backend: Backend, effect: do.ReleaseNamespaces) -> Event:
    # Keeps ERR-7.
    name = effect.allocation_id
    try:
        backend.release_namespaces(name)
        why = backend.why_alive(name)
    except AllocationNotFound:
        why = None
    except Exception as error:
        _log.exception("releasing %s failed", name)
        why = f"{type(error).__name__}: {error}"
    return on.NamespacesReleased(name) if why is None else on.ReleaseDelayed(name, why)


def _try_to_tidy(backend: Backend) -> float | None:
    try:
        return backend.tidy()
    except Exception:
        _log.exception("tidying up failed")
        return BACKEND_PAUSE_S


def _turn_away(accepted: Accepted, reason: str) -> None:
    """Say why a connection is not served, as far as that can be said at once, and close it."""
    try:
        with suppress(FdPassing):
            accepted.channel.send(SocketUnavailable(reason))
    finally:
        accepted.close()


def _sendable(error: NamespaceError) -> NamespaceError:
    """Say the same so that it fits into a frame, whatever it quotes."""
    text = error.text.encode("ascii", "backslashreplace").decode()
    return type(error)(text[:ERROR_CHARACTERS_MAX])


def _adopted(adoption: Adoption) -> Event:
    # Keeps CRASH-2.
    name = adoption.request.allocation_id
    if adoption.state is AllocationState.ENDED or adoption.response is None:
        return on.RemainsFound(name, adoption.request)
    is_handed = adoption.state is AllocationState.HANDED_OFF
    event = on.HandedOffAdopted if is_handed else on.CreatedAdopted
    return event(name, adoption.request, adoption.response)
