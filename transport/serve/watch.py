"""Observations of a provider's backend: what it sees of living allocations becomes events.

An empty cgroup is the end of an allocation only if it was used, and stays empty for the grace.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from statemachine import effects as do
from statemachine import events as on
from statemachine.events import ProviderInput
from statemachine.states import AllocationState

from ..contract import Backend, Sighting
from .timers import BACKEND_PAUSE_S

LOOK_AGAIN_S: Final = 0.05
"""When to look again at a cgroup that changed and does not prove its use: some scheduler ticks."""

OBSERVED_STATES: Final = frozenset(
    {AllocationState.CREATED, AllocationState.HANDED_OFF, AllocationState.ENDED}
)
"""States of an allocation in which a sighting means something."""

_log: Final = logging.getLogger(__name__)


class Watcher:
    """
    Watches the living allocations of a provider.

    Args:
        backend: sees them.
        empty_grace_s: how long a used cgroup must stay empty to count as ended.
        state_of: says how an allocation stands.
        feed: takes the events.
        stopping: set when watching is not to be taken up again after a failure.
    """

    def __init__(
        self,
        backend: Backend,
        empty_grace_s: float,
        state_of: Callable[[str], AllocationState],
        feed: Callable[[ProviderInput], None],
        stopping: asyncio.Event,
    ) -> None:
        self._backend: Final = backend
        self._empty_grace_s: Final = empty_grace_s
        self._state_of: Final = state_of
        self._feed: Final = feed
        self._stopping: Final = stopping
        self._graces: Final[dict[str, asyncio.TimerHandle]] = {}
        self._is_closed = False

    def start(self) -> None:
        """Observe whenever the backend has something to say."""
        asyncio.get_running_loop().add_reader(self._backend.fileno(), self.observe)

    def watch(self, effect: do.Watch) -> None:
        """Begin to observe an allocation; one that cannot be observed is ended."""
        loop = asyncio.get_running_loop()
        try:
            self._backend.watch(effect.allocation_id)
        except Exception:
            # Unwatched it would never end. So it ends now.
            _log.exception("watching %s failed", effect.allocation_id)
            loop.call_soon(self._give_up, effect.allocation_id)
            return
        # What is so already has made nothing readable that the loop would wake for.
        loop.call_soon(self.observe)

    def observe(self) -> None:
        """Take in what the backend has seen."""
        if self._is_closed:
            return
        try:
            observations = self._backend.observe()
        except Exception:
            # It may stay readable for ever: without a pause, this would spin.
            _log.exception("observing failed")
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._backend.fileno())
            loop.call_later(BACKEND_PAUSE_S, self._resume_observing)
            return
        for observation in observations:
            # One sighting can end the allocation that the next is of.
            if self._is_observed(observation.allocation_id):
                _SIGHTINGS[observation.sighting](self, observation.allocation_id)

    def forget(self, name: str) -> None:
        """Stop the grace of an allocation, if one runs."""
        handle = self._graces.pop(name, None)
        if handle is not None:
            handle.cancel()

    def stop(self) -> None:
        """Observe nothing new; what was begun (a grace, a second look) goes on until `close`."""
        asyncio.get_running_loop().remove_reader(self._backend.fileno())

    def close(self) -> None:
        """Feed nothing more."""
        self._is_closed = True
        for handle in self._graces.values():
            handle.cancel()

    def _resume_observing(self) -> None:
        if self._stopping.is_set():
            return
        try:
            self.start()
        except OSError:
            _log.exception("listening to the backend failed")
            asyncio.get_running_loop().call_later(BACKEND_PAUSE_S, self._resume_observing)

    def _give_up(self, name: str) -> None:
        if self._is_observed(name):
            self._feed(on.ReleaseRequested(name))

    def _is_observed(self, name: str) -> bool:
        return self._state_of(name) in OBSERVED_STATES

    def _see_populated(self, name: str) -> None:
        self.forget(name)
        self._feed(on.ScopePopulated(name))

    def _see_changed(self, name: str) -> None:
        asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look_again, name)

    def _see_init_died(self, name: str) -> None:
        self._feed(on.InitDied(name))

    def _look_again(self, name: str) -> None:
        if name not in self._graces and self._is_over(name):
            self._start_grace(name)

    def _is_over(self, name: str) -> bool:
        if self._is_closed or not self._is_observed(name):
            return False
        try:
            return self._backend.is_over(name)
        except Exception:
            _log.exception("looking at %s failed", name)
            asyncio.get_running_loop().call_later(BACKEND_PAUSE_S, self._look_again, name)
            return False

    def _start_grace(self, name: str) -> None:
        self.forget(name)
        if self._empty_grace_s <= 0:
            self._end_grace(name)
        else:
            loop = asyncio.get_running_loop()
            self._graces[name] = loop.call_later(self._empty_grace_s, self._end_grace, name)

    def _end_grace(self, name: str) -> None:
        # Keeps END-4, END-7.
        # Read again: the sighting may be old, and a process may have come since.
        self._graces.pop(name, None)
        if self._is_over(name):
            self._feed(on.ScopeEmptied(name))


_SIGHTINGS: Final[dict[Sighting, Callable[[Watcher, str], None]]] = {
    Sighting.POPULATED: Watcher._see_populated,
    Sighting.EMPTIED: Watcher._start_grace,
    Sighting.CHANGED: Watcher._see_changed,
    Sighting.INIT_DIED: Watcher._see_init_died,
}
