"""The stateful machines as a part of a verification campaign: many seeds, on every adapter of ours.

Every task takes the tour through all rows first, so that a picture of the cells has no holes that
are only bad luck. What it finds comes as a test that fails; `verify_task` repeats a task.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from linux.testing.adversary import STEPS as ADVERSARY_STEPS
from linux.testing.adversary import adversary_for
from linux.testing.worlds import IMAGE, SCOPE_PREFIX
from tests.campaign.outcome import Discovery, Outcome, Task
from tests.campaign.verify_pool import PoolTask
from tests.suites.stateful.adapters import LinuxNode, machine
from tests.suites.stateful.cells import counted
from tests.suites.stateful.names import ON_LINUX, PROCESSES, adapter_of, counterpart_of
from tests.suites.stateful.tour import CONSUMER_TOUR, PROVIDER_TOUR, take
from tests.support.isolation import find_cgroup2
from transport.testing.machine import STEPS

CHUNKS: Final = 2
"""How many tasks there are for each adapter and machine, at scale 1."""

EXAMPLES: Final = {
    "handoffs": {
        "model": 180,
        "kernels": 240,
        "simulated": 90,
        "linux": 14,
        "process": 20,
        "process on linux": 8,
    },
    "adversary": {"model": 120, "kernels": 120, "simulated": 120, "linux": 100},
}
"""How many examples a task has: about three seconds' worth of each."""

TOURS: Final = {"handoffs": PROVIDER_TOUR, "adversary": CONSUMER_TOUR}
STEPS_OF: Final = {"handoffs": STEPS, "adversary": ADVERSARY_STEPS}


def tasks(scale: float) -> list[Task]:
    """Split the campaign's share; without root there is no task for this node."""
    chunks = max(1, round(CHUNKS * scale))
    has_node = not os.geteuid() and find_cgroup2() is not None
    return [
        Task(
            f"stateful {kind} on {name} {chunk}",
            {"adapter": name, "kind": kind, "examples": examples},
        )
        for chunk in range(chunks)
        for kind in EXAMPLES
        for name, examples in EXAMPLES[kind].items()
        if has_node or name not in ON_LINUX
    ]


def run(seed: int, adapter: str, kind: str, examples: int) -> Outcome:
    """Do one task: the tour, and then random steps from a seed."""
    begin = time.monotonic()
    outcome = Outcome()
    with counted() as hits, opened(adapter, kind) as opened_machine:
        done = {"examples": 0, "steps": 0}
        counting = _counting(opened_machine, done)
        wanted = settings(
            max_examples=examples,
            stateful_step_count=STEPS_OF[kind],
            deadline=None,
            database=None,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            if adapter not in PROCESSES:  # whose rows are taken where none are counted
                take(counting, TOURS[kind])
            run_state_machine_as_test(seeded(seed)(counting), settings=wanted)
        except Exception as error:
            arguments = {"adapter": adapter, "kind": kind, "examples": examples}
            again = PoolTask("stateful", Task("", arguments), 0, seed, False, 0.0).command
            outcome.discoveries += discoveries(error, adapter, kind, again)
    outcome.seconds = time.monotonic() - begin
    outcome.figures = {**done, "seconds": outcome.seconds}
    if adapter not in PROCESSES:
        outcome.cells = {adapter: dict(sorted(hits.items()))}
    return outcome


@contextmanager
def opened(adapter: str, kind: str) -> Iterator[type[RuleBasedStateMachine]]:
    """Have one of the machines, on one of the adapters."""
    prefix = f"{SCOPE_PREFIX}s"
    level = logging.root.manager.disable
    with ExitStack() as stack:
        # That a consumer turns to self-service is loud, and here it does so all the time.
        logging.disable()
        stack.callback(logging.disable, level)
        node = stack.enter_context(_node()) if adapter in ON_LINUX else None
        if kind == "handoffs":
            yield machine(prefix, lambda: adapter_of(adapter, node))
            return
        counterpart = counterpart_of(adapter, prefix, node)
        stack.callback(counterpart.close)
        yield adversary_for(counterpart)


@contextmanager
def _node() -> Iterator[LinuxNode]:
    cgroup2, mksquashfs = find_cgroup2(), shutil.which("mksquashfs")
    assert cgroup2 is not None
    assert mksquashfs is not None
    with tempfile.TemporaryDirectory(prefix="nsh-") as name:
        tree, images, worlds = (Path(name) / each for each in ("tree", "images", "worlds"))
        for folder in (tree, images, worlds):
            folder.mkdir()
        (tree / "hello.txt").write_text("hello from the image\n")
        options = ["-noappend", "-all-root", "-no-progress", "-quiet"]
        subprocess.run([mksquashfs, tree, images / IMAGE, *options], check=True)
        yield LinuxNode(worlds, cgroup2, images)


def _counting(
    machine: type[RuleBasedStateMachine], done: dict[str, int]
) -> type[RuleBasedStateMachine]:
    """Have the same machine count what it does."""

    class Machine(machine):  # type: ignore[misc,valid-type]
        def check_invariants(self, *arguments: Any) -> None:
            done["steps"] += 1
            super().check_invariants(*arguments)

        def teardown(self) -> None:
            done["examples"] += 1
            super().teardown()

    return Machine


def discoveries(error: BaseException, adapter: str, kind: str, again: str) -> list[Discovery]:
    """Make of a failure the test that shows it; of one on the tour, the command."""
    if isinstance(error, BaseExceptionGroup):
        return [
            found for each in error.exceptions for found in discoveries(each, adapter, kind, again)
        ]
    title = f"{type(error).__name__}: {error}".splitlines()[0]
    said = "\n".join(getattr(error, "__notes__", [])).splitlines()
    steps = [line for line in said if line.startswith("state")]
    if not steps:
        return [Discovery(title, f"# {again}\n")]
    if not str(error):
        title = f"{type(error).__name__} in {steps[-2]}"
    body = "\n        ".join(steps)
    return [Discovery(title, _SCRIPT.format(again=again, adapter=adapter, kind=kind, body=body))]


_SCRIPT: Final = '''\
"""To be put into tests/. Found by: {again}"""

from tests.campaign.stateful_campaign import opened


def test_a_promise_that_is_not_kept() -> None:
    with opened("{adapter}", "{kind}") as Machine:
        {body}
'''
