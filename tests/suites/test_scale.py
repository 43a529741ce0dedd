"""A thousand allocations at a time in one provider, with the descriptors that a service gets."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from linux.testing.worlds import LIGHT, LinuxWorld, real
from statemachine.messages import AllocationEnded, NamespaceRequest, NamespaceResponse
from statemachine.states import AllocationState
from tests.support.forging import ALL
from tests.support.serving import Serving
from transport.testing.peer import Line, frame_of, wait_until

pytestmark = pytest.mark.needs_root

ALLOCATIONS: Final = 1_000
WITH_NET_EVERY: Final = 50
"""One in so many has a network namespace, which costs ten times as much as the other two."""

AT_A_TIME: Final = 50
"""Requests that are open at a time; a connection may have 64."""

DESCRIPTORS_MAX: Final = 20_000
DESCRIPTORS_PER_ALLOCATION_MAX: Final = 2
"""A pidfd and the events of its cgroup."""

IDLE_S: Final = 1.0
IDLE_CPU_MAX_S: Final = 0.01
IDLE_WAKEUPS_MAX: Final = 1
"""The one with which it goes back to sleep after the question that found its thread."""


@contextmanager
def descriptor_limit(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def request_for(name: str, number: int) -> NamespaceRequest:
    kinds = LIGHT if number % WITH_NET_EVERY else ALL
    return NamespaceRequest(f"{name}-{number}", kinds)


def create_all(line: Line, name: str) -> None:
    requests = [request_for(name, number) for number in range(ALLOCATIONS)]
    for start in range(0, ALLOCATIONS, AT_A_TIME):
        batch = requests[start : start + AT_A_TIME]
        line.say(b"".join(map(frame_of, batch)))
        expected = [NamespaceResponse(r.allocation_id, r.namespaces, None) for r in batch]
        assert [line.hear() for _ in batch] == expected


def end_all(line: Line, name: str) -> None:
    ends = [AllocationEnded(f"{name}-{number}") for number in range(ALLOCATIONS)]
    for start in range(0, ALLOCATIONS, AT_A_TIME):
        batch = ends[start : start + AT_A_TIME]
        line.say(b"".join(map(frame_of, batch)))
        assert {line.hear() for _ in batch} == set(batch)


def states_in(provider: Serving) -> set[AllocationState]:
    return provider.ask(lambda: set(provider.provider.kernel.states.values()))


def switches_of(thread: int) -> int:
    """How often a thread has gone to sleep: as often as it was woken."""
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("voluntary_ctxt"))
    return int(line.split()[1])


def idle_cost(provider: Serving) -> tuple[float, int]:
    """What a second costs in which nothing happens: CPU seconds, and wake-ups of the loop."""
    thread = provider.ask(threading.get_native_id)
    switches, before_s = switches_of(thread), time.process_time()
    time.sleep(IDLE_S)  # nothing is waited for: this is the span that is measured
    return time.process_time() - before_s, switches_of(thread) - switches


@pytest.mark.deep("long")
def test_a_thousand_allocations_live_idle_and_end(
    tmp_path: Path, cgroup2: Path, image_root: Path, allocation_id: str
) -> None:
    path = tmp_path / "s.sock"
    with ExitStack() as stack:
        stack.enter_context(descriptor_limit(DESCRIPTORS_MAX))
        world: LinuxWorld = stack.enter_context(real(tmp_path, cgroup2, image_root))
        provider = stack.enter_context(Serving(path, world.backend))
        line = stack.enter_context(Line.to(path))
        descriptors = len(os.listdir("/proc/self/fd"))

        create_all(line, allocation_id)
        assert states_in(provider) == {AllocationState.HANDED_OFF}
        wait_until(lambda: len(world.leftovers()) == 2 * ALLOCATIONS)
        held = len(os.listdir("/proc/self/fd")) - descriptors
        assert held <= DESCRIPTORS_PER_ALLOCATION_MAX * ALLOCATIONS + AT_A_TIME

        cpu_s, wakeups = idle_cost(provider)
        assert cpu_s < IDLE_CPU_MAX_S
        assert wakeups <= IDLE_WAKEUPS_MAX

        end_all(line, allocation_id)
        wait_until(lambda: states_in(provider) == set())
        assert world.leftovers() == []
