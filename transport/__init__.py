"""Moves frames and descriptors between two processes; knows namespaces only by name.

    codec        a message as MessagePack, byte for byte what a Rust peer writes
    framing      length and body, cut out of a stream
    descriptors  who owns a file descriptor, and for how long
    channel      one connection: messages out, messages in, each with its descriptors
    endpoint     the well-known path: listen, connect, peer credentials
    contract     what the provider's driver asks of a backend
    serve        the provider's driver
    request      the consumer's driver, blocking and for an event loop
    calls        the hook by which a test can have a system call fail
    trace        what a provider's kernel was fed and decided, as lines of JSON

What users import is here by name as well. Its module is imported when the name is asked for: a
consumer does not load what only a provider needs.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from statemachine import __version__

    from .channel import Channel, Delivery, Lost, Rejected
    from .contract import Adoption, Backend, Observation, Recovery, SelfService, Sighting
    from .descriptors import Descriptor, DescriptorBundle, Inspector, NamespaceIdentity
    from .endpoint import Listener, PeerCredentials, listen
    from .request import (
        AsyncConsumer,
        AsyncHandoff,
        Cancelled,
        Consumer,
        Fallback,
        Handoff,
        Patience,
    )
    from .serve import Observer, Provider, Spans

__all__ = [
    "Adoption",
    "AsyncConsumer",
    "AsyncHandoff",
    "Backend",
    "Cancelled",
    "Channel",
    "Consumer",
    "Delivery",
    "Descriptor",
    "DescriptorBundle",
    "Fallback",
    "Handoff",
    "Inspector",
    "Listener",
    "Lost",
    "NamespaceIdentity",
    "Observation",
    "Observer",
    "Patience",
    "PeerCredentials",
    "Provider",
    "Recovery",
    "Rejected",
    "SelfService",
    "Sighting",
    "Spans",
    "__version__",
    "listen",
]

# As `statemachine` says itself, unless the files of python-statemachine came last and it is theirs.
_found = find_spec("statemachine")
if _found and PathFinder.find_spec("statemachine.statemachine", _found.submodule_search_locations):
    raise ImportError(
        "python-statemachine is installed in the same environment as namespace-handoff, and"
        " both have a package `statemachine`: install each anew in an environment of its own"
    )

_HOMES: Final = {
    "statemachine": "__version__",
    ".channel": "Channel Delivery Lost Rejected",
    ".contract": "Adoption Backend Observation Recovery SelfService Sighting",
    ".descriptors": "Descriptor DescriptorBundle Inspector NamespaceIdentity",
    ".endpoint": "Listener PeerCredentials listen",
    ".request": "AsyncConsumer AsyncHandoff Cancelled Consumer Fallback Handoff Patience",
    ".serve": "Observer Provider Spans",
}

# Not for mypy, which would take any name for one that is there.
if not TYPE_CHECKING:

    def _exports() -> Any:
        from statemachine.exports import on_demand

        return on_demand(__name__, _HOMES)

    def __getattr__(name: str) -> Any:
        return _exports()[0](name)

    def __dir__() -> list[str]:
        return _exports()[1]()
