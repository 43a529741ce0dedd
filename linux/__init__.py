"""Does things to this node: the kernel backends and the programs.

    syscalls     the system calls, each failure with its call, errno and path
    features     which newer kernel features there are, found by trying
    anchor       the small process that keeps an allocation's namespaces alive
    forge        where processes come from: anchors, and commands inside namespaces
    namespaces   opening, naming and checking namespaces
    cgroups      cgroup v2 scopes: populated, kill, remove
    mounts       uenv images: squashfs, once per image
    journal      what must be known after the provider's death
    backend      `LinuxBackend`: all of that as `transport.contract.Backend`
    simulated    `SimulatedBackend`: the same without a privileged machine
    survey       which allocations there are, and why one is still alive
    cli          the command `nshandoff`

`forge`, `simulated`, `cli` and `demo` are folders. Beside `SimulatedBackend`, `simulated` has the
pieces of a simulated Linux kernel, each held to the real one by random programs: cgroups,
namespaces, mounts.
"""
