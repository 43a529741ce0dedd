"""The smallest program that an anchor can execute: it takes a name, and waits for ever.

An anchor only has to be there, with SIGCHLD ignored. A program with a C library takes ten times the
memory for that (some 110 kB each) and half a millisecond of processor time, for the dynamic linker.
This one has 158 bytes: the header of an ELF file, one segment, and the instructions below.

It is in no file of the node, but in a memfd of the forge that nothing can change any more: not a
workload that is root either, which sees its anchor's program as /proc/1/exe.

Source:
    elf(5); memfd_create(2); execve(2); the system calls' numbers: syscalls(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final

from transport.calls import syscall
from transport.descriptors import Descriptor

from ..syscalls import calling

IDLE_COMMAND: Final = ("ns-anchor",)
"""What such an anchor shows as its command."""

_X86_64: Final = (
    bytes.fromhex("bf 0f 00 00 00")  # mov edi, 15 (PR_SET_NAME)
    + bytes.fromhex("48 8d 35 10 00 00 00")  # lea rsi, [rip + 16]: the name, behind the code
    + bytes.fromhex("b8 9d 00 00 00")  # mov eax, 157 (prctl)
    + bytes.fromhex("0f 05")  # syscall
    + bytes.fromhex("b8 22 00 00 00")  # mov eax, 34 (pause)
    + bytes.fromhex("0f 05")  # syscall
    + bytes.fromhex("eb f7")  # jmp to the last mov
)

_CODE: Final[Mapping[str, tuple[int, bytes]]] = {"x86_64": (62, _X86_64)}
"""The instructions for a processor, with its number in ELF (`e_machine`)."""

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_IDENT: Final = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian
_BASE: Final = 0x400000
_PAGE: Final = 0x1000
_EXECUTABLE, _LOADED, _READ_AND_EXECUTE = 2, 1, 5

_MFD_EXEC: Final = 0x10
"""Since Linux 6.3, where a node may have it that a memfd is not executable without."""

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def idle_program(machine: str) -> bytes | None:
    """
    Return the program for a processor, as `uname -m` calls it; None if there is none.

    The caller executes `sleep infinity` then.
    """
    if machine not in _CODE:
        return None
    number, code = _CODE[machine]
    start = _HEADER.size + _SEGMENT.size
    loaded = code + IDLE_COMMAND[0].encode() + b"\0"
    sizes = (_HEADER.size, _SEGMENT.size, 1, 0, 0, 0)
    header = _HEADER.pack(_IDENT, _EXECUTABLE, number, 1, _BASE + start, _HEADER.size, 0, 0, *sizes)
    end = start + len(loaded)
    segment = _SEGMENT.pack(_LOADED, _READ_AND_EXECUTE, 0, _BASE, _BASE, end, end, _PAGE)
    return header + segment + loaded


def open_idle_program(machine: str) -> Descriptor | None:
    """
    Make a memfd of the program, which nothing can change any more.

    Returns:
        The memfd, owned by the caller; None if there is no program for this processor.

    Raises:
        SyscallError: it cannot be made; nothing is left.
    """
    program = idle_program(machine)
    if program is None:
        return None
    with ExitStack() as undo:
        memfd = undo.enter_context(_executable_memfd())
        with calling("write(2)"):
            syscall(os.write, memfd.fileno(), program)
        with calling("fcntl(2)"):
            syscall(fcntl.fcntl, memfd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        undo.pop_all()
    return memfd


def _executable_memfd() -> Descriptor:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    with calling("memfd_create(2)"):
        try:
            return Descriptor(syscall(os.memfd_create, IDLE_COMMAND[0], flags | _MFD_EXEC))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return Descriptor(syscall(os.memfd_create, IDLE_COMMAND[0], flags))
