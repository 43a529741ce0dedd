"""Choices of a scheduler: all of them within bounds, random ones, and one shrunk to a command line.

A run is a function that asks a `Scheduler` wherever more than one thing can happen next. Option 0
is always what happens by default; a script names the few places where something else is chosen, so
that it replays the run. Its text is `place:option` for each of them, as in `12:2 40:1`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from statemachine.errors import Copyable

ChoiceScript: TypeAlias = tuple[tuple[int, int], ...]
"""Place and option of every choice that is not the default, in order."""


class Scheduler:
    """
    Says what happens next.

    Args:
        script: the choices that are not the default.
        rng: chooses beyond the script; None takes the default.
        rate: how often what it chooses is not the default.
    """

    def __init__(
        self, script: ChoiceScript = (), rng: random.Random | None = None, rate: float = 0.1
    ) -> None:
        self._script: Final[Mapping[int, int]] = dict(script)
        self._rng = rng
        self._rate = rate
        self.widths: Final[list[int]] = []
        """Of every choice so far, how many options there were."""
        self.taken: Final[list[tuple[int, int]]] = []
        """Those that were not the default; a script of this run."""

    def choose(self, count: int) -> int:
        """Choose one of so many options; a single one is no choice."""
        if count < 2:
            return 0
        place = len(self.widths)
        self.widths.append(count)
        option = self._script.get(place, 0)
        if self._rng is not None and self._rng.random() < self._rate:
            option = self._rng.randrange(1, count)
        if option >= count:
            option = 0
        if option:
            self.taken.append((place, option))
        return option

    @property
    def script(self) -> ChoiceScript:
        return tuple(self.taken)


Run: TypeAlias = Callable[[Scheduler], object]
"""Runs once, as a scheduler says; raises what it finds."""


class Explored(NamedTuple):
    """How much was run."""

    runs: int
    choices: int
    is_complete: bool
    """Whether everything within the bounds was run."""


class BrokenRun(Copyable, AssertionError):
    """A run that found something, shrunk."""

    def __init__(self, script: ChoiceScript, finding: BaseException, replay: str) -> None:
        self.script = script
        self.finding = finding
        self.replay = replay
        super().__init__(f"{finding}\nAgain: {replay}")


def written(script: ChoiceScript) -> str:
    return " ".join(f"{place}:{option}" for place, option in script)


def read(words: Sequence[str]) -> ChoiceScript:
    pairs = (word.split(":") for word in words)
    return tuple((int(place), int(option)) for place, option in pairs)


def explore(
    run: Run,
    deviations: int,
    depth: int,
    runs_max: int | None = None,
    replay: Callable[[ChoiceScript], str] = written,
) -> Explored:
    """
    Run every script with so many choices other than the default, the fewest first.

    Args:
        run: what is run.
        deviations: most choices of a script: a bound on preemptions.
        depth: the first so many places are those that are chosen at.
        runs_max: stop after so many.
        replay: says how a script is run again.

    Raises:
        BrokenRun: one found something.
    """
    runs = choices = 0
    for script in _scripts(deviations, depth):
        if runs == runs_max:
            return Explored(runs, choices, is_complete=False)
        scheduler = Scheduler(script.choices)
        finding = _finding(run, scheduler)
        if finding is not None:
            raise _shrunk(run, scheduler.script, finding, replay)
        script.widths = scheduler.widths
        runs, choices = runs + 1, choices + len(scheduler.widths)
    return Explored(runs, choices, is_complete=True)


class _Scripted:
    """A script, and after its run the widths of its choices."""

    def __init__(self, choices: ChoiceScript) -> None:
        self.choices = choices
        self.widths: list[int] = []


def _scripts(deviations: int, depth: int) -> Iterator[_Scripted]:
    root = _Scripted(())
    yield root
    level = [root]
    for left in range(deviations, 0, -1):
        grown: list[_Scripted] = []
        for parent in level:
            first = parent.choices[-1][0] + 1 if parent.choices else 0
            widths, parent.widths = parent.widths[:depth], []
            for place in range(first, len(widths)):
                for option in range(1, widths[place]):
                    child = _Scripted((*parent.choices, (place, option)))
                    yield child
                    if left > 1:
                        grown.append(child)
        level = grown


def sample(
    run: Run,
    seeds: range,
    rates: Sequence[float] = (0.02, 0.1, 0.3),
    replay: Callable[[ChoiceScript], str] = written,
) -> Explored:
    """
    Run with choices at random, once for each seed.

    Raises:
        BrokenRun: one found something.
    """
    choices = 0
    for seed in seeds:
        scheduler = Scheduler((), random.Random(seed), rates[seed % len(rates)])
        finding = _finding(run, scheduler)
        if finding is not None:
            raise _shrunk(run, scheduler.script, finding, replay)
        choices += len(scheduler.widths)
    return Explored(len(seeds), choices, is_complete=True)


def _finding(run: Run, scheduler: Scheduler) -> Exception | None:
    try:
        run(scheduler)
    except Exception as error:
        return error
    return None


def _shrunk(
    run: Run, script: ChoiceScript, finding: BaseException, replay: Callable[[ChoiceScript], str]
) -> BrokenRun:
    """Leave out choices, and lower the others, as long as something is found."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(script):
            scheduler = Scheduler(smaller)
            found = _finding(run, scheduler)
            if found is not None:
                script, finding, is_smaller = scheduler.script, found, True
                break
    return BrokenRun(script, finding, replay(script))


def _smaller(script: ChoiceScript) -> Iterator[ChoiceScript]:
    size = len(script)
    while size:
        for start in range(0, len(script), size):
            yield script[:start] + script[start + size :]
        size //= 2
    for index, (place, option) in enumerate(script):
        for lower in range(1, option):
            yield (*script[:index], (place, lower), *script[index + 1 :])
