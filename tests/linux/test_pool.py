"""Anchors that are made ahead: fresh, taken once, and given up for whatever matters more."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from linux.anchor import Anchor
from linux.cgroups import WORKLOAD_SLICE
from linux.features import Features
from linux.forge.client import Forge
from linux.forge.plan import AnchorPlan, ForgeError
from linux.pool import (
    CHANGED_S,
    FAILED_S,
    POOL_MAX,
    POOL_TOKEN_PREFIX,
    PRESSURE_LOOK_S,
    QUIET_S,
    UNUSED_S,
    AnchorPool,
    NamespaceTypes,
)
from linux.survey import survey_node
from linux.syscalls import SyscallError
from linux.testing.worlds import LinuxWorld, real
from statemachine.errors import CreationFailed
from statemachine.messages import NamespaceRequest, NamespaceType
from tests.support.forging import wait_dead
from tests.support.programs import COMMAND, Daemon, daemon_in, run_program
from transport.contract import Step
from transport.testing.peer import wait_until

pytestmark = pytest.mark.needs_root

PID, NET, MOUNT = NamespaceType.PID, NamespaceType.NET, NamespaceType.MOUNT
ALL = frozenset({PID, NET, MOUNT})
LIGHT = frozenset({PID, NET})
TICK_S = 1e-6


class Maker:
    """Makes real anchors, and remembers them."""

    def __init__(self, forge: Forge) -> None:
        self._forge = forge
        self.made: list[int] = []
        self.meanwhile: Any = lambda: None

    def __call__(self, kinds: NamespaceTypes, token: str) -> Anchor:
        self.meanwhile()
        anchor = self._forge.make(AnchorPlan(token, tuple(k for k in NamespaceType if k in kinds)))
        self.made.append(anchor.pid)
        return anchor


class PoolBench:
    """A pool that is filled by the test, on a clock of its own."""

    def __init__(self, maker: Maker, directory: Path, most: dict[NamespaceTypes, int]) -> None:
        self.now_s = 1_000.0
        self.maker = maker
        self.pressure = directory / "pressure"
        self.pool = AnchorPool(most, maker, lambda: self.now_s, self.pressure)

    def fill(self, after_s: float = 0.0) -> int:
        """How many are made when this time has passed."""
        self.now_s += after_s
        made = 0
        while self.pool.fill():
            made += 1
        return made

    def press(self, percent: float) -> None:
        self.pressure.write_text(f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=1\nfull")


@pytest.fixture(scope="module")
def maker() -> Iterator[Maker]:
    with Forge.start(cgroup=None, features=Features.probe()) as forge:
        yield Maker(forge)


@pytest.fixture
def bench(maker: Maker, tmp_path: Path) -> Iterator[PoolBench]:
    maker.made.clear()
    maker.meanwhile = lambda: None
    bench = PoolBench(maker, tmp_path, {ALL: 2, LIGHT: 1})
    with bench.pool:
        yield bench
    for pid in maker.made:
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "its end")


def end(anchor: Anchor | None) -> None:
    assert anchor is not None
    with anchor:
        anchor.kill()
        wait_dead(anchor)


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "nsh-test", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.clause("DAEMON-14")
def test_it_is_filled_up_to_what_was_said(bench: PoolBench) -> None:
    assert (bench.fill(), len(bench.pool)) == (3, 3)
    assert bench.fill() == 0


@pytest.mark.clause("DAEMON-13")
def test_what_is_taken_has_exactly_these_namespaces_and_is_taken_once(bench: PoolBench) -> None:
    bench.fill()
    taken = [bench.pool.take(ALL) for _ in range(3)]
    assert taken[2] is None
    assert bench.pool.take(frozenset({PID})) is None
    assert len({anchor.pid for anchor in taken if anchor}) == 2
    for anchor in taken[:2]:
        assert anchor is not None
        assert anchor.token.startswith(POOL_TOKEN_PREFIX)
        end(anchor)


@pytest.mark.clause("DAEMON-14")
@pytest.mark.parametrize("kinds", [ALL, frozenset({MOUNT})], ids=["a kind of it", "another"])
def test_none_is_made_while_others_are_asked_for(bench: PoolBench, kinds: NamespaceTypes) -> None:
    taken = bench.pool.take(kinds)
    assert taken is None
    assert bench.fill(QUIET_S - TICK_S) == 0
    assert bench.fill(2 * TICK_S) == 3


@pytest.mark.clause("DAEMON-13")
def test_anchors_made_before_a_change_of_the_nodes_mounts_are_not_given_out(
    bench: PoolBench, tmp_path: Path
) -> None:
    bench.fill()
    with mounted(tmp_path):
        assert bench.pool.take(ALL) is None
        end(bench.pool.take(LIGHT))
        assert bench.fill(CHANGED_S - TICK_S) == 1
        assert bench.fill(2 * TICK_S) == 2


@pytest.mark.clause("DAEMON-13")
def test_nor_is_one_that_was_being_made_then(bench: PoolBench, tmp_path: Path) -> None:
    def change() -> None:
        with mounted(tmp_path):
            bench.maker.meanwhile = lambda: None
            assert bench.pool.take(ALL) is None

    bench.maker.meanwhile = change
    assert not bench.pool.fill()
    assert len(bench.maker.made) == 1
    assert len(bench.pool) == 0


@pytest.mark.clause("DAEMON-14")
def test_nothing_is_held_while_tasks_wait_for_memory(bench: PoolBench) -> None:
    bench.press(0.0)
    assert bench.fill() == 3
    end(bench.pool.take(LIGHT))
    bench.press(50.0)
    assert bench.fill(QUIET_S) == 0
    assert len(bench.pool) == 0
    bench.press(0.0)
    assert bench.fill(PRESSURE_LOOK_S - TICK_S) == 0
    assert bench.fill(2 * TICK_S) == 3


@pytest.mark.clause("DAEMON-14")
def test_what_is_not_asked_for_is_let_go_until_it_is(bench: PoolBench) -> None:
    bench.fill()
    bench.now_s += UNUSED_S / 2
    end(bench.pool.take(LIGHT))
    bench.fill(QUIET_S)
    bench.now_s += UNUSED_S / 2
    assert not bench.pool.tend()
    assert len(bench.pool) == 1  # the kind that was asked for
    assert bench.pool.take(ALL) is None
    assert bench.fill(QUIET_S) == 2


def test_after_a_failure_nothing_is_tried_for_a_while(bench: PoolBench) -> None:
    def fail() -> None:
        bench.maker.meanwhile = lambda: None
        raise ForgeError("make it", SyscallError("clone3(2)", 12))

    bench.maker.meanwhile = fail
    assert bench.fill() == 0
    assert bench.fill(FAILED_S - TICK_S) == 0
    assert bench.fill(2 * TICK_S) == 3


def test_when_it_is_closed_nothing_is_left(maker: Maker, tmp_path: Path) -> None:
    maker.made.clear()
    maker.meanwhile = lambda: None
    pool = AnchorPool({ALL: 2}, maker, time.monotonic, tmp_path / "none")
    pool.start()
    wait_until(lambda: len(pool) == 2)
    pool.close()
    assert [Path(f"/proc/{pid}/ns").exists() for pid in maker.made] == [False, False]
    pool.close()


def test_taking_one_wakes_the_thread_that_makes_the_next(
    maker: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linux.pool.PRESSURE_LOOK_S", 1e6)  # else it wakes by itself
    with AnchorPool({LIGHT: 1}, maker, time.monotonic, tmp_path / "none") as pool:
        pool.start()
        wait_until(lambda: len(pool) == 1)
        end(pool.take(LIGHT))
        wait_until(lambda: len(pool) == 1)


def test_without_a_thread_it_stays_empty(
    maker: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    with AnchorPool({LIGHT: 1}, maker, time.monotonic, tmp_path / "none") as pool:
        pool.start()
        assert pool.take(LIGHT) is None
    assert "can't start new thread" in caplog.text


def test_one_that_is_made_while_it_is_closed_ends(bench: PoolBench) -> None:
    bench.maker.meanwhile = bench.pool.close
    assert not bench.pool.fill()


@pytest.mark.clause("DAEMON-14")
def test_it_has_a_limit() -> None:
    with pytest.raises(ValueError, match=f"at most {POOL_MAX}"):
        AnchorPool({ALL: POOL_MAX, LIGHT: 1}, lambda *_: None, time.monotonic)  # type: ignore[arg-type,return-value]


# --- In a backend --------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, cgroup2: Path, image_root: Path) -> Iterator[LinuxWorld]:
    with real(tmp_path, cgroup2, image_root, has_pool=True) as world:
        yield world


def pids(world: LinuxWorld) -> set[str]:
    return set((world.anchors_cgroup / "cgroup.procs").read_text().split())


@pytest.mark.clause("DAEMON-13")
def test_an_allocation_has_the_anchor_that_was_made_ahead(
    world: LinuxWorld, allocation_id: str
) -> None:
    world.backend.create_namespaces(NamespaceRequest(f"{allocation_id}-warm", ()))
    before = pids(world)
    for names in ((PID, NET, MOUNT), (MOUNT, PID, NET)):
        name = f"{allocation_id}-{names[0].value}"
        world.backend.create_namespaces(NamespaceRequest(name, names))
        assert str(world.init_of(name)) in before
        with world.backend.bundle_of(name) as bundle:
            assert tuple(kind for kind, _ in bundle) == names
        before = pids(world)
        world.backend.create_namespaces(NamespaceRequest(f"{name}-next", ()))
        before |= pids(world)


def test_one_that_was_killed_meanwhile_is_replaced(world: LinuxWorld, allocation_id: str) -> None:
    def kill(step: Step, name: str) -> None:
        if step is Step.SCOPE:
            ahead = world.program_now._find(name).ahead
            assert ahead is not None
            ahead.kill()
            wait_dead(ahead)

    world.program_now.before = kill  # type: ignore[attr-defined]
    world.backend.create_namespaces(NamespaceRequest(allocation_id, (PID, NET)))
    assert Path(f"/proc/{world.init_of(allocation_id)}/ns/pid").exists()


def test_a_creation_that_fails_ends_it(world: LinuxWorld, allocation_id: str) -> None:
    world.occupy_scope(allocation_id, "another owner")
    taken: list[Anchor] = []

    def note(step: Step, name: str) -> None:
        if step is Step.SCOPE:
            ahead = world.program_now._find(name).ahead
            assert ahead is not None
            taken.append(ahead)

    world.program_now.before = note  # type: ignore[attr-defined]
    with pytest.raises(CreationFailed):
        world.backend.create_namespaces(NamespaceRequest(allocation_id, (PID, NET)))
    wait_until(lambda: str(taken[0].pid) not in pids(world))
    world.vacate_scope(allocation_id)


@pytest.mark.parametrize("step", [Step.SCOPE, Step.ANCHOR, Step.PUBLISH])
def test_a_crash_leaves_nothing_of_the_pool(
    world: LinuxWorld, allocation_id: str, step: Step
) -> None:
    world.crash(NamespaceRequest(allocation_id, (PID, NET)), step)
    assert any(token.startswith(POOL_TOKEN_PREFIX) for token in world._tokens())
    for adoption in world.restart().adoptions:
        world.release(adoption.request.allocation_id)
    wait_until(lambda: not world._tokens())


@pytest.mark.parametrize("count", [POOL_MAX])
def test_a_provider_that_stops_leaves_nothing_of_a_full_pool(
    tmp_path: Path, cgroup2: Path, image_root: Path, count: int
) -> None:
    world = LinuxWorld(tmp_path, cgroup2, image_root)
    world._pool = {ALL: count}
    world.start()
    pool = world.program_now._pool
    assert pool is not None
    while pool.fill(at_once=True):
        pass
    world.backend.close()
    assert not world.anchors_cgroup.exists()


# --- In a daemon ---------------------------------------------------------------------------------

OPTIONS = ("--pool", "pid,net,mount=2", "--pool", "net=1")


@contextmanager
def pooled(directory: Path, image_root: Path) -> Iterator[Daemon]:
    with daemon_in(directory, image_root, *OPTIONS) as daemon:
        wait_until(lambda: ahead(daemon) == 3)
        yield daemon


def ahead(daemon: Daemon) -> int:
    return survey_node(daemon.state_dir, Features.probe()).ahead


def test_daemon_fills_it_again_and_lists_it(
    tmp_path: Path, image_root: Path, allocation_id: str
) -> None:
    with (
        pooled(tmp_path, image_root) as daemon,
        daemon.obtain(allocation_id, PID, NET, MOUNT) as handoff,
    ):
        wait_until(lambda: ahead(daemon) == 3)
        listed = run_program(*COMMAND, "list", "--state-dir", str(daemon.state_dir))
        assert "anchors made ahead: 3" in listed.stdout
        assert "needs attention" not in listed.stdout
        doctor = run_program(*COMMAND, "doctor", "--state-dir", str(daemon.state_dir))
        assert doctor.returncode == 0
        assert handoff.end()


def test_successor_of_a_daemon_that_was_killed_has_a_pool_of_its_own(
    tmp_path: Path, image_root: Path, cgroup2: Path
) -> None:
    with pooled(tmp_path, image_root) as daemon:
        scopes = list((cgroup2 / WORKLOAD_SLICE).glob("*.scope"))
        daemon.stop(signal.SIGKILL)
        daemon.start()
        wait_until(lambda: ahead(daemon) == 3)
        assert list((cgroup2 / WORKLOAD_SLICE).glob("*.scope")) == scopes
        assert daemon.stop() == 0
        assert ahead(daemon) == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--pool", "user=1"), "types, of pid, net, mount"),
        (("--pool", "pid,pid=1"), "types, of"),
        (("--pool", "3"), "types, of"),
        (("--pool", "pid=0"), "from 1 to 64"),
        (("--pool", "pid=many"), "from 1 to 64"),
        (("--pool", "pid=40", "--pool", "net=40"), "at most 64"),
        (("--pool", "pid=1", "--no-scopes"), "needs real namespaces and scopes"),
        (("--pool", "pid=1", "--backend", "simulated"), "needs real namespaces and scopes"),
    ],
)
def test_pool_that_cannot_be_had_is_wrong_usage(options: tuple[str, ...], why: str) -> None:
    run = run_program(*COMMAND, "serve", *options)
    assert run.returncode == 2
    assert why in run.stderr
