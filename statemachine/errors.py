"""What can go wrong, and whose doing it is.

The seed's error enum is closed at four kinds; the four classes below mirror it one for one, with
the same fields and the same rendered text. Whatever the seed does not name is not a
`NamespaceError`.

    NamespaceError               a kind of the seed; travels on the wire
    ├── SocketUnavailable        the provider cannot serve           consumer: serve yourself
    ├── CreationFailed           this allocation cannot be created   consumer: report it
    ├── AllocationNotFound       no such allocation                  consumer: report it
    └── FdPassing                the exchange itself went wrong      consumer: serve yourself
    ProtocolError                an event that no row of the table allows
    ├── LocalProtocolError       our own driver's mistake; raised, nothing has changed
    └── RemoteProtocolError      the peer's mistake; the driver closes its channel

Peers and machines fail as data: an expected failure enters a kernel inside an event and leaves it
inside an effect. Only our own misuse is raised through a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final


class Copyable(BaseException):
    """
    A base of exceptions that can be pickled and copied whatever their `__init__` takes.

    By itself Python calls it with what the exception says, which is something else.
    """

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[Any, ...], dict[str, Any]]:
        return _with_args, (type(self), self.args), vars(self)


def _with_args(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Make an exception as the class of Python does that it is one of; its fields come later."""
    error = kind.__new__(kind, *args)
    built_in: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    built_in.__init__(error, *args)
    return error


class NamespaceError(Exception):
    """
    One of the seed's four errors; usable as an exception and as a value.

    Two errors of the same kind with the same text are equal and hash alike, so that they can be
    compared inside effects and snapshots. Construct a concrete kind, never this class.

    Source: seed 106-120.
    """

    kind: ClassVar[str]
    """The variant's name on the wire."""

    def __init__(self, text: str) -> None:
        super().__init__(text)

    @property
    def text(self) -> str:
        """The one field every kind has: a reason, or the allocation's id."""
        return str(self.args[0])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.args == self.args

    def __hash__(self) -> int:
        return hash((type(self), self.args))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


class SocketUnavailable(NamespaceError):
    """The provider as a whole cannot be reached or cannot serve; nothing was created."""

    kind = "SocketUnavailable"

    @property
    def reason(self) -> str:
        """What stood in the way, for a person to read."""
        return self.text

    def __str__(self) -> str:
        return f"handoff socket unavailable: {self.reason}"


class CreationFailed(NamespaceError):
    """This allocation cannot be created as asked; whatever had been made is undone."""

    kind = "CreationFailed"

    @property
    def reason(self) -> str:
        """Step, call, errno and path, or the rule that the request breaks."""
        return self.text

    def __str__(self) -> str:
        return f"namespace creation failed: {self.reason}"


class AllocationNotFound(NamespaceError):
    """The provider does not know the allocation; nothing changed."""

    kind = "AllocationNotFound"

    @property
    def allocation_id(self) -> str:
        """The id that was asked about."""
        return self.text

    def __str__(self) -> str:
        return f"allocation not found: {self.allocation_id}"


class FdPassing(NamespaceError):
    """The exchange failed on its way; every descriptor of the frame is closed, and the channel."""

    kind = "FdPassing"

    @property
    def reason(self) -> str:
        """What was wrong with the frame or its descriptors."""
        return self.text

    def __str__(self) -> str:
        return f"FD passing failed: {self.reason}"


NAMESPACE_ERRORS: Final = (SocketUnavailable, CreationFailed, AllocationNotFound, FdPassing)
"""The seed's four kinds, in the seed's order."""


class ProtocolError(Copyable, Exception):
    """An event arrived that its table has no row for; the kernel's state is untouched."""

    def __init__(self, event: str, state: str, subject: str) -> None:
        super().__init__(f"{event} is not possible while {subject} is {state}")
        self.event: Final = event
        self.state: Final = state
        self.subject: Final = subject


class LocalProtocolError(ProtocolError):
    """Our own driver or backend reported something that cannot be: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer did something that it may not do now."""
