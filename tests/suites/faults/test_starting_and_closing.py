"""A backend that is refused a call starts, or says why not; and it closes whatever it is refused.

`lives.py` tells of programs that serve. Here is what they do before and after it: what is alive
stays so, and what could not be removed is removed by the next one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from linux.backend import LinuxBackend
from linux.testing.worlds import IMAGE, LIGHT, LinuxWorld
from statemachine.messages import NamespaceRequest
from tests.suites.faults.faults import Fault, FaultInjector, FaultPlan, faults_of
from tests.suites.faults.lives import START_FAILURES
from transport.calls import hook_syscalls

FAULTS_MIN: Final = 20
"""How many there are at least, so that a test cannot pass for want of them."""


def with_allocation(world: LinuxWorld, name: str) -> None:
    """Let a program make an allocation, with an image, and close."""
    world.start()
    world.backend.create_namespaces(NamespaceRequest(name, LIGHT, IMAGE))
    world.backend.close()


@contextmanager
def nothing_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def start(world: LinuxWorld, plan: FaultPlan = ()) -> FaultInjector:
    """Start a program while something happens to its calls, and close it."""
    injector = FaultInjector(plan, who="provider")
    with nothing_left_open(), suppress(*START_FAILURES), hook_syscalls(injector):
        world.launch()
        try:
            world.backend.recover()
        finally:
            injector.is_asleep = True
            world.backend.close()
    return injector


@pytest.mark.clause("CRASH-2")
@pytest.mark.needs_root
def test_what_is_alive_stays_so_whatever_a_program_that_starts_is_refused(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    world = LinuxWorld(tmp_path, cgroup2, image_root)
    with_allocation(world, allocation_id)
    world.start()
    alive = world.identities(allocation_id)
    world.backend.close()
    for fault in faults_in(start(world)):
        assert start(world, (fault,)).fired == [fault]
        world.start()
        assert world.identities(allocation_id) == alive, fault
        world.backend.close()
    world.close()


@pytest.mark.clause("CRASH-2")
@pytest.mark.needs_root
def test_what_cannot_be_swept_keeps_no_program_from_starting(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    world = LinuxWorld(tmp_path, cgroup2, image_root)
    with_allocation(world, allocation_id)
    calls = start(world).passed
    listed = [n for n, call in enumerate(calls) if call.where == "cgroups._children_of"]
    (since,) = listed[1:2]  # after that of recovering, which needs it
    for call in calls[since:]:
        for fault in faults_of(call):
            with hook_syscalls(FaultInjector((fault,), who="provider")):
                assert len(world.start().adoptions) == 1, fault
            world.backend.close()
    world.close()


def close(backend: LinuxBackend, plan: FaultPlan = ()) -> FaultInjector:
    """Close a backend while something happens to its calls."""
    injector = FaultInjector(plan, who="provider")
    with hook_syscalls(injector):
        backend.close()
    return injector


def restart(world: LinuxWorld, plan: FaultPlan = ()) -> FaultInjector:
    """Let another program recover what is alive, and close under a plan."""
    with nothing_left_open():
        world.start()
        return close(world.program_now, plan)


@pytest.mark.clause("CRASH-12")
@pytest.mark.needs_root
@pytest.mark.parametrize("is_alive", [True, False], ids=["something alive", "nothing alive"])
def test_a_provider_closes_whatever_it_is_refused(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str, is_alive: bool
) -> None:
    world = LinuxWorld(tmp_path, cgroup2, image_root)
    if is_alive:
        with_allocation(world, allocation_id)
    for fault in faults_in(restart(world)):
        assert restart(world, (fault,)).fired == [fault]
    world.close()


@pytest.mark.clause("SELF-12")
@pytest.mark.needs_root
def test_self_service_closes_whatever_it_is_refused(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    settings = LinuxWorld(tmp_path, cgroup2, image_root).settings

    def use(plan: FaultPlan = ()) -> FaultInjector:
        backend = LinuxBackend.for_self_service(settings, clock=lambda: 0.0)
        backend.create_namespaces(NamespaceRequest(allocation_id, LIGHT, IMAGE))
        return close(backend, plan)

    for fault in faults_in(use()):
        assert use((fault,)).fired == [fault]
    use()


def faults_in(injector: FaultInjector) -> list[Fault]:
    """Everything that can go wrong with the calls that were made; there are some."""
    faults = [fault for call in injector.passed for fault in faults_of(call)]
    assert len(faults) > FAULTS_MIN
    return faults
