"""Any system call can be refused, cut short, or be the last: the outcome is typed, nothing is left.

The lives are in `lives.py`, what can happen to their calls in `faults.py`, deaths in
`crashes.py`. Here everything is swept on the simulated node, and a seeded sample on this
machine; `faults_campaign.py` sweeps all of it on both.
"""

from __future__ import annotations

import ast
import asyncio
import errno
import itertools
import os
import random
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from linux.cgroups import Scope, ScopeWatch
from statemachine.errors import NamespaceError, SocketUnavailable
from statemachine.messages import NamespaceRequest
from tests.suites.faults.crashes import CONSUMERS, PHASES, crash_points, dropped, killed
from tests.suites.faults.faults import (
    ERRNOS,
    CallSite,
    Fault,
    FaultInjector,
    errnos_of,
    faults_of,
    kills_of,
    short_faults_of,
)
from tests.suites.faults.interference import (
    ANYWHERE,
    NOT_SWEPT,
    ON_LINUX,
    interferences_of,
    put_file_there,
)
from tests.suites.faults.lives import (
    ALL_LIVES,
    LIVES,
    FaultSetup,
    NotTolerated,
    end_by_consumer,
    linux_stage,
    simulated_stage,
    whole_life,
)
from tests.suites.faults.traced import THREADS, Traced
from tests.test_architecture import Module, modules
from transport.calls import hook_syscalls, syscall
from transport.testing.peer import Line

SEED: Final = 20261122
PAIRS_ON_SIMULATED: Final = 50
"""For each life."""
FAULTS_ON_LINUX: Final = 5
"""For each life."""
KILLS_ON_LINUX: Final = 2
"""For each life: of its anchor, and of the forge."""
DEATHS_ON_LINUX: Final = 2
"""For each phase."""
ACTS_ON_LINUX: Final = 2
"""For each life: at how many calls a stranger does each thing."""
KILLS_AT_RANDOM: Final = 8


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[FaultSetup]:
    with simulated_stage(tmp_path) as stage:
        yield stage


# --- The hook -----------------------------------------------------------------------------------

NOT_FALLIBLE: Final = re.compile(
    "fsencode|fsdecode|fspath|strerror|getpid|geteuid|getpgrp|umask|_exit|isatty|urandom"
)
"""What of `os` asks the kernel for nothing, or for what it cannot refuse."""

FALLIBLE_METHODS: Final = re.compile(
    "(read|write)_(text|bytes)|mkdir|rmdir|unlink|l?stat|chmod|exists|is_(file|socket|symlink)"
    "|iterdir|rename|touch|accept|bind|listen|connect|[sg]etsockopt|(send|recv)msg|recv|sendall"
    "|execute|unregister"
)
"""What paths, sockets, databases and epolls ask it for."""

OURS: Final = re.compile(r"(self\._listener|.*channel)\.\w+|self\.\w+")
"""What is called alike and goes through `syscall` further inside."""

OUTSIDE: Final = {
    "transport/calls.py": "it has the hook",
    "linux/forge/exec.py": "runs in a process without these packages",
    "transport/testing": "tests",
    "linux/testing": "tests",
    "linux/launch.py": "runs before these packages",
    "linux/cli": "programs; strace refuses them things",
    "linux/demo": "programs",
    "linux/simulated": "a node that is none",
}
"""What is not held to it, by how its path begins, and why."""

BESIDE: Final = {
    ("linux/__main__.py", "os.path.exists"): "before anything is imported; it never raises",
    ("linux/forge/child.py", "socket.socket"): "takes over a descriptor that is there",
}


def calls_without_the_hook(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        owner, _, method = name.rpartition(".")
        if (
            (owner == "os" and not NOT_FALLIBLE.fullmatch(method))
            or owner == "fcntl"
            or name in ("open", "socket.socket", "socket.socketpair", "select.epoll")
            or name in ("subprocess.Popen", "sqlite3.connect")
            or (owner and FALLIBLE_METHODS.fullmatch(method) and not OURS.fullmatch(name))
        ):
            yield name


def test_basic_nothing_that_can_be_refused_is_asked_for_without_the_hook() -> None:
    found = {
        (module.path, name)
        for module in modules("transport", "linux")
        if not module.path.startswith(tuple(OUTSIDE))
        for name in calls_without_the_hook(module)
    }
    assert found == set(BESIDE)


@pytest.mark.parametrize("text", ["os.mkdir(p)", "p.read_text()", "s.accept()", "open(p)"])
def test_the_rule_sees_a_call_without_the_hook(text: str) -> None:
    assert list(calls_without_the_hook(Module("linux/x.py", text)))


def test_the_rule_lets_pass_what_goes_through_the_hook() -> None:
    text = "syscall(os.mkdir, p); syscall(p.read_text); os.getpid()"
    assert not list(calls_without_the_hook(Module("linux/x.py", text)))


def test_a_hook_is_there_only_while_it_is_installed(tmp_path: Path) -> None:
    injector = FaultInjector()
    with hook_syscalls(injector):
        syscall((tmp_path / "a").mkdir)
    syscall((tmp_path / "b").mkdir)
    (call,) = injector.passed
    assert (call.name, call.nth) == ("mkdir", 1)
    assert (tmp_path / "b").is_dir()


def test_every_errno_is_one() -> None:
    words = {word for name in ERRNOS for word in errnos_of(name)}
    names = {*errno.errorcode.values(), *(word for word in words if word.startswith("SQLITE_"))}
    assert words <= names


# --- Single faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIVES)
def test_a_life_makes_the_same_calls_whenever_it_is_told(stage: FaultSetup, name: str) -> None:
    assert stage.tell(LIVES[name]).passed == stage.tell(LIVES[name]).passed != []


@pytest.mark.sample(2)
@pytest.mark.clause("ERR-7")
@pytest.mark.parametrize("name", LIVES)
def test_basic_every_call_can_fail_with_every_errno(stage: FaultSetup, name: str) -> None:
    calls = stage.tell(LIVES[name]).passed
    faults = [fault for call in calls for fault in faults_of(call)]
    assert {f.call for f in faults} == set(calls)
    for fault in faults:
        assert tell(stage, name, fault) == [fault]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LIVES)
def test_every_transfer_can_be_short(stage: FaultSetup, name: str) -> None:
    calls = stage.tell(LIVES[name]).passed
    for fault in itertools.chain(*map(short_faults_of, calls)):
        assert tell(stage, name, fault) == [fault]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LIVES)
def test_two_calls_can_fail(stage: FaultSetup, name: str) -> None:
    faults = [f for call in stage.tell(LIVES[name]).passed for f in faults_of(call)]
    chosen = random.Random(SEED)
    for _ in range(PAIRS_ON_SIMULATED):
        tell(stage, name, *sorted(chosen.sample(faults, 2)), asks_afterwards=False)
    assert stage.tell(end_by_consumer).outcome == "served"


def tell(stage: FaultSetup, name: str, *plan: Fault, asks_afterwards: bool = True) -> list[Fault]:
    """Tell a life under a plan; what of it has happened."""
    try:
        return stage.tell(ALL_LIVES[name], plan, asks_afterwards=asks_afterwards).fired
    except BaseException as error:
        error.add_note(f"{name!r} on {stage.backend_name}: {'; '.join(map(str, plan))}")
        raise


@pytest.mark.needs_root
def test_basic_on_linux_calls_can_fail_as_well(
    tmp_path: Path, cgroup2: Path, image_root: Path
) -> None:
    chosen = random.Random(SEED)
    with linux_stage(tmp_path, cgroup2, image_root) as stage:
        for name, life in LIVES.items():
            faults = [f for call in stage.tell(life).passed for f in faults_of(call)]
            for fault in chosen.sample(faults, FAULTS_ON_LINUX):
                tell(stage, name, fault)


ONCE_BROKEN: Final = (
    # The scope's events, once opened, were never watched again when that had failed once.
    ("whole life", "provider", "cgroups.ScopeWatch.add", "register", "ENOMEM"),
    # Its changes were never heard of again when it could not be read once.
    ("whole life", "provider", "cgroups._rearm", "pread", "ENOMEM"),
    # These left the backend without saying what failed, and so past what undoes a creation.
    ("end by consumer", "provider", "cgroups._is_made_here_at", "fstat", "EIO"),
    ("end by consumer", "provider", "anchor._inode_of", "fstat", "EIO"),
    ("with image", "provider", "mounts._status_of", "fstat", "ENOMEM"),
    ("whole life", "provider", "cgroups.ScopeWatch.poll", "poll", "ENOMEM"),
    # The anchor of a forge that was given up was missed when it was about to be executed.
    ("end by consumer", "provider", "channel.receive_once", "recvmsg", "ENOMEM"),
    # Its image stayed mounted when the anchors' cgroup could not be looked at.
    ("with image", "provider", "instance.is_open_as", "stat", "ENOENT"),
    # A peer that is gone before it is accepted made the listener pause.
    ("end by consumer", "provider", "endpoint.Listener._accept_next", "accept", "ECONNABORTED"),
)


@pytest.mark.deep("long")
@pytest.mark.needs_root
def test_what_was_broken_once_is_whole(tmp_path: Path, cgroup2: Path, image_root: Path) -> None:
    with linux_stage(tmp_path, cgroup2, image_root) as stage:
        for name, who, where, call, kind in ONCE_BROKEN:
            all_calls = stage.tell(LIVES[name]).passed
            meant = [c for c in all_calls if (c.who, c.where, c.name) == (who, where, call)]
            assert meant, (name, where, call)
            for each in meant:
                tell(stage, name, Fault(each, kind))


@pytest.mark.needs_root
def test_a_scope_whose_events_could_not_be_read_is_heard_of_again(
    cgroup2: Path, allocation_id: str
) -> None:
    scope = Scope.create(cgroup2, allocation_id, "owner")
    try:
        with scope.open_events() as events, ScopeWatch[str]() as watch:
            watch.add("x", events.fileno())
            no_memory = Fault(CallSite("provider", "cgroups._rearm", "pread", 1), "ENOMEM")
            with hook_syscalls(FaultInjector((no_memory,))):
                assert watch.poll() == ["x"]
            assert watch.poll() == ["x"]
            assert watch.poll() == []
    finally:
        assert scope.remove()


# --- What the event loop is refused -------------------------------------------------------------


def test_a_connection_that_cannot_be_listened_to_is_told_so_at_once(
    stage: FaultSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = _refuse_once(monkeypatch, _connections(stage), "_register", "Connections._take_up")
    with Line.to(stage.path) as line:
        stage.loop.run_until_complete(asyncio.sleep(0.01))
        answer = line.hear()
        assert refused
        assert isinstance(answer, SocketUnavailable)
        assert "Cannot allocate memory" in answer.reason
        assert line.hear() is None
    assert stage.tell(end_by_consumer).outcome == "served"


@pytest.mark.parametrize("caller", ["Connections._resume_accepting", "Watcher.start"])
def test_listening_is_taken_up_again_though_that_is_refused_once(
    stage: FaultSetup, monkeypatch: pytest.MonkeyPatch, caller: str
) -> None:
    provider = stage.provider
    assert provider is not None
    stage.loop.remove_reader(provider._connections._listener.fileno())
    stage.loop.remove_reader(stage.world.backend.fileno())
    refused = _refuse_once(monkeypatch, stage.loop, "add_reader", caller)

    async def resume() -> None:
        provider._connections._resume_accepting()
        provider._watcher._resume_observing()

    stage.loop.run_until_complete(resume())
    assert refused
    assert stage.tell(whole_life).outcome == "served"


def test_an_answer_whose_rest_cannot_be_sent_ends_in_a_fallback(
    stage: FaultSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stage.tell(end_by_consumer).passed
    answer = next(c for c in calls if (c.who, c.name) == ("provider", "sendmsg"))
    refused = _refuse_once(
        monkeypatch, _connections(stage), "watch", "ServedConnection._wait_for_room"
    )
    outcome = stage.tell(end_by_consumer, (Fault(answer, "EAGAIN"),)).outcome
    assert refused
    assert outcome == "self-served: SocketUnavailable"


def _connections(stage: FaultSetup) -> Any:
    assert stage.provider is not None
    return stage.provider._connections


def _refuse_once(
    monkeypatch: pytest.MonkeyPatch, watcher: Any, name: str, caller: str
) -> list[str]:
    """Let what watches for events be refused one for one of the driver's functions; say when."""
    refused: list[str] = []
    real = getattr(watcher, name)

    def add(*arguments: Any) -> None:
        if not refused and sys._getframe(1).f_code.co_qualname == caller:
            refused.append(caller)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        real(*arguments)

    monkeypatch.setattr(watcher, name, add)
    return refused


# --- Deaths -------------------------------------------------------------------------------------


# What a program has open is closed with it; here it is Python that notices.
@pytest.mark.clause("CRASH-7")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("phase", PHASES)
def test_basic_a_provider_can_die_at_every_call(tmp_path: Path, phase: str) -> None:
    with dropped(tmp_path) as program:
        assert len(list(crash_points(program, phase))) > 10


@pytest.mark.clause("CRASH-7")
@pytest.mark.needs_root
@pytest.mark.parametrize("phase", PHASES)
def test_on_linux_a_provider_can_be_killed_at_any_call(
    tmp_path: Path, cgroup2: Path, image_root: Path, phase: str
) -> None:
    chosen = random.Random(f"{SEED} {phase}")
    with killed(tmp_path, cgroup2, image_root) as program:
        for k in chosen.sample(range(1, 60), DEATHS_ON_LINUX):
            program.run(phase, k)


@pytest.mark.sample(2)
@pytest.mark.clause("CRASH-7")
@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("phase", "who"), [(phase, who) for phase, found in THREADS.items() for who in found]
)
def test_on_linux_a_provider_can_be_killed_below_python(
    tmp_path: Path, cgroup2: Path, image_root: Path, phase: str, who: str
) -> None:
    with killed(tmp_path, cgroup2, image_root, partial(Traced, who=who)) as program:
        first, last = random.Random(f"{SEED} {phase} {who}").sample(range(1, 26), 2)
        assert program.run(phase, first) is not None
        assert program.run(phase, last) is not None
        assert program.missed < 2, "it was never killed"


@pytest.mark.clause("CRASH-7", "SELF-12", "SELF-14", "SELF-15")
@pytest.mark.needs_root
def test_on_linux_a_consumer_can_be_killed_at_any_call(
    tmp_path: Path, cgroup2: Path, image_root: Path
) -> None:
    chosen = random.Random(SEED)
    with killed(tmp_path, cgroup2, image_root) as program:
        for how in CONSUMERS:
            # Of the calls that each life has: how many more there are depends on how much is read.
            calls = range(1, 29 if how == "served" else 75)
            for k in chosen.sample(calls, DEATHS_ON_LINUX):
                assert program.run(how, k) is not None, (how, k)


@pytest.mark.deep("faults")
@pytest.mark.clause("CRASH-2", "CRASH-7")
@pytest.mark.needs_root
def test_on_linux_everything_can_be_killed_while_consumers_are_at_work(
    tmp_path: Path, cgroup2: Path, image_root: Path
) -> None:
    with killed(tmp_path, cgroup2, image_root) as program:
        assert program.run_kills(str(SEED), KILLS_AT_RANDOM).total() >= KILLS_AT_RANDOM


@pytest.mark.sample(2)
@pytest.mark.clause("END-1")
@pytest.mark.parametrize("name", LIVES)
def test_an_anchor_can_be_killed_at_every_call(stage: FaultSetup, name: str) -> None:
    for fault in itertools.chain(*map(kills_of, stage.tell(LIVES[name]).passed)):
        assert tell(stage, name, fault) == [fault]


@pytest.mark.clause("CRASH-7", "END-1")
@pytest.mark.needs_root
def test_on_linux_anchor_and_forge_can_be_killed_at_any_call(
    tmp_path: Path, cgroup2: Path, image_root: Path
) -> None:
    chosen = random.Random(SEED)
    with linux_stage(tmp_path, cgroup2, image_root) as stage:
        for name, life in LIVES.items():
            faults = [f for call in stage.tell(life).passed for f in kills_of(call)]
            for _, alike in itertools.groupby(
                sorted(faults, key=lambda f: f.kind), lambda f: f.kind
            ):
                found = list(alike)
                for fault in chosen.sample(found, min(KILLS_ON_LINUX, len(found))):
                    tell(stage, name, fault)


# --- Strangers ----------------------------------------------------------------------------------


@pytest.mark.sample(8)
@pytest.mark.parametrize("act", ANYWHERE)
@pytest.mark.parametrize("name", ALL_LIVES)
def test_a_stranger_can_interfere_at_every_call(stage: FaultSetup, name: str, act: str) -> None:
    for call in stage.tell(ALL_LIVES[name]).passed:
        for fault in interferences_of(call, stage.backend_name, name):
            if fault.kind == act:
                tell(stage, name, fault)


@pytest.mark.clause("NODE-4", "END-11")
@pytest.mark.needs_root
@pytest.mark.parametrize("name", ALL_LIVES)
def test_on_linux_a_stranger_can_interfere_at_any_call(
    tmp_path: Path, cgroup2: Path, image_root: Path, name: str
) -> None:
    chosen = random.Random(f"{SEED} {name}")
    with linux_stage(tmp_path, cgroup2, image_root) as stage:
        calls = stage.tell(ALL_LIVES[name]).passed
        faults = [f for call in calls for f in interferences_of(call, stage.backend_name, name)]
        for act in ON_LINUX:
            if (stage.backend_name, name, act) not in NOT_SWEPT:
                for fault in chosen.sample([f for f in faults if f.kind == act], ACTS_ON_LINUX):
                    tell(stage, name, fault)


def test_what_a_stranger_loses_is_seen(stage: FaultSetup) -> None:
    async def unkind(stage: FaultSetup, name: str) -> str:
        stage.interfere(put_file_there, name)
        stage.path.write_text("what the program wrote")
        return "served"

    with pytest.raises(NotTolerated, match=r"the content of handoff\.sock was changed"):
        stage.tell(unkind)


# --- That all this can fail ---------------------------------------------------------------------


def test_a_descriptor_that_is_left_is_seen(stage: FaultSetup) -> None:
    left: list[int] = []

    async def careless(stage: FaultSetup, name: str) -> str:
        left.append(os.memfd_create("left"))
        return "served"

    with pytest.raises(NotTolerated, match=r"left behind.*memfd:left"):
        stage.tell(careless)
    os.close(left[0])


def test_an_allocation_that_is_left_is_seen(stage: FaultSetup) -> None:
    async def careless(stage: FaultSetup, name: str) -> str:
        other = stage.new_name()
        async with await stage.consumer().obtain(NamespaceRequest(other, stage.kinds)):
            left.append(other)
        return "served"

    left: list[str] = []
    with pytest.raises(NotTolerated, match="is alive"):
        stage.tell(careless)
    stage.loop.run_until_complete(stage._settle(left[0]))


def test_a_neighbour_that_is_touched_is_seen(stage: FaultSetup) -> None:
    async def unkind(stage: FaultSetup, name: str) -> str:
        stage.world.kill_init(stage.neighbour)
        return "served"

    with pytest.raises((NotTolerated, NamespaceError)):
        stage.tell(unkind)


def test_an_error_of_no_type_is_seen(stage: FaultSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(stage.world.backend, "is_over", fail)
    with pytest.raises(NotTolerated, match="KeyError"):
        stage.tell(whole_life)
