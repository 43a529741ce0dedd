"""Breadth first through the worlds: each ground is moved once, and the same world is met once.

A world in the search is one whole number: the number of its ground, and those of its clients. So
there is no hash that two worlds could share, and a world costs a few bytes.

Worlds that differ only in names are one world. Connections are numbered anew in the order of their
age, which is the order in which the kernels look at them; clients are interchangeable; and so are
allocations, if their requests are. Then the order counts for nothing, either, in which the provider
remembers names of which none can be forgotten.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator
from operator import ge
from typing import NamedTuple

from specs import invariants as always

from ...messages import NamespaceRequest
from .client import ClientDraft, client_moves, is_provided, may_have_two_sets
from .ground import GroundDraft, Setting, check_ground, ground_moves, may_crash
from .kernels import Permutation
from .liveness import WAITS, Graph, check_at_rest, waits_of, waits_on
from .world import (
    BY_ITSELF,
    Bounds,
    Client,
    Ground,
    Link,
    Move,
    Node,
    Numbers,
    Violation,
    World,
)


class ViolatingPath(Exception):
    """
    A promise is broken.

    Args:
        script: The moves to it, each as it is called in the world before it.
        worlds: The worlds on the way, the first one included; of the last move there may be none.
        finding: What is broken.
    """

    def __init__(self, script: tuple[Move, ...], worlds: list[int], finding: str) -> None:
        super().__init__(finding)
        self.script = script
        self.worlds = worlds
        self.finding = finding


class _ViolatingMove(Exception):
    """A promise is broken by a move whose worlds are not known here."""

    def __init__(self, move: Move, error: AssertionError) -> None:
        super().__init__(str(error))
        self.move = move
        self.error = error


class _Edge(NamedTuple):
    """A move, and where it leads to."""

    label: int
    ground: int
    swap: Permutation
    """How the clients' allocations are renamed on that ground."""
    client: int = 0
    is_by_itself: bool = False


class _ServerFacts(NamedTuple):
    """What the search looks at of a ground."""

    keys: tuple[tuple[object, ...], ...]
    """For each client what tells it from another one like it."""
    ties: tuple[Permutation, ...]
    """The ways to exchange allocations after which it may be the same ground."""
    provided: int
    """Clients who have a set at the provider, or will have, as bits."""
    waits: int


class Search:
    """All worlds within bounds, the nearest first; with `has_symmetry` names make no difference."""

    def __init__(self, setting: Setting, *, has_symmetry: bool) -> None:
        self.setting = setting
        self.graph = Graph()
        self.moves_made = 0
        self._has_symmetry = has_symmetry
        self._swaps = _swaps_of(setting.bounds) if has_symmetry else []
        count = setting.bounds.consumers
        self._bits = min(16, 32 // max(1, count))
        self._plain_order = tuple(range(count))
        self._shifts = tuple(self._bits * i for i in range(count))
        self._grounds: Numbers[Ground] = Numbers()
        self._sights: list[_ServerFacts] = [_ServerFacts((), (), 0, 0)]
        self._clients: Numbers[Client] = Numbers()
        self._moves: Numbers[Move] = Numbers()
        self._ground_edges: dict[int, tuple[_Edge, ...]] = {}
        self._client_edges: dict[int, tuple[_Edge, ...]] = {}
        self._changed: dict[tuple[int, tuple[int, ...], str], int] = {}
        self._numbers: dict[int, int] = {}
        self._worlds = array("Q")
        self._parents = array("I")
        self._via = array("I")

    def __len__(self) -> int:
        return len(self._worlds)

    def run(
        self, first: World, states_max: int | None, progress: Callable[[int, int], None] | None
    ) -> bool:
        """
        Visit every world, then look for what is waited for in vain.

        Returns:
            Whether it came to the end before there were `states_max` worlds.

        Raises:
            ViolatingPath: a promise is broken.
        """
        self._arrive(0, 0, *self._enter(first))
        index = 0
        while index < len(self._worlds):
            if states_max is not None and len(self._worlds) >= states_max:
                return False
            self.setting.now = index
            self._expand(index)
            if progress is not None and index % 10_000 == 0:
                progress(len(self._worlds), len(self._worlds) - index)
            index += 1
        self._check_liveness()
        return True

    def _path(self, index: int) -> tuple[tuple[Move, ...], list[int]]:
        """Find the moves that first led to a world, and the worlds on the way."""
        script, worlds = [], [self._worlds[index]]
        while index:
            script.append(self._moves.things[self._via[index]])
            index = self._parents[index]
            worlds.append(self._worlds[index])
        return tuple(reversed(script)), worlds[::-1]

    def identity(self, world: World) -> int:
        """Say which world one is; those that differ only in names are one."""
        return self._key(*self._enter(world))

    # --- One world -----------------------------------------------------------------------------

    def _expand(self, index: int) -> None:
        ground, clients = self._parts(self._worlds[index])
        is_resting = True
        try:
            for edge in self._edges_of_ground(ground):
                is_resting &= not edge.is_by_itself
                self._follow(index, edge, clients)
            for i, client in enumerate(clients):
                for edge in self._edges_of_client(ground, i, client):
                    is_resting &= not edge.is_by_itself
                    left = (*clients[:i], edge.client, *clients[i + 1 :])
                    self._follow(index, edge, left)
        except _ViolatingMove as stumble:
            raise self._counterexample(index, stumble.error, stumble.move) from stumble.error
        if is_resting:
            self.graph.at_rest.append(index)
            known = [self._clients.things[client] for client in clients]
            try:
                check_at_rest(self.setting, self._grounds.things[ground], known)
            except AssertionError as error:
                raise self._counterexample(index, error) from error

    def _follow(self, index: int, edge: _Edge, clients: tuple[int, ...]) -> None:
        self.moves_made += 1
        if edge.swap:
            clients = tuple(self._swap_client(client, edge.swap) for client in clients)
        target = self._arrive(index, edge.label, edge.ground, clients)
        if edge.is_by_itself:
            self.graph.add(index, target, edge.label)

    def _arrive(self, parent: int, via: int, ground: int, clients: tuple[int, ...]) -> int:
        key = self._key(ground, clients)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._worlds)
            self._worlds.append(key)
            self._parents.append(parent)
            self._via.append(via)
            self.graph.waits.append(self._look_at(number, key))
        return number

    def _look_at(self, number: int, key: int) -> int:
        """Check a world that is new; say what is waited for in it."""
        ground, clients = self._parts(key)
        sight = self._sights[ground]
        waits = sight.waits
        for i, client in enumerate(clients):
            known = self._clients.things[client]
            waits |= waits_of(self.setting, known)
            if sight.provided >> i & 1 and may_have_two_sets(self.setting, known):
                view = self.setting.kernels.consumer_views[known.kernel]
                item = (i, view.request.allocation_id)
                error = always.InvariantBroken(*always.at_most_one_live_set([item], [], [item]))
                raise self._counterexample(number, error)
        return waits

    def _counterexample(
        self, index: int, error: AssertionError, move: Move | None = None
    ) -> ViolatingPath:
        script, worlds = self._path(index)
        return ViolatingPath((*script, move) if move else script, worlds, str(error))

    def _key(self, ground: int, clients: tuple[int, ...]) -> int:
        """Find the number of a world, which is that of all worlds that are the same."""
        best = self._ordered(ground, clients)
        for swap in self._sights[ground].ties:
            swapped = tuple(self._swap_client(client, swap) for client in clients)
            best = min(best, self._ordered(self._swap_ground(ground, swap), swapped))
        return best

    def _ordered(self, ground: int, clients: tuple[int, ...]) -> int:
        """Put the clients in order, and make it one number."""
        if self._has_symmetry and any(map(ge, clients, clients[1:])):
            keys = [*zip(clients, self._sights[ground].keys, strict=True)]
            order = tuple(sorted(range(len(clients)), key=keys.__getitem__))
            if order != self._plain_order:
                ground = self._permute_ground(ground, order)
                clients = tuple(clients[old] for old in order)
        key = ground
        for client in clients:
            key = key << self._bits | client
        return key

    def _parts(self, key: int) -> tuple[int, tuple[int, ...]]:
        mask = (1 << self._bits) - 1
        clients = tuple([key >> shift & mask for shift in reversed(self._shifts)])
        return key >> self._bits * len(clients), clients

    # --- Grounds and clients, by number --------------------------------------------------------

    def _enter(self, world: World) -> tuple[int, tuple[int, ...]]:
        ground, swap = self._settle(world.ground)
        clients = tuple(self._number_client(client) for client in world.clients)
        return ground, tuple(self._swap_client(client, swap) for client in clients)

    def _number_client(self, client: Client) -> int:
        number = self._clients.of(client)
        assert number < 1 << self._bits, "more clients than a world has room for"
        return number

    def _settle(self, ground: Ground) -> tuple[int, Permutation]:
        """Give a ground the names that it has in common with all that are the same."""
        swap: Permutation = ()
        if self._swaps:
            keys = [_key_of_node(node) for node in ground.nodes]
            swap = min([(), *self._swaps], key=lambda swap: _permuted(keys, swap))
        ground = self._rename(ground, swap)
        number = self._grounds.of(ground)
        if number == len(self._sights):
            check_ground(self.setting, ground)
            self._sights.append(self._sight_of(ground))
        return number, swap

    def _sight_of(self, ground: Ground) -> _ServerFacts:
        keys = [_key_of_node(node) for node in ground.nodes]
        clients = range(self.setting.bounds.consumers)
        return _ServerFacts(
            tuple(_key_of_client(ground, i) for i in clients),
            tuple(swap for swap in self._swaps if _permuted(keys, swap) == keys),
            sum(is_provided(self.setting, ground, i) << i for i in clients),
            waits_on(self.setting, ground),
        )

    def _rename(self, ground: Ground, swap: Permutation) -> Ground:
        kernels = self.setting.kernels
        links, nodes, provider = ground.links, ground.nodes, ground.provider
        old = self._numbers_to_change(ground)
        if old:
            new = {number: i for i, number in enumerate(old, 1)}
            links = tuple(link._replace(number=new[link.number]) for link in links)
        if swap:
            links = tuple(self._swap_link(link, swap) for link in links)
            nodes = self._swap_nodes(nodes, swap)
        if provider:
            provider = kernels.rename_provider(provider, old, swap)
        if not (old or swap) and provider == ground.provider:
            return ground
        return ground._replace(provider=provider, links=links, nodes=nodes)

    def _numbers_to_change(self, ground: Ground) -> tuple[int, ...]:
        """List the connections that either side knows, in their order; none if it is 1, 2, 3, …."""
        known = ()
        if ground.provider:
            known = self.setting.kernels.provider_views[ground.provider].numbers
        count = len(ground.links)
        is_counted = not count or ground.links[-1].number == count
        if is_counted and (not known or known[-1] <= count):
            return ()
        return tuple(sorted({*known, *(link.number for link in ground.links)}))

    def _swap_nodes(self, nodes: tuple[Node, ...], swap: Permutation) -> tuple[Node, ...]:
        rename = self.setting.kernels.rename_message
        swapped = list(nodes)
        for old, node in enumerate(nodes):
            swapped[swap[old]] = node._replace(
                request=rename(node.request, swap),
                jobs=tuple(rename(job, swap) for job in node.jobs),
            )
        return tuple(swapped)

    def _swap_link(self, link: Link, swap: Permutation) -> Link:
        rename = self.setting.kernels.rename_message
        return link._replace(
            to_provider=tuple(rename(m, swap) for m in link.to_provider),
            to_consumer=tuple((rename(m, swap), fate) for m, fate in link.to_consumer),
            open=tuple(rename(m, swap) for m in link.open),
            handed=_swapped_bits(link.handed, swap),
            told=_swapped_bits(link.told, swap),
            pushed=_swapped_bits(link.pushed, swap),
        )

    def _swap_client(self, number: int, swap: Permutation) -> int:
        key = (number, swap, "client")
        if swap and key not in self._changed:
            client = self._clients.things[number]
            kernel = self.setting.kernels.rename_consumer(client.kernel, swap)
            self._changed[key] = self._number_client(client._replace(kernel=kernel))
        return self._changed[key] if swap else number

    def _swap_ground(self, number: int, swap: Permutation) -> int:
        key = (number, swap, "swap")
        if key not in self._changed:
            self._changed[key] = self._add(self._rename(self._grounds.things[number], swap))
        return self._changed[key]

    def _permute_ground(self, number: int, order: tuple[int, ...]) -> int:
        """Give the clients other numbers."""
        key = (number, order, "order")
        if key not in self._changed:
            ground = self._grounds.things[number]
            new = {old + 1: i for i, old in enumerate(order, 1)}
            places = tuple(new[i + 1] - 1 for i in range(len(order)))
            links = tuple(x._replace(client=new.get(x.client, x.client)) for x in ground.links)
            nodes = tuple(
                node._replace(holders=_swapped_bits(node.holders, places)) if node.holders else node
                for node in ground.nodes
            )
            self._changed[key] = self._add(ground._replace(links=links, nodes=nodes))
        return self._changed[key]

    def _add(self, ground: Ground) -> int:
        number = self._grounds.of(ground)
        if number == len(self._sights):
            self._sights.append(self._sight_of(ground))
        return number

    # --- Moves, each made once -----------------------------------------------------------------

    def _edges_of_ground(self, number: int) -> tuple[_Edge, ...]:
        edges = self._ground_edges.get(number)
        if edges is None:
            edges = tuple(self._make_ground_edges(self._grounds.things[number]))
            if self._shifts:
                self._ground_edges[number] = edges
        return edges

    def _make_ground_edges(self, ground: Ground) -> Iterator[_Edge]:
        has_forks = may_crash(self.setting, ground)
        for move in ground_moves(self.setting, ground):
            draft = GroundDraft(self.setting, ground, has_forks=has_forks and move[0] != "crash")
            try:
                draft.make(move)
                yield self._edge(move, draft.freeze())
            except AssertionError as error:
                raise _ViolatingMove(move, error) from error
            yield from self._cut_edges(move, draft.forks or [])

    def _cut_edges(self, move: Move, forks: list[Ground]) -> Iterator[_Edge]:
        last = None
        for n, left in enumerate(forks):
            # Nothing that outlives the program has changed since the cut before.
            if left != last:
                yield self._edge(("crash in", n, *move), left)
            last = left

    def _edge(self, move: Move, after: Ground) -> _Edge:
        target, swap = self._settle(after)
        return _Edge(self._moves.of(move), target, swap, is_by_itself=move[0] in BY_ITSELF)

    def _edges_of_client(self, ground: int, index: int, client: int) -> tuple[_Edge, ...]:
        key = (ground << self._bits | client) << 2 | index
        edges = self._client_edges.get(key)
        if edges is None:
            edges = self._client_edges[key] = tuple(self._make_client_edges(ground, index, client))
        return edges

    def _make_client_edges(self, ground: int, index: int, client: int) -> Iterator[_Edge]:
        here, known = self._grounds.things[ground], self._clients.things[client]
        for move in client_moves(self.setting, here, index, known):
            draft = ClientDraft(self.setting, here, index, known)
            try:
                draft.make(move)
                target, swap = self._settle(draft.ground.freeze())
            except AssertionError as error:
                raise _ViolatingMove(move, error) from error
            after = self._number_client(draft.client)
            yield _Edge(self._moves.of(move), target, swap, after, move[0] in BY_ITSELF)

    # --- In the end ----------------------------------------------------------------------------

    def _check_liveness(self) -> None:
        lost = self.graph.first_that_never_rests()
        if lost is not None:
            raise self._counterexample(lost, Violation("from here on nothing ever comes to rest"))
        for bit, what in enumerate(WAITS):
            for circle in self.graph.fair_circles(1 << bit):
                error = Violation(f"{what}, for ever: a circle of {len(circle)} worlds")
                raise self._counterexample(min(circle), error)


def _swaps_of(bounds: Bounds) -> list[Permutation]:
    """Find the ways to exchange allocations that leave the set of requests as it is."""
    requests, names = set(bounds.requests), bounds.names
    swaps = []
    for order in itertools.permutations(range(len(names))):
        new = {old: names[order[i]] for i, old in enumerate(names)}
        renamed = {
            NamespaceRequest(new[r.allocation_id], r.namespaces, r.uenv_image) for r in requests
        }
        if renamed == requests and order != tuple(range(len(names))):
            swaps.append(order)
    return swaps


def _key_of_node(node: Node) -> tuple[object, ...]:
    """Say what of a node has nothing to do with its name, nor with the clients'."""
    return (node.life, *node[2:6], len(node.jobs), *node[7:-1])


def _key_of_client(ground: Ground, index: int) -> tuple[object, ...]:
    """Say what tells a client from another one like it, on its ground."""
    numbers = tuple(link.number for link in ground.links if link.client == index + 1)
    return (numbers, tuple(node.holders >> index & 1 for node in ground.nodes))


def _permuted(keys: list[tuple[object, ...]], swap: Permutation) -> list[tuple[object, ...]]:
    if not swap:
        return keys
    permuted = list(keys)
    for old, key in enumerate(keys):
        permuted[swap[old]] = key
    return permuted


def _swapped_bits(bits: int, swap: Permutation) -> int:
    return sum(1 << swap[i] for i in range(len(swap)) if bits >> i & 1) if bits else 0
