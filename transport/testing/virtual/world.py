"""A world in which only one thing happens at a time, and a scheduler says which.

`VirtualWorld` runs virtual threads, which are real ones of which only one has the baton, and
actors, whose steps are taken in between. Where a thread calls `switch`, any other may go on; time
passes when nothing else is left to do, or when the scheduler says so.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final, TypeAlias

from .choices import Scheduler

STEPS_MAX: Final = 20_000
"""How many steps a run may take: with more, something spins."""


class Ended(BaseException):
    """A virtual thread is ended where it stands."""


class Stuck(AssertionError):
    """Nothing is left that could happen, and the run is not over."""


class VirtualThread:
    """A thread that runs only while it has the baton."""

    def __init__(
        self, world: VirtualWorld, body: Callable[[], object], name: str, program: object = None
    ) -> None:
        self.name = name
        self.program = program
        self.wants: Callable[[], bool] | None = None
        """What it waits for; None if it can go on."""
        self.deadline: Callable[[], float | None] | None = None
        """Until when it waits."""
        self.is_done = False
        self.is_ended = False
        """Whether it is to raise `Ended` as soon as it has the baton."""
        self.baton = threading.Lock()
        self.baton.acquire()
        self._world = world
        self._body = body
        self._thread: threading.Thread | None = None

    def is_runnable(self, now: float) -> bool:
        if self.is_done:
            return False
        if self.wants is None or self.wants():
            return True
        deadline = self.deadline() if self.deadline is not None else None
        return deadline is not None and deadline <= now

    def hand(self) -> None:
        """Give it the baton."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
            self._thread.start()
        self.baton.release()

    @property
    def has_begun(self) -> bool:
        return self._thread is not None

    def join(self) -> None:
        """Wait for the real thread, which has no more to do."""
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        self.baton.acquire()
        try:
            if not self.is_ended:
                self._body()
        except Ended as ended:
            with warnings.catch_warnings():
                # What it had in hand goes with it, as when a program is killed.
                warnings.simplefilter("ignore", ResourceWarning)
                ended.__context__ = ended.__traceback__ = None
        except BaseException as error:
            self._world.fail(error)
        self.is_done = True
        self._world.leave(self)


ActorSteps: TypeAlias = Generator[Callable[[], bool] | None, None, None]
"""Steps of an actor; yields what the next step waits for, None if for nothing."""


class Actor:
    """
    What does something between the steps of threads: a peer, a node, an operator.

    Args:
        name: of the actor.
        steps: its steps.
        is_optional: whether it may also do nothing at all; it never acts by default.
    """

    def __init__(self, name: str, steps: ActorSteps, *, is_optional: bool = False) -> None:
        self.name = name
        self.is_optional = is_optional
        self.is_done = False
        self._steps = steps
        self._wants: Callable[[], bool] | None = None
        self._has_begun = False

    def is_ready(self) -> bool:
        return not self.is_done and (self._wants is None or self._wants())

    def step(self) -> None:
        try:
            self._wants = next(self._steps)
        except StopIteration:
            self.is_done = True


class VirtualWorld:
    """
    Threads, actors and a clock, in steps.

    Args:
        scheduler: says what is next.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.now = 1000.0
        self.story: Final[list[str]] = []
        """What has happened, a line for each step."""
        self.threads: Final[list[VirtualThread]] = []
        self.actors: Final[list[Actor]] = []
        self.after_step: Final[list[Callable[[], None]]] = []
        """Called after every step; raise what they find."""
        self.at_rest: Final[list[Callable[[], None]]] = []
        """Called when only time can bring anything about; raise what they find."""
        self.urgent: Final[deque[Callable[[], None]]] = deque()
        """What is done as soon as no thread is left that is to be ended."""
        self.alarms: Final[list[float]] = []
        """Times that actors wait for."""
        self.is_choosing = True
        """Whether the scheduler is asked; what goes before and after is always as by default."""
        self.failure: BaseException | None = None
        self.running: VirtualThread | None = None
        self._scheduler = scheduler
        self._current: VirtualThread | Actor | None = None
        self._is_over: Callable[[], bool] = lambda: True
        self._root = threading.Lock()
        self._root.acquire()
        self._steps = 0
        self._is_ending = False

    # --- For the run -----------------------------------------------------------------------------

    def start(self, body: Callable[[], object], name: str, program: object = None) -> VirtualThread:
        """Have a thread run, in steps."""
        thread = VirtualThread(self, body, name, program)
        self.threads.append(thread)
        return thread

    def add(self, actor: Actor) -> Actor:
        """Have an actor act."""
        self.actors.append(actor)
        return actor

    def run(self, is_over: Callable[[], bool]) -> None:
        """
        Take steps until the run is over.

        Raises:
            BaseException: what was found.
        """
        self._is_over = is_over
        chosen = self._pick()
        if chosen is not None:
            self._give(chosen)
            self._root.acquire()
        self.running = None
        if self.failure is not None:
            raise self.failure

    def end(self) -> None:
        """End all threads, where they stand."""
        self._is_ending = True
        for thread in self.threads:
            thread.is_ended = True
            thread.is_done |= not thread.has_begun
        while (thread_ := self._to_be_ended()) is not None:
            self._give(thread_)
            self._root.acquire()
        self.running = None
        while self.urgent:
            self.urgent.popleft()()
        for thread in self.threads:
            thread.join()

    def is_able(self, program: object) -> bool:
        """Say whether a program can go on before time passes."""
        return any(t.program is program and t.is_runnable(self.now) for t in self.threads)

    def is_anything_able(self) -> bool:
        """Say whether anything can happen before time passes."""
        return any(not getattr(each, "is_optional", False) for each in self._able())

    def fail(self, error: BaseException) -> None:
        """Note what was found; the run ends."""
        if self.failure is None:
            self.failure = error

    def end_program(self, program: object) -> None:
        """End the threads of a program, where they stand, before anything else happens."""
        for thread in self.threads:
            if thread.program is program:
                thread.is_ended = True

    # --- For threads -----------------------------------------------------------------------------

    def switch(
        self,
        doing: str = "",
        wants: Callable[[], bool] | None = None,
        deadline: Callable[[], float | None] | None = None,
    ) -> None:
        """
        Let others go on, and return when it is this thread's turn.

        Args:
            doing: what is done next.
            wants: what is waited for; None for nothing.
            deadline: until when.
        """
        thread = self.running
        if thread is None:
            return  # the run has not begun, or is over
        if thread.is_ended:
            raise Ended
        thread.wants, thread.deadline = wants, deadline
        self._check()
        chosen = self._pick()
        if chosen is not thread:
            self._give(chosen)
            thread.baton.acquire()
        if thread.is_ended:
            raise Ended
        thread.wants = thread.deadline = None
        if doing:
            self.story.append(f"{thread.name}: {doing}")

    def leave(self, thread: VirtualThread) -> None:
        """Go on without a thread that has come to its end."""
        self._check()
        self._give(self._to_be_ended() if self._is_ending else self._pick())

    def choose(self, *options: str) -> int:
        """Choose one of several ways in which a step can go; the first is the usual one."""
        index = self._choose(len(options))
        if index:
            self.story.append(f"    {options[index]}")
        return index

    # --- What is next ----------------------------------------------------------------------------

    def _give(self, chosen: VirtualThread | None) -> None:
        self.running = chosen
        if chosen is None:
            self._root.release()
        else:
            chosen.hand()

    def _to_be_ended(self) -> VirtualThread | None:
        return next((t for t in self.threads if t.is_ended and not t.is_done), None)

    def _check(self) -> None:
        for check in self.after_step:
            self._try(check)

    def _try(self, what: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                what()
            except Exception as error:
                self.fail(error)

    def _pick(self) -> VirtualThread | None:
        """Let actors act and time pass until a thread is to go on; None when the run is over."""
        while True:
            if (ended := self._to_be_ended()) is not None:
                return ended
            if self.urgent:
                self._try(self.urgent.popleft())
                continue
            if self.failure is not None or self._is_over():
                return None
            chosen = self._choose_next()
            if isinstance(chosen, VirtualThread):
                return chosen
            if isinstance(chosen, Actor):
                self.story.append(chosen.name)
                self._try(chosen.step)
                self._check()

    def _choose_next(self) -> VirtualThread | Actor | None:
        self._steps += 1
        if self._steps > STEPS_MAX:
            self.fail(Stuck(f"more than {STEPS_MAX} steps: something spins"))
            return None
        able = self._able()
        options: list[Any] = [each for each in able if not getattr(each, "is_optional", False)]
        if not options:
            for check in self.at_rest:
                self._try(check)
            if self.failure is not None:
                return None
        deadline = self._next_deadline()
        if deadline is not None:
            options.append(deadline)
        if not options:
            self.fail(Stuck("nothing is left that could happen"))
            return None
        options += [each for each in able if each not in options]
        chosen = options[self._choose(len(options))]
        if isinstance(chosen, float):
            self.story.append(f"time passes: {chosen - self.now:g} s")
            self.now = chosen
            return None
        self._current = chosen
        return chosen  # type: ignore[no-any-return]

    def _choose(self, count: int) -> int:
        return self._scheduler.choose(count) if self.is_choosing else 0

    def _able(self) -> list[VirtualThread | Actor]:
        """List who can go on: who did last, and then the others in order."""
        able: list[VirtualThread | Actor] = [t for t in self.threads if t.is_runnable(self.now)]
        able += [actor for actor in self.actors if actor.is_ready()]
        if self._current in able:
            able.remove(self._current)
            able.insert(0, self._current)
        return able

    def _next_deadline(self) -> float | None:
        ends = [t.deadline() for t in self.threads if not t.is_done and t.deadline is not None]
        later = [end for end in (*ends, *self.alarms) if end is not None and end > self.now]
        return min(later, default=None)
