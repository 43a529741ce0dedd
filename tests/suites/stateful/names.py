"""Our adapters and counterparts by their names."""

from __future__ import annotations

from typing import Final

from linux.testing.adversary import Counterpart, OnPipes, OnSockets
from linux.testing.worlds import SimulatedWorld
from statemachine.consumer import ConsumerKernel
from statemachine.provider import ProviderKernel
from tests.suites.stateful.adapters import InProcess, LinuxNode, OnSocketOfOurs
from tests.suites.stateful.processes import OnLinuxProcess, OnProcessOfOurs
from transport.testing.adapter import Adapter
from transport.testing.in_process import ConsumerModel, ProviderModel

NAMES: Final = ("model", "kernels", "simulated", "linux")
"""Our adapters; the last two are the provider on a real socket, over one backend or the other."""

PROCESSES: Final = ("process", "process on linux")
"""And the last two once more, in a process that can be killed, and that cannot be looked into."""

ON_LINUX: Final = (NAMES[-1], PROCESSES[-1])
"""Those that need root, and a node."""


SHARES: Final = {
    "model": 0.5,
    "kernels": 0.5,
    "simulated": 0.2,
    "linux": 0.05,
    "process": 0.08,
    "process on linux": 0.03,
}
"""How much of the profile's examples each adapter gets: a step costs what it costs there."""


def adapter_of(name: str, node: LinuxNode | None) -> Adapter:
    """Open one of our adapters; those on Linux need a node."""
    match name:
        case "model":
            return InProcess(SimulatedWorld(), ProviderModel, ConsumerModel)
        case "kernels":
            return InProcess(SimulatedWorld(), ProviderKernel, ConsumerKernel)
        case "simulated":
            return OnSocketOfOurs(SimulatedWorld())
        case "process":
            return OnProcessOfOurs(SimulatedWorld())
    assert node is not None
    return OnSocketOfOurs(node.world()) if name == "linux" else OnLinuxProcess(node.world())


def counterpart_of(name: str, prefix: str, node: LinuxNode | None) -> Counterpart:
    """Have what a consumer is connected with, on the same."""
    match name:
        case "model":
            return OnPipes(prefix, ConsumerModel)
        case "kernels":
            return OnPipes(prefix, ConsumerKernel)
        case "simulated":
            return OnSockets(SimulatedWorld(), prefix)
        case _:
            assert node is not None
            return OnSockets(node.world(), prefix)
