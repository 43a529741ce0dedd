"""Breadth-first search of the worlds: each server state is expanded once, each world met once.

A world in the search is one whole number: the number of its server state, and those of its clients.
So there is no hash that two worlds could share, and a world costs a few bytes.

Worlds that differ only in names are one world. Connections are numbered anew in the order of their
age, which is the order in which the kernels look at them; clients are interchangeable; and so are
allocations, if their requests are. Then the order counts for nothing, either, in which the provider
remembers names of which none can be forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from operator import ge
from typing import NamedTuple

from specs import invariants as always

from ...errors import Copyable
from ...messages import NamespaceRequest
from ..kit import Reached
from .client import ClientDraft, client_moves, is_provided, may_have_two_sets
from .kernels import Permutation
from .liveness import WAITS, Graph, check_at_rest, waits_of, waits_on
from .server import ServerDraft, Setting, check_server, may_crash, server_moves
from .world import (
    BY_ITSELF,
    Bounds,
    Client,
    GlobalState,
    Link,
    Move,
    Node,
    Numbers,
    ServerState,
)


class _ViolatingMove(Copyable, Exception):
    """A move violates a promise; the worlds on the way to it are not known here."""

    def __init__(self, move: Move, error: AssertionError) -> None:
        super().__init__(str(error))
        self.move = move
        self.error = error


class _Edge(NamedTuple):
    """A move, and where it leads to."""

    label: int
    server: int
    permutation: Permutation
    """How the clients' allocations are renamed in that state."""
    client: int = 0
    is_by_itself: bool = False


class _ServerFacts(NamedTuple):
    """What the search looks at of a server state."""

    keys: tuple[tuple[object, ...], ...]
    """For each client what tells it from another one like it."""
    ties: tuple[Permutation, ...]
    """The ways to exchange allocations after which it may be the same server state."""
    provided: int
    """Clients who have a set at the provider, or will have, as bits."""
    waits: int


class Search(Reached[int, Move]):
    """All worlds within bounds, the nearest first; with `has_symmetry` names make no difference."""

    def __init__(self, setting: Setting, *, has_symmetry: bool) -> None:
        super().__init__()
        self.setting = setting
        self.graph = Graph()
        self.moves_made = 0
        self._has_symmetry = has_symmetry
        self._symmetries = _symmetries_of(setting.bounds) if has_symmetry else []
        count = setting.bounds.consumers
        self._bits = min(16, 32 // max(1, count))
        self._plain_order = tuple(range(count))
        self._shifts = tuple(self._bits * i for i in range(count))
        self._servers: Numbers[ServerState] = Numbers()
        self._facts: list[_ServerFacts] = [_ServerFacts((), (), 0, 0)]
        self._clients: Numbers[Client] = Numbers()
        self._moves: Numbers[Move] = Numbers()
        self._server_edges: dict[int, tuple[_Edge, ...]] = {}
        self._client_edges: dict[int, tuple[_Edge, ...]] = {}
        self._changed: dict[tuple[int, tuple[int, ...], str], int] = {}

    def run(
        self,
        first: GlobalState,
        states_max: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> bool:
        """
        Visit every world, then look for what is waited for in vain.

        Returns:
            Whether it came to the end before there were `states_max` worlds.

        Raises:
            ViolatingPath: a promise is broken.
        """
        self._arrive(0, None, *self._enter(first))
        for index in self.in_order():
            if states_max is not None and len(self) >= states_max:
                return False
            self.setting.now = index
            self._expand(index)
            if progress is not None and index % 10_000 == 0:
                progress(len(self), len(self) - index)
        self._check_liveness()
        return True

    def identity(self, world: GlobalState) -> int:
        """Say which world one is; those that differ only in names are one."""
        return self._key(*self._enter(world))

    # --- One world -----------------------------------------------------------------------------

    def _expand(self, index: int) -> None:
        server, clients = self._parts(self.nodes[index])
        is_resting = True
        try:
            for edge in self._edges_of_server(server):
                is_resting &= not edge.is_by_itself
                self._follow(index, edge, clients)
            for i, client in enumerate(clients):
                for edge in self._edges_of_client(server, i, client):
                    is_resting &= not edge.is_by_itself
                    left = (*clients[:i], edge.client, *clients[i + 1 :])
                    self._follow(index, edge, left)
        except _ViolatingMove as violating:
            raise self.violation(index, violating.error, violating.move) from violating.error
        if is_resting:
            self.graph.at_rest.append(index)
            known = [self._clients.things[client] for client in clients]
            try:
                check_at_rest(self.setting, self._servers.things[server], known)
            except AssertionError as error:
                raise self.violation(index, error) from error

    def _follow(self, index: int, edge: _Edge, clients: tuple[int, ...]) -> None:
        self.moves_made += 1
        if edge.permutation:
            clients = tuple(self._permute_client(client, edge.permutation) for client in clients)
        move = self._moves.things[edge.label]
        target = self._arrive(index, move, edge.server, clients)
        if edge.is_by_itself:
            self.graph.add(index, target, edge.label)

    def _arrive(self, parent: int, move: Move | None, server: int, clients: tuple[int, ...]) -> int:
        key = self._key(server, clients)
        number = self.arrive(key, parent, move)
        if number == len(self.graph.waits):
            self.graph.waits.append(self._look_at(number, key))
        return number

    def _look_at(self, number: int, key: int) -> int:
        """Check a world that is new; say what is waited for in it."""
        server, clients = self._parts(key)
        facts = self._facts[server]
        waits = facts.waits
        for i, client in enumerate(clients):
            known = self._clients.things[client]
            waits |= waits_of(self.setting, known)
            if facts.provided >> i & 1 and may_have_two_sets(self.setting, known):
                view = self.setting.kernels.consumer_views[known.kernel]
                item = (i, view.request.allocation_id)
                error = always.InvariantBroken(*always.at_most_one_live_set([item], [], [item]))
                raise self.violation(number, error)
        return waits

    def _key(self, server: int, clients: tuple[int, ...]) -> int:
        """Find the number of a world, which is that of all worlds that are the same."""
        best = self._ordered(server, clients)
        for permutation in self._facts[server].ties:
            permuted = tuple(self._permute_client(client, permutation) for client in clients)
            best = min(best, self._ordered(self._permute_server(server, permutation), permuted))
        return best

    def _ordered(self, server: int, clients: tuple[int, ...]) -> int:
        """Put the clients in order, and make it one number."""
        if self._has_symmetry and any(map(ge, clients, clients[1:])):
            keys = [*zip(clients, self._facts[server].keys, strict=True)]
            order = tuple(sorted(range(len(clients)), key=keys.__getitem__))
            if order != self._plain_order:
                server = self._reorder_clients(server, order)
                clients = tuple(clients[old] for old in order)
        key = server
        for client in clients:
            key = key << self._bits | client
        return key

    def _parts(self, key: int) -> tuple[int, tuple[int, ...]]:
        mask = (1 << self._bits) - 1
        clients = tuple([key >> shift & mask for shift in reversed(self._shifts)])
        return key >> self._bits * len(clients), clients

    # --- Server states and clients, by number --------------------------------------------------

    def _enter(self, world: GlobalState) -> tuple[int, tuple[int, ...]]:
        server, permutation = self._settle(world.server)
        clients = tuple(self._number_client(client) for client in world.clients)
        return server, tuple(self._permute_client(client, permutation) for client in clients)

    def _number_client(self, client: Client) -> int:
        number = self._clients.of(client)
        assert number < 1 << self._bits, "more clients than a world has room for"
        return number

    def _settle(self, server: ServerState) -> tuple[int, Permutation]:
        """Give a server state the names that it has in common with all that are the same."""
        permutation: Permutation = ()
        if self._symmetries:
            keys = [_key_of_node(node) for node in server.nodes]
            permutation = min([(), *self._symmetries], key=lambda order: _permuted(keys, order))
        server = self._rename(server, permutation)
        number = self._servers.of(server)
        if number == len(self._facts):
            check_server(self.setting, server)
            self._facts.append(self._facts_of(server))
        return number, permutation

    def _facts_of(self, server: ServerState) -> _ServerFacts:
        keys = [_key_of_node(node) for node in server.nodes]
        clients = range(self.setting.bounds.consumers)
        return _ServerFacts(
            tuple(_key_of_client(server, i) for i in clients),
            tuple(order for order in self._symmetries if _permuted(keys, order) == keys),
            sum(is_provided(self.setting, server, i) << i for i in clients),
            waits_on(self.setting, server),
        )

    def _rename(self, server: ServerState, permutation: Permutation) -> ServerState:
        kernels = self.setting.kernels
        links, nodes, provider = server.links, server.nodes, server.provider
        old = self._numbers_to_change(server)
        if old:
            new = {number: i for i, number in enumerate(old, 1)}
            links = tuple(link._replace(number=new[link.number]) for link in links)
        if permutation:
            links = tuple(self._permute_link(link, permutation) for link in links)
            nodes = self._permute_nodes(nodes, permutation)
        if provider:
            provider = kernels.rename_provider(provider, old, permutation)
        if not (old or permutation) and provider == server.provider:
            return server
        return server._replace(provider=provider, links=links, nodes=nodes)

    def _numbers_to_change(self, server: ServerState) -> tuple[int, ...]:
        """List the connections that either side knows, in their order; none if it is 1, 2, 3, …."""
        known = ()
        if server.provider:
            known = self.setting.kernels.provider_views[server.provider].numbers
        count = len(server.links)
        is_counted = not count or server.links[-1].number == count
        if is_counted and (not known or known[-1] <= count):
            return ()
        return tuple(sorted({*known, *(link.number for link in server.links)}))

    def _permute_nodes(self, nodes: tuple[Node, ...], permutation: Permutation) -> tuple[Node, ...]:
        rename = self.setting.kernels.rename_message
        permuted = list(nodes)
        for old, node in enumerate(nodes):
            permuted[permutation[old]] = node._replace(
                request=rename(node.request, permutation),
                jobs=tuple(rename(job, permutation) for job in node.jobs),
            )
        return tuple(permuted)

    def _permute_link(self, link: Link, permutation: Permutation) -> Link:
        rename = self.setting.kernels.rename_message
        return link._replace(
            to_provider=tuple(rename(m, permutation) for m in link.to_provider),
            to_consumer=tuple((rename(m, permutation), fate) for m, fate in link.to_consumer),
            open=tuple(rename(m, permutation) for m in link.open),
            handed=_permuted_bits(link.handed, permutation),
            told=_permuted_bits(link.told, permutation),
            pushed=_permuted_bits(link.pushed, permutation),
        )

    def _permute_client(self, number: int, permutation: Permutation) -> int:
        key = (number, permutation, "client")
        if permutation and key not in self._changed:
            client = self._clients.things[number]
            kernel = self.setting.kernels.rename_consumer(client.kernel, permutation)
            self._changed[key] = self._number_client(client._replace(kernel=kernel))
        return self._changed[key] if permutation else number

    def _permute_server(self, number: int, permutation: Permutation) -> int:
        key = (number, permutation, "permutation")
        if key not in self._changed:
            self._changed[key] = self._add(self._rename(self._servers.things[number], permutation))
        return self._changed[key]

    def _reorder_clients(self, number: int, order: tuple[int, ...]) -> int:
        """Give the clients other numbers."""
        key = (number, order, "order")
        if key not in self._changed:
            server = self._servers.things[number]
            new = {old + 1: i for i, old in enumerate(order, 1)}
            places = tuple(new[i + 1] - 1 for i in range(len(order)))
            links = tuple(x._replace(client=new.get(x.client, x.client)) for x in server.links)
            nodes = tuple(
                node._replace(holders=_permuted_bits(node.holders, places))
                if node.holders
                else node
                for node in server.nodes
            )
            self._changed[key] = self._add(server._replace(links=links, nodes=nodes))
        return self._changed[key]

    def _add(self, server: ServerState) -> int:
        number = self._servers.of(server)
        if number == len(self._facts):
            self._facts.append(self._facts_of(server))
        return number

    # --- Moves, each made once -----------------------------------------------------------------

    def _edges_of_server(self, number: int) -> tuple[_Edge, ...]:
        edges = self._server_edges.get(number)
        if edges is None:
            edges = tuple(self._make_server_edges(self._servers.things[number]))
            if self._shifts:
                self._server_edges[number] = edges
        return edges

    def _make_server_edges(self, server: ServerState) -> Iterator[_Edge]:
        has_forks = may_crash(self.setting, server)
        for move in server_moves(self.setting, server):
            draft = ServerDraft(self.setting, server, has_forks=has_forks and move[0] != "crash")
            try:
                draft.make(move)
                yield self._edge(move, draft.freeze())
            except AssertionError as error:
                raise _ViolatingMove(move, error) from error
            yield from self._cut_edges(move, draft.forks or [])

    def _cut_edges(self, move: Move, forks: list[ServerState]) -> Iterator[_Edge]:
        last = None
        for n, left in enumerate(forks):
            # Nothing that outlives the program has changed since the cut before.
            if left != last:
                yield self._edge(("crash in", n, *move), left)
            last = left

    def _edge(self, move: Move, after: ServerState) -> _Edge:
        target, permutation = self._settle(after)
        return _Edge(self._moves.of(move), target, permutation, is_by_itself=move[0] in BY_ITSELF)

    def _edges_of_client(self, server: int, index: int, client: int) -> tuple[_Edge, ...]:
        key = (server << self._bits | client) << 2 | index
        edges = self._client_edges.get(key)
        if edges is None:
            edges = self._client_edges[key] = tuple(self._make_client_edges(server, index, client))
        return edges

    def _make_client_edges(self, server: int, index: int, client: int) -> Iterator[_Edge]:
        here, known = self._servers.things[server], self._clients.things[client]
        for move in client_moves(self.setting, here, index, known):
            draft = ClientDraft(self.setting, here, index, known)
            try:
                draft.make(move)
                target, permutation = self._settle(draft.server.freeze())
            except AssertionError as error:
                raise _ViolatingMove(move, error) from error
            after = self._number_client(draft.client)
            yield _Edge(self._moves.of(move), target, permutation, after, move[0] in BY_ITSELF)

    # --- In the end ----------------------------------------------------------------------------

    def _check_liveness(self) -> None:
        restless = self.graph.first_that_never_rests()
        if restless is not None:
            raise self.violation(restless, "from here nothing ever comes to rest")
        for bit, what in enumerate(WAITS):
            for cycle in self.graph.fair_cycles(1 << bit):
                raise self.violation(
                    min(cycle), f"{what}, for ever: a cycle of {len(cycle)} states"
                )


def _symmetries_of(bounds: Bounds) -> list[Permutation]:
    """Find the ways to exchange allocations that leave the set of requests as it is."""
    requests, names = set(bounds.requests), bounds.names
    symmetries = []
    for order in itertools.permutations(range(len(names))):
        new = {old: names[order[i]] for i, old in enumerate(names)}
        renamed = {
            NamespaceRequest(new[r.allocation_id], r.namespaces, r.uenv_image) for r in requests
        }
        if renamed == requests and order != tuple(range(len(names))):
            symmetries.append(order)
    return symmetries


def _key_of_node(node: Node) -> tuple[object, ...]:
    """Say what of a node has nothing to do with its name, nor with the clients'."""
    return (node.life, *node[2:6], len(node.jobs), *node[7:-1])


def _key_of_client(server: ServerState, index: int) -> tuple[object, ...]:
    """Say what tells a client from another one like it, in a server state."""
    numbers = tuple(link.number for link in server.links if link.client == index + 1)
    return (numbers, tuple(node.holders >> index & 1 for node in server.nodes))


def _permuted(keys: list[tuple[object, ...]], permutation: Permutation) -> list[tuple[object, ...]]:
    if not permutation:
        return keys
    permuted = list(keys)
    for old, key in enumerate(keys):
        permuted[permutation[old]] = key
    return permuted


def _permuted_bits(bits: int, permutation: Permutation) -> int:
    return sum(1 << permutation[i] for i in range(len(permutation)) if bits >> i & 1) if bits else 0
