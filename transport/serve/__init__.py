"""The provider's driver: `Provider` serves on a socket, with any backend.

provider    feeds the kernel in one event loop, and performs its effects
peers       connections: accepting, reading, writing, closing
timers      the kernel's timers, and how long they run
turns       round robin over users, and over a user's connections
watch       what the backend sees of living allocations
work        backend work in threads: in order for each allocation, shared out by user
"""

from .provider import Observer, Provider, event_of_adoption
from .timers import Spans

__all__ = ["Observer", "Provider", "Spans", "event_of_adoption"]
