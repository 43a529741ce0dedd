"""Breadth-first search with parents: what was reached, and a shortest script to it."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

from ...errors import Copyable

N = TypeVar("N", bound=Hashable)
M = TypeVar("M")


class ViolatingPath(Copyable, AssertionError):
    """
    A shortest path to a violation.

    Args:
        script: the moves to it: events, or what else leads from one to the next.
        nodes: what was reached on the way, the first included; of the last move there may be none.
        finding: what is broken.
    """

    def __init__(self, script: tuple[Any, ...], nodes: list[Any], finding: str) -> None:
        lines = [f"{finding}, after", *map(repr, script)] if script else [f"{finding}, at once"]
        super().__init__("\n".join(lines))
        self.script = script
        self.nodes = nodes
        self.finding = finding


class Reached(Generic[N, M]):
    """
    What was reached, in the order in which it was, each with the move that first led to it.

    A node is known by its number, and is anything that can be hashed: a snapshot, a line of text,
    the number of a world. Who goes through them `in_order` and lets what follows each of them
    `arrive` searches breadth first.
    """

    def __init__(self) -> None:
        self.nodes: list[N] = []
        self._numbers: dict[N, int] = {}
        self._parents = array("I")
        self._via: list[M | None] = []

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node: object) -> bool:
        return node in self._numbers

    def number_of(self, node: N) -> int:
        """
        Look up the number of a node.

        Raises:
            KeyError: it was not reached.
        """
        return self._numbers[node]

    def arrive(self, node: N, parent: int = 0, move: M | None = None) -> int:
        """Come to a node, by a move from another; return its number, which is the next if new."""
        number = self._numbers.get(node)
        if number is None:
            number = self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
            self._parents.append(parent)
            self._via.append(move)
        return number

    def in_order(self) -> Iterator[int]:
        """Go through what is reached, the nearest first, while more is."""
        number = 0
        while number < len(self.nodes):
            yield number
            number += 1

    def lineage(self, number: int) -> list[int]:
        """List the numbers on the way to a node, from the first one to its own."""
        line = [number]
        while number:
            number = self._parents[number]
            line.append(number)
        return line[::-1]

    def script_of(self, number: int) -> tuple[M, ...]:
        """Say which moves first led to a node."""
        moves: Any = [self._via[each] for each in self.lineage(number)[1:]]
        return tuple(moves)

    def violation(self, number: int, finding: object, *moves: M) -> ViolatingPath:
        """Make what to raise when something is broken in a node, or by moves from there."""
        nodes = [self.nodes[each] for each in self.lineage(number)]
        return ViolatingPath((*self.script_of(number), *moves), nodes, str(finding))
