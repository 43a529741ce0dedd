"""Tools that hold an implementation of the kernels to the protocol, and any table to its word.

    kit           any table and kernel: explored, beside a model, mutated, toured
    strategies    messages, requests, events and effects for Hypothesis
    lockstep      the reference model beside anything with `receive`
    explore       every world there can be, within bounds, of the kernels and what is between them
    induction     invariants of any table, proved for any number of steps; extra `proof`
    open_environment    a provider's kernel under every event in any order, as SPIN checks it

Chapter 11 shows their use; chapter 20 that of the kit, with a machine that is not ours.
"""
