"""A simulated node: the backend's contract without a privileged machine.

backend       `SimulatedBackend` and the `SimulatedNode` it works on
cgroups       cgroup v2, simulated
mounts        mounts and loop devices, simulated
namespaces    namespaces and processes, simulated
"""

from __future__ import annotations

from .backend import (
    SimulatedBackend,
    SimulatedCrash,
    SimulatedFailure,
    SimulatedInspector,
    SimulatedNode,
)

__all__ = [
    "SimulatedBackend",
    "SimulatedCrash",
    "SimulatedFailure",
    "SimulatedInspector",
    "SimulatedNode",
]
