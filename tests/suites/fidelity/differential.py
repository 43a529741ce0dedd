"""Random programs on both machines: whatever they can see must be the same.

A program is a list of calls, drawn from a seed. A program on which the machines differ is shrunk by
leaving calls out, and printed as Python that shows the difference again.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple, TypeAlias

from linux.simulated.mounts import Propagation
from linux.testing.worlds import IMAGE, OTHER_IMAGE
from statemachine.messages import NamespaceType
from tests.suites.fidelity.backend import ALLOCATIONS, SimulatedProgram, linux_program
from tests.suites.fidelity.cgroups import PATHS, PROCESSES, SimulatedCgroups, linux_cgroups
from tests.suites.fidelity.machines import PATIENCE_S, Operation
from tests.suites.fidelity.mounts import IMAGES, INSIDES, PLACES, SimulatedMounts, linux_mounts
from tests.suites.fidelity.namespaces import SimulatedWorker, linux_worker
from tests.suites.fidelity.sockets import WINDOW, SimulatedSockets, linux_sockets

POLL_S: Final = 0.001

NOTICES_S: Final = (0.05, 0.5)
"""
Longer than Linux holds a notice back: it tells of a change in a cgroup at most once in 10 ms
(CGROUP_FILE_NOTIFY_MIN_INTV, by a timer of whole ticks), and of a frozen process when that has had
the processor. The notice of a second change may so come when that has been read already. The longer
pause is for a machine that is busy, and only tried where the shorter one leaves a difference.
"""

PID: Final = NamespaceType.PID
NET: Final = NamespaceType.NET
MOUNT: Final = NamespaceType.MOUNT

Program: TypeAlias = tuple[Operation, ...]

Draws: TypeAlias = tuple[tuple[Callable[[random.Random], Operation], int], ...]
"""What a program can call, and how often that is drawn."""


def draw_calls(chance: random.Random, draws: Draws, calls_max: int) -> list[Operation]:
    """Draw a few calls."""
    kinds = chance.choices(
        [draw for draw, _ in draws], [weight for _, weight in draws], k=calls_max
    )
    return [draw(chance) for draw in kinds[: chance.randrange(2, calls_max)]]


@dataclass(frozen=True)
class Family:
    """What programs of one kind are made of, and run on."""

    name: str
    singular: str
    draw: Callable[[random.Random], Program]
    simulated: Callable[[], Any]
    linux: Callable[[], AbstractContextManager[Any]]
    """The machine, ready for one program after the other."""
    eventual: frozenset[str] = frozenset()
    """Calls that only look, at what Linux promises to be so in a moment."""
    notices: frozenset[str] = frozenset()
    """Calls whose answer may be late; so they are compared with pauses between calls."""


class Divergence(NamedTuple):
    """Where the machines first differ."""

    step: int
    call: Operation
    linux: object
    simulated: object

    def __str__(self) -> str:
        said = f"Linux says {_brief(self.linux)}, the simulation {_brief(self.simulated)}"
        return f"step {self.step}, {self.call}: {said}"


def _brief(answer: object) -> str:
    """An answer without the middle of a flood."""
    return re.sub(r"(.)\1{99,}", lambda run: f"{run[1]}*{len(run[0])}", repr(answer))


def perform(machine: Any, call: Operation) -> object:
    """Do one call; a failure is its errno's name."""
    try:
        return getattr(machine, call.name)(*call.arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@dataclass
class Comparison:
    """Both machines of a family, ready for one program after the other."""

    family: Family
    linux: Any
    simulated: Any
    cells: Counter[str] = field(default_factory=Counter)
    """What Linux answered to which call, in a word, and how often."""
    programs: int = 0
    """How many were drawn."""

    def run(self, program: Program) -> Divergence | None:
        """Run a program on both machines, which begin anew, up to where they differ."""
        difference = None
        for pause_s in (0, *NOTICES_S):
            difference = self._run(program, pause_s)
            if difference is None or difference.call.name not in self.family.notices:
                break
        return difference

    def _run(self, program: Program, pause_s: float) -> Divergence | None:
        self.linux.reset()
        self.simulated.reset()
        for step, call in enumerate(program):
            time.sleep(pause_s)
            answer = perform(self.linux, call)
            self.simulated.told(call, answer)
            said = perform(self.simulated, call)
            if answer != said and call.name in self.family.eventual:
                answer = self._answer_in_a_moment(call, said)
            if answer != said:
                return Divergence(step, call, answer, said)
            self.cells[f"{call.name} {_word(answer)}"] += 1
        return None

    def _answer_in_a_moment(self, call: Operation, said: object) -> object:
        deadline = time.monotonic() + PATIENCE_S
        while (answer := perform(self.linux, call)) != said and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return answer


@contextmanager
def comparing(family: Family) -> Iterator[Comparison]:
    """Have both machines, for as long as the context lasts."""
    with family.linux() as linux:
        yield Comparison(family, linux, family.simulated())


def _word(answer: object) -> str:
    """Say of what sort an answer is."""
    match answer:
        case str() | bool() | None:
            return str(answer)
        case (bytes(), list() as come, bool() as is_truncated):
            return f"{len(come)} descriptors{', truncated' if is_truncated else ''}"
        case tuple() if all(isinstance(each, bool) for each in answer):
            return str(answer)
        case _:
            return "something" if answer else "nothing"


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Leave out of a failing program whatever it fails without: ever smaller parts, to the end."""
    size = len(program) // 2
    while size:
        at = 0
        while at < len(program):
            shorter = program[:at] + program[at + size :]
            if fails(shorter):
                program = shorter
            else:
                at += size
        size //= 2
    return program


def script(family: Family, program: Program) -> str:
    """Say a program as a test that shows what it showed."""
    calls = "".join(f"    Operation({call.name!r}, {_code(call.arguments)}),\n" for call in program)
    return f"""from tests.suites.fidelity.differential import FAMILIES, Operation, comparing

from linux.simulated.mounts import Propagation
from statemachine.messages import NamespaceType

PROGRAM = (
{calls})


def test_the_simulation_is_not_told_from_linux():
    with comparing(FAMILIES[{family.name!r}]) as comparison:
        assert comparison.run(PROGRAM) is None
"""


def _code(value: object) -> str:
    """Say a value as Python reads it: an enum's member by its name."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{_code(each)}, " for each in value).strip() + ")"
    return str(value) if isinstance(value, Enum) else repr(value)


class ShrunkProgram(NamedTuple):
    """A program that shows a difference, shrunk."""

    seed: int
    program: Program
    difference: Divergence


def search(comparison: Comparison, seeds: range, findings_max: int = 3) -> Iterator[ShrunkProgram]:
    """Run one program of each seed, and yield what differs; no more than some."""
    found = 0
    for seed in seeds:
        program = comparison.family.draw(random.Random(seed))
        comparison.programs += 1
        difference = comparison.run(program)
        if difference is None:
            continue
        shrunk = shrink(program, lambda p: comparison.run(p) is not None)
        again = comparison.run(shrunk)
        # One that does not come again is one all the same: then nothing could be left out.
        yield ShrunkProgram(seed, shrunk if again else program, again or difference)
        found += 1
        if found == findings_max:
            return


# --- Sockets, descriptors, limits ---------------------------------------------------------------

_SIZES: Final = (0, 1, 1, 2, 3, 5, 8, 64)
_CONTROL_BYTES: Final = (0, 16, 19, 20, 24, 28, 32, 64, 64)
_FLOOD: Final = 300_000


def _draw_sockets(chance: random.Random) -> Program:
    """A pair and a file to begin with, so that most numbers mean something."""
    calls = draw_calls(chance, _SOCKET_CALLS, 16)
    return (Operation("pair"), Operation("open"), *calls, Operation("table"), Operation("alive"))


def _fd(chance: random.Random) -> int:
    return chance.choice((0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 9))


def _end(chance: random.Random, often: int) -> int:
    """Mostly one and the same, so that what is sent is received."""
    return often if chance.random() < 0.7 else _fd(chance)


def _passed(chance: random.Random) -> int:
    return chance.choice((0, 1, 2, 2, 2, 2, 2, 2, 3, 4, 9))


def _draw_send(chance: random.Random) -> Operation:
    count = _FLOOD if chance.random() < 0.02 else chance.choice(_SIZES)
    many = chance.random()
    if many < 0.02:
        fds = (2,) * chance.choice((252, 253, 254))
    else:
        fds = tuple(_passed(chance) for _ in range(max(0, int(many * 6) - 1)))
    return Operation("send", (_end(chance, 0), count, fds))


def _draw_receive(chance: random.Random) -> Operation:
    size = 100_000 if chance.random() < 0.1 else chance.choice(_SIZES)
    is_peek, is_inherited = chance.random() < 0.15, chance.random() < 0.1
    end, control_bytes = _end(chance, 1), chance.choice(_CONTROL_BYTES)
    return Operation("receive", (end, size, control_bytes, is_peek, is_inherited))


_SOCKET_CALLS: Final[Draws] = (
    (_draw_send, 30),
    (_draw_receive, 30),
    (lambda chance: Operation("read", (_fd(chance), chance.choice(_SIZES[1:]))), 4),
    (lambda chance: Operation("open"), 4),
    (lambda chance: Operation("pair"), 3),
    (lambda chance: Operation("duplicate", (_fd(chance),)), 4),
    (lambda chance: Operation("close_fd", (_fd(chance),)), 8),
    (lambda chance: Operation("limit", (chance.randrange(WINDOW + 1),)), 5),
    (lambda chance: Operation("shutdown", (_fd(chance), chance.randrange(3))), 2),
    (lambda chance: Operation("accept_rights", (_fd(chance), chance.random() < 0.4)), 2),
    (lambda chance: Operation("table"), 1),
    (lambda chance: Operation("alive"), 3),
)


# --- Cgroups ------------------------------------------------------------------------------------


def _draw_cgroups(chance: random.Random) -> Program:
    at_the_end = [Operation(name, (path,)) for path in PATHS for name in ("populated", "processes")]
    return (Operation("make", ("a",)), *draw_calls(chance, _CGROUP_CALLS, 20), *at_the_end)


def _path(chance: random.Random) -> str:
    return chance.choice(("a", "a", "a", *PATHS))


def _process(chance: random.Random) -> int:
    return chance.randrange(PROCESSES)


_CGROUP_CALLS: Final[Draws] = (
    (lambda chance: Operation("make", (chance.choice(PATHS),)), 8),
    (lambda chance: Operation("remove", (_path(chance),)), 6),
    (lambda chance: Operation("enter", (_path(chance), _process(chance))), 20),
    (lambda chance: Operation("exit", (_process(chance),)), 3),
    (lambda chance: Operation("reap", (_process(chance),)), 3),
    (lambda chance: Operation("kill", (_path(chance),)), 2),
    (lambda chance: Operation("freeze", (_path(chance), chance.random() < 0.6)), 4),
    (lambda chance: Operation("populated", (_path(chance),)), 8),
    (lambda chance: Operation("frozen", (_path(chance),)), 4),
    (lambda chance: Operation("processes", (_path(chance),)), 3),
    (lambda chance: Operation("has_changed", (_path(chance),)), 3),
)


# --- Namespaces and inits -----------------------------------------------------------------------

_KINDS: Final = (PID, PID, PID, MOUNT, MOUNT, NET)


def _draw_namespaces(chance: random.Random) -> Program:
    """A namespace with an init to begin with, and the worker at home again."""
    weights = [weight for _, weight in _NAMESPACE_CALLS]
    draws = chance.choices(
        [draw for draw, _ in _NAMESPACE_CALLS], weights, k=chance.randrange(4, 16)
    )
    first = chance.choice((PID, PID, MOUNT))
    program = [
        Operation("unshare", (first,)),
        Operation("fork"),
        Operation("open", (0, first)),
        Operation("go_home"),
    ]
    return (*program, *(draw(chance) for draw in draws))


def _kind(chance: random.Random) -> NamespaceType:
    return chance.choice(_KINDS)


def _few(chance: random.Random) -> int:
    return chance.choice((0, 0, 0, 1, 1, 2, 3))


_NAMESPACE_CALLS: Final[Draws] = (
    (lambda chance: Operation("unshare", (_kind(chance),)), 5),
    (
        lambda chance: Operation(
            "enter", (_few(chance), chance.choice((None, PID, PID, MOUNT, NET)))
        ),
        8,
    ),
    (lambda chance: Operation("go_home"), 4),
    (lambda chance: Operation("fork"), 10),
    (lambda chance: Operation("open", (_few(chance), _kind(chance))), 8),
    (lambda chance: Operation("open_own", (_kind(chance),)), 4),
    (lambda chance: Operation("kind_of", (_few(chance),)), 2),
    (lambda chance: Operation("are_same", (_few(chance), _few(chance))), 5),
    (lambda chance: Operation("find_init", (_few(chance),)), 4),
    (lambda chance: Operation("kill", (_few(chance),)), 6),
    (lambda chance: Operation("is_dead", (_few(chance),)), 5),
    (lambda chance: Operation("reap", (_few(chance),)), 6),
)


# --- Mounts and images --------------------------------------------------------------------------


def _draw_mounts(chance: random.Random) -> Program:
    """An outside with one copy, and what both see at the end."""
    start = Operation("copy", (1, chance.choice(_COPIES)))
    looks = [Operation("look", (side, place)) for side in range(1 + INSIDES) for place in PLACES]
    loops = [Operation("loops", (image,)) for image in range(len(IMAGES))]
    return (start, *draw_calls(chance, _MOUNT_CALLS, 16), *looks, *loops)


_COPIES: Final = (Propagation.SLAVE, Propagation.SLAVE, Propagation.PRIVATE, Propagation.SHARED)


def _side(chance: random.Random) -> int:
    return chance.choice((0, 0, 0, 1, 1, 2))


def _inside(chance: random.Random) -> int:
    return chance.choice((1, 1, 2, 2, 2))


def _place(chance: random.Random) -> str:
    return chance.choice(("a", "a", "a", "b"))


def _image(chance: random.Random) -> int:
    return chance.choice((0, 0, 1))


_MOUNT_CALLS: Final[Draws] = (
    (lambda chance: Operation("copy", (_inside(chance), chance.choice(_COPIES))), 3),
    (lambda chance: Operation("end", (_inside(chance),)), 1),
    (lambda chance: Operation("mount", (_side(chance), _place(chance), _image(chance))), 10),
    (
        lambda chance: Operation("unmount", (_side(chance), _place(chance), chance.random() < 0.3)),
        8,
    ),
    (lambda chance: Operation("look", (_side(chance), _place(chance))), 4),
    (lambda chance: Operation("open_in", (_side(chance), _place(chance))), 4),
    (lambda chance: Operation("close_file", (chance.randrange(3),)), 2),
    (lambda chance: Operation("drop", (_image(chance),)), 2),
    (lambda chance: Operation("loops", (_image(chance),)), 2),
)


# --- Backends -----------------------------------------------------------------------------------


def _draw_backends(chance: random.Random) -> Program:
    """An allocation to begin with, most often watched."""
    image = chance.choice((None, None, IMAGE))
    start = [
        Operation("create", (0, chance.choice(_REQUESTS[:2]), image)),
        Operation("watch", (0,)),
    ]
    looks = [Operation(name, (number,)) for number in range(ALLOCATIONS) for name in _AT_THE_END]
    return (*start, *draw_calls(chance, _BACKEND_CALLS, 14), *looks, Operation("mounted"))


_REQUESTS: Final = ((PID, MOUNT), (PID, MOUNT), (MOUNT,), (PID,), (MOUNT, PID), (NET,), ())
_AT_THE_END: Final = ("seen", "is_over", "bundle", "release")


def _one(chance: random.Random) -> int:
    return chance.choice((0, 0, 0, 1))


def _draw_create(chance: random.Random) -> Operation:
    image = chance.choice((None, None, IMAGE, OTHER_IMAGE, "missing.sqfs"))
    return Operation("create", (chance.randrange(ALLOCATIONS), chance.choice(_REQUESTS), image))


_BACKEND_CALLS: Final[Draws] = (
    (_draw_create, 12),
    (lambda chance: Operation("bundle", (_one(chance),)), 6),
    (lambda chance: Operation("keep", (_one(chance),)), 3),
    (lambda chance: Operation("let_go", (_one(chance),)), 2),
    (lambda chance: Operation("watch", (_one(chance),)), 5),
    (lambda chance: Operation("seen", (_one(chance),)), 8),
    (lambda chance: Operation("is_over", (_one(chance),)), 6),
    (lambda chance: Operation("hand_off", (_one(chance),)), 3),
    (lambda chance: Operation("end", (_one(chance),)), 2),
    (lambda chance: Operation("release", (_one(chance),)), 6),
    (lambda chance: Operation("restart"), 3),
    (lambda chance: Operation("tidy", (chance.choice((1.0, 30.0, 59.0, 60.0, 100.0)),)), 5),
    (lambda chance: Operation("join", (_one(chance),)), 10),
    (lambda chance: Operation("leave", (_one(chance), chance.random() < 0.8)), 10),
    (lambda chance: Operation("pass_through", (_one(chance),)), 3),
    (lambda chance: Operation("freeze", (_one(chance), chance.random() < 0.6)), 4),
    (lambda chance: Operation("remove_scope", (_one(chance),)), 2),
    (lambda chance: Operation("kill_init", (_one(chance),)), 4),
    (lambda chance: Operation("block_release", (_one(chance),)), 4),
    (lambda chance: Operation("unblock_release", (_one(chance),)), 2),
    (lambda chance: Operation("mounted"), 4),
)


FAMILIES: Final = {
    family.name: family
    for family in (
        Family("sockets", "socket", _draw_sockets, SimulatedSockets, linux_sockets),
        Family(
            "cgroups",
            "cgroup",
            _draw_cgroups,
            SimulatedCgroups,
            linux_cgroups,
            eventual=frozenset({"frozen", "has_changed"}),
            notices=frozenset({"has_changed"}),
        ),
        Family(
            "namespaces",
            "namespace",
            _draw_namespaces,
            SimulatedWorker,
            linux_worker,
            eventual=frozenset({"is_dead", "reap"}),
        ),
        Family(
            "mounts",
            "mount",
            _draw_mounts,
            SimulatedMounts,
            linux_mounts,
            eventual=frozenset({"loops"}),
        ),
        Family(
            "backends",
            "backend",
            _draw_backends,
            SimulatedProgram,
            linux_program,
            eventual=frozenset({"seen", "is_over", "mounted"}),
        ),
    )
}
