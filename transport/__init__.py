"""Moves frames and descriptors between two processes; knows namespaces only by name.

    codec        a message as MessagePack, byte for byte what a Rust peer writes
    framing      length and body, cut out of a stream
    descriptors  who owns a file descriptor, and for how long
    channel      one connection: messages out, messages in, each with its descriptors
    endpoint     the well-known path: listen, connect, who is there
    contract     what the provider's driver asks of a backend
    serve        the provider's driver
    request      the consumer's driver, blocking and for an event loop
    calls        the one door to the Linux kernel, where a test can have a call fail
    trace        what a provider's kernel was fed and decided, as lines of JSON

Public names are imported from their module, as everywhere in this project: a name tells where it
lives, and a consumer does not load what only a provider needs.
"""
