"""The backends on Linux and in the simulation, the consumers with defaults, and the programs.

    syscalls     the system calls, each failure with its call, errno and path
    features     which newer kernel features there are, found by trying
    anchor       the small process that keeps an allocation's namespaces alive
    forge        where processes come from: anchors, and commands inside namespaces
    namespaces   opening, naming and checking namespaces
    cgroups      cgroup v2 scopes: make or adopt, populated, kill, remove
    scope_file   where a provider's scopes are: the file beside its socket
    mounts       uenv images: squashfs, once per image
    journal      what must be known after the provider's death
    instance     who lives: the lock of a provider's anchors, and of a consumer's own scope
    recovery     what a starting provider does with what it finds: journal x kernel -> action
    doctor       the same for an operator, and the release of what is proved dead
    steps        creation and release, step by step, for both backends
    pool         anchors with namespaces that are made before they are asked for
    backend      `LinuxBackend`: all of that as `transport.contract.Backend`
    consumer     `Consumer`, and in consumer_async `AsyncConsumer`, with this node's defaults
    self_service the namespaces that they make themselves when the provider cannot be reached
    simulated    `SimulatedBackend`: the same without a privileged machine
    survey       which allocations there are, and why one is still alive
    limits       resource limits of a daemon, and its protection from the OOM killer
    shortage     what is short, and whose, when a system call fails for want of something
    sinks        log and trace lines, written without making the provider wait
    root         chroot and mount propagation
    mountinfo    the table of mounts of this process
    files        files that are replaced in one step, read without waiting, locked
    threads      a function in a thread of its own, whose namespaces it may change
    launch       the tool without the settings of a job, which keeps them all
    cli          the command `nshandoff`

`forge`, `simulated`, `cli` and `demo` are folders. Beside `SimulatedBackend`, `simulated` has the
pieces of a simulated Linux kernel, each held to the real one by random programs: cgroups,
namespaces, mounts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import transport  # noqa: F401  it says so if `statemachine` is another project's

if TYPE_CHECKING:
    from statemachine import __version__

    from .backend import LinuxBackend, NodeSettings
    from .consumer import Consumer
    from .consumer_async import AsyncConsumer
    from .features import Features
    from .namespaces import KernelInspector
    from .self_service import OwnNamespaces
    from .simulated import SimulatedBackend, SimulatedInspector, SimulatedNode

__all__ = [
    "AsyncConsumer",
    "Consumer",
    "Features",
    "KernelInspector",
    "LinuxBackend",
    "NodeSettings",
    "OwnNamespaces",
    "SimulatedBackend",
    "SimulatedInspector",
    "SimulatedNode",
    "__version__",
]

_HOMES: Final = {
    "statemachine": "__version__",
    ".backend": "LinuxBackend NodeSettings",
    ".consumer": "Consumer",
    ".consumer_async": "AsyncConsumer",
    ".features": "Features",
    ".namespaces": "KernelInspector",
    ".self_service": "OwnNamespaces",
    ".simulated": "SimulatedBackend SimulatedInspector SimulatedNode",
}

# Not for mypy, which would take any name for one that is there.
if not TYPE_CHECKING:

    def _exports() -> Any:
        # Not before a name is asked for: the command's `--help` needs none of it.
        from statemachine.exports import on_demand

        return on_demand(__name__, _HOMES)

    def __getattr__(name: str) -> Any:
        return _exports()[0](name)

    def __dir__() -> list[str]:
        return _exports()[1]()
