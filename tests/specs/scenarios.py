"""Plays the scenarios of `specs/scenarios/`: whole stories, and what every party does in them.

A scenario is a Markdown file. In its blocks of kind `scenario`, a line after `> ` is a command (see
`_COMMANDS`), and what stands below it is what every party did then:

    > first wants job-1: Net Mount
    first → provider    NamespaceRequest job-1 Net Mount

Each is played in an `Environment`: the bare kernels over a simulated node, or `nshandoff serve` as
a program of its own over the Linux kernel. Each party keeps its own account of what it did; the
accounts are put in one order by the messages that tie them together, so the text does not depend
on who was faster.
Nothing that differs from one run to the next is printed: a set of namespaces is known by the
number in which it was first seen.
"""

from __future__ import annotations

import fcntl
import re
import termios
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from linux.testing.adversary import FOREVER
from statemachine import effects as do
from statemachine import events as on
from statemachine.consumer import ConsumerKernel
from statemachine.effects import Effect, Timer
from statemachine.events import Event
from statemachine.messages import NamespaceRequest, NamespaceType
from statemachine.states import ConsumerState
from tests.specs.scenarios_accounts import Item, ProviderAccount, arrow, column, names_of, words_of
from tests.specs.scenarios_stages import PATIENCE_S, Environment, Sight
from transport.channel import Channel
from transport.request import Fallback
from transport.request.blocking import perform
from transport.request.exchange import Exchange
from transport.testing.adapter import StalledWork

FOLDER: Final = Path(__file__).resolve().parents[2] / "specs" / "scenarios"
SCENARIOS: Final = tuple(sorted(FOLDER.glob("[0-9][0-9]-*.md")))

REST_S: Final = 0.05
"""How long a real stage is looked at when nothing more is to come."""

KERNELS: Final = "kernels"
DAEMON: Final = "daemon"
PLAYERS: Final = (KERNELS, DAEMON)


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
        """Who plays it; who does not is left out for a reason that stands behind."""
        found = _PLAYED_BY.search(self.text)
        assert found is not None, "it is not said who plays it"
        players = tuple(re.split(r",? and |, ", found[1].replace("the ", "")))
        assert set(players) <= set(PLAYERS), players
        assert set(players) == set(PLAYERS) or found[2], "no reason why one does not play it"
        return players

    @property
    def shown(self) -> list[str]:
        """The clauses that it shows."""
        return re.findall(r"\[([A-Z]+-\d+)\]", self.text)

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


# --- Consumers -----------------------------------------------------------------------------------


class _ConsumerRecorder(ConsumerKernel):
    """A consumer's kernel that tells what it takes in and decides."""

    def __init__(self, request: NamespaceRequest, call: Dialogue) -> None:
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


class Dialogue:
    """One allocation that a consumer deals with, and the connection that it does so on."""

    def __init__(self, consumer: AskingParty, request: NamespaceRequest, name: str) -> None:
        self.consumer = consumer
        self.name = name
        """As the scenario has it."""
        self.connection: tuple[int, int] = (-1, -1)
        """Of which life of the provider, and which of it."""
        self._numbers: Counter[Hashable] = Counter()
        self._audit: list[Fallback] = []
        player = consumer.player
        self.exchange = Exchange(
            _ConsumerRecorder(request, self),
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
        kinds = " ".join(names_of(exchange.response.fd_types))
        degraded = ", degraded" if exchange.fallback is not None else ""
        holding = f"holds {self.name}: {kinds}, set {self.set_number}{degraded}"
        return column(self.consumer.name, holding)

    @property
    def set_number(self) -> int:
        """Which namespaces it holds."""
        # Of two simulated nodes, each has its own numbers.
        node = self.consumer.name if self.exchange.fallback is not None else "the provider's"
        return self.consumer.player.number_of((node, *self.exchange.identities))

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
                perform(exchange, effect)
        if not self.consumer.is_looking_away:
            exchange.read()
        if exchange.is_done:
            # A mount namespace lives as long as there is a descriptor of it, and what is
            # mounted in it as well.
            exchange.close()


class AskingParty:
    """A party that asks."""

    def __init__(self, player: Player, name: str) -> None:
        self.player = player
        self.name = name
        self.calls: dict[str, Dialogue] = {}
        self.items: list[Item] = []
        self.service = player.stage.self_service(name)
        self.is_gone = False
        self.is_looking_away = False

    def call(self, name: str, request: NamespaceRequest) -> Dialogue:
        """Begin to deal with an allocation."""
        before = self.calls.pop(name, None)
        if before is not None:
            before.exchange.close()
        call = self.calls[name] = Dialogue(self, request, name)
        return call

    def close(self) -> None:
        """Be gone, and whatever was made by oneself with it."""
        self.is_gone = True
        for call in self.calls.values():
            call.exchange.close()
        self.calls.clear()
        self.service.close()
        self.player.stage.own_is_gone(self.name)


def unread(channel: Channel) -> int:
    """Count the bytes that a channel has sent and its peer has not read, with their overhead."""
    count = array("i", [0])
    fcntl.ioctl(channel.fileno(), termios.TIOCOUTQ, count)
    return count[0]


# --- Playing -----------------------------------------------------------------------------------


@dataclass
class Player:
    """Plays commands on a stage, and tells what every party did."""

    stage: Environment
    consumers: dict[str, AskingParty] = field(default_factory=dict)
    patience_s: float = PATIENCE_S

    def __post_init__(self) -> None:
        self._provider = ProviderAccount(self.stage.named, self.stage.caller)
        self._said: set[Hashable] = set()
        self._sets: dict[Hashable, int] = {}
        self._node = self._seen()

    def number_of(self, namespaces: Hashable) -> int:
        """Number the sets of namespaces as they come up."""
        return self._sets.setdefault(namespaces, len(self._sets) + 1)

    def play(self, told: str, expected: list[str]) -> list[str]:
        """Do what a command says; say what every party did until nothing is left to be done."""
        for pattern, act in _COMMANDS.items():
            if found := re.fullmatch(pattern, told):
                act(self, **found.groupdict())
                break
        else:
            raise ValueError(f"there is no way to play {told!r}")
        deadline = time.monotonic() + self.patience_s
        lines = self._settle()
        while lines != expected and not self.stage.is_sudden and time.monotonic() < deadline:
            time.sleep(0.002)
            lines = self._settle()
        if lines != expected:
            self.patience_s = 0.0
        while not self._is_read() and time.monotonic() < deadline:
            time.sleep(0.002)
        self._turn_page()
        return lines

    def _is_read(self) -> bool:
        """Say whether the provider has read all that was said; else the next command overtakes."""
        calls = (call for each in self.consumers.values() for call in each.calls.values())
        channels = [call.exchange.channel for call in calls if not self.stage.is_sudden]
        return not any(unread(each) for each in channels if each is not None and not each.closed)

    def afterthoughts(self) -> list[str]:
        """Say what is done though everything that was expected has been done."""
        if not self.stage.is_sudden:
            time.sleep(REST_S)
        return self._settle()

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
        accounts = [deque(each.items) for each in (*self.consumers.values(), self._provider)]
        said = {None, *self._said}
        while ready := [each for each in accounts if each and each[0].needs in said]:
            item = ready[0].popleft()
            said.add(item.says)
            text = item.text if isinstance(item.text, str) else item.text()
            if text:
                yield text
        for item in (item for account in accounts for item in account):
            yield f"{item.text or item.needs}, though what comes before it was not said"

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

    def _consumer(self, who: str) -> AskingParty:
        if who not in self.consumers:
            self.consumers[who] = AskingParty(self, who)
        return self.consumers[who]

    def _holder(self, job: str) -> Dialogue:
        calls = [c.calls[job] for c in self.consumers.values() if job in c.calls]
        return next(call for call in reversed(calls) if call.exchange.bundle is not None)

    # What several lines are needed for.

    def want(self, who: str, job: str, kinds: str, image: str | None) -> None:
        types = tuple(map(NamespaceType, kinds.split()))
        request = NamespaceRequest(self.stage.real(job), types, image)
        self._consumer(who).call(job, request).exchange.feed(on.NamespacesWanted())

    def end(self, who: str, job: str) -> None:
        consumer = self._consumer(who)
        call = consumer.calls.get(job)
        if call is None or call.exchange.kernel.state in _OVER:
            call = consumer.call(job, NamespaceRequest(self.stage.real(job), ()))
        call.exchange.feed(on.EndWanted())

    def look(self, who: str, where: str) -> None:
        self._consumer(who).is_looking_away = where == "away"

    def enter(self, job: str) -> None:
        call = self._holder(job)
        self.stage.enter(self.stage.real(job), call)
        kinds = " ".join(names_of(call.exchange.kernel.request.namespaces))
        inside = f"is in {kinds} of set {call.set_number}"
        call.consumer.items.append(Item(column("process", inside)))

    def expire(self, span: str, who: str) -> None:
        for call in self._consumer(who).calls.values():
            if _SPANS[span] in call.exchange.deadlines:
                call.exchange.deadlines[_SPANS[span]] = 0.0
                call.exchange.expire()


_OVER: Final = (ConsumerState.ENDED, ConsumerState.REFUSED, ConsumerState.FAILED)
_WORK: Final = {"creating": StalledWork.CREATE, "releasing": StalledWork.RELEASE}
_SPANS: Final = {
    "claim timeout": Timer.CLAIM,
    "release deadline": Timer.RELEASE,
    "answer deadline": Timer.ANSWER,
    "redial pause": Timer.REDIAL,
}

_WHO: Final = r"(?P<who>[a-z]+)"
_JOB: Final = r"(?P<job>job-\d+)"
_HELD: Final = "(?P<work>creating|releasing)"
_COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "the provider starts": lambda p: p.stage.start(is_held=False),
    "the provider starts and is not ready yet": lambda p: p.stage.start(is_held=True),
    "the provider gets ready": lambda p: p.stage.let_go(StalledWork.RECOVER),
    "the provider is killed": lambda p: p.stage.kill(),
    rf"{_WHO} wants {_JOB}: (?P<kinds>[A-Z][A-Za-z ]*?)(?: with (?P<image>\S+))?": Player.want,
    f"{_WHO} ends {_JOB}": Player.end,
    f"{_WHO} dies": lambda p, who: p.consumers.pop(who).close(),
    f"{_WHO} looks (?P<where>away|again)": Player.look,
    f"a process enters {_JOB}": Player.enter,
    f"a process leaves {_JOB}": lambda p, job: p.stage.leave(p.stage.real(job)),
    f"the init of {_JOB} is killed": lambda p, job: p.stage.kill_init(p.stage.real(job)),
    f"something in {_JOB} cannot die": lambda p, job: p.stage.block_release(
        p.stage.real(job), p._holder(job)
    ),
    f"what is in {_JOB} can die": lambda p, job: p.stage.unblock_release(p.stage.real(job)),
    f"an operator releases {_JOB}": lambda p, job: p.stage.release(p.stage.real(job)),
    f"{_HELD} takes long": lambda p, work: p.stage.hold(_WORK[work]),
    f"{_HELD} goes on": lambda p, work: p.stage.let_go(_WORK[work]),
    f"the (?P<span>claim timeout|release deadline) of {_JOB} passes": lambda p, span, job: (
        p.stage.expire(_SPANS[span], p.stage.real(job))
    ),
    "the hold time passes": lambda p: p.stage.pass_hold_time(),
    f"the (?P<span>answer deadline|redial pause) of {_WHO} passes": Player.expire,
}
"""Patterns of what a scenario can tell, and what is done then."""

VOCABULARY: Final = tuple(_COMMANDS)


def _in_words(sight: Sight) -> str:
    kinds = " ".join(names_of(sight.kinds)) or "no namespaces"
    cgroup = "no cgroup"
    if sight.has_cgroup:
        cgroup = f"a cgroup with {sight.processes or 'no'} process{'es' * (sight.processes != 1)}"
    return f"{kinds}, {cgroup}"


def play(scenario: Scenario, stage: Environment, patience_s: float = PATIENCE_S) -> str:
    """Play a scenario; return its text as it should be. The stage is closed."""
    player = Player(stage, patience_s=patience_s)
    try:
        text = scenario.played(player.play)
        return "\n".join([text, *player.afterthoughts()])
    finally:
        player.close()
