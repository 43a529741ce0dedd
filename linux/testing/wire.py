"""A test's connections to a provider, over its socket alone, and the numbers of the cases.

`ProviderUnderTest` has what the cases of `conformance` know of it. A `Wire` has the connections of
one case, and is closed with it.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from statemachine.errors import AllocationNotFound, FdPassing
from statemachine.messages import (
    AllocationEnded,
    Message,
    NamespaceRequest,
    NamespaceResponse,
    NamespaceType,
)
from transport.descriptors import Inspector, NamespaceIdentity
from transport.testing.peer import Line, frame_of, wait_until

Identities = tuple[NamespaceIdentity, ...]


@dataclass(frozen=True, slots=True)
class ProviderUnderTest:
    """What is known of a provider: where it listens, and how to look at what it passes."""

    socket: Path
    inspector: Inspector
    image: str | None


class Ear(Line):
    """A line that also holds the other end to the letter of what it writes, byte for byte."""

    def __init__(self, sock: Any) -> None:
        super().__init__(sock)
        self._read_bytes = b""

    def hear(self) -> Message | None:
        self._read_bytes = b""
        message = super().hear()
        if message is not None:
            assert self._read_bytes == frame_of(message), "not what rmp_serde::to_vec_named writes"
        return message

    def _read(self, size: int) -> bytes | None:
        data = super()._read(size)
        self._read_bytes += data or b""
        return data

    def wait_read(self) -> None:
        """Wait until the other end has read all that was said, so that it saw a cut just here."""
        wait_until(lambda: _bytes_unread(self) == 0, "reading what was sent")


def _bytes_unread(line: Line) -> int:
    """How much of what was sent the other end has not read, by unix(7)'s SIOCOUTQ."""
    answer = fcntl.ioctl(line.sock, termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])


class Wire:
    """
    A provider under test, and the connections of one test to it.

    Args:
        provider: whom it tries.
        prefix: begins every allocation's id, and no other session's.
    """

    def __init__(self, provider: ProviderUnderTest, prefix: str) -> None:
        self.provider = provider
        self.prefix = prefix
        self._names: list[str] = []
        self._lines = ExitStack()
        self._bystander: tuple[Ear, NamespaceRequest, Identities] | None = None

    def name(self, rest: str = "") -> str:
        """An id that was never used; its allocation is ended with the test."""
        self._names.append(f"{self.prefix}-{len(self._names)}{rest}")
        return self._names[-1]

    def request(self, *kinds: NamespaceType, image: str | None = None) -> NamespaceRequest:
        """A request for an allocation that never was."""
        return NamespaceRequest(self.name(), kinds, image)

    def call(self) -> Ear:
        """A connection; hung up with the test."""
        line = Ear.to(self.provider.socket)
        self._lines.callback(line.hang_up)
        assert isinstance(line, Ear)
        return line

    def ask(self, request: NamespaceRequest, line: Ear | None = None) -> Identities:
        """Ask for namespaces, on a line of its own if none is given, and look at them."""
        line = line or self.call()
        line.say(request)
        return self.granted(request, line)

    def granted(self, request: NamespaceRequest, line: Ear) -> Identities:
        """Hear a request's answer, which has to be its namespaces, and look at them."""
        answer = line.hear()
        assert isinstance(answer, NamespaceResponse), answer
        assert answer.allocation_id == request.allocation_id
        assert answer.fd_types == request.namespaces
        assert (answer.uenv_mount_path is None) == (request.uenv_image is None), answer
        inspect = self.provider.inspector.inspect
        with line.take() as bundle:  # which also counts them
            identities = tuple(inspect(descriptor.fileno()) for _, descriptor in bundle)
        assert [identity.kind for identity in identities] == list(request.namespaces)
        return identities

    def end(self, name: str, line: Ear | None = None) -> None:
        """
        End an allocation, and hear that it has ended.

        A line that holds the allocation may hear so twice: the two `AllocationEnded` can cross.
        """
        line = line or self.call()
        ended, never = AllocationEnded(name), AllocationEnded(f"{self.prefix}-never")
        line.say(ended)
        assert line.hear() == ended
        line.say(never)
        answer = line.hear()
        assert (line.hear() if answer == ended else answer) == AllocationNotFound(
            never.allocation_id
        )

    def call_end(self, name: str) -> Message | None:
        """Ask for an allocation's end on a line of its own; what is answered."""
        line = self.call()
        line.say(AllocationEnded(name))
        return line.hear()

    def barrier(self, line: Ear) -> None:
        """Show that nothing more was said before: the next thing to be heard is this answer."""
        never = AllocationEnded(f"{self.prefix}-never")
        line.say(never)
        assert line.hear() == AllocationNotFound(never.allocation_id)

    def watch(self) -> None:
        """Have a bystander hold an allocation, so that it can tell whether others are affected."""
        line, request = self.call(), self.request(NamespaceType.PID)
        self._bystander = (line, request, self.ask(request, line))

    def check_bystander(self) -> None:
        """Nothing has happened to the bystander, to what it holds, or to who calls anew."""
        assert self._bystander is not None
        line, request, identities = self._bystander
        assert self.ask(request, line) == identities
        self.barrier(self.call())

    def check_rejected(self, line: Ear) -> None:
        """Hear that a frame was rejected, which names something, and that the line is dead."""
        answer = line.hear()
        assert isinstance(answer, FdPassing), answer
        assert answer.reason.strip()
        assert line.hear() is None
        self.check_bystander()

    def check_frame_rejected(self, data: bytes) -> None:
        """Send bytes on a line of their own, and have them rejected."""
        if self._bystander is None:
            self.watch()
        line = self.call()
        line.say(data)
        self.check_rejected(line)

    def close(self) -> None:
        """Hang up, and end whatever is alive of the test's."""
        self._lines.close()
        with Ear.to(self.provider.socket) as line:
            for name in self._names:
                line.say(AllocationEnded(name))
                answer = line.hear()
                assert answer in (AllocationEnded(name), AllocationNotFound(name)), answer


# --- Numbering the cases -----------------------------------------------------------------------

Test = Callable[..., None]
_known: Final[set[str]] = set()


def case(number: str) -> Callable[[Test], Test]:
    """Give a test the id of its case, `FD-1/2`: the clause it is about, and a number that stays."""
    return cases(number, None)


def cases(first: str, *values: object) -> Callable[[Test], Test]:
    """Make a case of each value, which the test takes as `what`; numbered from the first id on."""
    clause, _, start = first.partition("/")
    numbered = {f"{clause}/{number}": value for number, value in enumerate(values, int(start))}
    assert not _known & numbered.keys(), f"not the only one: {_known & numbered.keys()}"
    _known.update(numbered)

    def mark(test: Test) -> Test:
        vars(test)["cases"] = numbered
        return pytest.mark.clause(clause)(test)

    return mark


def number_cases(metafunc: pytest.Metafunc) -> None:
    """Be a module's `pytest_generate_tests`: every case, under its id."""
    numbered = getattr(metafunc.function, "cases", None)
    if numbered is None:
        return
    names, values = ["wire"], [(number,) for number in numbered]
    if "what" in metafunc.fixturenames:
        names, values = ["wire", "what"], list(numbered.items())
    metafunc.parametrize(names, values, ids=list(numbered), indirect=["wire"])
