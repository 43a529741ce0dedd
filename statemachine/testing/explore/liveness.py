"""What must come about: what is kept in every world at rest, and that every world comes to rest."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from specs import invariants as always

from ...states import AllocationState, ConsumerState, ServiceState
from .client import DONE
from .kernels import ConsumerView
from .server import Setting
from .world import Client, ServerState, Violation

WAITS: Final = (
    "a request is unanswered",
    "an end is unannounced",
    "a consumer owes an end",
)
"""What must not be waited for without end; each a bit."""


def waits_on(setting: Setting, server: ServerState) -> int:
    """Say what is waited for in a server state, as bits of `WAITS`."""
    bits = 0
    if server.provider:
        states = setting.kernels.provider_views[server.provider].states
        bits |= (AllocationState.ENDED in states) << 1
    return bits | any(link.open or link.to_provider for link in server.links)


def waits_of(setting: Setting, client: Client) -> int:
    """Say what a client waits for, as bits of `WAITS`."""
    view: ConsumerView | None = setting.kernels.consumer_views[client.kernel]
    if view is None:
        return 0
    return (view.hold is ConsumerState.ASKING) | view.owes_end << 2


# --- At rest -----------------------------------------------------------------------------------


def check_at_rest(setting: Setting, server: ServerState, clients: Iterable[Client]) -> None:
    """
    Hold a world in which nothing happens by itself any more to what it must have come to.

    Raises:
        Violation, InvariantBroken: it has not.
    """
    view = setting.kernels.provider_views[server.provider]
    if view is None or view.service is not ServiceState.READY:
        raise Violation("at rest without a provider that is ready")
    for link in server.links:
        numbers = range(len(server.nodes))
        bits = {i: (link.number, i) for i in numbers}
        always.require(
            always.every_holder_has_heard(
                [bits[i] for i in numbers if link.handed >> i & 1],
                [bits[i] for i in numbers if link.told >> i & 1],
                [i for i in numbers if server.nodes[i].is_over],
                [link.number] if link.has_provider and link.has_consumer else [],
            ),
            always.every_message_is_answered([("read", setting.message(m)) for m in link.open]),
        )
    for node, state in zip(server.nodes, view.states, strict=True):
        if state in (AllocationState.REQUESTED, AllocationState.ENDED):
            raise Violation(f"at rest, an allocation is {state.value}")
        is_alive = state in (AllocationState.CREATED, AllocationState.HANDED_OFF)
        if is_alive != bool(node.life):
            raise Violation("at rest, the kernel and the node disagree on what is alive")
        is_claimed = any(link.handed for link in server.links) or node.scope or node.timers
        if is_alive and not is_claimed:
            raise Violation(
                "at rest, an allocation is alive that is not held and that nothing will end"
            )
    for client in clients:
        _check_client_at_rest(setting, client)


def _check_client_at_rest(setting: Setting, client: Client) -> None:
    view = setting.kernels.consumer_views[client.kernel]
    if view is None:
        return
    if view.hold not in (*DONE, ConsumerState.HELD, ConsumerState.SELF_HELD):
        raise Violation(f"at rest, a consumer is {view.hold.value}")
    if view.owes_end:
        raise Violation("at rest, a consumer owes an end")
    if client.timers:
        raise Violation("at rest, a consumer's timer runs")


# --- In the end --------------------------------------------------------------------------------


@dataclass
class Graph:
    """What happens by itself: every world, and every move between two that needs no caller."""

    waits: array[int] = field(default_factory=lambda: array("B"))
    """What is waited for in each world, as bits of `WAITS`."""
    at_rest: list[int] = field(default_factory=list)
    sources: array[int] = field(default_factory=lambda: array("I"))
    targets: array[int] = field(default_factory=lambda: array("I"))
    labels: array[int] = field(default_factory=lambda: array("I"))

    def add(self, source: int, target: int, label: int) -> None:
        """Note a move."""
        self.sources.append(source)
        self.targets.append(target)
        self.labels.append(label)

    def first_that_never_rests(self) -> int | None:
        """Find the first world from which no world at rest can be reached."""
        starts, back = self._backward()
        can_rest = bytearray(len(self.waits))
        todo = list(self.at_rest)
        for index in todo:
            can_rest[index] = 1
        while todo:
            index = todo.pop()
            for source in back[starts[index] : starts[index + 1]]:
                if not can_rest[source]:
                    can_rest[source] = 1
                    todo.append(source)
        first = can_rest.find(0)
        return None if first < 0 else first

    def _backward(self) -> tuple[array[int], array[int]]:
        """Sort the sources by their targets; those of world n stand from `starts[n]` on."""
        starts = array("I", bytes(4 * (len(self.waits) + 2)))
        for target in self.targets:
            starts[target + 2] += 1
        for index in range(2, len(starts)):
            starts[index] += starts[index - 1]
        back = array("I", bytes(4 * len(self.sources)))
        for source, target in zip(self.sources, self.targets, strict=True):
            back[starts[target + 1]] = source
            starts[target + 1] += 1
        return starts, back

    def fair_cycles(self, bit: int) -> Iterator[set[int]]:
        """
        Find cycles of states in which something is waited for, and no timer is put off.

        They are the strongly connected parts, with a move inside, of the worlds that wait; but not
        those in all of whose worlds a move is offered that is never made.
        """
        cycles = self._cycles(bit)
        home = {index: cycle for cycle, members in enumerate(cycles) for index in members}
        offered: dict[int, set[int]] = {index: set() for index in home}
        taken: list[set[int]] = [set() for _ in cycles]
        for source, target, label in zip(self.sources, self.targets, self.labels, strict=True):
            if source in home:
                offered[source].add(label)
                if home.get(target) == home[source]:
                    taken[home[source]].add(label)
        for cycle, members in enumerate(cycles):
            if set.intersection(*(offered[index] for index in members)) <= taken[cycle]:
                yield members

    def _cycles(self, bit: int) -> list[set[int]]:
        forward: dict[int, list[int]] = {}
        loops = set()
        for source, target in zip(self.sources, self.targets, strict=True):
            if self.waits[source] & bit and self.waits[target] & bit:
                forward.setdefault(source, []).append(target)
                if source == target:
                    loops.add(source)
        return [c for c in components(forward) if len(c) > 1 or c <= loops]


def components(forward: dict[int, list[int]]) -> Iterator[set[int]]:
    """Find strongly connected components, without recursion (Tarjan)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    is_on_stack: set[int] = set()
    for root in sorted(forward):
        if root in order:
            continue
        work = [(root, iter(forward.get(root, ())))]
        order[root] = low[root] = len(order)
        stack.append(root)
        is_on_stack.add(root)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    is_on_stack.add(target)
                    work.append((target, iter(forward.get(target, ()))))
                    break
                if target in is_on_stack:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    above = work[-1][0]
                    low[above] = min(low[above], low[node])
                if low[node] == order[node]:
                    component = set()
                    while node not in component:
                        top = stack.pop()
                        is_on_stack.discard(top)
                        component.add(top)
                    yield component
