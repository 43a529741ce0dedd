"""Tools that hold an implementation of the kernels to the protocol.

    strategies    messages, requests, events and effects for Hypothesis
    lockstep      the reference model beside anything with `receive`
    explore       every world there can be, within bounds, of the kernels and what is between them
    induction     invariants of a table, proved for any number of connections; extra `proof`

Chapter 11 shows their use.
"""
