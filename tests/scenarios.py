"""Plays the scenarios of `specs/scenarios/`: whole stories, and what every party does in them.

A scenario is a Markdown file. In its blocks of kind `scenario`, a line after `> ` is a command (the
methods of `Player` below that have one), and what stands below it is what every party did then:

    > first wants job-1: Net Mount
    first → provider    NamespaceRequest job-1 Net Mount

Who plays is a `Stage`: the bare kernels over a simulated node, or `nshandoff serve` as a program of
its own over the Linux kernel. Each party keeps its own account of what it did; the accounts are put
in one order by the messages that tie them together, so the text does not depend on who was faster.
Nothing that differs from one run to the next is printed: a set of namespaces is known by the
number in which it was first seen.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from handoffs import Work
from programs import Daemon
from stateful_adapters import InProcess
from stateful_dealings import FOREVER
from stateful_inside import put_through
from worlds import IMAGE, SimulatedWorld

from linux.backend import LinuxBackend, NodeSettings
from linux.cgroups import Scope
from linux.features import Features
from linux.forge import spawn_within
from linux.namespaces import KernelInspector
from linux.simulated import SimulatedBackend, SimulatedInspector, SimulatedNode
from linux.survey import survey_node
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect, Timer
from statemachine.errors import AllocationNotFound, NamespaceError, SocketUnavailable
from statemachine.events import Event
from statemachine.lifecycle import AllocationState, ConsumerState
from statemachine.messages import Message, NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.provider import Limits, ProviderKernel
from transport.contract import SelfService
from transport.descriptors import Descriptor, DescriptorBundle, Inspector, NamespaceIdentity
from transport.request import Fallback, _Exchange, _perform
from transport.trace import Entry, Recovery, Start, Turn, decode_line

FOLDER: Final = Path(__file__).resolve().parent.parent / "specs" / "scenarios"
SCENARIOS: Final = tuple(sorted(FOLDER.glob("[0-9][0-9]-*.md")))

KERNELS: Final = "kernels"
DAEMON: Final = "daemon"
PLAYERS: Final = (KERNELS, DAEMON)

HOLD_TIME_S: Final = 60.0
UENV_BASE: Final = "/run/pact/uenv"
PATIENCE_S: Final = 5.0
"""How long a real stage may take for what it is expected to do."""
COLUMN: Final = 21

_MOUNT: Final = NamespaceType.MOUNT
_PID: Final = NamespaceType.PID
_BLOCK: Final = re.compile(r"(?<=^```scenario\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
_PLAYED_BY: Final = re.compile(r"^Played by (.*?)\.(?: (.*?))?$", re.MULTILINE)


# --- Scenarios ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scenario:
    """A file of `specs/scenarios/`."""

    text: str

    @classmethod
    def read(cls, path: Path) -> Scenario:
        return cls(path.read_text(encoding="utf-8"))

    @property
    def players(self) -> tuple[str, ...]:
        """Who plays it; whoever does not is left out for a reason that stands behind."""
        found = _PLAYED_BY.search(self.text)
        assert found is not None, "nobody is said to play it"
        players = tuple(re.split(r",? and |, ", found[1].replace("the ", "")))
        assert set(players) <= set(PLAYERS), players
        assert set(players) == set(PLAYERS) or found[2], "no reason why one does not play it"
        return players

    @property
    def commands(self) -> list[str]:
        return [line[2:] for line in self._lines if line.startswith("> ")]

    @property
    def _lines(self) -> list[str]:
        return [line for block in _BLOCK.findall(self.text) for line in block.splitlines()]

    def played(self, play: Callable[[str, list[str]], list[str]]) -> str:
        """Return its text with what is below each command as it is told by `play`."""

        def replay(block: re.Match[str]) -> str:
            return "".join(
                f"> {command}\n" + "".join(f"{line}\n" for line in play(command, expected))
                for command, expected in _steps(block[0])
            )

        return _BLOCK.sub(replay, self.text)


def _steps(block: str) -> Iterator[tuple[str, list[str]]]:
    command, below = "", []
    for line in block.splitlines():
        if not line.startswith("> "):
            below.append(line)
            continue
        if command:
            yield command, below
        command, below = line[2:], []
    if command:
        yield command, below


# --- Accounts ----------------------------------------------------------------------------------


class Item(NamedTuple):
    """Something that a party did or took in."""

    text: str | Callable[[], str]
    """Empty if it is not told."""
    needs: Hashable = None
    """What somebody else must have said before."""
    says: Hashable = None


def column(who: str, what: str) -> str:
    return f"{who:<{COLUMN}}{what}".rstrip()


def arrow(source: str, target: str, what: str) -> str:
    return column(f"{source} → {target}", what)


def words_of(message: Message) -> str:
    """Say a message, but for what differs from one node to the next."""
    kind = type(message).__name__
    match message:
        case NamespaceRequest(allocation_id=name, namespaces=kinds, uenv_image=image):
            return " ".join([kind, name, *_names(kinds), *([f"with {image}"] if image else [])])
        case NamespaceResponse(allocation_id=name, fd_types=kinds, uenv_mount_path=path):
            return " ".join([kind, name, *_names(kinds), *([f"at {path}"] if path else [])])
        case NamespaceError():
            return f"NamespaceError {kind}"
        case _:
            return f"{kind} {message.allocation_id}"


def _attached(response: NamespaceResponse) -> str:
    count = len(response.fd_types)
    return f" + {count} descriptor{'s' * (count > 1)}" if count else ""


def _names(kinds: Iterable[NamespaceType]) -> list[str]:
    return [kind.value for kind in kinds]


_OF_NODE: Final = (
    on.NamespacesCreated,
    on.NamespacesNotCreated,
    on.ScopePopulated,
    on.ScopeEmptied,
    on.InitDied,
    on.NamespacesReleased,
    on.CreatedAdopted,
    on.HandedOffAdopted,
    on.RemainsFound,
)
_OF_TIME: Final = (on.ClaimExpired, on.ReleaseOverdue, on.ReadinessOverdue)
_OF_CONSUMERS: Final = (on.RequestReceived, on.EndReceived, on.FrameRejected)


class ProviderAccount:
    """What the provider did, by its trace, which is held to the kernel once more."""

    def __init__(self, named: Callable[[str], str], callers: Callable[[int, int], str]) -> None:
        self._named = named
        self._callers = callers
        self.life = -1
        self.items: list[Item] = []
        self.moves: dict[str, list[str]] = {}
        self._kernel = ProviderKernel()
        self._numbers: Counter[Hashable] = Counter()
        self._noted: set[tuple[str, str]] = set()
        """What was told of an incarnation and is not told again."""

    def take(self, entry: Entry) -> None:
        match entry:
            case Start(limits=limits):
                self._kernel = ProviderKernel(limits)
                self.life += 1
                self._noted.clear()
            case Recovery(remembered=names):
                self._kernel.remember(names)
            case Turn(event=event, effects=effects):
                before = self._kernel.states
                assert self._kernel.receive(event) == effects
                self._tell(event, effects)
                self._move(event, before)

    def _tell(self, event: Event, effects: tuple[Effect, ...]) -> None:
        if isinstance(event, _OF_CONSUMERS):
            self.items.append(Item("", needs=self._next("consumer", event.connection)))
        else:
            self._tell_of(event, effects)
        for effect in effects:
            self._perform(event, effect)

    def _tell_of(self, event: Event, effects: tuple[Effect, ...]) -> None:
        name = getattr(event, "allocation_id", "")
        kind = type(event).__name__
        word = f"{kind} {self._named(name)}".rstrip()
        source = next((s for s, kinds in _SOURCES.items() if isinstance(event, kinds)), None)
        if isinstance(event, on.ProviderReady):
            self.items.append(Item(column("provider", "ready")))
        elif isinstance(event, on.ReleaseDelayed):
            # Dying takes more than one try; it is worth a word only if it takes longer.
            self._note(name, Item(arrow("node", "provider", word)))
        elif isinstance(event, on.ScopePopulated):
            if self._kernel.state_of(name) is not AllocationState.ENDED:
                self._note(name, Item(arrow("node", "provider", word)))
        elif isinstance(event, on.ScopeEmptied | on.InitDied) and not effects:
            pass
        elif source is not None:
            self.items.append(Item(arrow(source, "provider", word)))
        if isinstance(event, on.NamespacesReleased):
            delay = arrow("node", "provider", f"ReleaseDelayed {self._named(name)}")
            self.items = [item for item in self.items if item.text != delay]
            self._noted = {noted for noted in self._noted if noted[0] != name}

    def _note(self, name: str, item: Item) -> None:
        if (name, str(item.text)) not in self._noted:
            self._noted.add((name, str(item.text)))
            self.items.append(item)

    def _perform(self, event: Event, effect: Effect) -> None:
        name = self._named(getattr(effect, "allocation_id", ""))
        match effect:
            case do.CreateNamespaces(request=request):
                word = f"CreateNamespaces {self._named(request.allocation_id)}"
                self.items.append(Item(arrow("provider", "node", word)))
            case do.ReleaseNamespaces() if not isinstance(event, on.RetryDue):
                self.items.append(Item(arrow("provider", "node", f"ReleaseNamespaces {name}")))
            case do.StartTimer(timer=Timer.CLAIM):
                self.items.append(Item(column("provider", f"starts the claim timer of {name}")))
            case do.StopTimer(timer=Timer.CLAIM):
                self.items.append(Item(column("provider", f"stops the claim timer of {name}")))
            case do.HandOver(connection=number, response=response):
                told = words_of(_renamed(response, self._named))
                self._say(number, f"{told}{_attached(response)}")
            case do.Refuse(connection=number, error=error):
                self._say(number, words_of(error))
            case do.AnnounceEnd(connection=number):
                self._say(number, f"AllocationEnded {name}")
            case _:
                pass

    def _say(self, number: int, what: str) -> None:
        caller = self._callers(self.life, number)
        item = Item(arrow("provider", caller, what), says=self._next("provider", number))
        self.items.append(item)

    def _next(self, side: str, number: int) -> Hashable:
        key = (side, self.life, number)
        self._numbers[key] += 1
        return (*key, self._numbers[key])

    def _move(self, event: Event, before: dict[str, AllocationState]) -> None:
        unknown = AllocationState.UNKNOWN
        for name in {**before, **self._kernel.states}:
            was, now = before.get(name, unknown), self._kernel.state_of(name)
            if was is now:
                continue
            path = self.moves.setdefault(self._named(name), [was.value])
            if isinstance(event, on.NamespacesReleased) and now is not AllocationState.RELEASED:
                path.append(AllocationState.RELEASED.value)
            path.append(now.value)


_SOURCES: Final[dict[str, Any]] = {
    "node": _OF_NODE,
    "time": _OF_TIME,
    "operator": on.ReleaseRequested,
}


def _renamed(response: NamespaceResponse, named: Callable[[str], str]) -> NamespaceResponse:
    path = response.uenv_mount_path
    if path is not None:
        path = f"{UENV_BASE}/{IMAGE.removesuffix('.sqfs')}" if path.endswith("/hello") else path
    return NamespaceResponse(named(response.allocation_id), response.fd_types, path)


class _Recorder(ConsumerKernel):
    """A consumer's kernel that tells what it takes in and decides."""

    def __init__(self, request: NamespaceRequest, call: Call) -> None:
        super().__init__(request)
        self._call = call

    def receive(self, event: Event) -> tuple[Effect, ...]:
        effects = super().receive(event)
        self._call.tell(event, effects)
        return effects


_PEERS: Final = (
    on.ResponseReceived,
    on.ResponseMismatched,
    on.CreationRefused,
    on.NotFoundReceived,
    on.ProviderUnavailable,
    on.PassingFailed,
    on.EndAnnounced,
)
_OWN_TIME: Final = (on.AnswerOverdue, on.NoticeDue, on.NoticeOverdue)


class Call:
    """One allocation that a consumer deals with, and the connection that it does so on."""

    def __init__(self, consumer: Consumer, request: NamespaceRequest, name: str) -> None:
        self.consumer = consumer
        self.name = name
        """As the scenario has it."""
        self.connection: tuple[int, int] = (-1, -1)
        """Of which life of the provider, and which of it."""
        self._numbers: Counter[Hashable] = Counter()
        self._audit: list[Fallback] = []
        player = consumer.player
        self.exchange = _Exchange(
            _Recorder(request, self),
            player.stage.inspector,
            consumer.service,
            FOREVER,
            self._audit.append,
            player.stage.path,
        )

    def tell(self, event: Event, effects: tuple[Effect, ...]) -> None:
        """Take down what the kernel took in and decided."""
        if self.consumer.is_gone:
            return
        who, items = self.consumer.name, self.consumer.items
        if isinstance(event, _PEERS):
            items.append(Item("", needs=self._next("provider")))
        elif isinstance(event, _OWN_TIME):
            items.append(Item(arrow("time", who, f"{type(event).__name__} {self.name}")))
        elif isinstance(event, on.ProviderUnreachable | on.ConnectionLost):
            items.append(Item(column(who, f"{type(event).__name__} {self.name}")))
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        who, items = self.consumer.name, self.consumer.items
        match effect:
            case do.SendRequest(request=request):
                said = NamespaceRequest(self.name, request.namespaces, request.uenv_image)
                self._say(words_of(said))
            case do.SendEnd():
                self._say(f"AllocationEnded {self.name}")
            case do.SendFault():
                self._say("NamespaceError FdPassing")
            case do.DeliverDescriptors():
                items.append(Item(self._holding))
            case do.DiscardDescriptors():
                items.append(Item(column(who, "closes what arrived, unused")))
            case do.ReportFallback():
                items.append(Item(self._audited))
            case do.ServeSelf() | do.ReleaseOwn():
                items.append(Item(arrow(who, "node", f"{type(effect).__name__} {self.name}")))
            case do.ReportRefusal(error=error):
                items.append(Item(column(who, f"is refused {self.name}: {type(error).__name__}")))
            case do.ReportEnd():
                items.append(Item(column(who, f"has done with {self.name}")))
            case _:
                pass

    def _holding(self) -> str:
        exchange = self.exchange
        assert exchange.response is not None
        number = self.consumer.player.number_of(exchange.identities)
        kinds = " ".join(_names(exchange.response.fd_types))
        degraded = ", degraded" if exchange.fallback is not None else ""
        return column(self.consumer.name, f"holds {self.name}: {kinds}, set {number}{degraded}")

    def _audited(self) -> str:
        (fallback,) = self._audit
        what = f"{fallback.event} {self.name}: {type(fallback.error).__name__}"
        return arrow(self.consumer.name, "audit", what)

    def _say(self, what: str) -> None:
        item = Item(arrow(self.consumer.name, "provider", what), says=self._next("consumer"))
        self.consumer.items.append(item)

    def _next(self, side: str) -> Hashable:
        key = (side, *self.connection)
        self._numbers[key] += 1
        return (*key, self._numbers[key])

    def work(self) -> None:
        """Do what there is to do."""
        exchange, stage = self.exchange, self.consumer.player.stage
        while exchange.slow:
            effect = exchange.slow.popleft()
            if isinstance(effect, do.Connect):
                # What is said at once is said on the connection that it opens.
                self.connection = stage.next_connection(self.consumer.name)
                stage.connect(exchange)
                if exchange.channel is None:
                    stage.forget_connection()
            else:
                _perform(exchange, effect)
        if not self.consumer.is_looking_away:
            exchange.read()


class Consumer:
    """A party that asks."""

    def __init__(self, player: Player, name: str) -> None:
        self.player = player
        self.name = name
        self.calls: dict[str, Call] = {}
        self.items: list[Item] = []
        self.service = player.stage.self_service(name)
        self.is_gone = False
        self.is_looking_away = False

    def call(self, name: str, request: NamespaceRequest) -> Call:
        """Begin to deal with an allocation."""
        before = self.calls.pop(name, None)
        if before is not None:
            before.exchange.close()
        call = self.calls[name] = Call(self, request, name)
        return call

    def close(self) -> None:
        """Be gone, and whatever was made by oneself with it."""
        self.is_gone = True
        for call in self.calls.values():
            call.exchange.close()
        self.calls.clear()
        self.service.close()
        self.player.stage.own_is_gone(self.name)


# --- Stages ------------------------------------------------------------------------------------


class Sight(NamedTuple):
    """What is on the node of one allocation."""

    kinds: tuple[NamespaceType, ...]
    has_cgroup: bool
    processes: int


class Stage(ABC):
    """Where a scenario is played: a node, and a provider that comes and goes on it."""

    path = Path("nowhere")
    inspector: Inspector
    is_sudden = True
    """Whether everything that follows from a step is done when it returns."""

    def __init__(self) -> None:
        self.callers: list[list[str]] = []
        """Who called each life of the provider, in order."""

    def real(self, name: str) -> str:
        return name

    def named(self, name: str) -> str:
        return name

    def caller(self, life: int, number: int) -> str:
        return self.callers[life][number - 1]

    def next_connection(self, name: str) -> tuple[int, int]:
        if not self.callers:
            return -1, -1
        self.callers[-1].append(name)
        return len(self.callers) - 1, len(self.callers[-1])

    def forget_connection(self) -> None:
        if self.callers:
            self.callers[-1].pop()

    @abstractmethod
    def start(self, *, is_held: bool) -> None: ...
    @abstractmethod
    def kill(self) -> None: ...
    @abstractmethod
    def hold(self, work: Work) -> None: ...
    @abstractmethod
    def let_go(self, work: Work) -> None: ...
    @abstractmethod
    def expire(self, timer: Timer, name: str) -> None: ...
    @abstractmethod
    def pass_hold_time(self) -> None: ...
    @abstractmethod
    def release(self, name: str) -> None: ...
    @abstractmethod
    def connect(self, exchange: _Exchange) -> None: ...
    @abstractmethod
    def enter(self, name: str, call: Call) -> None: ...
    @abstractmethod
    def leave(self, name: str) -> None: ...
    @abstractmethod
    def kill_init(self, name: str) -> None: ...
    @abstractmethod
    def entangle(self, name: str, call: Call) -> None: ...
    @abstractmethod
    def disentangle(self, name: str) -> None: ...
    @abstractmethod
    def self_service(self, name: str) -> SelfService: ...
    @abstractmethod
    def work(self) -> None:
        """Let the provider do what there is to do."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """What the provider has traced since it was last asked."""

    @abstractmethod
    def sights(self) -> dict[str, Sight]:
        """What is on the node of each allocation of the provider's."""

    @abstractmethod
    def own_sight(self, name: str, call: Call) -> Sight | None:
        """What is on the node that a consumer made by itself."""

    @abstractmethod
    def images(self) -> dict[str, int]:
        """The images that are mounted, and by how many allocations each is used."""

    def own_is_gone(self, name: str) -> None:
        """Take note that a consumer's own service is closed."""

    @abstractmethod
    def close(self) -> None: ...


class OnKernels(Stage):
    """Kernels in this thread, on a simulated node."""

    inspector = SimulatedInspector()

    def __init__(self) -> None:
        super().__init__()
        self._world = SimulatedWorld()
        self._adapter = InProcess(self._world, ProviderKernel, ConsumerKernel)
        self._own: dict[str, SimulatedNode] = {}
        self._seen = 0
        self._fresh: list[Entry] = []
        self._is_there = True
        # The adapter has served once already; the node has not noticed.
        self.kill()
        self._fresh.clear()

    def start(self, *, is_held: bool) -> None:
        if is_held:
            self._adapter.hold(Work.RECOVER)
        limits = Limits(frozenset({os.geteuid()}))
        self._fresh += [Start(limits), Recovery(tuple(self._world.node.remembered))]
        self.callers.append([])
        self._seen, self._is_there = 0, True
        self._adapter.start()

    def kill(self) -> None:
        self._fresh += self._turns()
        self._adapter.stop()
        self._world.backend.close()
        self._is_there = False
        for work in _WORK.values():
            self._adapter.let_go(work)

    def hold(self, work: Work) -> None:
        self._adapter.hold(work)

    def let_go(self, work: Work) -> None:
        self._adapter.let_go(work)

    def expire(self, timer: Timer, name: str) -> None:
        self._adapter.expire(timer, name)

    def pass_hold_time(self) -> None:
        self._world.now_s += HOLD_TIME_S
        self._world.backend.tidy()

    def release(self, name: str) -> None:
        self._adapter.release(name)

    def connect(self, exchange: _Exchange) -> None:
        if self._is_there:
            put_through(exchange, self._adapter._connect())
        else:
            exchange.not_connected(SocketUnavailable("nobody is there"))

    def enter(self, name: str, call: Call) -> None:
        is_inside = _PID in call.exchange.kernel.request.namespaces
        self._node_of(call).start_process(name, is_inside=is_inside)

    def leave(self, name: str) -> None:
        nodes = [self._world.node, *self._own.values()]
        next(node for node in nodes if name in node.lives).end_process(name)

    def kill_init(self, name: str) -> None:
        self._world.kill_init(name)

    def entangle(self, name: str, call: Call) -> None:
        self._node_of(call).leave_unreaped(name)

    def disentangle(self, name: str) -> None:
        self._world.node.reap(name)

    def _node_of(self, call: Call) -> SimulatedNode:
        own = self._own[call.consumer.name]
        return own if call.name in own.lives else self._world.node

    def self_service(self, name: str) -> SelfService:
        node = self._own[name] = SimulatedNode(frozenset({IMAGE}))
        return SimulatedBackend(node)

    def own_is_gone(self, name: str) -> None:
        self._own.pop(name).close()

    def work(self) -> None:
        if self._is_there:
            self._adapter._work()

    def _turns(self) -> list[Turn]:
        turns = [Turn(*turn) for turn in self._adapter.turns()[self._seen :]]
        self._seen += len(turns)
        return turns

    def entries(self) -> list[Entry]:
        fresh, self._fresh = self._fresh, []
        return [*fresh, *(self._turns() if self._is_there else [])]

    def sights(self) -> dict[str, Sight]:
        return {name: self._sight(life) for name, life in self._world.node.lives.items()}

    def own_sight(self, name: str, call: Call) -> Sight | None:
        life = self._own[call.consumer.name].lives.get(name)
        return None if life is None else self._sight(life)

    def _sight(self, life: Any) -> Sight:
        kinds = () if life.is_init_gone else tuple(held.namespace.kind for held in life.namespaces)
        living = sum(each.member.is_alive for each in life.workload)
        return Sight(kinds, life.scope is not None, living)

    def images(self) -> dict[str, int]:
        lives = self._world.node.lives.values()
        return {
            image: sum(life.image == image and not life.is_init_gone for life in lives)
            for image in self._world.node.mounted
        }

    def close(self) -> None:
        self._adapter.close()


class _Program(Daemon):
    """`tests/scenarios_daemon.py`, between two lives or in one."""

    def __init__(self, directory: Path, image_root: Path) -> None:
        self.trace = directory / "trace"
        spans = [f"--{span}={10**6}" for span in ("claim-timeout", "release-deadline")]
        hold = f"--hold-time={HOLD_TIME_S:g}"
        super().__init__(directory, image_root, *spans, hold, f"--trace={self.trace}")

    def launch(self, *held: str) -> None:
        """Start it; `start` also waits until it is ready."""
        program = [sys.executable, str(Path(__file__).with_name("scenarios_daemon.py"))]
        with self.log.open("ab") as log:
            self.program = subprocess.Popen(
                [*program, *self.words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
        self._write(held)

    def start(self, **more: str) -> None:
        self.launch()
        until(self._is_ready, "the provider is ready")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        program = self.program
        code = super().stop(number)
        for pipe in (program.stdin, program.stdout):  # type: ignore[union-attr]
            pipe.close()  # type: ignore[union-attr]
        return code

    def tell(self, *words: object) -> None:
        """Have it do something."""
        self._write(words)
        assert self.program is not None
        assert self.program.stdout is not None
        assert self.program.stdout.readline() == b"\n", self.log.read_text()

    def _write(self, words: Iterable[object]) -> None:
        assert self.program is not None
        assert self.program.stdin is not None
        self.program.stdin.write(json.dumps([*words]).encode() + b"\n")


class OnDaemon(Stage):
    """
    The daemon as a program of its own, on this node.

    Args:
        directory: Its own, and empty.
        cgroup2: Where cgroup v2 is mounted.
        image_root: Has `hello.sqfs`.
        prefix: Begins the name of every allocation.
    """

    is_sudden = False

    def __init__(self, directory: Path, cgroup2: Path, image_root: Path, prefix: str) -> None:
        super().__init__()
        self._features = Features.probe()
        self.inspector = KernelInspector(self._features)
        self._daemon = _Program(directory, image_root)
        self.path = self._daemon.socket
        self._settings = NodeSettings(cgroup2, image_root, self._daemon.uenv_base)
        self._image_root = image_root
        self._cgroup2 = cgroup2
        self._prefix = f"{prefix}-"
        self._read = 0
        self._inside: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._entangled: dict[str, subprocess.Popen[bytes]] = {}
        self._own: dict[str, LinuxBackend] = {}

    def real(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def named(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def start(self, *, is_held: bool) -> None:
        self.callers.append([])
        if is_held:
            self._daemon.launch(Work.RECOVER.name)
            until(self._is_listening, "the provider listens")
        else:
            self._daemon.start()

    def _is_listening(self) -> bool:
        listening = f"{self.path}\n"
        sockets = Path("/proc/net/unix").read_text()
        return any(f"{line}\n".endswith(listening) for line in sockets.splitlines())

    def kill(self) -> None:
        self._daemon.stop(signal.SIGKILL)

    def hold(self, work: Work) -> None:
        self._daemon.tell("hold", work.name)

    def let_go(self, work: Work) -> None:
        self._daemon.tell("let_go", work.name)

    def expire(self, timer: Timer, name: str) -> None:
        self._daemon.tell("expire", timer.name, name)

    def pass_hold_time(self) -> None:
        self._daemon.tell("put_forward", HOLD_TIME_S)

    def release(self, name: str) -> None:
        self._daemon.tell("release", name)

    def connect(self, exchange: _Exchange) -> None:
        _perform(exchange, do.Connect())

    def enter(self, name: str, call: Call) -> None:
        exchange = call.exchange
        assert exchange.bundle is not None
        scope = self._cgroup2 / "workload.slice" / f"{name}.scope"
        if exchange.fallback is not None:
            scope = self._own[call.consumer.name].scope_of(name) or scope
        with Scope(scope, "").open_procs() as procs:
            process = spawn_within(["sleep", "infinity"], exchange.bundle, scope=procs)
        self._inside.setdefault(name, []).append(process)
        self._check(process.pid, exchange.bundle, exchange.response)

    def _check(
        self, pid: int, bundle: DescriptorBundle, response: NamespaceResponse | None
    ) -> None:
        """Ask the Linux kernel where the process is."""
        for kind, descriptor in bundle:
            entered = os.stat(f"/proc/{pid}/ns/{_LINKS[kind]}").st_ino
            assert entered == os.fstat(descriptor.fileno()).st_ino, kind
        if response is not None and response.uenv_mount_path is not None:
            seen = Path(f"/proc/{pid}/root{response.uenv_mount_path}/hello.txt")
            assert seen.read_text() == "hello from the image\n"

    def leave(self, name: str) -> None:
        process = self._inside[name].pop()
        process.kill()
        process.wait()

    def kill_init(self, name: str) -> None:
        seen = survey_node(self._daemon.state_dir, self._features).allocations
        (init,) = (each.init_pid for each in seen if each.entry.allocation_id == name)
        assert init is not None
        os.kill(init, signal.SIGKILL)

    def entangle(self, name: str, call: Call) -> None:
        assert call.exchange.bundle is not None
        process = spawn_within(["sleep", "infinity"], call.exchange.bundle)
        self._entangled[name] = process
        process.kill()
        # Dead, and not reaped by its parent, which is outside: its init waits for that.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def disentangle(self, name: str) -> None:
        self._entangled.pop(name).wait()

    def self_service(self, name: str) -> SelfService:
        own = self._own[name] = LinuxBackend.for_self_service(
            self._settings, clock=time.monotonic, features=self._features
        )
        return own

    def own_is_gone(self, name: str) -> None:
        del self._own[name]

    def work(self) -> None:
        """It works by itself; only its workload's parent is here."""
        for processes in self._inside.values():
            for process in processes:
                process.poll()

    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        if self._daemon.trace.exists():
            data = self._daemon.trace.read_bytes()[self._read :]
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            found = [decode_line(1, line)[1] for line in whole.splitlines()]
        return found

    def sights(self) -> dict[str, Sight]:
        found = {}
        for seen in survey_node(self._daemon.state_dir, self._features).allocations:
            kinds = seen.entry.request.namespaces if seen.init_pid is not None else ()
            living = sum(process.state != "Z" for process in seen.processes)
            sight = Sight(kinds, seen.scope is not None, living)
            if sight != Sight((), False, 0):
                found[seen.entry.allocation_id] = sight
        return found

    def own_sight(self, name: str, call: Call) -> Sight | None:
        own = self._own[call.consumer.name]
        try:
            scope = own.scope_of(name)
        except AllocationNotFound:
            return None
        pids = [] if scope is None else (scope / "cgroup.procs").read_text().split()
        return Sight(call.exchange.kernel.request.namespaces, scope is not None, len(pids))

    def images(self) -> dict[str, int]:
        seen = survey_node(self._daemon.state_dir, self._features)
        living = [each for each in seen.allocations if each.init_pid is not None]
        return {
            image.image: sum(each.entry.request.uenv_image == image.image for each in living)
            for image in seen.images
            if Path(image.file).is_relative_to(self._image_root)
        }

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._stop)
            for process in (*self._entangled.values(), *(p for ps in self._inside.values() for p in ps)):
                process.kill()
                process.wait()

    def _stop(self) -> None:
        if self._daemon.program is not None:
            self._daemon.stop(signal.SIGKILL)
        if self.callers:
            # Another one, on which nothing is held, so that nothing is left.
            self._daemon.start()
            self._daemon.clear()
            self._daemon.stop()


_LINKS: Final = {NamespaceType.PID: "pid", NamespaceType.NET: "net", NamespaceType.MOUNT: "mnt"}


def until(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.002)


# --- Playing -----------------------------------------------------------------------------------

_COMMANDS: Final[list[tuple[re.Pattern[str], str]]] = []


def command(pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a method one of the things that a scenario can tell."""

    def register(method: Callable[..., None]) -> Callable[..., None]:
        regular = re.sub(r"WHO", r"(?P<who>[a-z]+)", pattern)
        regular = re.sub(r"JOB", r"(?P<job>job-\\d+)", regular)
        _COMMANDS.append((re.compile(regular), method.__name__))
        return method

    return register


@dataclass
class Player:
    """Plays commands on a stage, and tells what every party did."""

    stage: Stage
    consumers: dict[str, Consumer] = field(default_factory=dict)
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        self._provider = ProviderAccount(self.stage.named, self.stage.caller)
        self._said: set[Hashable] = set()
        self._sets: dict[tuple[NamespaceIdentity, ...], int] = {}
        self._node = self._seen()

    def number_of(self, identities: tuple[NamespaceIdentity, ...]) -> int:
        """Number the sets of namespaces as they come up."""
        return self._sets.setdefault(identities, len(self._sets) + 1)

    def play(self, told: str, expected: list[str]) -> list[str]:
        """Do what a command says; say what every party did until nothing is left to be done."""
        for pattern, name in _COMMANDS:
            if found := pattern.fullmatch(told):
                getattr(self, name)(**found.groupdict())
                break
        else:
            raise ValueError(f"no command: {told!r}")
        deadline = time.monotonic() + self.patience_s
        lines = self._settle()
        while lines != expected and not self.stage.is_sudden and time.monotonic() < deadline:
            time.sleep(0.002)
            lines = self._settle()
        if lines != expected:
            self.patience_s = 0.0
        self._turn_page()
        return lines

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.stage.close)
            for consumer in self.consumers.values():
                stack.callback(consumer.close)

    # The account.

    def _settle(self) -> list[str]:
        before = -1
        while before != (count := self._count()):
            before = count
            for consumer in self.consumers.values():
                for call in tuple(consumer.calls.values()):
                    call.work()
            self.stage.work()
            for entry in self.stage.entries():
                self._provider.take(entry)
        return [*self._merged(), *self._moves(), *self._differences()]

    def _count(self) -> int:
        return len(self._provider.items) + sum(len(c.items) for c in self.consumers.values())

    def _merged(self) -> Iterator[str]:
        """Put the accounts in the one order that what was said leaves, consumers first."""
        accounts = [[*c.items] for c in (*self.consumers.values(), self._provider)]
        said = {None, *self._said}
        while (account := next((a for a in accounts if a and a[0].needs in said), None)) is not None:
            item = account.pop(0)
            said.add(item.says)
            text = item.text if isinstance(item.text, str) else item.text()
            if text:
                yield text

    def _moves(self) -> Iterator[str]:
        for name, path in sorted(self._provider.moves.items()):
            yield column(name, " → ".join(path))

    def _differences(self) -> Iterator[str]:
        now = self._seen()
        for what in sorted({**self._node, **now}, key=lambda what: (what.endswith(".sqfs"), what)):
            if now.get(what) != self._node.get(what):
                yield column("node", f"{what}: {now.get(what, 'nothing left')}")

    def _seen(self) -> dict[str, str]:
        """What is on the node now, in words."""
        found = {
            self.stage.named(name): _in_words(sight)
            for name, sight in sorted(self.stage.sights().items())
        }
        for consumer in self.consumers.values():
            for call in consumer.calls.values():
                sight = self.stage.own_sight(self.stage.real(call.name), call)
                if sight is not None:
                    found[f"{call.name} of {consumer.name}"] = _in_words(sight)
        for image, users in sorted(self.stage.images().items()):
            found[image] = f"mounted, {users or 'no'} user{'s' * (users != 1)}"
        return found

    def _turn_page(self) -> None:
        for account in (*self.consumers.values(), self._provider):
            self._said |= {item.says for item in account.items}
            account.items.clear()
        self._provider.moves.clear()
        self._node = self._seen()

    def _consumer(self, who: str) -> Consumer:
        if who not in self.consumers:
            self.consumers[who] = Consumer(self, who)
        return self.consumers[who]

    def _holder(self, job: str) -> Call:
        calls = [c.calls[job] for c in self.consumers.values() if job in c.calls]
        return next(call for call in reversed(calls) if call.exchange.bundle is not None)

    # The commands.

    @command("the provider starts")
    def _start(self) -> None:
        self.stage.start(is_held=False)

    @command("the provider starts and is not ready yet")
    def _start_slowly(self) -> None:
        self.stage.start(is_held=True)

    @command("the provider gets ready")
    def _get_ready(self) -> None:
        self.stage.let_go(Work.RECOVER)

    @command("the provider is killed")
    def _kill(self) -> None:
        self.stage.kill()

    @command(r"WHO wants JOB: (?P<kinds>[A-Z][A-Za-z ]*?)(?: with (?P<image>\S+))?")
    def _want(self, who: str, job: str, kinds: str, image: str | None) -> None:
        types = tuple(map(NamespaceType, kinds.split()))
        request = NamespaceRequest(self.stage.real(job), types, image)
        self._consumer(who).call(job, request).exchange.feed(on.NamespacesWanted())

    @command("WHO ends JOB")
    def _end(self, who: str, job: str) -> None:
        consumer = self._consumer(who)
        call = consumer.calls.get(job)
        if call is None or call.exchange.kernel.state in _OVER:
            call = consumer.call(job, NamespaceRequest(self.stage.real(job), ()))
        call.exchange.feed(on.EndWanted())

    @command("WHO dies")
    def _die(self, who: str) -> None:
        self.consumers.pop(who).close()

    @command("WHO looks away")
    def _look_away(self, who: str) -> None:
        self._consumer(who).is_looking_away = True

    @command("WHO looks again")
    def _look_again(self, who: str) -> None:
        self._consumer(who).is_looking_away = False

    @command("a process enters JOB")
    def _enter(self, job: str) -> None:
        call = self._holder(job)
        self.stage.enter(self.stage.real(job), call)
        number = self.number_of(call.exchange.identities)
        kinds = " ".join(_names(call.exchange.kernel.request.namespaces))
        call.consumer.items.append(Item(column("process", f"is in {kinds} of set {number}")))

    @command("a process leaves JOB")
    def _leave(self, job: str) -> None:
        self.stage.leave(self.stage.real(job))

    @command("the init of JOB is killed")
    def _kill_init(self, job: str) -> None:
        self.stage.kill_init(self.stage.real(job))

    @command("something in JOB cannot die")
    def _entangle(self, job: str) -> None:
        self.stage.entangle(self.stage.real(job), self._holder(job))

    @command("what is in JOB can die")
    def _disentangle(self, job: str) -> None:
        self.stage.disentangle(self.stage.real(job))

    @command("an operator releases JOB")
    def _release(self, job: str) -> None:
        self.stage.release(self.stage.real(job))

    @command("(?P<work>creating|releasing) takes long")
    def _hold(self, work: str) -> None:
        self.stage.hold(_WORK[work])

    @command("(?P<work>creating|releasing) goes on")
    def _let_go(self, work: str) -> None:
        self.stage.let_go(_WORK[work])

    @command("the (?P<span>claim timeout|release deadline) of JOB passes")
    def _expire(self, span: str, job: str) -> None:
        self.stage.expire(_SPANS[span], self.stage.real(job))

    @command("the hold time passes")
    def _pass_hold_time(self) -> None:
        self.stage.pass_hold_time()

    @command("the (?P<span>answer deadline|redial pause) of WHO passes")
    def _expire_consumer(self, span: str, who: str) -> None:
        for call in self._consumer(who).calls.values():
            if _SPANS[span] in call.exchange.deadlines:
                call.exchange.deadlines[_SPANS[span]] = 0.0
                call.exchange.expire(time.monotonic())


_OVER: Final = (ConsumerState.ENDED, ConsumerState.REFUSED, ConsumerState.FAILED)
_WORK: Final = {"creating": Work.CREATE, "releasing": Work.RELEASE}
_SPANS: Final = {
    "claim timeout": Timer.CLAIM,
    "release deadline": Timer.RELEASE,
    "answer deadline": Timer.ANSWER,
    "redial pause": Timer.REDIAL,
}

VOCABULARY: Final = tuple(pattern.pattern for pattern, _ in _COMMANDS)


def _in_words(sight: Sight) -> str:
    kinds = " ".join(_names(sight.kinds)) or "no namespaces"
    cgroup = "no cgroup"
    if sight.has_cgroup:
        cgroup = f"a cgroup with {sight.processes or 'no'} process{'es' * (sight.processes != 1)}"
    return f"{kinds}, {cgroup}"


def play(scenario: Scenario, stage: Stage) -> str:
    """Play a scenario; return its text as it should be."""
    player = Player(stage)
    try:
        return scenario.played(player.play)
    finally:
        player.close()
