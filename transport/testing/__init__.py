"""Tools that hold a provider or a consumer on a socket to the protocol.

    machine          what consumers and crashes can do to a provider: `Handoffs`, `Adapter`
    possible         what may be heard of what is under way
    peer             the other side of a connection, by hand; `Liar`, a provider that cheats
    lies             what such a provider can say, each with what must be said of it
    in_process       a provider and its consumers in one thread, without a socket
    model_judge      the reference model as the judge of a provider's trace
    gated_backend    a backend that can be held up
    virtual          drivers whose every step a scheduler chooses: orders, time, kills
    explored         a counterexample of `statemachine.testing.explore` as a trace

Chapter 11 shows their use.
"""
