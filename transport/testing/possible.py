"""What may be heard while several messages about one allocation are under way.

A message takes effect at some moment between being said and being answered, and a peer does not see
when. `Possible` keeps every history that agrees with what was heard so far: what the allocation is
now, which messages have taken effect, and which incarnation each request was granted. An answer
rules out the histories that do not lead to it; when none is left, no order of effects explains what
was heard. That is linearizability, checked as it goes along.

A consumer that goes leaves messages behind that may take effect or not. A provider that dies leaves
some that have and some that have not, and what it was making is there or is not; but what it has
told stays true.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from statemachine.errors import AllocationNotFound, CreationFailed
from statemachine.messages import AllocationEnded, Message, NamespaceRequest, NamespaceResponse

Shown: TypeAlias = tuple[Hashable, ...]
TakenEffect: TypeAlias = int | type[Message]
"""What a message has come to: the incarnation that was granted, or the only answer there can be."""

NEVER: Final = -2
"""In the place of an incarnation: there never was one."""
OVER: Final = -1
"""The last one has ended."""
FIRST: Final = 0
"""The incarnation that was alive in the beginning, if one was."""


class Inexplicable(AssertionError):
    """No order in which the messages took effect explains what was heard."""


@dataclass(frozen=True, slots=True)
class _Course:
    """One way in which it can have come to what is known."""

    alive: int
    """The incarnation that is alive, or `NEVER`, or `OVER`."""
    requests: tuple[NamespaceRequest, ...] = ()
    """What each incarnation was first asked for with."""
    identities: tuple[Shown | None, ...] = ()
    """The namespaces of each, as far as they have been seen."""
    ended: frozenset[int] = frozenset()
    outcomes: frozenset[tuple[int, TakenEffect]] = frozenset()
    """What those messages have come to that have taken effect and are not answered."""

    def begun(self, request: NamespaceRequest, identities: Shown | None = None) -> _Course:
        """Begin an incarnation."""
        return replace(
            self,
            alive=len(self.requests),
            requests=(*self.requests, request),
            identities=(*self.identities, identities),
        )

    def ending(self, then: int = OVER) -> _Course:
        """End the incarnation that is alive, if one is."""
        if self.alive < 0:
            return self
        return replace(self, alive=then, ended=self.ended | {self.alive})

    def taking(self, number: int, message: Message) -> _Course:
        """Let a message take effect."""
        after, outcome = self._effect_of(message)
        return replace(after, outcomes=after.outcomes | {(number, outcome)})

    def _effect_of(self, message: Message) -> tuple[_Course, TakenEffect]:
        if not isinstance(message, NamespaceRequest):
            if self.alive == NEVER:
                return self, AllocationNotFound
            return self.ending(), AllocationEnded
        if self.alive < 0:
            began = self.begun(message)
            return began, began.alive
        is_same = self.requests[self.alive] == message
        return self, self.alive if is_same else CreationFailed

    def without(self, number: int) -> _Course:
        """Forget a message whose answer was heard, or will not be."""
        return replace(self, outcomes=frozenset(x for x in self.outcomes if x[0] != number))

    def explaining(self, number: int, answer: Message, identities: Shown | None) -> _Course | None:
        """Go on with the answer to a message; None if it cannot have come to that."""
        outcome = dict(self.outcomes).get(number)
        if isinstance(outcome, int):
            if isinstance(answer, NamespaceResponse):
                return self.without(number)._showing(outcome, identities)
            is_told = isinstance(answer, CreationFailed) and outcome in self.ended
        else:
            is_told = outcome is not None and isinstance(answer, outcome)
        return self.without(number) if is_told else None

    def _showing(self, incarnation: int, identities: Shown | None) -> _Course | None:
        """See the namespaces of an incarnation: always the same, and those of no other."""
        if self.identities[incarnation] == identities:
            return self
        if self.identities[incarnation] is not None or identities in self.identities:
            return None
        seen = list(self.identities)
        seen[incarnation] = identities
        return replace(self, identities=tuple(seen))


class Possible:
    """
    What an allocation may be while messages about it are under way.

    Args:
        name: its id.
        alive: what it was asked for with, if it is alive.
        identities: which namespaces it has, if that was seen.
        was_ever: whether it is certain that it once was; if it is not, the provider may still
            remember it, from before it was looked at.
    """

    def __init__(
        self,
        name: str,
        alive: NamespaceRequest | None,
        identities: Shown | None = None,
        *,
        was_ever: bool = False,
    ) -> None:
        self.name = name
        self._numbers = 0
        self._pending: dict[int, Message] = {}
        self._had_first = alive is not None
        self._was_ever = was_ever or self._had_first
        first = {_Course(OVER)} if self._was_ever else {_Course(OVER), _Course(NEVER)}
        if alive is not None:
            first = {course.begun(alive, identities) for course in first}
        self._histories = frozenset(first)

    @property
    def unanswered(self) -> int:
        """How many messages may still take effect."""
        return len(self._pending)

    @property
    def alive(self) -> set[int]:
        """What may be alive now."""
        return {history.alive for history in self._explored()}

    def may_have_ended_first(self) -> bool:
        """Say whether what was alive in the beginning can have ended."""
        return any(FIRST in history.ended for history in self._explored())

    def request_of(self, number: int) -> NamespaceRequest:
        """Return the request with a number, if it is one."""
        message = self._pending[number]
        assert isinstance(message, NamespaceRequest), f"{message} was no request"
        return message

    def request_for(self, otherwise: NamespaceRequest) -> NamespaceRequest:
        """Return a request for it as it may be alive."""
        asked = {h.requests[h.alive] for h in self._explored() if h.alive >= 0}
        return min(asked, key=repr) if asked else otherwise

    # What happens.

    def said(self, message: Message) -> int:
        """Take note of a message that is sent; return the number of its answer."""
        self._numbers += 1
        self._pending[self._numbers] = message
        return self._numbers

    def answered(self, number: int, answer: Message, identities: Shown | None = None) -> None:
        """
        Take note of an answer, and of the namespaces that came with it.

        Raises:
            Inexplicable: nothing that can have happened leads to it.
        """
        explained = (h.explaining(number, answer, identities) for h in self._explored())
        self._keep(explained, f"{answer} to {self._pending[number]}")
        del self._pending[number]

    def may_have_ended(self) -> None:
        """Take note of something else than a message that ends it, unless it was ending."""
        explored = self._explored()
        self._histories = explored | {history.ending() for history in explored}

    def told_of_the_end(self, identities: Shown) -> None:
        """
        Take note that a consumer was told that what it was handed has ended.

        Raises:
            Inexplicable: it cannot have ended.
        """
        over = (
            history if any(history.identities[n] == identities for n in history.ended) else None
            for history in self._explored()
        )
        self._keep(over, f"that the end of {identities} was announced")

    def abandoned(self, numbers: Iterable[int]) -> None:
        """Take note that some messages are not answered, and take no effect from now on."""
        explored = self._explored()
        for number in tuple(numbers):
            self._pending.pop(number, None)
            explored = frozenset(history.without(number) for history in explored)
        self._histories = explored

    def all_abandoned(self) -> None:
        """Take note that nothing is under way any more."""
        self.abandoned(tuple(self._pending))

    def provider_died(self) -> None:
        """Take note that a provider died: what no peer was told of may be undone."""
        self.all_abandoned()
        for history in tuple(self._histories):
            n = history.alive
            is_sure = n == FIRST and self._had_first
            if n >= 0 and history.identities[n] is None and not is_sure:
                self._histories |= {history.ending()}
                if n == FIRST and not self._was_ever:
                    self._histories |= {history.ending(NEVER)}

    # How that is found out.

    def _explored(self) -> frozenset[_Course]:
        """Every history that there is: what is under way may have taken effect, in any order."""
        found, open_ = set(self._histories), list(self._histories)
        while open_:
            history = open_.pop()
            done = {number for number, _ in history.outcomes}
            for number in self._pending.keys() - done:
                more = history.taking(number, self._pending[number])
                if more not in found:
                    found.add(more)
                    open_.append(more)
        return frozenset(found)

    def _keep(self, histories: Iterable[_Course | None], what: str) -> None:
        kept = frozenset(history for history in histories if history is not None)
        if not kept:
            raise Inexplicable(f"{self.name}: nothing that is under way explains {what}")
        self._histories = kept
