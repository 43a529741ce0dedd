"""Limits of the process: raised for itself, restored for its children, and the provider's."""

from __future__ import annotations

import json
import sys

import pytest

from linux.limits import DESCRIPTORS_RESERVED, descriptors_for, fit_to_descriptors
from statemachine.provider import Limits
from tests.support.programs import run_program

LIMITS = Limits(frozenset({0, 1}), connections_per_uid=100, allocations_per_uid=300)
NEEDED = DESCRIPTORS_RESERVED + 2 * (2 * 100 + 2 * 300)


@pytest.mark.clause("DAEMON-2")
@pytest.mark.parametrize(
    ("descriptors", "connections", "allocations"),
    [
        (NEEDED + 1, 100, 300),
        (NEEDED, 100, 300),
        (NEEDED - 1, 99, 299),
        (DESCRIPTORS_RESERVED + (NEEDED - DESCRIPTORS_RESERVED) // 2, 50, 150),
        (DESCRIPTORS_RESERVED + 2, 1, 1),
        (DESCRIPTORS_RESERVED, 1, 1),
        (0, 1, 1),
    ],
)
def test_basic_limits_fit_the_descriptors(
    descriptors: int, connections: int, allocations: int
) -> None:
    fitting = fit_to_descriptors(LIMITS, descriptors)
    assert (fitting.connections_per_uid, fitting.allocations_per_uid) == (connections, allocations)
    assert (fitting.allowed_uids, fitting.waiting) == (LIMITS.allowed_uids, LIMITS.waiting)
    if connections > 1:
        assert descriptors_for(fitting) <= max(descriptors, DESCRIPTORS_RESERVED)


PROGRAM = """
import json, resource, subprocess, sys
from linux.limits import raise_descriptor_limit, restore_descriptor_limit
said = [raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)]
child = subprocess.Popen(["sleep", "10"])
restore_descriptor_limit(child.pid)
said.append(resource.prlimit(child.pid, resource.RLIMIT_NOFILE))
child.kill()
child.wait()
print(json.dumps(said))
"""


@pytest.mark.clause("DAEMON-1")
@pytest.mark.parametrize("soft", [100, 200])
def test_soft_limit_is_raised_and_a_child_has_the_one_before(soft: int) -> None:
    run = run_program("prlimit", f"--nofile={soft}:200", sys.executable, "-c", PROGRAM)
    assert json.loads(run.stdout) == [200, [200, 200], [soft, 200]]
