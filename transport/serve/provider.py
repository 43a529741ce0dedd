"""The provider's driver: `Provider` feeds the kernel in one event loop, and performs its effects.

Frames become events, effects become backend work and frames. The loop itself never waits: backend
work runs in threads, and a peer that sends slowly or does not read costs a timer.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, TypeAlias

from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect
from statemachine.errors import CreationFailed, FdPassing, NamespaceError, SocketUnavailable
from statemachine.events import ProviderInput
from statemachine.messages import AllocationEnded, NamespaceResponse
from statemachine.provider import Limits, ProviderKernel
from statemachine.states import AllocationState

from ..contract import Adoption, Backend
from ..descriptors import DescriptorBundle
from ..endpoint import Listener
from .peers import Connections
from .timers import Spans, Timers
from .turns import Lane
from .watch import Watcher
from .work import BackendWork, WorkReport

Observer: TypeAlias = Callable[[ProviderInput, tuple[Effect, ...]], None]
"""Told of every event and of what the kernel decided; must not raise."""

_OVER: Final = (AllocationState.UNKNOWN, AllocationState.RELEASED)
"""States of an allocation for which there is no work."""

_log: Final = logging.getLogger(__name__)


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
        self._path: Final = listener.path
        self._backend: Final = backend
        self._observer: Final = observer
        limits = limits or Limits(frozenset({os.geteuid()}))
        self._kernel: Final = ProviderKernel(limits)
        self._events: Final[deque[ProviderInput]] = deque()
        self._asking = 0
        """The connection whose message the present effects follow from; 0 if none."""
        self._lanes: Final[dict[str, Lane]] = {}
        """In whose turn the work for each allocation that has any was done last."""
        self._is_feeding = False
        self._stopping: Final = asyncio.Event()
        self._is_closed = False
        self._has_hung = False
        spans = spans or Spans()
        self._timers: Final = Timers(spans, self._feed)
        self._connections: Final = Connections(
            listener, limits, spans, self._kernel.objection_to, self._feed, self._stopping
        )
        self._watcher: Final = Watcher(
            backend, spans.empty_grace_s, self._kernel.state_of, self._feed, self._stopping
        )
        self._work: Final = BackendWork(backend, spans.image_s, self._report, self._stopping)
        self._performers: Final[dict[type[Effect], Callable[[Any], None]]] = {
            do.StartTimer: self._timers.start,
            do.StopTimer: self._timers.stop,
            do.CreateNamespaces: self._create,
            do.ReleaseNamespaces: self._release,
            do.Watch: self._watcher.watch,
            do.RecordHandoff: self._record_handoff,
            do.HandOver: self._hand_over,
            do.Refuse: self._refuse,
            do.AnnounceEnd: self._announce_end,
            do.CloseConnection: self._close_connection,
        }

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

    def __repr__(self) -> str:
        states, connections = len(self._kernel.states), len(self._connections)
        return f"<Provider on {self._path}: {states} allocations, {connections} connections>"

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
            SocketUnavailable: the threads that work needs cannot be started; everything is closed.
            OSError: the event loop cannot listen to the connections; everything is closed.
            Exception: the backend could not recover; everything is closed.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._work.start()
            self._connections.start()
        except (SocketUnavailable, OSError):
            self._connections.stop_accepting()
            self._connections.close("the provider does not start")
            self._work.close()
            raise
        starting = self._loop.create_task(self._start(on_ready, on_recovered))
        stopping = self._loop.create_task(self._stopping.wait())
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
        self._stopping.set()

    async def _start(
        self,
        on_ready: Callable[[], None] | None,
        on_recovered: Callable[[Iterable[str]], None] | None,
    ) -> None:
        recovery = await self._work.recover()
        if self._stopping.is_set():
            # What was found stays as it is, for the next provider to adopt.
            return
        if on_recovered is not None:
            on_recovered(recovery.remembered)
        self._kernel.remember(recovery.remembered)
        for adoption in recovery.adoptions:
            self._feed(event_of_adoption(adoption))
        self._watcher.start()
        self._feed(on.ProviderReady())
        self._work.tidy_soon()
        if on_ready is not None:
            on_ready()

    async def _wind_up(self, starting: asyncio.Task[None]) -> None:
        # Keeps CRASH-12.
        self.stop()
        # First the path, so that who connects now is refused at once, and the next one can start.
        self._connections.stop_accepting()
        self._feed(on.ProviderStopping())
        # Connections stay open meanwhile: what is under way was asked for on them.
        self._has_hung = not await self._work.finish(starting)
        self._watcher.stop()
        self._connections.close("the provider is shutting down")
        # Last of all, because a connection that is lost can start a timer. What is alive now stays
        # alive, whatever else this loop does.
        self._is_closed = True
        self._timers.close()
        self._watcher.close()
        self._work.close()

    # --- Events in, effects out ----------------------------------------------------------------

    def _feed(self, event: ProviderInput) -> None:
        """Give the kernel an event, and the events that performing its effects brings about."""
        if self._is_closed:
            return
        self._events.append(event)
        # Fed from within an effect, it waits until all effects before it are performed.
        if self._is_feeding:
            return
        self._is_feeding = True
        try:
            while self._events:
                self._turn(self._events.popleft())
        finally:
            self._is_feeding = False

    def _turn(self, event: ProviderInput) -> None:
        effects = self._kernel.receive(event)
        if self._observer is not None:
            self._observer(event, effects)
        self._asking = getattr(event, "connection", 0)
        for effect in effects:
            self._performers[type(effect)](effect)

    def _report(self, event: WorkReport) -> None:
        """Feed the outcome of backend work."""
        self._feed(event)
        name = event.allocation_id
        if self._kernel.state_of(name) in _OVER:
            self._lanes.pop(name, None)
        if isinstance(event, on.NamespacesReleased):
            self._timers.forget(name)
            if self._work.has_images:
                self._work.tidy_soon()

    # --- Effects that concern several parts ------------------------------------------------------

    def _create(self, effect: do.CreateNamespaces) -> None:
        self._work.create(effect, self._lane_of(effect.request.allocation_id))

    def _lane_of(self, name: str) -> Lane:
        """Say in whose turn work for an allocation is: its user's, of the connection that asks."""
        # Another try to release follows from no message: it is in the turn of the first one, lest
        # it waits for those of all others.
        if self._asking or name not in self._lanes:
            self._lanes[name] = (self._kernel.user_of(name), self._asking)
        return self._lanes[name]

    def _release(self, effect: do.ReleaseNamespaces) -> None:
        # Keeps END-14.
        # Before the release is even queued: it may wait for a creation, and the end be announced.
        name = effect.allocation_id
        try:
            self._backend.record_ended(name)
        except Exception:
            # The release is tried all the same, and notes it as well.
            _log.exception("recording the end of %s failed", name)
        self._watcher.forget(name)
        self._work.release(effect, self._lane_of(name))

    def _record_handoff(self, effect: do.RecordHandoff) -> None:
        try:
            self._backend.record_handed_off(effect.allocation_id)
        except Exception:
            # Adopted after a restart, it counts as not handed over yet, which is as good.
            _log.exception("recording the hand-off of %s failed", effect.allocation_id)

    def _hand_over(self, effect: do.HandOver) -> None:
        # Keeps FD-13, END-24.
        connection = self._connections.get(effect.connection)
        if connection is None:
            return
        response, name = effect.response, effect.response.allocation_id
        # Opened for every hand-over anew, when there is room to send them: none is kept here.
        try:
            is_sent = connection.hand_over(response, partial(self._open, response))
        except (NamespaceError, ValueError) as error:
            failure = error if isinstance(error, FdPassing) else _unopened(name, error)
            self._connections.send(effect.connection, failure)
            self._feed(on.ResponseNotSent(name, effect.connection, failure))
            return
        if is_sent:
            self._feed(on.ResponseSent(name, effect.connection))
        else:
            # Its loss is reported only when all it said is read; the release does not wait for it.
            gone = FdPassing("the consumer takes nothing any more")
            self._feed(on.ResponseNotSent(name, effect.connection, gone))

    def _open(self, response: NamespaceResponse, has_waited: bool) -> DescriptorBundle:
        """Open the descriptors of a response, unless its allocation ended while it waited."""
        name = response.allocation_id
        if has_waited and self._kernel.response_of(name) is not response:
            raise CreationFailed("the allocation ended before it could be handed over")
        try:
            return self._backend.bundle_of(name)
        except Exception as error:
            if not isinstance(error, NamespaceError):
                _log.exception("opening %s failed", name)
            raise _unopened(name, error) from error

    def _refuse(self, effect: do.Refuse) -> None:
        self._connections.send(effect.connection, effect.error)

    def _announce_end(self, effect: do.AnnounceEnd) -> None:
        self._connections.send(effect.connection, AllocationEnded(effect.allocation_id))

    def _close_connection(self, effect: do.CloseConnection) -> None:
        connection = self._connections.get(effect.connection)
        if connection is not None:
            connection.close_when_sent()


def _unopened(name: str, error: Exception) -> FdPassing:
    return FdPassing(f"the descriptors of {name} cannot be had: {error}")


def event_of_adoption(adoption: Adoption) -> ProviderInput:
    """Name what it means for a provider that its backend has found an allocation."""
    # Keeps CRASH-2.
    name = adoption.request.allocation_id
    if adoption.state is AllocationState.ENDED or adoption.response is None:
        return on.RemainsFound(name, adoption.request)
    is_handed = adoption.state is AllocationState.HANDED_OFF
    event = on.HandedOffAdopted if is_handed else on.CreatedAdopted
    return event(name, adoption.request, adoption.response)
