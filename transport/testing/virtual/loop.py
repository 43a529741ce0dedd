"""An asyncio event loop on a virtual clock, whose turns a scheduler interleaves with all else.

`VirtualLoop` runs in a virtual thread. After each callback others may go on. Readiness of
descriptors and timers that are due are looked at once in a turn, as a real loop does; which of the
descriptors that are ready is served first is a choice.
"""

from __future__ import annotations

import asyncio
import heapq
import select
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from .world import Ended, VirtualWorld


class Firing(NamedTuple):
    """A callback that is being run; noted before, because one that is cancelled is empty."""

    callback: str
    owner: Any
    """The object whose method it is."""
    arguments: tuple[Any, ...]
    is_timer: bool

    @classmethod
    def of(cls, handle: asyncio.Handle) -> Firing:
        unlisted: Any = handle
        callback = unlisted._callback
        return cls(
            getattr(callback, "__qualname__", type(callback).__name__),
            getattr(callback, "__self__", None),
            unlisted._args or (),
            isinstance(handle, asyncio.TimerHandle),
        )


class VirtualLoop(asyncio.BaseEventLoop):
    """
    An event loop in a virtual world.

    Args:
        world: where it runs.
        name: in the story of a run.
        program: whose threads its executor's are.
    """

    _ready: Any
    _scheduled: Any
    _stopping: bool

    def __init__(self, world: VirtualWorld, name: str, program: object = None) -> None:
        super().__init__()
        self.world = world
        self.firing: Firing | None = None
        """The callback that is being run."""
        self.on_timer: Callable[[asyncio.TimerHandle, float], None] | None = None
        """Told of every timer that is started, and how long it is to run."""
        self.on_fire: Callable[[asyncio.TimerHandle], None] | None = None
        """Told of every timer that has run out, before its callback is run."""
        self.started: dict[int, tuple[asyncio.TimerHandle, float]] = {}
        """Every timer that is neither cancelled nor has been run, and since when it runs."""
        self._name = name
        self._program = program
        self._watched: dict[tuple[int, int], asyncio.Handle] = {}
        self._poll = select.poll()
        self.set_exception_handler(self._note_exception)

    def time(self) -> float:
        return self.world.now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = super().call_at(when, callback, *args, context=context)
        self.started[id(timer)] = (timer, self.world.now)
        if self.on_timer is not None:
            self.on_timer(timer, when - self.world.now)
        return timer

    def timers(self) -> list[tuple[asyncio.TimerHandle, float]]:
        """List the timers that run, each with the time at which it was started."""
        for key in [key for key, (timer, _) in self.started.items() if timer.cancelled()]:
            del self.started[key]
        return list(self.started.values())

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        future: asyncio.Future[Any] = self.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = func(*args)
            except Exception as raised:
                error = raised
            if not self.is_closed():
                self.call_soon_threadsafe(settle, result, error)

        self.world.start(work, f"{self._name}'s executor", self._program)
        return future

    def abandon(self) -> None:
        """Close it as it is; what is left of coroutines is not to be run any more."""
        if self.is_closed():
            return
        self.set_exception_handler(lambda *_: None)
        with warnings.catch_warnings():
            # What they would do at their end is begun, and not awaited.
            warnings.simplefilter("ignore")
            closed: list[Any] = []
            while tasks := [t for t in asyncio.all_tasks(self) if t not in closed]:
                for task in tasks:
                    self._close_task(task)
                closed += tasks
            self._ready.clear()
            self._scheduled.clear()
            self.started.clear()
            self.close()

    def _close_task(self, task: Any) -> None:
        task._log_destroy_pending = False
        with suppress(BaseException):
            task.get_coro().close()

    # Descriptors.

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        self._watch(fd, select.POLLIN, callback, args)

    def add_writer(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        self._watch(fd, select.POLLOUT, callback, args)

    def remove_reader(self, fd: Any) -> bool:
        return self._unwatch(fd, select.POLLIN)

    def remove_writer(self, fd: Any) -> bool:
        return self._unwatch(fd, select.POLLOUT)

    def _watch(self, fd: Any, what: int, callback: Callable[..., Any], args: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        self._unwatch(number, what)
        self._watched[number, what] = asyncio.Handle(callback, args, self)
        self._register(number)

    def _unwatch(self, fd: Any, what: int) -> bool:
        number = fd if isinstance(fd, int) else fd.fileno()
        handle = self._watched.pop((number, what), None)
        if handle is None:
            return False
        handle.cancel()
        self._register(number)
        return True

    def _register(self, number: int) -> None:
        wanted = sum(what for fd, what in self._watched if fd == number)
        if wanted:
            self._poll.register(number, wanted)
        else:
            self._poll.unregister(number)

    def _ready_descriptors(self) -> list[tuple[int, int]]:
        lost = select.POLLHUP | select.POLLERR
        return [
            (fd, what)
            for fd, seen in self._poll.poll(0)
            for what in (select.POLLIN, select.POLLOUT)
            if seen & (what | lost) and (fd, what) in self._watched
        ]

    # Turns.

    def _write_to_self(self) -> None:
        """Nothing to do: whether anything is to be run is looked at whenever it may be."""

    def _has_news(self) -> bool:
        return bool(self._ready or self._stopping or self._ready_descriptors())

    def _next_deadline(self) -> float | None:
        while self._scheduled and self._scheduled[0].cancelled():
            heapq.heappop(self._scheduled)
        return self._scheduled[0].when() if self._scheduled else None

    def _run_once(self) -> None:
        if not self._has_news():
            self.world.switch("", self._has_news, self._next_deadline)
        ready = self._ready_descriptors()
        while ready:
            names = [f"{self._name}: descriptor {fd} first" for fd, _ in ready]
            self._ready.append(self._watched[ready.pop(self.world.choose(*names))])
        while (deadline := self._next_deadline()) is not None and deadline <= self.world.now:
            self._ready.append(heapq.heappop(self._scheduled))
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            if not handle.cancelled():
                self._run_handle(handle)

    def _run_handle(self, handle: asyncio.Handle) -> None:
        self.world.switch(_name_of(handle))
        if handle.cancelled():
            return
        self.firing = Firing.of(handle)
        if isinstance(handle, asyncio.TimerHandle) and self.on_fire is not None:
            self.on_fire(handle)
        self.started.pop(id(handle), None)
        handle._run()
        self.firing = None

    def _note_exception(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Ended):
            return  # it is raised again at the next step
        self.world.fail(error if error is not None else AssertionError(context["message"]))


def _name_of(handle: asyncio.Handle) -> str:
    firing = Firing.of(handle)
    if isinstance(firing.owner, asyncio.Task):
        coroutine: Any = firing.owner.get_coro()
        return f"go on with {coroutine.__qualname__}"
    return firing.callback
