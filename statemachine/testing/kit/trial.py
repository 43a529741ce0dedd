"""Every event in every snapshot of a kernel, the nearest first, and a tour of the rows."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from ...errors import ProtocolError
from ...events import Event
from ...table import Table
from .homes import RowKey, TableHomes, all_rows, row_key
from .reached import Reached, ViolatingPath
from .reference import Difference, Receiver, Reference, identity_of

K = TypeVar("K", bound=Receiver)


class Exploration:
    """What was found of a kernel: how much there is, and a script to each row of its tables."""

    def __init__(self) -> None:
        self.steps = 0
        """How many events were put to it, those that it refused included."""
        self.refused = 0
        """How many it refused, and did not change by them."""
        self.is_complete = True
        """False: `snapshots_max` was reached first; what was found so far was gone through."""
        self.reached: Reached[Any, Event] = Reached()
        """Snapshots, each with the model's state, and the events between them."""
        self.rows_to: list[frozenset[RowKey]] = []
        """By number of what is reached, the rows that the event took which first led there."""
        self._first: dict[RowKey, tuple[int, Event, frozenset[RowKey]]] = {}

    @property
    def snapshots(self) -> int:
        """How many distinct snapshots there are; with a reference, each with its state."""
        return len(self.reached)

    @property
    def rows(self) -> set[RowKey]:
        """Every row that was taken."""
        return set(self._first)

    def missing(self, *tables: Table) -> list[RowKey]:
        """List the rows of tables that were never taken."""
        return sorted(all_rows(*tables) - self.rows)

    def script_to(self, row: RowKey) -> tuple[Event, ...]:
        """Return a shortest script that takes a row, with its last event."""
        number, event, _ = self._first[row]
        return (*self.reached.script_of(number), event)

    def tour(self) -> tuple[tuple[Event, ...], ...]:
        """Return scripts that together take every row that can be: a shortest one to each."""
        left, scripts = set(self._first), []
        # One that is longer takes more of those that others would be for.
        for row in sorted(self._first, key=lambda each: (-len(self.script_to(each)), each)):
            if row in left:
                left -= self._rows_on_the_way(row)
                scripts.append(self.script_to(row))
        return tuple(reversed(scripts))

    def note(self, number: int, event: Event, rows: Sequence[RowKey], *, is_taken: bool) -> None:
        """Take down a step, and the rows that it took."""
        self.steps += 1
        self.refused += not is_taken
        new = [row for row in rows if is_taken and row not in self._first]
        self._first.update(dict.fromkeys(new, (number, event, frozenset(rows))))

    def _rows_on_the_way(self, row: RowKey) -> frozenset[RowKey]:
        number, _, last = self._first[row]
        return last.union(*(self.rows_to[each] for each in self.reached.lineage(number)))


@dataclass(frozen=True)
class KernelTrial(Generic[K]):
    """A kernel, what may happen to it, and what must be so."""

    make: Callable[[], K]
    """Makes the kernel as it is in the beginning."""
    events: Sequence[Event] | Callable[[K], Iterable[Event]]
    """What may happen, and what cannot; or what may happen to a kernel as it is now."""
    invariants: Mapping[str, Callable[[K], bool]] = field(default_factory=dict)
    """What must be so in every snapshot, by name."""
    reference: Reference[Any] | None = None
    """Says what the effects must be, and which events cannot be."""
    homes: TableHomes | None = None
    """Where the kernel takes its tables from; without it, nothing is known of rows."""
    copied: Callable[[K], K] = copy.deepcopy
    """Copies a kernel."""

    def explore(self, snapshots_max: int | None = None) -> Exploration:
        """
        Put every event to the kernel in every snapshot that these events lead to.

        Args:
            snapshots_max: go through the first so many only.

        Raises:
            ViolatingPath: an invariant is broken, the model says otherwise, a refused event has
                changed something, or the kernel fails; with a shortest script.
        """
        search = _KernelSearch(self)
        with self._watching(search.rows):
            search.run(snapshots_max)
        return search.found

    def replay(self, script: Iterable[Event]) -> K:
        """
        Put events to a new kernel one after the other, and check all that `explore` does.

        Returns:
            The kernel as it is afterwards.

        Raises:
            ViolatingPath: as `explore`, at the first that is broken.
        """
        done: list[Event] = []
        try:
            kernel, state = self._begun()
            for event in script:
                done.append(event)
                kernel, state, _ = self._after(kernel, state, event)
        except Exception as error:
            raise ViolatingPath(tuple(done), [], _told(error)) from error
        return kernel

    def _begun(self) -> tuple[K, Any]:
        """Make a kernel, and the state of the model beside it."""
        kernel = self.make()
        self._check(kernel)
        return kernel, self.reference and self.reference.initial

    def _after(self, kernel: K, state: Any, event: Event) -> tuple[K, Any, bool]:
        """Put an event to a kernel; return it and the model's state, and whether it was taken."""
        if self.reference is not None:
            kernel, state, effects = self.reference.taken(kernel, state, event)
            is_taken = effects is not None
        else:
            is_taken = _is_taken(kernel, event)
        if is_taken:
            self._check(kernel)
        return kernel, state, is_taken

    def _check(self, kernel: K) -> None:
        for name, holds in self.invariants.items():
            if not holds(kernel):
                raise AssertionError(f"{name} does not hold")

    def _events_in(self, kernel: K) -> Iterable[Event]:
        return self.events(kernel) if callable(self.events) else self.events

    def _watching(self, rows: list[RowKey]) -> AbstractContextManager[None]:
        if self.homes is None:
            return nullcontext()
        return self.homes.watched(lambda *row: rows.append(row_key(*row)))


class _KernelSearch(Generic[K]):
    """The search of one exploration."""

    def __init__(self, trial: KernelTrial[K]) -> None:
        self.found: Final = Exploration()
        self.rows: Final[list[RowKey]] = []
        """The rows that were taken in the step that is being made."""
        self._trial = trial
        self._reached = self.found.reached
        self._waiting: deque[tuple[K, Any]] = deque()
        """Kernels to which the events are still to be put, and the model's states."""

    def run(self, snapshots_max: int | None) -> None:
        """Go through what is reached; raises `ViolatingPath`."""
        try:
            start = self._trial._begun()
        except Exception as error:
            raise ViolatingPath((), [], _told(error)) from error
        self._arrive(*start)
        for number in self._reached.in_order():
            kernel, state = self._waiting.popleft()
            for event in self._trial._events_in(kernel):
                self.rows.clear()
                try:
                    copied = self._trial.copied(kernel)
                    after, state_after, is_taken = self._trial._after(copied, state, event)
                except Exception as error:
                    raise self._reached.violation(number, _told(error), event) from error
                self.found.note(number, event, self.rows, is_taken=is_taken)
                if is_taken:
                    self._arrive(after, state_after, number, event, snapshots_max)

    def _arrive(
        self,
        kernel: K,
        state: Any,
        parent: int = 0,
        event: Event | None = None,
        snapshots_max: int | None = None,
    ) -> None:
        node = identity_of(kernel), state
        if node in self._reached:
            return
        if snapshots_max is not None and len(self._reached) >= snapshots_max:
            self.found.is_complete = False
            return
        self._reached.arrive(node, parent, event)
        self.found.rows_to.append(frozenset(self.rows))
        self._waiting.append((kernel, state))


def _is_taken(kernel: Receiver, event: Event) -> bool:
    """Put an event to a kernel; say whether it was taken. One that is refused changes nothing."""
    before = identity_of(kernel)
    try:
        kernel.receive(event)
    except ProtocolError as error:
        if identity_of(kernel) != before:
            raise Difference(f"{error} changed something") from None
        return False
    return True


def _told(error: Exception) -> str:
    """Say what is wrong: in the words of a check, or what failed in the kernel itself."""
    is_said = isinstance(error, AssertionError) and str(error)
    return str(error) if is_said else f"{type(error).__name__}: {error}"
