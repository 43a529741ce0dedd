"""Tools that hold an implementation of the kernels to the protocol.

    strategies    messages, requests, events and effects for Hypothesis
    lockstep      the reference model beside anything with `receive`
    explore       every world there can be, within bounds, of the kernels and what is between them
    induction     invariants of a table, proved for any number of connections; extra `proof`
    open_environment    a provider's kernel under every event in any order, as SPIN checks it

Chapter 11 shows their use.
"""
