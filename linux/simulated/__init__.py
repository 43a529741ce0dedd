"""A simulated node: the backend's contract without a privileged machine.

backend       `SimulatedBackend`, a provider's program on such a node
node          `SimulatedNode`, the machine
cgroups       cgroup v2, simulated
mounts        mounts and loop devices, simulated
namespaces    namespaces and processes, simulated
"""

from __future__ import annotations

from .backend import SimulatedBackend
from .node import SimulatedCrash, SimulatedFailure, SimulatedInspector, SimulatedNode

__all__ = [
    "SimulatedBackend",
    "SimulatedCrash",
    "SimulatedFailure",
    "SimulatedInspector",
    "SimulatedNode",
]
