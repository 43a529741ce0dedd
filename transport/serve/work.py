"""Backend work of a provider, in threads: in order for one allocation, shared out by user.

Every thread is started before anything is served, and none afterwards. Work with an image may hang
for as long as a file server likes, so it has threads of its own, of which one image never has more
than one, and a deadline: when that is over, the creation counts as failed, whatever becomes of it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from statemachine import effects as do
from statemachine import events as on
from statemachine.errors import AllocationNotFound, CreationFailed, SocketUnavailable
from statemachine.messages import NamespaceRequest

from ..contract import Backend, Recovery
from .timers import BACKEND_PAUSE_S
from .turns import Lane, Turns

CREATORS_MAX: Final = 2
"""Most allocations without an image that are made at a time: they share a forge, a journal, and one
interpreter, so that more of them would only make each take longer."""

RELEASERS_MAX: Final = 1
"""Most that are released at a time; by a thread of its own, so that no creation waits for it."""

IMAGE_WORKERS_MAX: Final = 4
"""Most pieces of work with an image at a time; of these any may hang."""

THREADS_MAX: Final = CREATORS_MAX + RELEASERS_MAX + IMAGE_WORKERS_MAX
"""How many threads do the backend's work, all of which are started before anything is served."""

STOP_TIMEOUT_S: Final = 1.0
"""How long a provider that shuts down waits for backend work that was asked for."""

HANG_TIMEOUT_S: Final = 0.5
"""How long it waits after that for work that has begun; what takes longer hangs."""

WorkReport: TypeAlias = (
    on.NamespacesCreated | on.NamespacesNotCreated | on.NamespacesReleased | on.ReleaseDelayed
)
"""What becomes of a piece of work for an allocation."""

_NO_LANE: Final[Lane] = (None, 0)

_log: Final = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """One piece of work."""

    lane: Lane
    """In whose turn it is done."""
    workers: Workers
    """Which threads do it."""
    do: Callable[[], Any]
    """Does it, in a thread."""
    done: Callable[[_Job, Any, Exception | None], None]
    """Takes what it returned or raised, in the event loop's thread."""
    image: str | None = None
    """The image that it uses."""
    deadline: asyncio.TimerHandle | None = None
    """When it counts as failed."""
    is_given_up: bool = False
    """Whether it has been reported as failed though it may still go on."""


class Workers:
    """
    Threads that do jobs, in turns; jobs with the same image one at a time.

    Args:
        count: how many threads.
        name: begins the threads' names.
    """

    def __init__(self, count: int, name: str) -> None:
        self._turns: Final[Turns[_Job]] = Turns()
        self._changed: Final = threading.Condition()
        self._is_closed = False
        self._images: Final[set[str]] = set()
        """Those that some thread uses now."""
        self._busy: Final[set[threading.Thread]] = set()
        # Daemons: what hangs must not keep the program from ending.
        self._threads: Final = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]

    @property
    def is_idle(self) -> bool:
        """Whether no job is being done, and none waits."""
        with self._changed:
            return not self._busy and not self._turns

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """
        Start the threads; what is done is reported to the loop.

        Raises:
            RuntimeError: one cannot be started.
        """
        self._loop = loop
        for thread in self._threads:
            thread.start()

    def put(self, job: _Job) -> None:
        """Have a job done when it is its turn."""
        with self._changed:
            self._turns.put(job.lane, job)
            self._changed.notify()

    def withdraw(self, job: _Job) -> bool:
        """Take back a job; say whether it had not begun."""
        with self._changed:
            return self._turns.remove(job.lane, job)

    def clear(self) -> None:
        """Take back all jobs that have not begun."""
        with self._changed:
            self._turns.clear()

    def close(self) -> None:
        """End the threads; one that hangs ends when it can."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            idle = [x for x in self._threads if x not in self._busy and x.ident is not None]
        for thread in idle:
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            result, error = None, None
            try:
                result = job.do()
            except Exception as raised:
                error = raised
            self._finish(job)
            # The loop may be closed already, if this has hung.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(job.done, job, result, error)

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._is_closed:
                job = self._turns.take(lambda job: job.image not in self._images)
                if job is not None:
                    self._busy.add(threading.current_thread())
                    if job.image is not None:
                        self._images.add(job.image)
                    return job
                self._changed.wait()
        return None

    def _finish(self, job: _Job) -> None:
        with self._changed:
            self._busy.discard(threading.current_thread())
            if job.image is not None:
                self._images.discard(job.image)
                # Another thread may have left a job alone for this image's sake.
                self._changed.notify_all()


class BackendWork:
    """
    What a backend does that takes time.

    Args:
        backend: does it.
        image_s: how long a creation with an image may take, in seconds.
        report: takes the event that is the outcome, in the event loop's thread.
        stopping: set when no more tidying up is wanted.
    """

    def __init__(
        self,
        backend: Backend,
        image_s: float,
        report: Callable[[WorkReport], None],
        stopping: asyncio.Event,
    ) -> None:
        self._backend: Final = backend
        self._image_s: Final = image_s
        self._report: Final = report
        self._stopping: Final = stopping
        self._creators: Final = Workers(CREATORS_MAX, "backend-create")
        self._releasers: Final = Workers(RELEASERS_MAX, "backend-release")
        self._image_workers: Final = Workers(IMAGE_WORKERS_MAX, "backend-image")
        self._all_workers: Final = (self._creators, self._releasers, self._image_workers)
        self._queues: Final[dict[str, deque[_Job]]] = {}
        """Of each allocation that has any, its work in order; the first is under way."""
        self.has_images = False
        """Whether any work had to do with an image: if not, there is nothing to tidy up."""
        self._is_over = False
        self._is_tidying = False
        self._is_untidy = False
        self._tidy_timer: asyncio.TimerHandle | None = None
        self._moved: Final = asyncio.Event()
        """Set when some work is done."""

    def start(self) -> None:
        """
        Start the threads, all that there will ever be.

        Raises:
            SocketUnavailable: they cannot be started; `close` ends those that were.
        """
        # Keeps PEER-17.
        try:
            for workers in self._all_workers:
                workers.start(asyncio.get_running_loop())
        except RuntimeError as error:
            raise SocketUnavailable(
                f"the provider needs {THREADS_MAX} threads, and not all of "
                f"them can be started ({error}): pids.max of its cgroup, or RLIMIT_NPROC"
            ) from error

    async def recover(self) -> Recovery:
        """Find what an earlier provider left; as `Backend.recover`."""
        found: asyncio.Future[Recovery] = asyncio.get_running_loop().create_future()

        def done(_: _Job, recovery: Recovery, error: Exception | None) -> None:
            if found.cancelled():
                return
            if error is None:
                self.has_images = any(x.request.uenv_image for x in recovery.adoptions)
                found.set_result(recovery)
            else:
                found.set_exception(error)

        self._creators.put(_Job(_NO_LANE, self._creators, self._backend.recover, done))
        return await found

    def create(self, effect: do.CreateNamespaces, lane: Lane) -> None:
        """Make an allocation's namespaces, after the work that it already has."""
        # Keeps PEER-16.
        request = effect.request
        image = request.uenv_image
        workers = self._creators if image is None else self._image_workers
        work = partial(try_to_create, self._backend, effect)
        job = _Job(lane, workers, work, self._done, image)
        if image is not None:
            self.has_images = True
            loop = asyncio.get_running_loop()
            job.deadline = loop.call_later(self._image_s, self._give_up, job, request)
        self._add(request.allocation_id, job)

    def release(self, effect: do.ReleaseNamespaces, lane: Lane) -> None:
        """Try once to release an allocation, after the work that it already has."""
        work = partial(try_to_release, self._backend, effect)
        self._add(effect.allocation_id, _Job(lane, self._releasers, work, self._done))

    def tidy_soon(self) -> None:
        """Have the backend tidy up now, and from now on whenever something is due."""
        if self._stopping.is_set():
            return
        if self._is_tidying:
            self._is_untidy = True
            return
        self._stop_tidy_timer()
        self._is_tidying = True
        # Dropping an image can hang as well as mounting it.
        self._image_workers.put(
            _Job(_NO_LANE, self._image_workers, self._backend.tidy, self._tidied)
        )

    async def finish(self, starting: asyncio.Task[None]) -> bool:
        """
        Let work finish, and what follows from it, for `STOP_TIMEOUT_S` at most.

        What has not begun by then is not done: its intent is in the journal, if it got so far.

        Args:
            starting: to be waited for as well.

        Returns:
            Whether nothing is under way any more.
        """
        starting.add_done_callback(lambda _: self._moved.set())
        if await self._wait(lambda: starting.done() and self._is_idle, STOP_TIMEOUT_S):
            return True
        self._is_over = True
        starting.cancel()
        for workers in self._all_workers:
            workers.clear()
        return await self._wait(self._are_workers_idle, HANG_TIMEOUT_S)

    def close(self) -> None:
        """Take no more work, and do not wait for what hangs."""
        self._is_over = True
        self._stop_tidy_timer()
        for queue in self._queues.values():
            for job in queue:
                if job.deadline is not None:
                    job.deadline.cancel()
        for workers in self._all_workers:
            workers.close()

    @property
    def _is_idle(self) -> bool:
        return not self._queues and not self._is_tidying

    def _are_workers_idle(self) -> bool:
        return all(workers.is_idle for workers in self._all_workers)

    async def _wait(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_done():
                    self._moved.clear()
                    await self._moved.wait()
        return is_done()

    # One piece after the other, for each allocation.

    def _add(self, name: str, job: _Job) -> None:
        # Keeps END-9.
        # Jobs wait for one another, not threads: a thread that waits is a worker less for others.
        queue = self._queues.setdefault(name, deque())
        queue.append(job)
        if queue[0] is job:
            self._begin(job)

    def _begin(self, job: _Job) -> None:
        if not self._is_over:
            job.workers.put(job)

    def _done(self, job: _Job, event: Any, _: Exception | None) -> None:
        if job.deadline is not None:
            job.deadline.cancel()
        if not job.is_given_up:
            self._report(event)
        self._leave(event.allocation_id, job)

    def _leave(self, name: str, job: _Job) -> None:
        queue = self._queues[name]
        was_first = queue[0] is job
        queue.remove(job)
        if not queue:
            del self._queues[name]
        elif was_first:
            self._begin(queue[0])
        self._moved.set()

    def _give_up(self, job: _Job, request: NamespaceRequest) -> None:
        """Report a creation as failed that takes too long; one that has begun goes on."""
        name, queue = request.allocation_id, self._queues[request.allocation_id]
        job.is_given_up = True
        span = f"{request.uenv_image!a} within {self._image_s:g} s"
        if job.workers.withdraw(job) or queue[0] is not job:
            reason = f"there was no turn for {span}: images that hang are before it"
            self._leave(name, job)
        else:
            reason = f"it was not made with {span}: the image hangs, and is left to the kernel"
        self._report(on.NamespacesNotCreated(name, CreationFailed(reason)))

    # Tidying up.

    def _tidied(self, _: _Job, due_s: float | None, error: Exception | None) -> None:
        self._is_tidying = False
        self._moved.set()
        if error is not None:
            _log.error("tidying up failed", exc_info=error)
            due_s = BACKEND_PAUSE_S
        if self._is_untidy:
            self._is_untidy = False
            self.tidy_soon()
        elif due_s is not None and not self._stopping.is_set():
            loop = asyncio.get_running_loop()
            self._tidy_timer = loop.call_later(due_s, self.tidy_soon)

    def _stop_tidy_timer(self) -> None:
        if self._tidy_timer is not None:
            self._tidy_timer.cancel()
            self._tidy_timer = None


def try_to_create(backend: Backend, effect: do.CreateNamespaces) -> WorkReport:
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


def try_to_release(backend: Backend, effect: do.ReleaseNamespaces) -> WorkReport:
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
