"""Pytest plugin: options that name the provider to be tested, and the marker `clause`.

Loaded by every pytest where this package is installed, so it imports nothing else of ours.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("linux.testing.conformance", "linux.testing.contract")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `linux.testing.conformance` has to know."""
    group = parser.getgroup("provider", "a provider to be tested by linux.testing.conformance")
    group.addoption("--provider-socket", metavar="PATH", help="where it listens")
    group.addoption(
        "--provider-backend",
        choices=("kernel", "simulated"),
        default="kernel",
        help="its descriptors: namespaces (default), or memfds that stand for them",
    )
    group.addoption("--provider-uenv", metavar="IMAGE", help="an image below its image root")
    group.addoption(
        "--provider-examples",
        metavar="N",
        type=int,
        help="how many runs the stateful case makes; default: two fifths of Hypothesis' profile",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of every case."""
    config.addinivalue_line("markers", "clause(*ids): shows that these clauses of specs/ are kept")
