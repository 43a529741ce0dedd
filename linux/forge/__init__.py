"""Where processes come from: anchors, and commands inside allocations.

    client    `Forge`, the provider's side
    plan      what both sides say to each other
    child     the forge itself, `python -m linux.forge.child`, and the steps that make an anchor
    spawn     `spawn_within`: a command inside an allocation
    exec      what that command is for its first milliseconds

Nothing is imported here, so that the forge's own process stays small.
"""
