"""Where processes come from: anchors, and commands inside allocations.

    client    `Forge`, the provider's side
    plan      the plan of an anchor, and the records of both sides
    child     the forge itself, `python -m linux.forge.child`, and how an anchor is made
    spawn     `spawn_within`: a command inside an allocation
    exec      what enters the cgroup and becomes that command

Nothing is imported here, so that the forge's own process stays small.
"""
