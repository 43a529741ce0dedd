"""Test suites for a backend, a provider or a consumer on a node.

    conformance    the cases over the wire, for pytest; `plugin` has their options, `wire` speaks
    contract       the contract of a backend, as a suite to subclass
    worlds         a machine with a backend on it: this one, or a simulated one
    hostile        bodies, ids and image paths that must be refused
    adversary      what a provider can do to a consumer's kernel, in any order
    model_check    the program behind `nshandoff trace check --by model`

Chapter 11 shows their use.
"""
