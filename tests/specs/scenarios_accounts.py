"""What the parties of a scenario did, each in its own order and in words that do not vary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Final, NamedTuple

from linux.testing.worlds import IMAGE
from statemachine import effects as do
from statemachine import events as on
from statemachine.effects import Effect, Timer
from statemachine.errors import NamespaceError
from statemachine.events import Event
from statemachine.messages import Message, NamespaceRequest, NamespaceResponse, NamespaceType
from statemachine.provider import ProviderKernel
from statemachine.states import AllocationState
from transport.trace import Recovered, Start, TraceEntry, Turn

UENV_BASE: Final = "/run/pact/uenv"
COLUMN: Final = 21


class Item(NamedTuple):
    """Something that a party did or took in."""

    text: str | Callable[[], str]
    """Empty if it is not told."""
    needs: Hashable = None
    """What another party must have said before."""
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
            return " ".join([kind, name, *names_of(kinds), *([f"with {image}"] if image else [])])
        case NamespaceResponse(allocation_id=name, fd_types=kinds, uenv_mount_path=path):
            return " ".join([kind, name, *names_of(kinds), *([f"at {path}"] if path else [])])
        case NamespaceError():
            return f"NamespaceError {kind}"
        case _:
            return f"{kind} {message.allocation_id}"


def _attached(response: NamespaceResponse) -> str:
    count = len(response.fd_types)
    return f" + {count} descriptor{'s' * (count > 1)}" if count else ""


def names_of(kinds: Iterable[NamespaceType]) -> list[str]:
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

    def take(self, entry: TraceEntry) -> None:
        match entry:
            case Start(limits=limits):
                self._kernel = ProviderKernel(limits)
                self.life += 1
                self._noted.clear()
            case Recovered(remembered=names):
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
