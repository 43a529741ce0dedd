"""Every world there can be, within bounds: the real kernels, breadth first, to the last state.

A *world* is a provider, its consumers, the connections between them, and the node. A *move* is one
thing that the environment may let happen to it: a message arrives, a timer expires, a job of the
backend succeeds or fails, the provider dies between two effects. The kernels are not modelled: a
move restores the real one from its snapshot, feeds it the event, takes the snapshot again, and
performs the effects as the drivers do. Beside each kernel goes the reference model of `specs`, and
every step of theirs must be the same, in state and in effects.

    explorer = Explorer(Bounds(consumers=2))
    result = explorer.explore()          # raises Counterexample with the shortest script
    result.states, result.rows, result.seen

*Safety* is checked in every move and in every world. *Liveness* is checked at the end, on the
graph of what happens by itself (`Move`s that are no fault, no request and no deadline): from every
world one can come to rest, every world at rest has kept its promises, and there is no fair cycle
in which something is waited for without end.

How a link behaves: it delays (each end reads when it likes), it loses (`lose`: for good, with all
that was on its way), and it delivers a request twice (`duplicate`). It does not split: kernels are
fed whole messages, and how frames are cut is `transport.framing`'s business, tried exhaustively in
`test_channel.py`.

In this order: `world` (what a world is), `kernels` (steps, and the model beside
them), `server` and `client` (what may happen, and what it does), `search`
(breadth first), `liveness` (what must come about), `story` (scripts and pictures).
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from specs import invariants as always

from ...consumer import ConsumerKernel
from ...errors import Copyable
from ...lifecycle import ALLOCATION, CONSUMER, NOTICE
from ...provider import ProviderKernel
from ...table import Table
from ..kit import RowKey, ViolatingPath, row_key
from ..tables import HOMES
from .client import CLIENT_MOVES, ClientDraft, client_moves, is_provided, may_have_two_sets
from .kernels import Kernels
from .liveness import check_at_rest
from .search import Search
from .server import (
    SERVER_MOVES,
    Cut,
    ServerDraft,
    Setting,
    check_server,
    server_moves,
)
from .story import Story, as_python
from .world import (
    BY_ITSELF,
    Bounds,
    Client,
    GlobalState,
    Move,
    Node,
    ServerState,
)

MOVES = frozenset({*SERVER_MOVES, *CLIENT_MOVES})
"""Every move there is, but for dying in the middle of one, which "crash" stands for, too."""


class Counterexample(Copyable, AssertionError):
    """A promise can be violated; `script` is a shortest way to do it."""

    def __init__(
        self, bounds: Bounds, script: tuple[Move, ...], finding: str, story: Story
    ) -> None:
        self.bounds = bounds
        self.script = script
        self.finding = finding
        self.chart = story.chart
        """A Mermaid sequence diagram of the script."""
        self.lives = story.lives
        """What the provider took in and decided: for `transport.testing.explored.trace_of`."""
        self.test = as_python(bounds, script, finding)
        """A test that fails."""
        super().__init__(f"{finding}\n\n{self.test}\n{self.chart}")


@dataclass
class Result:
    """What was found in a space."""

    states: int = 0
    moves: int = 0
    at_rest: int = 0
    kernel_steps: int = 0
    """How many distinct steps of kernels, each judged once."""
    hits: Counter[RowKey] = field(default_factory=Counter)
    """How often every row was taken: table, event, state."""
    seen: dict[str, int] = field(default_factory=dict)
    """Every situation that came about, and the number of the world in which it first did."""
    moments: set[Cut] = field(default_factory=set)
    """Every moment between two effects; where there may be a crash, there was one at each."""
    cuts: set[Cut] = field(default_factory=set)
    """The moments at which the provider died."""
    is_complete: bool = True
    """False: `states_max` was reached first, and liveness was not checked."""

    @property
    def rows(self) -> set[RowKey]:
        """Every row that was taken."""
        return set(self.hits)


def only(*moves: str) -> frozenset[str]:
    """Say for `Bounds.without`: nothing but these, and what happens by itself."""
    return MOVES - BY_ITSELF - set(moves)


class Explorer:
    """
    Visits every world within bounds, the nearest first.

    Args:
        bounds: how large a world may become.
        provider: the provider's kernel, or a mutant of it.
        consumer: the consumer's kernel, or a mutant of it.
        tables: the tables that the kernels use, to be replaced by mutants.
        lockstep: judge every distinct step of a kernel by the reference model.
        has_symmetry: take worlds that differ only in names for one.
        also: what else to check of every server state with a provider; raises `AssertionError`.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        provider: type[ProviderKernel] = ProviderKernel,
        consumer: type[ConsumerKernel] = ConsumerKernel,
        tables: tuple[Table, Table, Table] = (ALLOCATION, CONSUMER, NOTICE),
        lockstep: bool = True,
        has_symmetry: bool = True,
        also: Callable[[Setting, ServerState], None] | None = None,
    ) -> None:
        self.bounds = bounds
        self._tables = tables
        self._has_symmetry = has_symmetry
        kernels = Kernels(bounds, provider, consumer, has_model=lockstep)
        self._setting = Setting(bounds, kernels, also=also)

    def explore(
        self,
        *,
        states_max: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """
        Visit every world.

        Args:
            states_max: stop when there are so many.
            progress: told every 10,000 worlds how many are found and how many wait.

        Raises:
            Counterexample: with a shortest script.
        """
        setting = self._setting
        search = Search(setting, has_symmetry=self._has_symmetry)
        with self._recording(setting.kernels.rows):
            try:
                is_complete = search.run(_first(setting), states_max, progress)
            except ViolatingPath as path:
                script = self._in_plain_names(search, path)
                story = self._tell(script, path.finding)
                raise Counterexample(self.bounds, script, path.finding, story) from path
        return Result(
            states=len(search),
            moves=search.moves_made,
            at_rest=len(search.graph.at_rest),
            kernel_steps=setting.kernels.steps,
            hits=setting.kernels.hits(),
            seen=setting.seen,
            moments=setting.moments,
            cuts=setting.cuts,
            is_complete=is_complete,
        )

    def replay(self, script: Iterable[Move]) -> GlobalState:
        """
        Make moves one after the other, from the beginning; here nothing changes its name.

        Raises:
            Violation, InvariantBroken: a promise is broken, by a move or by coming to rest.
        """
        with self._recording(self._setting.kernels.rows):
            return _replay(self._setting, script)

    def _tell(self, script: tuple[Move, ...], finding: str) -> Story:
        """Replay a script that breaks a promise, and take down what happens."""
        story = self._setting.story = Story(self.bounds)
        with suppress(AssertionError):
            _replay(self._setting, script)
        self._setting.story = None
        story.end(finding)
        return story

    def _in_plain_names(self, search: Search, path: ViolatingPath) -> tuple[Move, ...]:
        """Find the script in which connections, clients and allocations keep their names."""
        script: list[Move] = []
        world = _first(self._setting)
        for number, move in enumerate(path.script, 1):
            goal = path.nodes[number] if number < len(path.nodes) else None
            for own, after in _alike(self._setting, world, move):
                if after is None and number == len(path.script):
                    return (*script, own)
                if after is not None and search.identity(after) == goal:
                    world = after
                    script.append(own)
                    break
            else:
                return path.script
        return tuple(script)

    @contextmanager
    def _recording(self, rows: list[RowKey]) -> Iterator[None]:
        # A collector of cycles finds none here, and looks at millions of tuples for them.
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            with (
                HOMES.replaced(*self._tables),
                HOMES.watched(lambda *row: rows.append(row_key(*row))),
            ):
                yield
        finally:
            if is_collecting:
                gc.enable()


# --- One world after the other -----------------------------------------------------------------


def _first(setting: Setting) -> GlobalState:
    """Make the world in which nothing has happened yet."""
    nodes = (Node(),) * len(setting.bounds.names)
    server = ServerState(setting.kernels.new_provider(), (), nodes)
    return GlobalState(server, (Client(),) * setting.bounds.consumers)


def _replay(setting: Setting, script: Iterable[Move]) -> GlobalState:
    world = _first(setting)
    for move in script:
        if setting.story is not None:
            setting.story.move(move)
        world = _make(setting, world, move)
    if not any(move[0] in BY_ITSELF for move in _moves(setting, world)):
        check_at_rest(setting, world.server, world.clients)
    return world


def _moves(setting: Setting, world: GlobalState) -> list[Move]:
    """List what may happen now."""
    found = server_moves(setting, world.server)
    for index, client in enumerate(world.clients):
        found += client_moves(setting, world.server, index, client)
    return found


def _make(setting: Setting, world: GlobalState, move: Move) -> GlobalState:
    """Make a move; raises `Violation` or `InvariantBroken` if it breaks a promise."""
    clients = list(world.clients)
    if move[0] in CLIENT_MOVES:
        draft = ClientDraft(setting, world.server, move[1], clients[move[1]])
        draft.make(move)
        clients[move[1]] = draft.client
        server = draft.server.freeze()
    else:
        server = _make_on_server(setting, world.server, move).freeze()
    check_server(setting, server)
    for index, client in enumerate(clients):
        if client.kernel and may_have_two_sets(setting, client):
            name = setting.kernels.consumer_views[client.kernel].request.allocation_id
            held = [(index, name)] if is_provided(setting, server, index) else []
            always.require(always.at_most_one_live_set([(index, name)], [], held))
    return GlobalState(server, tuple(clients))


def _make_on_server(setting: Setting, server: ServerState, move: Move) -> ServerDraft:
    is_cut = move[0] == "crash in"
    draft = ServerDraft(setting, server, crash_after=move[1] if is_cut else None)
    draft.make(move[2:] if is_cut else move)
    return draft


def _alike(
    setting: Setting, world: GlobalState, move: Move
) -> Iterator[tuple[Move, GlobalState | None]]:
    """List the moves of the same kind, and where each leads to; None: it breaks a promise."""
    is_cut = move[0] == "crash in"
    kind = move[2] if is_cut else move[0]
    for own in _moves(setting, world):
        if own[0] == kind:
            cut = (*move[:2], *own) if is_cut else own
            try:
                yield cut, _make(setting, world, cut)
            except AssertionError:
                yield cut, None
