"""The provider's kernel, room by room.

kernel        `ProviderKernel`: events in, effects out
service       the provider as a whole: connections, limits, readiness
allocations   messages that are put to allocations, and what their rows ask for
answers       one answer to each message, in the order of the messages
state         what it knows, and how its tables are run
models        what is kept of the service, a connection, a message, an allocation
limits        who may use a provider, and how much of it
"""

from typing import TYPE_CHECKING

from ..exports import on_demand
from .limits import (
    ALLOCATIONS_PER_UID_MAX,
    CONNECTIONS_PER_UID_MAX,
    OPEN_MESSAGES_PER_CONNECTION_MAX,
    OPEN_MESSAGES_PER_UID_MAX,
    REMEMBERED_MAX,
    WAITING_MAX,
    Limits,
)

if TYPE_CHECKING:
    from ..snapshots import ProviderSnapshot
    from .kernel import ProviderKernel, event_of

__all__ = [
    "ALLOCATIONS_PER_UID_MAX",
    "CONNECTIONS_PER_UID_MAX",
    "OPEN_MESSAGES_PER_CONNECTION_MAX",
    "OPEN_MESSAGES_PER_UID_MAX",
    "REMEMBERED_MAX",
    "WAITING_MAX",
    "Limits",
    "ProviderKernel",
    "ProviderSnapshot",
    "event_of",
]

# Not for mypy, which would take any name for one that is there.
if not TYPE_CHECKING:
    homes = {"..snapshots": "ProviderSnapshot", ".kernel": "ProviderKernel event_of"}
    __getattr__, __dir__ = on_demand(__name__, homes)
