"""The verified core: decides what a provider and a consumer do, and touches nothing.

No I/O, no clock, no randomness, no descriptor numbers, no logging: same events, same effects.

    lifecycle    the five tables of rows; read this one first
    messages     what the two roles say to each other
    errors       what can go wrong, and whose doing it is
    roles        the seed's two traits
    events       what has happened: a kernel's input
    effects      what shall be done: a kernel's output
    states       the states of the tables, and what each means
    snapshots    the whole state of a kernel, as values with names
    table        checks rows, and fires their events
    machine      the machine of `transitions` that runs a table
    provider     `ProviderKernel`: allocations, answers in order, limits
    consumer     `ConsumerKernel`: one request, self-service, the end notice
    drawing      tables as Mermaid diagrams and as Markdown
    record       frozen value classes
    exports      names that are imported when they are asked for

What users import is here by name as well. Its module is imported when the name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .exports import expect_to_be_alone, on_demand

if TYPE_CHECKING:
    from .consumer import ConsumerKernel
    from .errors import (
        AllocationNotFound,
        CreationFailed,
        FdPassing,
        LocalProtocolError,
        NamespaceError,
        ProtocolError,
        RemoteProtocolError,
        SocketUnavailable,
    )
    from .messages import (
        HANDOFF_SOCKET_PATH,
        AllocationEnded,
        Message,
        NamespaceRequest,
        NamespaceResponse,
        NamespaceType,
        objection,
    )
    from .provider import Limits, ProviderKernel
    from .roles import NamespaceConsumer, NamespaceProvider
    from .snapshots import ConsumerSnapshot, ProviderSnapshot
    from .states import AllocationState, ConsumerState, MessageState, NoticeState, ServiceState

__version__ = "0.1.0"
"""The project's version; that of the other packages is this one."""

__all__ = [
    "HANDOFF_SOCKET_PATH",
    "AllocationEnded",
    "AllocationNotFound",
    "AllocationState",
    "ConsumerKernel",
    "ConsumerSnapshot",
    "ConsumerState",
    "CreationFailed",
    "FdPassing",
    "Limits",
    "LocalProtocolError",
    "Message",
    "MessageState",
    "NamespaceConsumer",
    "NamespaceError",
    "NamespaceProvider",
    "NamespaceRequest",
    "NamespaceResponse",
    "NamespaceType",
    "NoticeState",
    "ProtocolError",
    "ProviderKernel",
    "ProviderSnapshot",
    "RemoteProtocolError",
    "ServiceState",
    "SocketUnavailable",
    "__version__",
    "objection",
]

expect_to_be_alone(__path__)

_HOMES: Final = {
    ".consumer": "ConsumerKernel",
    ".errors": "AllocationNotFound CreationFailed FdPassing LocalProtocolError NamespaceError "
    "ProtocolError RemoteProtocolError SocketUnavailable",
    ".messages": "HANDOFF_SOCKET_PATH AllocationEnded Message NamespaceRequest NamespaceResponse "
    "NamespaceType objection",
    ".provider": "Limits ProviderKernel",
    ".roles": "NamespaceConsumer NamespaceProvider",
    ".snapshots": "ConsumerSnapshot ProviderSnapshot",
    ".states": "AllocationState ConsumerState MessageState NoticeState ServiceState",
}

# Not for mypy, which would take any name for one that is there.
if not TYPE_CHECKING:
    __getattr__, __dir__ = on_demand(__name__, _HOMES)
