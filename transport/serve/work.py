"""Backend work of a provider, in threads: in order for one allocation, side by side for others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from statemachine import effects as do
from statemachine import events as on
from statemachine.errors import AllocationNotFound, CreationFailed
from statemachine.events import ProviderInput

from ..contract import Backend, Recovery
from .timers import BACKEND_PAUSE_S

WORKERS_MAX: Final = 8
"""Most pieces of backend work at a time: more than cores, because images may be slow to mount."""

STOP_TIMEOUT_S: Final = 5.0
"""How long a provider that shuts down waits for backend work that is under way."""

_log: Final = logging.getLogger(__name__)


class BackendWork:
    """
    What a backend does that takes time.

    Args:
        backend: does it.
        report: takes the event that is the outcome, in the event loop's thread.
        stopping: set when no more tidying up is wanted.
    """

    def __init__(
        self, backend: Backend, report: Callable[[ProviderInput], None], stopping: asyncio.Event
    ) -> None:
        self._backend: Final = backend
        self._report: Final = report
        self._stopping: Final = stopping
        # Not the loop's own: what hangs must keep neither others nor the end of the loop waiting.
        self._pool = ThreadPoolExecutor(WORKERS_MAX, thread_name_prefix="backend")
        self._last: Final[dict[str, asyncio.Task[None]]] = {}
        """The last piece of each allocation that has any; it waits for those before it."""
        self._tidying: asyncio.Task[None] | None = None
        self._untidy: Final = asyncio.Event()

    async def recover(self) -> Recovery:
        """Find what an earlier provider left; as `Backend.recover`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._backend.recover)

    def create(self, effect: do.CreateNamespaces) -> None:
        """Make an allocation's namespaces, after the work that it already has."""
        name = effect.request.allocation_id
        self._add(name, lambda: try_to_create(self._backend, effect))

    def release(self, effect: do.ReleaseNamespaces) -> None:
        """Try once to release an allocation, after the work that it already has."""
        name = effect.allocation_id
        self._add(name, lambda: try_to_release(self._backend, effect))

    def keep_tidy(self) -> None:
        """Have the backend tidy up from now on, whenever something is due."""
        self._tidying = asyncio.get_running_loop().create_task(self._keep_tidy())

    def tidy_soon(self) -> None:
        """Have the backend look now whether something is due."""
        self._untidy.set()

    async def finish(self, starting: asyncio.Task[None]) -> set[asyncio.Task[None]]:
        """
        Let work finish, and what follows from it, for `STOP_TIMEOUT_S` at most.

        Args:
            starting: to be waited for as well.

        Returns:
            What has not finished in time; to be given to `abandon`.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + STOP_TIMEOUT_S
        left = {starting, *([self._tidying] if self._tidying else [])}
        # Work that ends can bring about more: a release after a creation, say.
        while left := {task for task in (*left, *self._last.values()) if not task.done()}:
            timeout_s = deadline - clock()
            if timeout_s <= 0:
                break
            await asyncio.wait(left, timeout=timeout_s)
        return left

    def abandon(self, left: set[asyncio.Task[None]]) -> None:
        """Take no more work, and do not wait for what hangs: its intent is in the journal."""
        for task in left:
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _add(self, name: str, job: Callable[[], ProviderInput]) -> None:
        # Keeps END-9.
        # Tasks wait for one another, not threads: a thread that waits is a worker less for others.
        work = self._do(name, self._last.get(name), job)
        self._last[name] = asyncio.get_running_loop().create_task(work)

    async def _do(
        self, name: str, before: asyncio.Task[None] | None, job: Callable[[], ProviderInput]
    ) -> None:
        if before is not None:
            await asyncio.wait({before})
        event = await asyncio.get_running_loop().run_in_executor(self._pool, job)
        # Unless more was added meanwhile, which waits for this very task.
        if self._last.get(name) is asyncio.current_task():
            del self._last[name]
        self._report(event)

    async def _keep_tidy(self) -> None:
        while not self._stopping.is_set():
            self._untidy.clear()
            loop = asyncio.get_running_loop()
            due_s = await loop.run_in_executor(self._pool, _try_to_tidy, self._backend)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._untidy.wait(), due_s)


def try_to_create(backend: Backend, effect: do.CreateNamespaces) -> ProviderInput:
    """Have a backend make namespaces; whatever it raises becomes an event."""
    # Keeps ERR-7.
    name = effect.request.allocation_id
    try:
        return on.NamespacesCreated(name, backend.create_namespaces(effect.request))
    except CreationFailed as error:
        return on.NamespacesNotCreated(name, error)
    except Exception as error:
        # A bug of the backend costs this allocation, not the provider.
        _log.exception("creating %s failed", name)
        return on.NamespacesNotCreated(name, CreationFailed(f"{type(error).__name__}: {error}"))


def try_to_release(backend: Backend, effect: do.ReleaseNamespaces) -> ProviderInput:
    """Have a backend try to release an allocation; whatever it raises becomes an event."""
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
