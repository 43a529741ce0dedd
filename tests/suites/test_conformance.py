"""The conformance suite, over our own daemon: once on this node, once simulated."""

from linux.testing.conformance import *  # noqa: F403
